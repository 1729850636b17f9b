"""From what a user typed to a browser's sources."""

from pathlib import Path

import pytest

from freehold.errors import UsageError
from freehold.tools.browser.sources import open_sources
from freehold.tools.browser.web import Web
from tests.tools.conftest import Browse


def test_folders_files_and_the_web_become_sources_with_names_of_their_own(
    browse: Browse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FREEHOLD_CACHE", str(tmp_path / "cache"))
    for name in ("one/my docs", "two/my docs", "web"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "a.md").write_text(f"zebra of {name}")
    (tmp_path / "link").symlink_to(tmp_path / "web")
    steps: list[tuple[str, int, int]] = []
    sources = open_sources(
        [tmp_path / name for name in ("one/my docs", "two/my docs", "web", "link")],
        web="http://127.0.0.1:8888",
        progress=lambda *step: steps.append(step),
    )
    assert [source.name for source in sources] == ["my-docs", "my-docs-2", "web-2", "web"]
    assert isinstance(sources[-1], Web)
    assert {(label, total) for label, done, total in steps if done == total} == {
        ("indexing my-docs", 20),
        ("indexing my-docs-2", 20),
        ("indexing web-2", 12),
    }
    browsing = browse(*sources)
    assert browsing.browser.namespace.description.endswith("web-2, web (default: my-docs, my-docs-2, web-2)")
    assert browsing("search", query="zebra").count("†a.md】") == 3
    assert len(list((tmp_path / "cache" / "browser").iterdir())) == 3


def test_what_is_no_source_says_what_would_be_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FREEHOLD_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("EXA_API_KEY", raising=False)
    monkeypatch.setenv("YDC_API_KEY", "key")
    (tmp_path / "notes.md").write_text("text")
    (tmp_path / "wiki.zim").write_text("text")
    for name, message in {
        "notes.md": "is no folder and no ZIM file; name the folder that it lies in",
        "wiki.zim": "cannot be opened as a ZIM file",
        "gone": "is no folder and no ZIM file; name one that is there",
    }.items():
        with pytest.raises(UsageError, match=message):
            open_sources([tmp_path / name])
    for web, message in {"exa": "set EXA_API_KEY", "bing": "got 'bing'", "": "got ''"}.items():
        with pytest.raises(UsageError, match=message):
            open_sources([], web=web)
    (you,) = open_sources([], web="you")
    you.close()
