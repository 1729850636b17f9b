"""The whole server without sockets, for two callers with keys: what it is sent, says, logs, and holds afterwards."""

import asyncio
import io
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from starlette.types import Message, Scope

from freehold.engine.request import Request
from freehold.serve import journal
from freehold.serve.app import create_app
from freehold.serve.guard import guard
from freehold.serve.keys import Keys
from freehold.serve.server import Server
from freehold.serve.settings import ServeSettings
from freehold.serve.threads import Threads
from freehold.serve.tuning.models import TunedModels
from freehold.serve.tuning.trainer import Trainer
from freehold.serve.tuning.tuning import Tuning
from freehold.serve.tuning.workshop import Workshop
from freehold.session.scripted import ScriptedTurn, serve_script
from freehold.session.served import Served
from freehold.session.store.store import Store
from tests.serve.http import Recorder

_LOGGERS = ("freehold", "uvicorn", "uvicorn.access", "uvicorn.error", "asyncio")


@contextmanager
def logged() -> Iterator[io.StringIO]:
    """Everything that is logged meanwhile, one JSON object a line."""
    kept = [(each, each.handlers, each.propagate, each.level) for each in map(logging.getLogger, _LOGGERS)]
    stream = io.StringIO()
    journal.start_logging(as_json=True, stream=stream)
    try:
        yield stream
    finally:
        for each, handlers, propagate, level in kept:
            each.handlers, each.propagate = handlers, propagate
            each.setLevel(level)


@dataclass(frozen=True)
class Told:
    """An answer."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        found = self.json["error"]
        assert isinstance(found, dict)
        return found


class Fortress:
    """Guards, endpoints and store as `freehold serve` puts them together, over a script. Use it with `with`.

    `alice` and `bob` are the secrets of two keys; who does not say which one sends alice's.
    """

    def __init__(self, folder: Path, *turns: Mapping[str, Any], served: Served | None = None, **settings: Any) -> None:
        self.store = Store.open(f"sqlite:///{folder / 'freehold.db'}", patience_seconds=settings.pop("patience", 30.0))
        self.alice, self.bob = (self.store.create_key(name)[1] for name in ("alice", "bob"))
        speed = settings.pop("tokens_per_second", None)
        served = served or serve_script([ScriptedTurn.from_json(turn) for turn in turns], tokens_per_second=speed)
        self.runner = Recorder(served.runner)
        self.workshop = Workshop.open(folder / "tuning")
        self.tuning = Tuning(  # its queue stands still: nothing is ever trained
            self.workshop,
            self.store,
            TunedModels(self.workshop.root, Threads("tuning", 1), None),
            trainer=Trainer(model="m", learning_rates={"supervised": 1e-4, "dpo": 1e-4}, command=("/bin/false",)),
        )
        self.app = create_app(
            replace(served, runner=self.runner), ServeSettings(**settings), store=self.store, tuning=self.tuning
        )
        self.server: Server = self.app.state.server
        self.guarded = guard(self.app, keys=Keys(self.store.keys_by_hash), gate=self.server.gate)
        self._loop = asyncio.Runner()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(RuntimeError):  # of another loop, where a server ran on one of its own
            self._loop.run(self.server.background.finish(30))
        self._loop.close()
        self.store.close()
        self.workshop.close()

    @property
    def prompts(self) -> list[Request]:
        """What was asked of the engine."""
        return self.runner.requests

    def run(self, work: Any) -> Any:
        return self._loop.run(asyncio.wait_for(work, 60))

    def ask(self, path: str, body: Any = None, **more: Any) -> Told:
        told: Told = self.run(self.send(path, body, **more))
        return told

    async def send(
        self,
        path: str,
        body: Any = None,
        *,
        method: str = "POST",
        key: str | None = None,
        query: str = "",
        headers: Mapping[str, str] | None = None,
        gone_after: int | None = None,
    ) -> Told:
        """One request. `body` is sent as it is where it is bytes. The client goes away after so many messages."""
        content = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        named = {"host": "localhost:8000", "authorization": f"Bearer {key or self.alice}"}
        if content:
            named |= {"content-type": "application/json", "content-length": str(len(content))}
        named |= headers or {}
        scope: Scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http",
            "path": path, "raw_path": path.encode(), "root_path": "", "query_string": query.encode(),
            "headers": [(name.lower().encode(), value.encode("latin-1")) for name, value in named.items()],
            "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 8000),
        }  # fmt: skip
        incoming = [content]
        sent: list[Message] = []
        gone = asyncio.Event()
        if gone_after == 0:
            gone.set()

        async def receive() -> Message:
            if incoming:
                return {"type": "http.request", "body": incoming.pop(), "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            sent.append(message)
            if len(sent) == gone_after:
                gone.set()
            await asyncio.sleep(0)  # a client reads

        await self.guarded(scope, receive, send)
        if not sent:
            return Told(0, {}, b"")
        got = {name.decode(): value.decode("latin-1") for name, value in sent[0]["headers"]}
        return Told(sent[0]["status"], got, b"".join(message.get("body", b"") for message in sent[1:]))

    def held(self) -> tuple[int, int, int]:
        """Places of the gate, requests of the runner, and tasks that are left."""
        left: int = self._loop.run(_left())
        return self.server.gate.taken, self.runner.stats().running, left


async def _left() -> int:
    """Tasks besides this one, once all have had their turn."""
    for _ in range(10):
        await asyncio.sleep(0)
    return len([task for task in asyncio.all_tasks() if not task.done()]) - 1
