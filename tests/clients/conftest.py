"""The servers that the clients call: one that says a script, one with the default model."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients.running import Serving, serving
from tests.clients.turns import TURNS


@pytest.fixture(scope="session")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """Answers to `gpt-5.5` as well: Codex knows that name, and offers it a tool that it offers to no stranger."""
    folder = tmp_path_factory.mktemp("scripted")
    script = folder / "turns.jsonl"
    script.write_text("".join(json.dumps(turn) + "\n" for turn in TURNS))
    with serving(folder, "--script", str(script), "--served-model-name", "gpt-5.5") as server:
        yield server


@pytest.fixture(scope="session")
def default(tmp_path_factory: pytest.TempPathFactory, default_folder: Path) -> Iterator[Serving]:
    """The default model, in a small context."""
    with serving(tmp_path_factory.mktemp("default"), "--context", "2048") as server:
        yield server
