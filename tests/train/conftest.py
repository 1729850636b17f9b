"""gpt-oss's vocabulary and its format, of a fixed day."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from freehold.formats.chat import HarmonyFormat
from freehold.formats.conversation import SystemContent
from freehold.formats.tokenizer import Tokenizer

SYSTEM = SystemContent(date="2025-08-05")

WriteLines = Callable[..., Path]


@pytest.fixture(scope="session")
def gpt_oss() -> Tokenizer:
    return Tokenizer.o200k_harmony()


@pytest.fixture(scope="session")
def harmony(gpt_oss: Tokenizer) -> HarmonyFormat:
    return HarmonyFormat(gpt_oss, system=SYSTEM)


@pytest.fixture
def write_lines(tmp_path: Path) -> WriteLines:
    """Writes a .jsonl file of objects, and of lines that are given as text or bytes."""

    def write(*lines: Any, name: str = "chats.jsonl") -> Path:
        path = tmp_path / name
        with path.open("wb") as file:
            for line in lines:
                text = line if isinstance(line, str | bytes) else json.dumps(line)
                file.write((text.encode() if isinstance(text, str) else text) + b"\n")
        return path

    return write
