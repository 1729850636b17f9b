"""A model folder as a whole: checkpoint, tokeniser, chat template and generation defaults, each checked when read."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from freehold.errors import CheckpointError, FreeholdError, UsageError
from freehold.formats import o200k
from freehold.formats.harmony.vocabulary import CALL, RETURN
from freehold.formats.tokenizer import Tokenizer
from freehold.hub import default_base, default_model
from freehold.sampling import GenerationDefaults, Sampling
from freehold.weights.files import read_json
from freehold.weights.layouts import Checkpoint, open_checkpoint

_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFolder:
    """An opened model. `tokenizer` and `chat_template` are None where the folder has none."""

    checkpoint: Checkpoint
    tokenizer: Tokenizer | None
    chat_template: str | None
    template_variables: Mapping[str, str]
    defaults: GenerationDefaults

    @property
    def path(self) -> Path:
        return self.checkpoint.folder


def open_folder(path: Path) -> ModelFolder:
    """Open and check everything but the tensors' contents.

    A model with gpt-oss's vocabulary and no tokenizer.json, as in the original layout, gets o200k_harmony.
    """
    try:
        checkpoint = open_checkpoint(path)
    except FreeholdError as error:
        if path in (default_model.folder(), default_base.folder()):  # made here, not downloaded
            raise CheckpointError(f"{error}; it is the default model: remove {path} to have it made anew") from None
        raise
    tokenizer = _tokenizer(path, checkpoint.config.vocab_size)
    tokenizer_config = _optional_json(path / "tokenizer_config.json")
    variables = _token_names(tokenizer_config)
    if tokenizer is not None and tokenizer.vocab_size > checkpoint.config.vocab_size:
        raise CheckpointError(
            f"{path}: the tokeniser has {tokenizer.vocab_size} tokens, the model {checkpoint.config.vocab_size}; "
            "they do not belong together: download both again"
        )
    return ModelFolder(
        checkpoint=checkpoint,
        tokenizer=tokenizer,
        chat_template=_chat_template(path / "chat_template.jinja", tokenizer_config),
        template_variables=variables,
        defaults=_generation_defaults(path, tokenizer, variables.get("eos_token")),
    )


def _tokenizer(path: Path, vocab_size: int) -> Tokenizer | None:
    if (path / "tokenizer.json").is_file():
        return Tokenizer.from_file(path / "tokenizer.json")
    return Tokenizer.o200k_harmony() if vocab_size == o200k.VOCAB_SIZE else None


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _chat_template(path: Path, tokenizer_config: Mapping[str, Any]) -> str | None:
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path} cannot be read ({error}); download it again") from None
    template = tokenizer_config.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = (entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default")
        template = next(named, {}).get("template")
    return template if isinstance(template, str) else None


def _token_names(tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token`, `eos_token` and the like: strings, or objects with their string as `content`."""
    names = {}
    for key, value in tokenizer_config.items():
        name = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(name, str):
            names[key] = name
    return names


def _generation_defaults(path: Path, tokenizer: Tokenizer | None, eos_token: str | None) -> GenerationDefaults:
    source = path / "generation_config.json"
    raw = _optional_json(source)
    given = {name: raw[name] for name in _SAMPLING if raw.get(name) is not None}
    if not raw.get("do_sample", True):
        given["temperature"] = 0.0
    stops = _stop_ids(raw, source) or _stop_ids(_optional_json(path / "config.json"), path / "config.json")
    if not stops and tokenizer is not None:
        names = [eos_token] if eos_token else [RETURN, CALL, "<|endoftext|>"]
        stops = frozenset(tokenizer.control_tokens[name] for name in names if name in tokenizer.control_tokens)
    longest = raw.get("max_new_tokens")
    if longest is not None and (isinstance(longest, bool) or not isinstance(longest, int) or longest < 1):
        raise CheckpointError(f"{source}: max_new_tokens cannot be {longest!r}; download the file again")
    try:
        sampling = Sampling(**given)
    except UsageError as error:
        raise CheckpointError(f"{source}: {error}; download the file again") from None
    return GenerationDefaults(stop_ids=stops, sampling=sampling, max_tokens=longest)


def _stop_ids(raw: Mapping[str, Any], source: Path) -> frozenset[int]:
    stops = raw.get("eos_token_id")
    stops = [] if stops is None else stops if isinstance(stops, list) else [stops]
    for stop in stops:
        if isinstance(stop, bool) or not isinstance(stop, int):
            raise CheckpointError(f"{source}: eos_token_id cannot be {stop!r}; download the file again")
    return frozenset(stops)
