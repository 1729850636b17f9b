"""Vocabularies, folders of documents, and the browser over them."""

import asyncio
import json
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from freehold.formats.byte_level import CHARACTERS
from freehold.formats.tokenizer import Tokenizer
from freehold.tools.browser.browser import Browser, BrowserSession
from freehold.tools.browser.content import Source
from freehold.tools.browser.documents import Documents
from tests.tools import corpus

T = TypeVar("T")


class Browsing:
    """A conversation's browser, on an event loop of its own."""

    def __init__(self, browser: Browser) -> None:
        self.browser = browser
        self._runner = asyncio.Runner()
        self.session: BrowserSession = self.run(browser.open())

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self._runner.run(work)

    def __call__(self, function: str, **arguments: Any) -> str:
        return self.run(self.session.call(f"browser.{function}", json.dumps(arguments))).text

    def close(self) -> None:
        self.run(self.session.aclose())
        self._runner.close()
        self.browser.close()


Browse = Callable[..., Browsing]


@pytest.fixture(scope="session")
def gpt_oss() -> Tokenizer:
    return Tokenizer.o200k_harmony()


@pytest.fixture(scope="session")
def small() -> Tokenizer:
    """Of all bytes and ChatML's tokens; 2 ends a text."""
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = [*control, *CHARACTERS, "**", "***"]
    types = [3 if token in control else 1 for token in tokens]
    return Tokenizer.from_gguf(tokens=tokens, token_types=types, merges=["* *", "** *"], pre="smollm")


@pytest.fixture
def browse(small: Tokenizer) -> Iterator[Browse]:
    """Opens a browser over sources, closed at the end of the test; a token is a byte, if it is not told otherwise."""
    opened: list[Browsing] = []

    def make(*sources: Source, **changed: Any) -> Browsing:
        settings: dict[str, Any] = {"tokenizer": small, "view_tokens": 4096} | changed
        opened.append(Browsing(Browser(sources=sources, **settings)))
        return opened[-1]

    yield make
    for each in opened:
        each.close()


@pytest.fixture
def docs(tmp_path: Path) -> Iterator[Callable[..., Documents]]:
    """Makes `Documents` of files given by name and text."""
    made: list[Documents] = []

    def make(files: dict[str, str | bytes] | None = None, *, root: Path | None = None) -> Documents:
        root = root or tmp_path / "docs"
        root.mkdir(exist_ok=True)
        for name, text in (files or {}).items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text if isinstance(text, bytes) else text.encode())
        made.append(Documents(root, tmp_path / f"index-{root.name}"))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture(scope="session")
def towns(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The 300 documents and where their index is, for tests that do not change them."""
    folder = tmp_path_factory.mktemp("towns") / "towns"
    corpus.write(folder)
    index = folder.parent / "index"
    documents = Documents(folder, index)
    changes = documents.refresh()
    documents.close()
    assert (changes.added, changes.skipped) == (corpus.TOWNS, {})
    return folder, index
