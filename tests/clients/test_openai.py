"""OpenAI's own SDK, in the versions that are in use: 3.x, and the 2.x that litellm and aider bring."""

import os
import sys
from collections.abc import Iterator

import pytest

from tests.clients.running import Client, Serving, steps_of

OTHER = os.environ.get("FREEHOLD_TEST_LITELLM_PYTHON")


@pytest.fixture(scope="module", params=["3.x", "2.x"])
def openai(request: pytest.FixtureRequest) -> Iterator[Client]:
    python = sys.executable if request.param == "3.x" else OTHER
    if python is None:
        pytest.skip("FREEHOLD_TEST_LITELLM_PYTHON names no interpreter with openai 2.x")
    with Client("with_openai", python=python) as client:
        client.does(f"is_version_{request.param[0]}", "")
        yield client


@pytest.mark.parametrize("step", [step for step in steps_of("with_openai") if not step.startswith(("is_", "smoke"))])
def test_openai(openai: Client, scripted: Serving, step: str) -> None:
    openai.does(step, scripted.url)


def test_openai_and_the_default_model(openai: Client, default: Serving) -> None:
    openai.does("smoke_of_the_default_model", default.url)
