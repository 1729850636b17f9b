"""A server that fine-tunes, without sockets: clients of it, and its folder."""

import asyncio
import json
import sys
import threading
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Self, TypeVar

import httpx
import httpx2
from openai import AsyncOpenAI

from freehold.errors import FreeholdError
from freehold.serve.app import create_app
from freehold.serve.bodies import Bodies
from freehold.serve.server import Server
from freehold.serve.threads import Threads
from freehold.serve.tuning.models import TunedModels
from freehold.serve.tuning.trainer import Trainer
from freehold.serve.tuning.tuning import Tuning, TuningLimits
from freehold.serve.tuning.workshop import Workshop
from freehold.session.store.store import Store
from tests.serve.http import scripted
from tests.serve.responding import Named
from tests.serve.trainer import LEARNING_RATES

_T = TypeVar("_T")
LINES = b'{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}\n'
STARTED: dict[str, Any] = {"event": "started", "step": 0}
DONE: tuple[dict[str, Any], ...] = ({"adapter": "learnt"}, {"event": "done", "step": 2})


def step(number: int, loss: float, **more: Any) -> dict[str, Any]:
    return {"step": number, "steps": 2, "loss": loss, "tokens": 100 * number, **more}


WELL: tuple[dict[str, Any], ...] = (
    STARTED,
    step(1, 2.0),
    {"event": "checkpoint", "step": 1, "path": "/elsewhere"},
    step(2, 1.0, validation_loss=1.5),
    {"event": "checkpoint", "step": 2, "path": "/elsewhere"},
    *DONE,
)


class Tuned:
    """Use it with `async with`. Several may follow one another over one folder, as servers do."""

    def __init__(
        self,
        folder: Path,
        lines: Sequence[Any] | None = WELL,
        *,
        runs: bool = True,
        refuses: Sequence[FreeholdError] = (),
        most_held: int = 16,
        **limits: int,
    ) -> None:
        """`lines` are what a training does, None is a server without one. Its queue `runs`, or stands still. The model
        refuses so many adapters, one after the other, before it takes any."""
        self.folder = folder
        self.script = folder / "script.jsonl"
        if lines is not None:
            self.script.write_text("\n".join(map(json.dumps, lines)))
        self.store = Store.open(f"sqlite:///{folder / 'freehold.db'}")
        self.workshop = Workshop.open(folder / "tuning")
        self.adapters: dict[str, Path] = {}
        self._refuses = [*refuses]
        self.adding, self.slow = False, threading.Event()  # an adapter is being read, for as long as this is not set
        self.slow.set()
        command = (sys.executable, str(Path(__file__).with_name("trainer.py")), str(self.script))
        trainer = None if lines is None else Trainer(model="/models/m", learning_rates=LEARNING_RATES, command=command)
        threads = Threads("tuning", 2)
        models = TunedModels(
            self.workshop.root, threads, self._add_adapter, self.adapters.__delitem__, most_held=most_held
        )
        most, seconds = limits.pop("max_upload_bytes", 1 << 20), limits.pop("read_seconds", 30)
        self.tuning = Tuning(
            self.workshop, self.store, models, trainer=trainer, limits=TuningLimits(**limits), threads=threads,
            poll_seconds=0.02, stop_seconds=0.5, retry_seconds=0.05,
        )  # fmt: skip
        served = scripted({"match": "", "answer": "ok"})
        served = replace(served, prompting=replace(served.prompting, adapters=self.adapters))
        self.app = create_app(served, store=self.store, tuning=self.tuning)
        self.server: Server = self.app.state.server
        self._door = Named(Bodies(self.app, max_upload_bytes=most, read_seconds=seconds))
        self._runs = runs
        self._queue: asyncio.Task[None] | None = None
        self._open = AsyncExitStack()

    def _add_adapter(self, name: str, folder: Path) -> None:
        self.adding = True
        self.slow.wait()
        if self._refuses:
            raise self._refuses.pop(0)
        assert name not in self.adapters
        self.adapters[name] = folder

    def refuse(self, error: FreeholdError) -> None:
        """The next adapter."""
        self._refuses.append(error)

    async def __aenter__(self) -> Self:
        await self.tuning.open()
        if self._runs:
            self._queue = asyncio.create_task(self.tuning.run())
        self.http = await self._open.enter_async_context(
            httpx.AsyncClient(transport=httpx.ASGITransport(app=self._door), base_url="http://127.0.0.1:8000")
        )
        self.sdk = await self._open.enter_async_context(self.client("alice"))
        return self

    def client(self, owner: str) -> AsyncOpenAI:
        transport = httpx2.ASGITransport(app=self._door)
        http = httpx2.AsyncClient(transport=transport, headers={"x-owner": owner})
        return AsyncOpenAI(
            api_key="none", base_url="http://127.0.0.1:8000/v1", max_retries=0, http_client=http, default_headers=None
        )

    async def __aexit__(self, *_: object) -> None:
        await self.tuning.stop()
        if self._queue is not None:
            await self._queue
        await self._open.aclose()
        self.store.close()
        self.workshop.close()

    async def upload(self, data: bytes = LINES, name: str = "chats.jsonl") -> str:
        return (await self.sdk.files.create(file=(name, data), purpose="fine-tune")).id

    async def ended(self, job_id: str) -> dict[str, Any]:
        """The job, once it has."""
        async with asyncio.timeout(60):
            while (job := (await self.sdk.fine_tuning.jobs.retrieve(job_id)).to_dict())["status"] not in (
                "succeeded",
                "failed",
                "cancelled",
            ):
                await asyncio.sleep(0.01)
        return job

    async def tuned_model(self, model: str, training: str) -> str:
        """The name of what comes of a job."""
        job = await self.sdk.fine_tuning.jobs.create(model=model, training_file=training)
        return str((await self.ended(job.id))["fine_tuned_model"])

    async def until_status(self, job_id: str, status: str) -> None:
        async with asyncio.timeout(60):
            while (await self.sdk.fine_tuning.jobs.retrieve(job_id)).status != status:
                await asyncio.sleep(0.01)

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(60):
            while not condition():
                await asyncio.sleep(0.01)

    async def waits(self, job_id: str) -> None:
        """Until its training does nothing any more, and lives."""
        await self.until((self.workshop.job(job_id) / "waits").exists)

    @property
    def files(self) -> list[str]:
        """What lies in the folder of files, hidden ones too."""
        return sorted(path.name for path in (self.workshop.root / "files").iterdir())


def run(work: Awaitable[_T]) -> _T:
    async def limited() -> _T:
        return await asyncio.wait_for(work, 120)

    return asyncio.run(limited())
