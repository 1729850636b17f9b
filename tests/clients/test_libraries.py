"""The libraries that people reach a model by, each against a scripted server and once against the default model.

OpenAI's own in both versions that are in use: 3.x, and the 2.x that litellm and aider bring.
"""

from collections.abc import Callable

import pytest

from tests.clients.documented import shown
from tests.clients.running import Client, Serving, steps_of

LIBRARIES = {
    "openai 3.x": ("with_openai", False),
    "openai 2.x": ("with_openai", True),
    "openai-agents": ("with_agents", False),
    "anthropic": ("with_anthropic", False),
    "langchain": ("with_langchain", False),
    "litellm": ("with_litellm", True),
}
SMOKE = "smoke_of_the_default_model"
STEPS = [(name, step) for name, (program, _) in LIBRARIES.items() for step in steps_of(program) if step != SMOKE]

ClientOf = Callable[[str, bool], Client]


@pytest.mark.parametrize(("library", "step"), STEPS)
def test_library(client_of: ClientOf, scripted: Serving, library: str, step: str) -> None:
    client_of(*LIBRARIES[library]).does(step, scripted.url)


@pytest.mark.parametrize("library", LIBRARIES)
def test_library_and_the_default_model(client_of: ClientOf, default: Serving, library: str) -> None:
    client_of(*LIBRARIES[library]).does(SMOKE, default.url)


def test_the_openai_libraries_are_the_versions_that_are_meant(client_of: ClientOf) -> None:
    for version in ("3.x", "2.x"):
        client_of(*LIBRARIES[f"openai {version}"]).does("_is_version", version[0])


@pytest.mark.parametrize(
    ("library", "section"),
    [
        ("openai 3.x", "OpenAI SDK"),
        ("openai 2.x", "OpenAI SDK"),
        ("openai-agents", "OpenAI Agents SDK"),
        ("anthropic", "Anthropic SDK"),
        ("langchain", "LangChain"),
        ("litellm", "litellm"),
    ],
)
def test_what_the_page_about_clients_shows_runs(
    client_of: ClientOf, scripted: Serving, library: str, section: str
) -> None:
    client_of(*LIBRARIES[library]).runs(shown(section, "python", scripted.url))
