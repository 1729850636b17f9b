"""llm, as the program that people type."""

import json
import subprocess
import sys
from pathlib import Path

from tests.clients.documented import shown
from tests.clients.running import Serving, bare_environment


def llm(folder: Path, server: Serving, *words: str) -> str:
    """What it prints."""
    (folder / "extra-openai-models.yaml").write_text(shown("llm", "yaml", server.url))
    done = subprocess.run(
        [sys.executable, "-m", "llm", *words],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env=bare_environment() | {"LLM_USER_PATH": str(folder)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_llm_answers_whole_and_streamed_and_goes_on(scripted: Serving, tmp_path: Path) -> None:
    assert llm(tmp_path, scripted, "-m", "freehold", "--no-stream", "Say hello") == "Hello there, friend."
    assert llm(tmp_path, scripted, "-m", "freehold", "My name is Ada") == "Hello, Ada."
    assert llm(tmp_path, scripted, "-m", "freehold", "--continue", "Who am I?") == "You are Ada."


def test_llm_lets_the_model_call_its_tools(scripted: Serving, tmp_path: Path) -> None:
    said = llm(tmp_path, scripted, "-m", "freehold", "-T", "llm_version", "Which version of llm is this?")
    assert said == "That is the version."


def test_llm_asks_for_a_schema(scripted: Serving, tmp_path: Path) -> None:
    said = llm(tmp_path, scripted, "-m", "freehold", "--schema", "city, people int", "Describe a city")
    assert json.loads(said) == {"city": "Rome", "people": 3}


def test_llm_and_the_default_model(default: Serving, tmp_path: Path) -> None:
    options = ("-o", "max_tokens", "80", "-o", "temperature", "0")
    assert "Paris" in llm(tmp_path, default, "-m", "freehold", *options, "What is the capital of France?")
