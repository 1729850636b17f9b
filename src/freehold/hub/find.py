"""From what a user types after --model to a folder on this machine."""

from pathlib import Path

from freehold import paths
from freehold.config import NAMED_CONFIGS
from freehold.errors import ModelNotFoundError
from freehold.hub import default_base, default_model
from freehold.log import Progress, no_progress

DEFAULT, DEFAULT_BASE = "default", "default-base"
BUILT_IN = {
    DEFAULT: default_model.ensure, default_model.NAME: default_model.ensure,
    DEFAULT_BASE: default_base.ensure, default_base.NAME: default_base.ensure,
}  # fmt: skip
"""What is no folder of the user's, whatever there is of that name, and how one gets it."""


def find_model(name_or_path: str, progress: Progress = no_progress) -> Path:
    """The folder of a model, in this order: `default`, and `default-base`, which is that before it was tuned; a folder;
    a model in Freehold's cache; one in Hugging Face's.

    Only the first two may use the network. Raises ModelNotFoundError otherwise, saying how to get the model.
    """
    try:
        if (ensure := BUILT_IN.get(name_or_path)) is not None:
            return ensure(progress)
        path = Path(name_or_path).expanduser()
        if path.exists():
            return path
        if (cached := paths.models_dir() / name_or_path).is_dir():
            return cached
        if (snapshot := _in_hugging_face_cache(name_or_path)) is not None:
            return snapshot
    except (OSError, RuntimeError, ValueError) as error:  # no permission, no such user, names that cannot be paths
        raise ModelNotFoundError(f"model {name_or_path!r} cannot be looked up: {error}; check the path") from None
    raise ModelNotFoundError(f"there is no model {name_or_path!r}: {_advice(name_or_path)}")


def _in_hugging_face_cache(name: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(name, "config.json")
    except HFValidationError:  # not shaped like owner/name
        return None
    return Path(config).parent if isinstance(config, str) else None


def _advice(name: str) -> str:
    if name in NAMED_CONFIGS:
        return (
            f"fetch it with `hf download openai/{name}`, then use openai/{name}; or make random weights of its size "
            f"with `freehold synth {name} FOLDER`"
        )
    if name.count("/") == 1 and not name.startswith(("/", ".", "~")):
        return f"it is no folder, and not in a cache; fetch it with `hf download {name}`"
    return "it is no folder; name one that holds a gpt-oss checkpoint, or leave it out for the default model"
