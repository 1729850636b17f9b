"""`freehold cache`: what Freehold keeps under its cache directory, and how to be rid of it."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from freehold import paths
from freehold.cli import terminal
from freehold.cli.options import Json
from freehold.disk import remove, remove_all_abandoned, size_of, unfinished_in
from freehold.errors import UsageError

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


def _folders() -> dict[str, Path]:
    return {"models": paths.models_dir(), "downloads": paths.downloads_dir(), "packed": paths.packed_dir()}


@app.callback()
def _about() -> None:
    """See and clear what Freehold keeps on disk: models, downloads, packed weights.

    \b
    freehold cache list
    freehold cache clear
    """


@app.command("list")
def list_entries(as_json: Json = False) -> None:
    """List what is in the cache directory, with sizes.

    Packed weights are "current" if the next load of their model uses them.

    \b
    freehold cache list
    freehold cache list --json
    """
    entries = list(_entries())
    facts = {
        "cache": str(paths.cache_dir()),
        "entries": entries,
        "total_bytes": sum(entry["bytes"] for entry in entries),
    }
    terminal.write(json.dumps(facts, indent=2) + "\n" if as_json else _text(facts))


@app.command("clear")
def clear(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME", help="packed, downloads, models, or the name of one entry. Default: packed."),
    ] = None,
    stale: Annotated[
        bool, typer.Option("--stale", help="Only packed weights that are not current: no load will use them.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Remove models without asking.")] = False,
) -> None:
    """Remove packed weights, which the next load makes again; downloads and models if they are named.

    \b
    freehold cache clear
    freehold cache clear --stale
    freehold cache clear downloads
    """
    from freehold.weights.pack_file import clear_packed

    chosen = set(names or ["packed"])
    if stale and chosen != {"packed"}:
        raise UsageError(f"--stale is about packed weights; leave out {', '.join(sorted(chosen - {'packed'}))}")
    entries = [entry for entry in _entries() if chosen & {entry["kind"], entry["name"]}]
    unknown = chosen - _folders().keys() - {entry["name"] for entry in entries}
    if unknown:
        raise UsageError(f"nothing in the cache is called {min(unknown)!r}; see `freehold cache list`")
    models = [entry["name"] for entry in entries if entry["kind"] == "models"]
    if models and not yes and not _agreed(models):
        return
    freed = 0
    for kind in chosen & _folders().keys():
        freed += clear_packed(keep_current=stale) if kind == "packed" else remove_all_abandoned(_folders()[kind])
    if not stale:
        freed += sum(remove(Path(entry["path"])) for entry in entries if entry["state"] != "unfinished")
    terminal.write(f"{terminal.gib(freed)} freed\n")


def _agreed(models: list[str]) -> bool:
    question = f"remove {', '.join(models)}? What cannot be fetched or made again is lost"
    if not sys.stdin.isatty():
        raise UsageError(f"{question}: confirm with --yes")
    return typer.confirm(question, err=True)


def _entries() -> Iterator[dict[str, Any]]:
    from freehold.weights.pack_file import list_packed

    packed = {entry.path: entry for entry in list_packed()}
    for kind, folder in _folders().items():
        unfinished = [path for path in unfinished_in(folder) if path.suffix != ".lock"]
        for path in [*sorted(folder.glob("[!.]*")), *unfinished]:
            try:
                facts: dict[str, Any] = {"kind": kind, "name": path.name, "path": str(path), "bytes": size_of(path)}
            except FileNotFoundError:  # removed a moment ago
                continue
            facts["state"] = "unfinished" if path in unfinished else "complete"
            if entry := packed.get(path):
                facts |= {
                    "state": entry.state.value,
                    "model": None if entry.source is None else str(entry.source),
                    "dense": entry.dense,
                    "written": entry.written_at.isoformat(timespec="seconds"),
                }
            yield facts


def _text(facts: dict[str, Any]) -> str:
    entries = facts["entries"]
    width = max((len(entry["name"]) for entry in entries), default=0)
    lines = [facts["cache"]]
    for entry in entries:
        size, state = terminal.gib(entry["bytes"]), entry["state"]
        about = "" if state == "complete" else f"  {state}"
        about += f", of {entry['model']}" if entry.get("model") else ""
        lines.append(f"  {entry['kind']:<9}  {entry['name']:<{width}}  {size:>10}{about}")
    lines.append(f"  {'total':<9}  {'':<{width}}  {terminal.gib(facts['total_bytes']):>10}")
    return "\n".join(lines) + "\n"
