"""A loaded model, for people: token ids in and logits or tokens out, or messages in and a reply out.

Requests run on the calling thread, through the engine. What it was loaded from is checked in full before the first
tensor is used; a model is ready, or it is an error.
"""

import os
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor

from freehold import __version__
from freehold.config import ModelConfig
from freehold.engine.adapters import Adapters
from freehold.engine.core import OUT_OF_MEMORY, Engine, is_out_of_memory
from freehold.engine.loop import LocalEngine
from freehold.engine.options import MAX_NUM_SEQS
from freehold.engine.prefix_files import PrefixFiles
from freehold.engine.request import TokenConstraint
from freehold.errors import OutOfMemoryError, UsageError
from freehold.formats.chat import TurnChoices
from freehold.formats.conversation import Conversation, Effort, Message
from freehold.formats.events import Event, TextDelta
from freehold.formats.stops import StopStrings
from freehold.formats.tokenizer import Detokenizer, Tokenizer
from freehold.hub.bases import naming_base, other_base
from freehold.hub.find import DEFAULT, find_model
from freehold.hub.folder import ModelFolder, open_folder
from freehold.kernels.ops import Weight
from freehold.log import NOTICE, Progress, logger, no_progress
from freehold.model.lora import Adapter, adapter_bytes
from freehold.model.packed_lora import packed_adapter_bytes
from freehold.model.peft_files import read_peft, read_spec
from freehold.model.transformer import Transformer
from freehold.sampling import GenerationDefaults, SamplingOptions
from freehold.session.generation import Ask, Generation, GenerationEvent, Said, prepare_now
from freehold.session.memory import MemoryPlan, fitting_plan, free_memory, gib
from freehold.session.policy import Policy, decide, instruction_set, use_threads
from freehold.session.prompting import Prompting
from freehold.session.served import Served
from freehold.tools.base import FunctionTools, Tool
from freehold.weights.pack_file import load_packed, source_fingerprint


def load(
    path_or_name: str | os.PathLike[str] = DEFAULT,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    dense: str | None = None,
    kv_dtype: str | None = None,
    context: int | None = None,
    kv_tokens: int | None = None,
    max_num_seqs: int = MAX_NUM_SEQS,
    threads: int | None = None,
    prefix_cache_dir: str | os.PathLike[str] | None = None,
    adapters: Mapping[str, str | os.PathLike[str]] | None = None,
    progress: Progress = no_progress,
) -> "Model":
    """Load a model: a folder in either published layout, `default`, or a name in a cache (see hub.find).

    `device` is the GPU if torch sees one, else the CPU. On a CPU the native kernels run: `dense` is how they hold
    attention and output weights (q8, bf16, f32; default q8) and `threads` how many they use (default: physical cores).
    The first load writes a packed copy of the weights to the cache directory, later ones map it. Elsewhere the
    reference ops run in `dtype`, float32 or bfloat16. `kv_dtype` is the KV cache's type: f32, bf16 or q8 (default bf16,
    with reference ops that of `dtype`). `context` is how many tokens a sequence may have; the default is what the model
    can, or what fits into memory. `kv_tokens` is how many the KV cache holds for all that run at once and for prefixes
    that are kept, by default as many as `context`; `max_num_seqs` is how many sequences run at once. In
    `prefix_cache_dir` the engine keeps what many prompts begin with, so that the next process need not compute it.
    `adapters` are folders in PEFT's format by the names that requests will call them; the weights are not changed, and
    each request names its own adapter, or none.

    Raises a FreeholdError that names the file or value and the remedy; OutOfMemoryError before anything is allocated
    where the plan exceeds what is free.
    """
    folder = open_folder(find_model(os.fspath(path_or_name), progress))
    checkpoint = folder.checkpoint
    config = checkpoint.config
    policy = decide(config, device=device, dtype=dtype, dense=dense, kv_dtype=kv_dtype, threads=threads)
    prefix_files = None if prefix_cache_dir is None else _prefix_files(Path(prefix_cache_dir), folder, policy)
    folders = {name: Path(path) for name, path in (adapters or {}).items()}
    plan = fitting_plan(
        config,
        checkpoint.experts,
        policy,
        context=context,
        kv_tokens=kv_tokens,
        max_num_seqs=max_num_seqs,
        adapters=sum(_adapter_bytes(path, os.fspath(path_or_name), folder, policy) for path in folders.values()),
    )
    logger.log(NOTICE, "memory: %s of %s free", plan.describe(), gib(free_memory(policy)))
    logger.info("%s: %s", folder.path, policy.describe(checkpoint.experts.value))
    known = Adapters(packed=policy.native)
    with _out_of_memory():
        for name, path in folders.items():  # before the weights, which take longer
            mention_other_base(path, os.fspath(path_or_name), folder.path)
            known.add(name, _read_adapter(path, config, policy))
    transformer = load_transformer(folder, policy, progress=progress)
    return Model(transformer, folder, policy, plan, prefix_files, known)


def load_transformer(folder: ModelFolder, policy: Policy, *, progress: Progress = no_progress) -> Transformer:
    """The model alone, for who has planned its memory. Raises OutOfMemoryError where that runs out all the same."""
    checkpoint = folder.checkpoint
    table: Mapping[str, Weight]
    with _out_of_memory():
        if policy.dense is None:
            table = checkpoint.table()
        else:
            use_threads(policy.threads)
            table = load_packed(checkpoint, policy.dense, progress=progress)
        return Transformer(
            checkpoint.config, table, dtype=policy.dtype, device=policy.device, kv_type=policy.kv, progress=progress
        )


def _dtype_of_adapters(policy: Policy) -> torch.dtype:
    return torch.float32 if policy.device.type == "cpu" else policy.dtype


def _adapter_bytes(adapter: Path, model: str, folder: ModelFolder, policy: Policy) -> int:
    config = folder.checkpoint.config
    with naming_base(adapter, model, folder.path):
        spec = read_spec(adapter, config)
    return (
        packed_adapter_bytes(config, spec) if policy.native else adapter_bytes(config, spec, _dtype_of_adapters(policy))
    )


def _read_adapter(folder: Path, config: ModelConfig, policy: Policy) -> Adapter:
    return read_peft(folder, config, dtype=_dtype_of_adapters(policy)).to(device=policy.device)


def mention_other_base(adapter: Path, model: str, folder: Path) -> None:
    """Names differ between machines, so this is no reason to refuse it."""
    if (named := other_base(adapter, model, folder)) is not None:
        logger.log(NOTICE, "%s says that it is for %.200s, not for %s: expect little of it", adapter, named, model)


def _prefix_files(directory: Path, folder: ModelFolder, policy: Policy) -> PrefixFiles:
    """For these weights, run in this way: keys and values computed otherwise are other numbers."""
    how = (policy.device.type, policy.dtype, policy.dense, policy.kv, policy.native and instruction_set())
    return PrefixFiles(directory, f"{__version__} {source_fingerprint(folder.checkpoint)} {how}")


class ChatOptions(SamplingOptions, total=False):
    """How a reply is made; see Model.stream_chat."""

    adapter: str | None
    reasoning_effort: Effort | None
    harmony: bool | None
    grammar: bool
    choices: TurnChoices | None
    max_tokens: int | None
    stop: Sequence[str]


_SAMPLING = SamplingOptions.__annotations__
_WHILE_READ = 3  # copies of an adapter: as it is stored, as it is computed with, and packed


class Model:
    """See `load`. `tokenizer` is None for a folder without one; only token ids work then. `prompting` makes requests
    for `engine` out of text and conversations; `adapter_set` has the adapters that its engines compute with."""

    def __init__(
        self,
        transformer: Transformer,
        folder: ModelFolder,
        policy: Policy,
        plan: MemoryPlan,
        prefix_files: PrefixFiles | None = None,
        adapters: Adapters | None = None,
    ) -> None:
        self._transformer = transformer
        self._prefix_files = prefix_files
        self.adapter_set = Adapters(packed=policy.native) if adapters is None else adapters
        self._making = threading.Lock()
        self._engine: LocalEngine | None = None
        self._folder = folder
        self.policy = policy
        self.plan = plan
        self.prompting = Prompting(
            source=str(folder.path),
            tokenizer=folder.tokenizer,
            vocab_size=transformer.config.vocab_size,
            context=plan.context,
            longest=transformer.config.max_context,
            defaults=folder.defaults,
            chat_template=folder.chat_template,
            template_variables=folder.template_variables,
            adapters=self.adapter_set,
        )

    @property
    def path(self) -> Path:
        """The folder that it was loaded from."""
        return self._folder.path

    @property
    def transformer(self) -> Transformer:
        """The model itself, for who wants tensors: forward, unembed, caches."""
        return self._transformer

    @property
    def experts(self) -> str:
        """The format in which the checkpoint keeps its experts."""
        return self._folder.checkpoint.experts.value

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

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names that requests may give as their adapter."""
        return tuple(self.adapter_set)

    def add_adapter(self, name: str, folder: str | os.PathLike[str]) -> None:
        """One more adapter, from a folder in PEFT's format, also while requests run. Raises what `load` does."""
        self.adapter_set.check_name(name)
        needed = _adapter_bytes(Path(folder), str(self.path), self._folder, self.policy)
        free = free_memory(self.policy)
        if _WHILE_READ * needed > free:
            raise OutOfMemoryError(
                f"{folder}: this adapter takes {gib(needed)}, {_WHILE_READ} times that while it is read, and "
                f"{gib(free)} are free"
            )
        with _out_of_memory():
            self.adapter_set.add(name, _read_adapter(Path(folder), self.config, self.policy))

    def remove_adapter(self, name: str) -> None:
        """Nobody can ask for it any more; requests that run with it keep it. Raises UsageError where there is none."""
        self.adapter_set.remove(name)

    @torch.inference_mode()
    def logits(self, token_ids: Sequence[int], *, adapter: str | None = None) -> Tensor:
        """Logits (T, V), float32, of each next token after each of the T given ones."""
        tokens_T = torch.tensor(self.prompting.checked(token_ids), device=self._transformer.device)
        with _out_of_memory():
            batch = self._transformer.new_cache(len(tokens_T)).extend(len(tokens_T))
            adapters = self.adapter_set.of_tokens([(adapter, len(tokens_T))], tokens_T.device)
            return self._transformer.unembed(self._transformer.forward(tokens_T, replace(batch, adapters=adapters)))

    @property
    def engine(self) -> LocalEngine:
        """What runs the requests of this model: many at once, and what they have in common only once."""
        with self._making:
            if self._engine is None:
                self._engine = LocalEngine(self.new_engine())
            return self._engine

    def new_engine(self) -> Engine:
        """An engine as planned for, for who drives it in another way (engine.loop). There is memory for one."""
        return Engine(self._transformer, self.plan.options, adapters=self.adapter_set, prefix_files=self._prefix_files)

    def generate(
        self,
        token_ids: Sequence[int],
        *,
        max_tokens: int | None = None,
        stop_ids: Iterable[int] | None = None,
        min_tokens: int = 0,
        boundaries: Sequence[int] = (),
        constraint: Callable[[], TokenConstraint] | None = None,
        adapter: str | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> Iterator[int]:
        """Yield new tokens until one of `stop_ids` (which is yielded too), `max_tokens`, or the model's full context.

        What is None comes from `defaults`. `sampling` are the fields of freehold.sampling.Sampling: temperature 0 takes
        the likeliest token; the same seed gives the same tokens, and without one each call draws its own. `boundaries`
        are prefixes of the prompt that later ones may share, `constraint` says what may come next (both:
        engine.request). `adapter` is one of `adapters`. Arguments are checked before anything runs. Several may run at
        once, on one thread or many.
        """
        request = self.prompting.request(
            token_ids,
            max_tokens=max_tokens,
            stop_ids=stop_ids,
            min_tokens=min_tokens,
            boundaries=boundaries,
            constraint=constraint,
            adapter=adapter,
            **sampling,
        )
        return (token for step in self.engine.stream(request) for token in step.tokens)

    def stream_text(self, prompt: str, *, stop: Sequence[str] = (), **options: Any) -> Iterator[str]:
        """Continue a text, with no conversation around it; ends before the first of the `stop` strings.

        `options` are what `generate` takes. Raises CheckpointError where the model has no tokeniser.
        """
        tokenizer, stops = self.prompting.the_tokenizer(), StopStrings(stop)
        return _text(self.generate(tokenizer.encode(prompt), **options), Detokenizer(tokenizer), stops)

    def chat(
        self,
        messages: Conversation | Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any] | Callable[..., Any] | Tool | FunctionTools] | None = None,
        **options: Unpack[ChatOptions],
    ) -> str:
        """The reply to a conversation, given as OpenAI-style dicts or as a Conversation: what is meant for the user.

        Functions with types and a docstring (freehold.tool), and tools of freehold.tools, are called as the model asks
        for them until it answers; that takes Harmony. Tools that are dicts are the caller's own: the reply ends with
        their call. `options` are what `stream_chat` takes.
        """
        described = [tool for tool in tools or () if isinstance(tool, Mapping)]
        ours = [tool for tool in tools or () if not isinstance(tool, Mapping)]
        if not ours:
            events = self.stream_chat(messages, tools=described, **options).events
            return "".join(event.text for event in events if isinstance(event, TextDelta))
        from freehold.session.agent import LocalRunner, answer

        served = Served(
            name=str(self.path),
            prompting=self.prompting,
            runner=LocalRunner(self.engine),
            harmony=options.get("harmony", True),
            grammar=options.get("grammar", True),
            adapter=options.get("adapter"),
        )
        done = answer(served, _ask(messages, described, options), ours)
        return "".join(message.text for message in done.messages if message.channel == "final")

    def _harmony(self, options: ChatOptions) -> bool | None:
        asked = options.get("harmony")
        return self.adapter_set.harmony(options.get("adapter")) if asked is None else asked

    def stream_chat(
        self,
        messages: Conversation | Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **options: Unpack[ChatOptions],
    ) -> "Reply":
        """Like `chat`, as it is made: reasoning, answer and calls, and in the end the messages for the history.

        `tools` are those of OpenAI's chat API. `reasoning_effort` (low, medium, high) is for models that speak Harmony;
        the others refuse it. `harmony` makes a model speak Harmony whose template says otherwise, if it has the control
        tokens; where it is left out, an adapter that says what it learnt speaks that. Harmony's structure is enforced
        by a `grammar`, which also keeps to the `choices`. An answer ends before the first of the `stop` strings. The
        other options are what `generate` takes.
        """
        ask = _ask(messages, tools, options)
        generation = prepare_now(
            self.prompting,
            ask,
            harmony=self._harmony(options),
            grammar=options.get("grammar", True),
            adapter=options.get("adapter"),
        )
        return Reply(generation, generation.events_now(self.engine.stream))


def _ask(
    messages: Conversation | Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    options: ChatOptions,
) -> Ask:
    if isinstance(messages, Conversation):
        if tools:
            raise UsageError("tools of a Conversation are part of its developer message; put them there")
        conversation = messages
    else:
        conversation = Conversation.from_openai(messages, tools=tools)
    sampling: dict[str, Any] = {name: value for name, value in options.items() if name in _SAMPLING}
    unknown = options.keys() - ChatOptions.__annotations__.keys()
    if unknown:
        raise TypeError(f"there is no option {min(unknown)!r}; there are {', '.join(ChatOptions.__annotations__)}")
    return Ask(
        conversation=conversation,
        effort=options.get("reasoning_effort"),
        choices=options.get("choices") or {},
        sampling=SamplingOptions(**sampling),  # type: ignore[typeddict-item]
        max_tokens=options.get("max_tokens"),
        stop=tuple(options.get("stop", ())),
    )


def _text(tokens: Iterator[int], detokenizer: Detokenizer, stops: StopStrings) -> Iterator[str]:
    for token in tokens:
        yield stops.feed(detokenizer.feed(token))
        if stops.stopped:
            return
    yield stops.feed(detokenizer.flush())
    yield stops.flush()


class Reply:
    """One reply while it is made: read `events` to the end, then `messages`."""

    def __init__(self, generation: Generation, events: Iterator[GenerationEvent]) -> None:
        self._generation = generation
        self.events = self._read(events)

    @property
    def num_prompt_tokens(self) -> int:
        return self._generation.num_prompt_tokens

    @property
    def num_tokens(self) -> int:
        return self._generation.num_tokens

    @property
    def messages(self) -> tuple[Message, ...]:
        """What belongs in the history, also after the reader stopped half-way. Nothing more is read after this."""
        return self._generation.cut()

    def _read(self, events: Iterator[GenerationEvent]) -> Generator[Event]:
        yield from (said.event for said in events if isinstance(said, Said))


@contextmanager
def _out_of_memory() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(OUT_OF_MEMORY) from None
