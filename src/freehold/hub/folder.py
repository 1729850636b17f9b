"""A model folder as a whole: checkpoint, tokeniser, chat template and generation defaults, each checked when read."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from freehold.errors import CheckpointError, UsageError
from freehold.formats.tokenizer import Tokenizer
from freehold.kernels.ops import check_sampling
from freehold.weights.files import read_json
from freehold.weights.layouts import Checkpoint, open_checkpoint

_O200K_HARMONY_ROWS = 201_088
_SAMPLING_TYPES = {"temperature": int | float, "top_p": int | float, "top_k": int, "min_p": int | float}

SIDE_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json",
    "chat_template.jinja", "README.md", "LICENSE", "USAGE_POLICY",
)  # fmt: skip
"""What belongs to a model besides config.json and tensors; conversions carry these along."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationDefaults:
    """What generation_config.json asks for where the caller does not say."""

    stop_ids: frozenset[int] = frozenset()
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0


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
    checkpoint = open_checkpoint(path)
    tokenizer = _tokenizer(path, checkpoint.config.vocab_size)
    tokenizer_config = _optional_json(path / "tokenizer_config.json")
    defaults = _generation_defaults(path / "generation_config.json")
    if tokenizer is not None and tokenizer.vocab_size > checkpoint.config.vocab_size:
        raise CheckpointError(
            f"{path}: the tokeniser has {tokenizer.vocab_size} tokens, the model {checkpoint.config.vocab_size}; "
            "they do not belong together: download both again"
        )
    return ModelFolder(
        checkpoint=checkpoint,
        tokenizer=tokenizer,
        chat_template=_chat_template(path / "chat_template.jinja", tokenizer_config),
        template_variables={
            name: value if isinstance(value, str) else value["content"]
            for name, value in tokenizer_config.items()
            if name.endswith("_token") and (isinstance(value, str) or (isinstance(value, dict) and "content" in value))
        },
        defaults=defaults,
    )


def _tokenizer(path: Path, vocab_size: int) -> Tokenizer | None:
    if (path / "tokenizer.json").is_file():
        return Tokenizer.from_file(path / "tokenizer.json")
    return Tokenizer.o200k_harmony() if vocab_size == _O200K_HARMONY_ROWS else None


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
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _generation_defaults(path: Path) -> GenerationDefaults:
    raw = _optional_json(path)
    stops = raw.get("eos_token_id")
    stops = [] if stops is None else stops if isinstance(stops, list) else [stops]
    given = {name: raw[name] for name in _SAMPLING_TYPES if raw.get(name) is not None}
    if not raw.get("do_sample", True):
        given["temperature"] = 0.0
    for name, value in [("eos_token_id", stop) for stop in stops] + list(given.items()):
        if isinstance(value, bool) or not isinstance(value, _SAMPLING_TYPES.get(name, int)):
            raise CheckpointError(f"{path}: {name} cannot be {value!r}; download the file again")
    defaults = GenerationDefaults(stop_ids=frozenset(stops), **given)
    try:
        check_sampling(
            temperature=defaults.temperature, top_k=defaults.top_k, top_p=defaults.top_p, min_p=defaults.min_p
        )
    except UsageError as error:
        raise CheckpointError(f"{path}: {error}; download the file again") from None
    return defaults
