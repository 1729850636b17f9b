"""The servers that the clients call: one that says a script, one with the default model."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path

import pytest

from tests.clients.running import Client, Serving, serving
from tests.clients.turns import TURNS

LITELLM_PYTHON = os.environ.get("FREEHOLD_TEST_LITELLM_PYTHON")


@pytest.fixture(scope="session")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """Answers to `gpt-5.5` as well: Codex knows that name, and offers it a tool that it offers to no stranger.

    Whatever clients do to it, nothing that was said stands in its log, and no fault but the scripted one.
    """
    folder = tmp_path_factory.mktemp("scripted")
    script = folder / "turns.jsonl"
    script.write_text("".join(json.dumps(turn) + "\n" for turn in TURNS))
    with serving(folder, "--script", str(script), "--served-model-name", "gpt-5.5") as server:
        yield server
    complaints = [record["message"] for record in server.records() if record["level"] != "notice"]
    assert [said for said in complaints if not said.startswith("a stream failed: RequestError at ")] == []
    log = server.log.read_text()
    assert [word for word in ("Rome", "Ada", "friend", "greet.py", "degrees") if word in log] == []


@pytest.fixture(scope="session")
def default(tmp_path_factory: pytest.TempPathFactory, default_folder: Path) -> Iterator[Serving]:
    """The default model, in a small context."""
    with serving(tmp_path_factory.mktemp("default"), "--context", "2048") as server:
        yield server


@pytest.fixture(scope="module")
def client_of() -> Iterator[Callable[[str, bool], Client]]:
    """The process that runs a program's functions; with litellm and the openai 2.x that it brings, if asked for."""
    with ExitStack() as stack:

        @cache
        def start(program: str, beside_litellm: bool = False) -> Client:
            python = LITELLM_PYTHON if beside_litellm else sys.executable
            if python is None:
                pytest.skip("FREEHOLD_TEST_LITELLM_PYTHON names no interpreter with litellm")
            return stack.enter_context(Client(program, python=python))

        yield start
