"""From what a user typed to the sources of a browser: folders, ZIM files, and the web where it is asked for.

Indexes each folder before it is used, with its progress told, so that no conversation waits for it. Called by commands.
"""

from collections.abc import Sequence
from pathlib import Path

from freehold.errors import UsageError
from freehold.log import Progress, no_progress
from freehold.tools.browser.content import Source, source_name
from freehold.tools.browser.documents import Documents
from freehold.tools.browser.engines import engine_of
from freehold.tools.browser.web import Web
from freehold.tools.browser.zim import Zim

_WEB = "web"


def open_sources(
    paths: Sequence[Path], *, web: str | None = None, progress: Progress = no_progress
) -> tuple[Source, ...]:
    """A source for each folder and ZIM file, in this order, and last the web where `web` names a search engine.

    Sources of one name are numbered; a path that leads to what is there already is left out. The index of a folder lies
    in Freehold's cache, under `browser`. `progress` is told of each folder under a label of its own. Raises UsageError
    for what is neither folder nor ZIM file and for an engine that there is not, BackendError where libzim is missing,
    and DiskError where an index cannot be written; then nothing stays open. The caller closes what is returned, or
    gives it to a Browser, which does.
    """
    opened: list[Source] = []
    try:
        if web is not None:
            opened.append(Web(engine=engine_of(web), name=_WEB))
        taken, seen = {source.name for source in opened}, set[Path]()
        for path in paths:
            real = path.expanduser().resolve()
            if real in seen:
                continue
            seen.add(real)
            name = _free(source_name(real.name if real.is_dir() else real.stem), taken)
            taken.add(name)
            opened.append(_open(real, name))
        for source in opened:
            if isinstance(source, Documents):
                source.refresh(progress=_labelled(progress, source.name))
    except BaseException:
        for source in opened:
            source.close()
        raise
    return (*opened[1:], opened[0]) if web is not None else tuple(opened)


def _open(path: Path, name: str) -> Source:
    if path.is_dir():
        return Documents(path, name=name)
    if path.suffix.lower().startswith(".zim"):  # large ones come in parts: .zimaa, .zimab
        return Zim(path, name=name)
    if not path.exists():
        raise UsageError(f"{path} is no folder and no ZIM file; name one that is there")
    raise UsageError(f"{path} is no folder and no ZIM file; name the folder that it lies in")


def _free(name: str, taken: set[str]) -> str:
    number, free = 1, name
    while free in taken:
        number += 1
        free = f"{name}-{number}"
    return free


def _labelled(progress: Progress, name: str) -> Progress:
    return lambda label, done, total: progress(f"{label} {name}", done, total)
