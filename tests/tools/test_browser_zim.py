"""A ZIM file as a source; the file is made by the tests."""

import sys
from pathlib import Path
from typing import Any

import pytest

from freehold.errors import BackendError, UsageError
from freehold.tools.base import ToolError
from freehold.tools.browser.zim import Zim
from tests.tools.conftest import Browse

libzim_writer = pytest.importorskip("libzim.writer")


class Article(libzim_writer.Item):  # type: ignore[name-defined,misc]
    def __init__(self, path: str, title: str, content: str, mimetype: str = "text/html") -> None:
        super().__init__()
        self._path, self._title, self._content, self._mimetype = path, title, content, mimetype

    def get_path(self) -> str:
        return self._path

    def get_title(self) -> str:
        return self._title

    def get_mimetype(self) -> str:
        return self._mimetype

    def get_contentprovider(self) -> Any:
        return libzim_writer.StringProvider(self._content)

    def get_hints(self) -> dict[Any, int]:
        return {libzim_writer.Hint.FRONT_ARTICLE: self._mimetype == "text/html"}


@pytest.fixture(scope="module", params=[True, False], ids=["full text", "titles"])
def zim_file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("zim") / "wiki.zim"
    pages = {
        "A/Airship": '<h1>Airship</h1><p>An airship flies, see <a href="Count%20Z">the count</a>, '
        '<a href="../I/z.png">picture</a>, <a href="https://x.org/">out</a>, <a href="../../../etc/passwd">up</a>.',
        "A/C#": "<h1>Sharp</h1><p>A language.",
        "A/Count Z": "<h1>Count</h1><p>A count【1†L1】.",
    }
    with libzim_writer.Creator(path).config_indexing(request.param, "eng") as creator:
        for name, html in pages.items():
            creator.add_item(Article(name, name[2:], f"<html><head><title>{name[2:]}</title></head><body>{html}"))
        creator.add_item(Article("I/z.png", "z", "png", "image/png"))
        creator.add_redirection("A/Zeppelin", "Zeppelin", "A/Airship", {})
        creator.set_mainpath("A/Airship")
    return path


def test_articles_are_found_opened_followed_and_cited(browse: Browse, zim_file: Path) -> None:
    browsing = browse(Zim(zim_file))
    assert "†Airship】" in browsing("search", query="airship").split("【")[1]
    page = browsing("open", id=0)
    assert page.startswith("[1] Airship (zim://wiki/A/Airship)\n")
    assert "L4: An airship flies" in page or "L4: \nL5: An" in page or "An airship flies, see 【0†the count】" in page
    assert "【2†out†x.org】" in page
    assert browsing("open", id=0).split("\n")[0] == "[2] Count Z (zim://wiki/A/Count%20Z)"
    assert browsing.session.citations("【2†L4】")[0].url == "zim://wiki/A/Count%20Z"
    assert "〖1†L1〗" in browsing("open", id="zim://wiki/A/Count%20Z")
    assert browsing("open", id="zim://wiki/A/Zeppelin").startswith("[4] Airship (zim://wiki/A/Airship)")
    for cursor, link, reason in ((1, 1, "is no text but image/png"), (1, 3, "There is no `etc/passwd` in wiki")):
        with pytest.raises(ToolError, match=reason):
            browsing("open", cursor=cursor, id=link)
    assert "A language." in browsing("open", id="zim://wiki/A/C%23#part")
    assert "Nothing was found" in browsing("search", query="submarine")


def test_what_is_no_zim_file_or_cannot_be_read_here_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.zim").write_bytes(b"nothing")
    for name in ("a.zim", "gone.zim"):
        with pytest.raises(UsageError, match="cannot be opened as a ZIM file"):
            Zim(tmp_path / name)
    monkeypatch.setitem(sys.modules, "libzim.reader", None)
    with pytest.raises(BackendError, match="pip install 'freehold\\[zim\\]'"):
        Zim(tmp_path / "a.zim")
