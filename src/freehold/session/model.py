"""A loaded model, for people: token ids in and logits or tokens out, or messages in and a reply out.

One conversation at a time, on the calling thread. What it was loaded from is checked in full before the first tensor
is used; a model is ready, or it is an error.
"""

import datetime
import operator
import os
import re
import secrets
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from freehold import machine
from freehold.config import ModelConfig
from freehold.errors import BackendError, CheckpointError, OutOfMemoryError, UsageError
from freehold.formats import chat
from freehold.formats.chat import ChatFormat, HarmonyFormat, ReplyDelta, ReplyReader
from freehold.formats.conversation import Conversation, Effort, Message, SystemContent
from freehold.formats.tokenizer import Tokenizer
from freehold.hub.find import DEFAULT, find_model
from freehold.hub.folder import GenerationDefaults, ModelFolder, open_folder
from freehold.kernels import ops
from freehold.log import Progress, logger, no_progress
from freehold.model.kv_cache import KVCache
from freehold.model.transformer import Transformer
from freehold.weights import mxfp4
from freehold.weights.memory import PREFILL_CHUNK, plan_memory, worth_expanding
from freehold.weights.mxfp4 import Mxfp4Tensor

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load(
    path_or_name: str | os.PathLike[str] = DEFAULT,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    progress: Progress = no_progress,
) -> "Model":
    """Load a model: a folder in either published layout, `default`, or a name in a cache (see hub.find).

    `device` is the GPU if torch sees one, else the CPU. `dtype` is float32 or bfloat16; if it is not given, bfloat16
    on a GPU, and on a CPU float32 where the dense weights take at most a quarter of the machine's memory. Packed
    experts stay packed, except on a CPU those of a model so small that writing them out takes 1/32 of its memory or
    less. Raises a FreeholdError that names the file and the remedy.
    """
    folder = open_folder(find_model(os.fspath(path_or_name), progress))
    config = folder.checkpoint.config
    chosen_device = _device(device)
    chosen_dtype = _dtype(dtype, config, chosen_device)
    table = folder.checkpoint.table()
    logger.info("%s runs in %s on %s", folder.path, str(chosen_dtype).removeprefix("torch."), chosen_device)
    with _out_of_memory():
        if chosen_device.type == "cpu" and worth_expanding(
            config, dense_bytes=chosen_dtype.itemsize, machine_bytes=machine.total_memory()
        ):
            table = {name: _expanded(tensor, chosen_dtype) for name, tensor in table.items()}
        transformer = Transformer(config, table, dtype=chosen_dtype, device=chosen_device, progress=progress)
    return Model(transformer, folder)


class Model:
    """See `load`. `tokenizer` is None for a folder without one; only token ids work then."""

    def __init__(self, transformer: Transformer, folder: ModelFolder) -> None:
        self._transformer = transformer
        self._folder = folder

    @property
    def config(self) -> ModelConfig:
        return self._transformer.config

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self._folder.tokenizer

    @property
    def defaults(self) -> GenerationDefaults:
        """Sampling and stop ids where a call does not give them, from generation_config.json."""
        return self._folder.defaults

    @torch.inference_mode()
    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """Logits (T, V), float32, of each next token after each of the T given ones."""
        tokens_T = self._checked(token_ids)
        with _out_of_memory():
            return self._transformer.unembed(self._transformer.forward(tokens_T, self._transformer.new_cache()))

    def generate(
        self,
        token_ids: Sequence[int],
        *,
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        min_p: float | None = None,
        seed: int | None = None,
        stop_ids: Iterable[int] | None = None,
    ) -> Iterator[int]:
        """Yield new tokens until one of `stop_ids` (which is yielded too), `max_tokens`, or the model's full context.

        What is None comes from `defaults`. Temperature 0 takes the likeliest token; top_k 0 keeps all. The same seed
        gives the same tokens; without one each call draws its own. Arguments are checked before anything runs.
        """
        tokens_T = self._checked(token_ids)
        defaults = self.defaults
        sampling = {
            "temperature": defaults.temperature if temperature is None else temperature,
            "top_p": defaults.top_p if top_p is None else top_p,
            "top_k": defaults.top_k if top_k is None else top_k,
            "min_p": defaults.min_p if min_p is None else min_p,
        }
        for name, value in {"max_tokens": max_tokens, "top_k": top_k, "seed": seed}.items():
            if value is not None and not isinstance(value, int):
                raise UsageError(f"{name} must be an integer, got {value!r}")
        ops.check_sampling(**sampling)  # type: ignore[arg-type]
        if max_tokens is not None and max_tokens < 1:
            raise UsageError(f"max_tokens must be 1 or more, got {max_tokens}")
        if seed is not None and not -(2**63) <= seed < 2**63:
            raise UsageError(f"seed must fit in 64 bits, got {seed}")
        max_tokens = defaults.max_tokens if max_tokens is None else max_tokens
        room = self.config.max_context - len(tokens_T)
        limit = room if max_tokens is None else min(max_tokens, room)
        stops = defaults.stop_ids if stop_ids is None else frozenset(stop_ids)
        generator = torch.Generator().manual_seed(secrets.randbits(63) if seed is None else seed)
        return self._generate(tokens_T, limit, stops, sampling, generator)

    def chat(
        self,
        messages: Conversation | Sequence[Mapping[str, Any]],
        *,
        reasoning_effort: Effort | None = None,
        **sampling: Any,
    ) -> str:
        """The reply to a conversation, given as OpenAI-style dicts or as a Conversation; reasoning is left out.

        `sampling` is what `generate` takes. `reasoning_effort` (low, medium, high) is for models that speak Harmony;
        the others refuse it.
        """
        deltas = self.stream_chat(messages, reasoning_effort=reasoning_effort, **sampling).deltas
        return "".join(delta.text for delta in deltas if delta.kind == "answer")

    def stream_chat(
        self,
        messages: Conversation | Sequence[Mapping[str, Any]],
        *,
        reasoning_effort: Effort | None = None,
        **sampling: Any,
    ) -> "Reply":
        """Like `chat`, as it is made: reasoning and answer, and in the end the messages for the history."""
        conversation = messages if isinstance(messages, Conversation) else Conversation.from_openai(messages)
        chat_format = self.chat_format(reasoning_effort)
        if sampling.get("stop_ids") is None:
            sampling["stop_ids"] = chat_format.stop_ids
        prompt = chat_format.render(conversation)
        return Reply(self.generate(prompt, **sampling), chat_format.reply_reader(), num_prompt_tokens=len(prompt))

    def chat_format(self, reasoning_effort: Effort | None = None) -> ChatFormat:
        """How this model writes conversations. Raises CheckpointError where its folder does not say."""
        if self.tokenizer is None:
            raise CheckpointError(
                f"{self._folder.path} has no tokenizer.json, so this model knows token ids only; add the tokeniser it "
                "was trained with"
            )
        today = datetime.datetime.now().astimezone().date().isoformat()
        system = (
            SystemContent(date=today)
            if reasoning_effort is None
            else SystemContent(date=today, effort=reasoning_effort)
        )
        chosen = chat.choose(
            self.tokenizer,
            self._folder.chat_template,
            self.defaults.stop_ids,
            system=system,
            variables=self._folder.template_variables,
        )
        if reasoning_effort is not None and not isinstance(chosen, HarmonyFormat):
            raise UsageError(
                f"reasoning effort {reasoning_effort!r}: this model does not speak Harmony and has no such setting"
            )
        return chosen

    def _checked(self, token_ids: Sequence[int]) -> Tensor:
        if not len(token_ids):
            raise UsageError("the prompt is empty; give at least one token")
        if len(token_ids) > self.config.max_context:
            raise UsageError(
                f"the prompt has {len(token_ids)} tokens and this model's context is {self.config.max_context}; "
                "shorten it"
            )
        try:
            tokens = [operator.index(token) for token in token_ids]
        except TypeError as error:
            raise UsageError(f"token ids are integers: {error}") from None
        for token in tokens:
            if not 0 <= token < self.config.vocab_size:
                raise UsageError(f"token id {token} is outside this model's vocabulary of {self.config.vocab_size}")
        return torch.tensor(tokens, device=self._transformer.device)

    def _generate(
        self,
        tokens_T: Tensor,
        limit: int,
        stops: frozenset[int],
        sampling: Mapping[str, Any],
        generator: torch.Generator,
    ) -> Iterator[int]:
        cache = self._transformer.new_cache()
        for _ in range(limit):
            token = ops.sample(self._next_logits(tokens_T, cache), generator=generator, **sampling)
            yield token
            if token in stops:
                return
            tokens_T = torch.tensor([token], device=self._transformer.device)

    @torch.inference_mode()
    def _next_logits(self, tokens_T: Tensor, cache: KVCache) -> Tensor:
        with _out_of_memory():
            for chunk in torch.split(tokens_T, PREFILL_CHUNK):
                hidden_TD = self._transformer.forward(chunk, cache)
            return self._transformer.unembed(hidden_TD[-1:])[0].cpu()


class Reply:
    """One reply while it is made: read `deltas` to the end, then `messages`."""

    def __init__(self, tokens: Iterator[int], reader: ReplyReader, *, num_prompt_tokens: int) -> None:
        self.num_prompt_tokens = num_prompt_tokens
        self.num_tokens = 0
        self._reader = reader
        self.deltas = self._read(tokens)

    @property
    def messages(self) -> tuple[Message, ...]:
        """What belongs in the history, also after the reader stopped half-way."""
        return self._reader.messages

    def _read(self, tokens: Iterator[int]) -> Generator[ReplyDelta]:
        try:
            for token in tokens:
                self.num_tokens += 1
                yield from self._reader.feed(token)
        finally:
            rest = self._reader.flush()
        yield from rest


def _expanded(tensor: Tensor | Mxfp4Tensor, dtype: torch.dtype) -> Tensor:
    return mxfp4.unpack(tensor, dtype) if isinstance(tensor, Mxfp4Tensor) else tensor


@contextmanager
def _out_of_memory() -> Iterator[None]:
    """torch reports failed allocations as RuntimeErrors, in words that differ by device."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and not re.search(r"out of memory|can't allocate memory", str(error)):
            raise
        raise OutOfMemoryError(
            "out of memory; shorten the prompt, run in bfloat16, or use a smaller model: `freehold inspect MODEL` says "
            "how much one needs"
        ) from None


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.zeros(1, device=chosen).item()  # also refuses "meta", which holds no numbers
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise BackendError(
            f"device {str(device)!r} cannot be used here ({reason}); choose cpu, or see `freehold doctor`"
        ) from None
    return chosen


def _dtype(dtype: str | torch.dtype | None, config: ModelConfig, device: torch.device) -> torch.dtype:
    if dtype is None:
        return _automatic_dtype(config, device)
    chosen = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if chosen not in _DTYPES.values():
        raise UsageError(f"dtype must be {' or '.join(_DTYPES)}, got {dtype!r}")
    assert chosen is not None
    return chosen


def _automatic_dtype(config: ModelConfig, device: torch.device) -> torch.dtype:
    # By what the machine has, not by what is free just now: the same seed shall give the same text tomorrow.
    if device.type != "cpu":
        return torch.bfloat16
    plan = plan_memory(config, context=1, expert_bits=4.25, dense_bytes=4)
    return torch.float32 if plan.dense <= machine.total_memory() / 4 else torch.bfloat16
