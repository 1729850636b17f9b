"""`freehold keys`: who may use a server. A new secret is shown once, alone on stdout; only its hash is kept."""

import json
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from freehold.cli import terminal
from freehold.cli.options import Json, StoreOption

if TYPE_CHECKING:
    from freehold.session.store.records import KeyRecord

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def _about() -> None:
    """Make and end the API keys that clients of a server send.

    \b
    freehold keys create laptop
    freehold keys list
    freehold keys revoke laptop
    """


@app.command("create")
def create(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="What the key is for. Default: it goes by its id.")
    ] = None,
    requests_per_minute: Annotated[
        int | None, typer.Option(metavar="N", help="Requests that it may send in a minute. Default: no limit.")
    ] = None,
    tokens_per_minute: Annotated[
        int | None, typer.Option(metavar="N", help="Tokens that it may use in a minute. Default: no limit.")
    ] = None,
    store: StoreOption = None,
) -> None:
    """Make a key and print its secret, which cannot be shown again.

    \b
    freehold keys create laptop
    freehold keys create --requests-per-minute 60
    OPENAI_API_KEY=$(freehold keys create laptop)
    """
    from freehold.session.store.store import Store

    with Store.open(store) as opened:
        record, secret = opened.create_key(
            name, requests_per_minute=requests_per_minute, tokens_per_minute=tokens_per_minute
        )
    named = record.id if record.name == record.id else f"{record.name} ({record.id})"
    terminal.say(f"key {named}; keep the secret, it is not shown again")
    terminal.write(f"{secret}\n")


@app.command("list")
def list_keys(as_json: Json = False, store: StoreOption = None) -> None:
    """List all keys, revoked ones too, without their secrets.

    \b
    freehold keys list
    freehold keys list --json
    """
    from freehold.session.store.store import Store

    with Store.open(store) as opened:
        records = opened.keys()
        where = opened.name
    if as_json:
        facts = {"store": where, "keys": [_facts(record) for record in records]}
        terminal.write(json.dumps(facts, indent=2) + "\n")
    else:
        terminal.write(_table(records))


@app.command("revoke")
def revoke(
    key: Annotated[str, typer.Argument(metavar="ID_OR_NAME", help="Which key, as `freehold keys list` shows it.")],
    store: StoreOption = None,
) -> None:
    """End a key. What was stored for it stays until it is old enough to be forgotten.

    \b
    freehold keys revoke laptop
    """
    from freehold.session.store.store import Store

    with Store.open(store) as opened:
        record = opened.revoke_key(key)
        is_last = all(other.revoked_at is not None for other in opened.keys())  # noqa: SIM118
    closed = "; no key is left, and servers on this store let nobody in until there is one" if is_last else ""
    terminal.say(f"key {record.name} ({record.hint}…) opens nothing any more{closed}")


def _facts(record: "KeyRecord") -> dict[str, object]:
    facts = asdict(record)
    return facts | {field: _when(facts[field]) for field in ("created_at", "revoked_at")}


def _when(seconds: float | None) -> str | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def _table(records: "list[KeyRecord]") -> str:
    rows = [("id", "name", "secret", "requests/min", "tokens/min", "created", "state")]
    rows += [
        (
            record.id,
            "" if record.name == record.id else record.name,
            f"{record.hint}…",
            str(record.requests_per_minute or "no limit"),
            str(record.tokens_per_minute or "no limit"),
            (_when(record.created_at) or "")[:10],
            "active" if record.revoked_at is None else f"revoked {(_when(record.revoked_at) or '')[:10]}",
        )
        for record in records
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines) + "\n"
