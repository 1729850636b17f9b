"""A server of scripted responses with a store, for callers of several names, and what it says read back."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import httpx2
from openai import AsyncOpenAI
from openai.types.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from freehold.serve.app import create_app
from freehold.serve.caller import Caller
from freehold.serve.hosted import HostedTools
from freehold.serve.responses.seal import Sealer
from freehold.serve.server import Server
from freehold.serve.settings import ServeSettings
from freehold.session.scripted import ScriptedTurn, serve_script
from freehold.session.store.store import Store
from tests.serve.event_order import EventOrder
from tests.serve.sdk import check

PRIVATE = "_call"
"""What stored items have and nobody is shown."""

WEATHER = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    "strict": True,
}
LOOK_UP = {"reasoning": "Look it up.", "calls": [{"name": "get_weather", "arguments": {"city": "Rome"}}]}
SUNNY = {"reasoning": "Sunny, then.", "answer": "It is sunny."}


class Named:
    """The door, for tests: who asks says so in a header."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if owner := dict(scope.get("headers", ())).get(b"x-owner", b"").decode():
            scope["state"] = {**scope.get("state", {}), "caller": Caller(owner=owner, salt=owner)}
        await self._app(scope, receive, send)


class Responding:
    """`http` and `sdk` are clients of the server; use it with `async with`."""

    def __init__(
        self,
        *turns: Mapping[str, Any],
        path: Path | None = None,
        sealer: Sealer | None = None,
        tokens_per_second: float | None = None,
        context: int | None = None,
        template: str | None = None,
        tools: HostedTools | None = None,
        **settings: Any,
    ) -> None:
        self.store = None if path is None else Store.open(f"sqlite:///{path / 'responses.db'}")
        served = serve_script([ScriptedTurn.from_json(turn) for turn in turns], tokens_per_second=tokens_per_second)
        if context is not None:
            served = replace(served, prompting=replace(served.prompting, context=context))
        if template is not None:
            prompting = replace(served.prompting, chat_template=template)
            served = replace(served, prompting=prompting, harmony=False)
        self.app = app = create_app(served, ServeSettings(**settings), store=self.store, sealer=sealer, tools=tools)
        self.server: Server = app.state.server
        self.warnings = ""  # of the response that was made last
        self.http = httpx.AsyncClient(transport=httpx.ASGITransport(app=Named(app)), base_url="http://127.0.0.1:8000")
        self.sdk = AsyncOpenAI(
            api_key="none",
            base_url="http://127.0.0.1:8000/v1",
            http_client=httpx2.AsyncClient(transport=httpx2.ASGITransport(app=Named(app))),
            max_retries=0,
        )

    async def __aenter__(self) -> "Responding":
        if self.server.tools is not None:
            await self.server.tools.connect()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.server.background.finish()
        if self.server.tools is not None:
            await self.server.tools.aclose()
        await self.http.aclose()
        await self.sdk.close()
        if self.store is not None:
            self.store.close()

    async def make(self, *, owner: str = "", **body: Any) -> dict[str, Any]:
        """A response that has to be one; read as a stream where the body says so."""
        answer = await self.http.post("/v1/responses", json=body, headers=_of(owner))
        assert answer.status_code == 200, answer.text
        assert f'"{PRIVATE}"' not in answer.text
        self.warnings = answer.headers.get("x-freehold-warnings", "")
        if body.get("stream"):
            return EventOrder.of(events_of(answer.text))
        response: dict[str, Any] = answer.json()
        check(Response, response)
        return response

    async def refused(self, status: int = 400, *, owner: str = "", **body: Any) -> dict[str, Any]:
        """The error that these fields are answered with."""
        answer = await self.http.post("/v1/responses", json=body, headers=_of(owner))
        assert answer.status_code == status, answer.text
        error: dict[str, Any] = answer.json()["error"]
        return error

    async def get(self, path: str, status: int = 200, *, owner: str = "", method: str = "GET", **query: Any) -> Any:
        answer = await self.http.request(method, f"/v1/{path}", params=query, headers=_of(owner))
        assert answer.status_code == status, answer.text
        assert f'"{PRIVATE}"' not in answer.text
        return answer.json() if "json" in answer.headers["content-type"] else answer.text


def _of(owner: str) -> dict[str, str]:
    return {"x-owner": owner} if owner else {}


def events_of(text: str) -> list[dict[str, Any]]:
    """The events of a stream's text, which has to end as streams do."""
    blocks = [block for block in text.split("\n\n") if block and not block.startswith(":")]
    assert blocks.pop() == "data: [DONE]"
    events = []
    for block in blocks:
        name, data = block.split("\n")
        event: dict[str, Any] = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        events.append(event)
    return events


def result_of(response: Mapping[str, Any], output: str = "sunny") -> dict[str, Any]:
    """What the client sends for the first call of a response."""
    call = next(item for item in response["output"] if item["type"] in ("function_call", "custom_tool_call"))
    return {"type": f"{call['type']}_output", "call_id": call["call_id"], "output": output}
