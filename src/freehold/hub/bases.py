"""Whether an adapter is for the model that it is used with: by the base that it names, since all of one size fit.

Names differ between machines, so a different one is a reason to ask, and none to be sure: who merges refuses
(`check_base`), who loads mentions it, and where an adapter does not fit, says it first (`naming_base`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from freehold.errors import MisfitError, UsageError
from freehold.hub import default_base
from freehold.hub.find import DEFAULT, DEFAULT_BASE
from freehold.model.peft_files import CONFIG_FILE, base_model_of


def check_base(adapter: Path, model: str, folder: Path) -> None:
    """Raise UsageError where an adapter names another base model than the one that was asked for as `model`."""
    if (named := other_base(adapter, model, folder)) is not None:
        raise UsageError(
            f"{adapter / CONFIG_FILE} says that the adapter is for {named!r:.200}, and the model is {model!r} "
            f"({folder}); name that model, or --any-base if it is the same under another name"
        )


@contextmanager
def naming_base(adapter: Path, model: str, folder: Path) -> Iterator[None]:
    """For who reads an adapter: the MisfitError of one that names another base begins with that."""
    try:
        yield
    except MisfitError as error:
        if (named := other_base(adapter, model, folder)) is None:
            raise
        raise MisfitError(
            f"{adapter / CONFIG_FILE} says that the adapter is for {named!r:.200}, and it does not fit {model!r}; "
            f"give --model what it is for. If both are one model under two names: {error}"
        ) from None


def other_base(adapter: Path, model: str, folder: Path) -> str | None:
    """The base model that an adapter names, where that is another one."""
    if (named := base_model_of(adapter)) is None:
        return None
    # Folders are moved, and the hub's names have owners: the last part of a name is what stays.
    known = {_last_part(str(folder)), *map(_hub_name, folder.parts)}
    if model != DEFAULT:  # what that stands for changes with every tuning
        known.add(_last_part(model))
    if folder == default_base.folder():
        known.add(DEFAULT_BASE)
    return None if _last_part(named) in known - {""} else named


def _last_part(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2].lower()


def _hub_name(part: str) -> str:
    """Of a folder in Hugging Face's cache, models--owner--name."""
    return part.rpartition("--")[2].lower() if part.startswith("models--") else ""
