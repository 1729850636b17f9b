"""The libraries that people reach a model by, each against a scripted server and once against the default model."""

import os
import sys
from collections.abc import Iterator

import pytest

from tests.clients.running import Client, Serving, steps_of

PROGRAMS = ("with_agents", "with_anthropic", "with_langchain", "with_litellm")


@pytest.fixture(scope="module")
def client(request: pytest.FixtureRequest) -> Iterator[Client]:
    python: str | None = sys.executable
    if request.param == "with_litellm":
        python = os.environ.get("FREEHOLD_TEST_LITELLM_PYTHON")
    if python is None:
        pytest.skip("FREEHOLD_TEST_LITELLM_PYTHON names no interpreter with litellm")
    with Client(request.param, python=python) as client:
        yield client


SMOKE = "smoke_of_the_default_model"
STEPS = [(program, step) for program in PROGRAMS for step in steps_of(program)]


@pytest.mark.parametrize(
    ("client", "step"), [(program, step) for program, step in STEPS if step[0].islower() and step != SMOKE], indirect=["client"]
)
def test_library(client: Client, scripted: Serving, step: str) -> None:
    client.does(step, scripted.url)


@pytest.mark.parametrize("client", PROGRAMS, indirect=True)
def test_library_and_the_default_model(client: Client, default: Serving) -> None:
    client.does(SMOKE, default.url)
