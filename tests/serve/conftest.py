"""Clients of a server without sockets and weights: a scripted model behind the real application."""

from collections.abc import Callable
from typing import Any

import httpx
import pytest

from freehold.serve.app import create_app
from freehold.serve.settings import ServeSettings
from freehold.session.scripted import ScriptedTurn, serve_script

Turns = list[dict[str, Any]]
MakeClient = Callable[..., httpx.AsyncClient]


def scripted_client(turns: Turns, **settings: Any) -> httpx.AsyncClient:
    """A client of a new server that says these turns."""
    app = create_app(serve_script([ScriptedTurn.from_json(turn) for turn in turns]), ServeSettings(**settings))
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://127.0.0.1:8000")


@pytest.fixture
def anyio_backend() -> str:
    """Tests that are marked `anyio` are coroutines."""
    return "asyncio"
