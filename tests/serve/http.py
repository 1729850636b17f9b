"""Requests to an application without sockets, and what its streams say."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import httpx
import httpx2
from fastapi import FastAPI
from openai import AsyncOpenAI

from freehold.engine.metrics import EngineMetrics, EngineStats
from freehold.engine.request import Request
from freehold.serve.app import create_app
from freehold.serve.settings import ServeSettings
from freehold.session.scripted import ScriptedTurn, serve_script
from freehold.session.served import AsyncRunner, Served, Steps

_T = TypeVar("_T")


def scripted(*turns: dict[str, Any], speed: float | None = None) -> Served:
    return serve_script([ScriptedTurn.from_json(turn) for turn in turns], tokens_per_second=speed)


def post(served: Served, path: str, body: Any, **settings: Any) -> httpx.Response:
    """One request, to an application of its own."""
    (response,) = post_all(served, path, [body], **settings)
    return response


def post_all(served: Served, path: str, bodies: Sequence[Any], **settings: Any) -> list[httpx.Response]:
    """Requests one after the other, to one application."""

    async def send() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app=create_app(served, ServeSettings(**settings)))
        headers = {"content-type": "application/json"}
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000", headers=headers) as client:
            return [await client.post(path, content=json.dumps(body)) for body in bodies]

    return asyncio.run(send())


def with_sdk(served: Served, use: Callable[[AsyncOpenAI], Awaitable[_T]]) -> _T:
    """What is made with OpenAI's own client."""

    async def run() -> _T:
        transport = httpx2.ASGITransport(app=create_app(served))
        async with AsyncOpenAI(
            api_key="none",
            base_url="http://127.0.0.1:8000/v1",
            max_retries=0,
            http_client=httpx2.AsyncClient(transport=transport),
        ) as client:
            return await use(client)

    return asyncio.run(run())


def chunks_of(response: httpx.Response) -> list[dict[str, Any]]:
    """The events of a stream, which ends in [DONE]."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    assert all(event.startswith("data: ") and "\n" not in event for event in events)
    return [json.loads(event.removeprefix("data: ")) for event in events]


class Recorder:
    """A runner that keeps the requests that it hands on."""

    def __init__(self, runner: AsyncRunner) -> None:
        self.requests: list[Request] = []
        self.metrics: EngineMetrics = runner.metrics
        self._runner = runner

    def submit(self, request: Request) -> Steps:
        self.requests.append(request)
        return self._runner.submit(request)

    def stats(self) -> EngineStats:
        return self._runner.stats()

    async def drain(self, timeout: float | None = None) -> None:
        await self._runner.drain(timeout)


def requests_of(served: Served, path: str, bodies: Sequence[Any]) -> list[Request]:
    """What each of these bodies asks of the engine."""
    recorder = Recorder(served.runner)
    for response in post_all(replace(served, runner=recorder), path, bodies):
        assert response.status_code == 200, response.text
    return recorder.requests


async def vanish(app: FastAPI, path: str, body: Any, *, once: Callable[[], bool]) -> list[Any]:
    """A client that sends a request, and goes away once something is so; what it was sent until then."""
    sent: list[Any] = []
    messages = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        while not once():
            await asyncio.sleep(0.001)
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(b"host", b"127.0.0.1:8000"), (b"content-type", b"application/json")],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 8000),
        "state": {},
    }
    await asyncio.wait_for(app(scope, receive, send), 60)
    return sent
