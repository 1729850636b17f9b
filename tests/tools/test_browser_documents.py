"""A folder as a source: what is found again, what is never opened, and what the index survives."""

import asyncio
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import BinaryIO

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from freehold.errors import DiskError, UsageError
from freehold.tools.base import ToolError
from freehold.tools.browser import apart, markup, pdf
from freehold.tools.browser import documents as documents_module
from freehold.tools.browser import index as index_module
from freehold.tools.browser.apart import UnreadableError
from freehold.tools.browser.documents import Documents
from freehold.tools.browser.folder import Folder
from freehold.tools.browser.index import Index, StoppedError
from tests.tools import corpus

MakeDocs = Callable[..., Documents]


def names(documents: Documents, query: str, topn: int = 20) -> list[str]:
    documents._looked = float("-inf")  # as if the last look were long ago
    return sorted(hit.place for hit in asyncio.run(documents.search(query, topn)))


def test_only_what_changed_is_indexed_again(docs: MakeDocs, tmp_path: Path) -> None:
    documents = docs({f"d/{n}.md": f"number{n} common" for n in range(20)})
    steps: list[tuple[str, int, int]] = []
    first = documents.refresh(progress=lambda *step: steps.append(step))
    assert (first.added, first.changed, first.removed) == (20, 0, 0)
    assert {label for label, _, _ in steps} == {"indexing"}
    assert steps[-1][1] == steps[-1][2] == sum(path.stat().st_size for path in (tmp_path / "docs/d").iterdir())
    root = tmp_path / "docs" / "d"
    assert documents.refresh()[:4] == (0, 0, 0, 20)

    (root / "3.md").write_text("number3 edited")
    (root / "4.md").unlink()
    (root / "5.md").rename(root / "moved.md")
    os.utime(root / "6.md", ns=(1, 1))  # touched only
    before = (root / "7.md").stat()
    (root / "7.md").write_text("number8 common")  # as long as before, and dated back
    os.utime(root / "7.md", ns=(before.st_atime_ns, before.st_mtime_ns))
    changes = documents.refresh()
    assert (changes.added, changes.changed, changes.removed) == (1, 2, 2)
    assert names(documents, "edited") == ["d/3.md"]
    assert names(documents, "number4") == []
    assert names(documents, "number5") == ["d/moved.md"]
    assert names(documents, "number7") == []
    assert names(documents, "number8") == ["d/7.md", "d/8.md"]


def test_an_index_inside_its_folder_is_not_indexed(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("alpha")
    documents = Documents(tmp_path, tmp_path / "index")
    assert documents.refresh().added == 1
    assert documents.refresh()[:4] == (0, 0, 0, 1)
    documents.close()


def test_a_search_sees_an_edit_at_once(docs: MakeDocs, tmp_path: Path) -> None:
    documents = docs({"a.md": "before"})
    assert names(documents, "before") == ["a.md"]
    (tmp_path / "docs" / "a.md").write_text("behind")
    assert (names(documents, "before"), names(documents, "behind")) == ([], ["a.md"])


def test_a_first_index_that_took_long_does_not_hide_an_edit(
    docs: MakeDocs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [1000.0]
    for module in (documents_module, index_module):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock[0], time_ns=time.time_ns))
    documents = docs({"a.md": "before"})

    def an_hour(label: str, done: int, total: int) -> None:
        clock[0] += 3600

    documents.refresh(progress=an_hour)
    clock[0] += 1
    (tmp_path / "docs" / "a.md").write_text("changed since")
    assert [hit.summary for hit in asyncio.run(documents.search("changed", 3))] == ["changed since"]


def test_a_search_does_not_wait_until_pieces_of_the_index_are_merged(
    docs: MakeDocs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents, searched = docs({"a.md": "before"}), threading.Event()
    documents.refresh()
    merged: list[bool] = []
    merge = index_module._Merge.__call__

    def merges_at_leisure(each: index_module._Merge) -> None:
        merged.append(searched.wait(60))
        merge(each)

    monkeypatch.setattr(index_module._Merge, "__call__", merges_at_leisure)
    (tmp_path / "docs" / "a.md").write_text("behind the times")
    assert names(documents, "behind") == ["a.md"]
    assert not merged
    assert documents._index.refresh(wait=0) is None  # nobody else writes meanwhile
    searched.set()
    documents.close()
    assert merged == [True]
    assert documents._index.refresh(wait=0) is not None


def test_every_kind_and_script_is_found(docs: MakeDocs) -> None:
    documents = docs(
        {
            "notes.txt": "Grüße aus Köln, naïve façade",
            "latin.txt": "pi\u00f1ata".encode("latin-1"),
            "wide.txt": "\ufeffutfsixteen".encode("utf-16-le"),
            "日本.md": "東京は日本の首都です。",
            "code.rs": "fn parse_header(input: &str) {}",
            "page.html": "<meta charset=iso-8859-1><p>caf\u00e9 <i>society</i>".encode("latin-1"),
            "print.pdf": corpus.pdf([["first page"], ["quicksilver"]], title="Metals"),
            "lies.pdf": corpus.pdf([["aluminium"]]).replace(b"/Count 1", b"/Count 9"),
            "torn.pdf": corpus.pdf([["page"], ["tungsten"]]).replace(b"/Kids [6", b"/Kids [1"),
            "download": corpus.pdf([["molybdenum"]]),
            "Re: plans #2.txt": "osmium",
            "long.txt": "x" * 10_000 + " needle " + "y" * 10_000,
            "empty.md": "",
        }
    )
    for query, name in {
        "koln": "notes.txt",
        "piñata": "latin.txt",
        "utfsixteen": "wide.txt",
        "首都": "日本.md",
        "parse header": "code.rs",
        "CAFÉ": "page.html",
        "quicksilver": "print.pdf",
        "metals": "print.pdf",
        "needle": "long.txt",
        "empty": "empty.md",
        '"first page" AND (': "print.pdf",
        "aluminium": "lies.pdf",
        "tungsten": "torn.pdf",
        "molybdenum": "download",
        'the "osmium': "Re: plans #2.txt",
        "'osmium yields": "Re: plans #2.txt",
    }.items():
        assert names(documents, query)[:1] == [name], query
    assert asyncio.run(documents.fetch("Re: plans #2.txt")).text == "osmium"
    assert asyncio.run(documents.fetch("torn.pdf")).page_lines == (0, 4)


def test_what_cannot_be_read_is_named_and_left_out(
    docs: MakeDocs, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("freehold.tools.browser.folder.MAX_FILE_BYTES", 1000)
    documents = docs(
        {
            "good.md": "readable",
            "big.txt": "large " * 1000,
            "broken.pdf": b"%PDF-1.7 nothing of the kind",
            "binary.dat": b"\0\1\2 readable",
            "picture.png": b"readable",
        }
    )
    odd = os.fsencode(tmp_path) + b"/docs/\xff.md"
    Path(os.fsdecode(odd)).write_text("readable")
    read: list[int] = []
    digest = index_module._digest

    def noted(file: BinaryIO) -> bytes:
        read.append(os.fstat(file.fileno()).st_size)
        return digest(file)

    monkeypatch.setattr(index_module, "_digest", noted)
    (tmp_path / "docs" / "dangling.md").symlink_to("missing")
    os.mkfifo(tmp_path / "docs" / "pipe.md")
    with caplog.at_level(logging.WARNING, "freehold"):
        changes = documents.refresh()
    assert changes.skipped.keys() == {"big.txt", "broken.pdf", "?.md"}
    assert max(read) < 1000  # what is too large is not read to the end for nothing
    assert f"{tmp_path}/docs/broken.pdf is left out: it is damaged, or no PDF" in caplog.text
    assert "big.txt is left out: it is larger than 0 MiB" in caplog.text
    assert names(documents, "readable") == ["good.md"]
    caplog.clear()
    assert documents.refresh().skipped.keys() == changes.skipped.keys()
    assert not caplog.text  # a search is no reason to say it again
    with pytest.raises(ToolError, match=r"`broken.pdf` cannot be opened: it is damaged"):
        asyncio.run(documents.fetch("broken.pdf"))
    with pytest.raises(ToolError, match=r"`binary.dat` is no text"):
        asyncio.run(documents.fetch("binary.dat"))
    (tmp_path / "docs" / "broken.pdf").write_bytes(corpus.pdf([["mended"]]))
    assert documents.refresh().changed == 1
    assert names(documents, "mended") == ["broken.pdf"]


def test_a_folder_that_cannot_be_listed_takes_nothing_away(
    docs: MakeDocs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = docs({"in/a.md": "apple", "b.md": "banana"})
    documents.refresh()
    real = os.scandir

    def refuses(path: str) -> object:
        if str(path).rstrip("/").endswith("/in"):
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr("os.scandir", refuses)  # the tests may run as root, whom permissions do not stop
    assert documents.refresh().skipped == {"in": "permission denied"}
    assert names(documents, "apple") == ["in/a.md"]
    monkeypatch.undo()
    shutil.rmtree(tmp_path / "docs")
    with pytest.raises(DiskError, match="cannot be read: there is no such file"):
        documents.refresh()
    with pytest.raises(UsageError, match="is no folder"):
        Documents(tmp_path / "docs", tmp_path / "index")


OUTSIDE_OR_HIDDEN = (
    "../secret.md",
    "sub/../../secret.md",
    "{root}/../secret.md",
    "file://{root}/../secret.md",
    "file://{root}/%2e%2e/secret.md",
    "file://elsewhere{root}/a.md",
    "{outside}/secret.md",
    "file://{outside}/secret.md",
    "link.md",
    "linked/secret.md",
    ".hidden.md",
    ".git/config",
    "sub/.env",
    "node_modules/a.md",
    "a.md\0",
    "",
    "/etc/passwd",
    "//etc/passwd",
    "pipe.md",
    "sub",
    ".",
)


def test_nothing_outside_and_nothing_hidden_can_be_opened(docs: MakeDocs, tmp_path: Path) -> None:
    hidden = dict.fromkeys((".hidden.md", ".git/config", "sub/.env", "node_modules/a.md"), "secret")
    (tmp_path / "secret.md").write_text("secret")
    documents = docs({"a.md": "x", **hidden})
    root = tmp_path / "docs"
    (root / "link.md").symlink_to(tmp_path / "secret.md")
    (root / "linked").symlink_to(tmp_path)
    os.mkfifo(root / "pipe.md")
    for address in OUTSIDE_OR_HIDDEN:
        with pytest.raises(ToolError):
            asyncio.run(documents.fetch(address.format(root=root, outside=tmp_path)))
            pytest.fail(f"{address} was opened")
    assert names(documents, "secret") == []


def test_a_folder_that_becomes_a_link_between_look_and_opening_leads_nowhere(docs: MakeDocs, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "a.md").write_text("secret")
    documents = docs({"sub/a.md": "public"})
    assert names(documents, "public") == ["sub/a.md"]
    shutil.rmtree(tmp_path / "docs" / "sub")
    (tmp_path / "docs" / "sub").symlink_to(tmp_path / "outside")
    with pytest.raises(ToolError, match="a symbolic link leads to it"):
        asyncio.run(documents.fetch("sub/a.md"))


def test_the_index_is_private_and_made_anew_where_it_is_damaged(
    docs: MakeDocs, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = {f"{n}.md": f"alpha number{n}" for n in range(5)}
    documents = docs(files)
    documents.refresh()
    index = tmp_path / "index-docs"
    assert index.stat().st_mode & 0o777 == 0o700
    for damage in ("passages/meta.json", "files.db"):
        (index / damage).write_bytes(b"{nonsense")
        assert len(names(docs(), "alpha")) == 5
        assert "is damaged or of another version" in caplog.text
        caplog.clear()
    shutil.rmtree(index / "passages")
    assert len(names(docs(), "alpha")) == 5
    other = docs({"x.md": "alpha"}, root=tmp_path / "other")
    other._index._dir = index  # an index of another folder
    assert other.refresh().added == 1
    (index / "lock").unlink()
    shutil.rmtree(index)
    index.write_text("in the way")
    with pytest.raises(ToolError, match="The documents cannot be searched"):
        asyncio.run(docs().search("alpha", 3))


def test_killed_at_any_point_the_next_run_goes_on_and_nothing_is_there_twice(docs: MakeDocs, tmp_path: Path) -> None:
    documents = docs({f"{n}.md": f"alpha number{n} " + "filler " * 200 for n in range(40)})
    script = (
        "import os, sys, pathlib, tantivy\n"
        "from freehold.tools.browser import index\n"
        "from freehold.tools.browser.documents import Documents\n"
        "index._COMMIT_CHARACTERS = 5000\n"
        "for at in map(int, sys.argv[3:]):\n"
        "    if child := os.fork():\n"
        "        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
        "        continue\n"
        "    calls = [0]\n"
        "    def trace(frame, event, argument):\n"
        "        if event == 'call' and frame.f_code.co_filename == index.__file__:\n"
        "            calls[0] += 1\n"
        "            if calls[0] == at: os.kill(os.getpid(), 9)\n"
        "    sys.setprofile(trace)\n"
        "    Documents(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])).refresh()\n"
        "    os._exit(0)\n"
    )
    source = random.Random(7)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    points = [str(at) for at in [*sorted(source.sample(range(20, 900), 6)), 10**9]]
    command = [sys.executable, "-c", script, str(tmp_path / "docs"), str(tmp_path / "index-docs"), *points]
    told = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.split()
    assert told.count(str(-signal.SIGKILL)) >= 3
    assert told[-1] == "0"
    assert documents.refresh()[:3] == (0, 0, 0)
    for n in range(40):
        assert names(documents, f"number{n}") == [f"{n}.md"]
    passages = documents._index.search("alpha", 1000)
    assert len(passages) == len({(passage.name, passage.start) for passage in passages}) == 40


def test_a_crash_between_the_two_commits_is_mended(
    docs: MakeDocs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = docs({f"{n}.md": f"alpha number{n}" for n in range(9)})
    real = index_module._Run._commit

    def half(run: index_module._Run) -> None:
        run._pending, run._gone = [], []
        real(run)

    monkeypatch.setattr(index_module._Run, "_commit", half)
    documents.refresh()
    monkeypatch.undo()
    assert documents.refresh().added == 9
    assert len(documents._index.search("alpha", 100)) == 9


def test_a_run_that_is_stopped_keeps_what_it_has(docs: MakeDocs, tmp_path: Path) -> None:
    docs({f"{n}.md": f"alpha number{n}" for n in range(30)})
    index = Index(Folder(tmp_path / "docs"), tmp_path / "index")
    seen: list[tuple[str, int, int]] = []

    def stopped() -> bool:
        return len(seen) >= 10

    with pytest.raises(StoppedError):
        index.refresh(progress=lambda *step: seen.append(step), stopped=stopped)
    assert not index.is_complete()
    changes = index.refresh()
    assert changes is not None
    assert (changes.added, changes.unchanged) == (20, 10)
    assert index.is_complete()
    assert len(index.search("alpha", 100)) == 30


def test_two_processes_at_once_index_everything_once(docs: MakeDocs, tmp_path: Path) -> None:
    documents = docs({f"{n}.md": f"alpha number{n} " + "filler " * 300 for n in range(200)})
    script = (
        "import sys, pathlib, asyncio\n"
        "from freehold.tools.browser.documents import Documents\n"
        "documents = Documents(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]))\n"
        "print(documents.refresh().added, len(asyncio.run(documents.search('alpha', 20))))\n"
        "documents.close()\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "docs"), str(tmp_path / "index-docs")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    running = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    told = sorted(process.communicate(timeout=60)[0].split() for process in running)
    assert told == [["0", "20"], ["200", "20"]]
    assert len(documents._index.search("alpha", 1000)) == 200


def test_who_finds_the_index_held_searches_what_is_there(docs: MakeDocs, tmp_path: Path) -> None:
    documents = docs({"a.md": "alpha"})
    documents.refresh()
    other = Index(Folder(tmp_path / "docs"), tmp_path / "index-docs")
    (tmp_path / "docs" / "b.md").write_text("alpha too")
    with other._locked(lambda: False, None, lambda *step: None) as ours:
        assert ours
        assert documents._index.refresh(wait=0) is None
        with pytest.raises(StoppedError):
            documents._index.refresh(stopped=lambda: True)
        assert [passage.name for passage in documents._index.search("alpha", 9)] == ["a.md"]
    assert names(documents, "alpha") == ["a.md", "b.md"]


def test_html_becomes_readable_text_with_links(docs: MakeDocs) -> None:
    html = """<!doctype html><html><head><title> A  page </title><script>evil()</script></head><body>
    <nav><ul><li><a href="a.md">First</a></li><li><a href="#top">Top</a><ul><li>deep</li></ul></li></ul></nav>
    <h1>Head<!-- c --> line</h1><p>Some <b>bold</b>, <code>x = 1</code><br>next &amp; last</p>
    <pre><code>def f():
        return 1</code></pre>
    <table><tr><th>k</th><th>v</th></tr><tr><td>1</td><td><a href="/etc/passwd">2</a></td></tr></table>
    <p hidden>unseen</p><p style="display: none">unseen</p><img alt="A cat"><a href="javascript:x()">js</a>
    <a href="https://x.org/y"><div><h3>Card</h3> of <img alt="dog"></div></a><a href="a.md"></a></body></html>"""
    content = asyncio.run(docs({"p.html": html, "a.md": "x"}).fetch("p.html"))
    assert content.title == "A page"
    assert content.text.split("\n") == [
        "  * 【0†First】",
        "  * Top",
        "    * deep",
        "",
        "# Head line",
        "",
        "Some bold, x = 1",
        "next & last",
        "",
        "def f():",
        "        return 1",
        "",
        "k | v",
        "1 | 2",
        "",
        "[Image: A cat]js 【1†Card of [Image: dog]†x.org】",
    ]
    assert [link.rpartition("/")[2] for link in content.links] == ["a.md", "y"]


def test_markdown_links_and_nothing_else_are_changed(docs: MakeDocs) -> None:
    text = """# T
[a](b.md "t"), ![i](i.png), `[c](d.md)`, [ref][R], [R], <https://x.org/a(b)>, [w](https://e.org/a_(b))
```
[code](b.md)
```
[out](../../etc/passwd) [m](mailto:x@y) [un](closed
[R]: sub/r.md
| [t](b.md#x) | \\[no\\](b.md) |"""
    content = asyncio.run(docs({"a.md": text}).fetch("a.md"))
    assert content.text.split("\n") == [
        "# T",
        "【0†a】, ![i](i.png), `[c](d.md)`, 【1†ref】, [R], 【2†https://x.org/a(b)†x.org】, 【3†w†e.org】",
        "```",
        "[code](b.md)",
        "```",
        "[out](../../etc/passwd) [m](mailto:x@y) [un](closed",
        "[R]: sub/r.md",
        "| 【0†t】 | \\[no\\](b.md) |",
    ]


PIECES = (
    "<p> </p> <a> <a/href='x.md'> </a> <pre> <li> </ul> <ul> <td> <tr> <table> <h1> </h9> <h9> <!-- --> <![CDATA[ "
    "<script> </script> <svg> <style> <br/> <img/alt='【1†x】'> &#x3010; &#0; &#xD800; <?xml/encoding='x'?> "
    "<ref/target=x> <head/rend=1> <item> <code>\n </code> <template> <plaintext> <base/href=//x> \x00 \ud800 "
    "<a/href='http://[x'> 【 】 † \u2028 \x85 \x1c"
)
HTML = st.lists(
    st.one_of(
        st.sampled_from(re.split(" ", PIECES)),
        st.text(max_size=8),
    ),
    max_size=40,
).map("".join)


@given(HTML)
@settings(max_examples=60, deadline=None)
def test_whatever_html_says_it_becomes_plain_text(html: str) -> None:
    for article_only in (False, True):
        found = markup.of_html(html, "https://e.org/", markup.web_resolve("https://e.org/"), article_only=article_only)
        _is_plain(found)
    _is_plain(markup.of_markdown(html, "", lambda href: (href, None)))
    _is_plain(markup.of_text(html))


def _is_plain(found: markup.Text) -> None:
    rest = re.sub(
        r"【(\d+)†[^【】†\n]+(†[^【】†\n]+)?】",
        lambda mark: "" if int(mark[1]) < len(found.links) else "【",
        found.text,
    )
    assert "【" not in rest and "】" not in rest
    assert found.text.splitlines() == (found.text.split("\n") if found.text else []) or found.text.endswith("\n")
    found.text.encode()
    assert not any(ord(c) < 32 and c not in "\n\t" for c in found.text + found.title)


def test_pages_made_to_be_slow_are_not() -> None:
    resolve = markup.web_resolve("https://e.org/")
    for html in ("<div>" * 100_000, "<a href=x>" * 20_000, "<ul><li>" * 20_000, "<b " * 50_000, "[" * 100_000):
        markup.of_html(html, "", resolve)
    for text in ("[" * 200_000, "[a](" * 50_000, "`" * 100_000, "[x](a" + "(b)" * 50_000, "<http://" * 50_000):
        markup.of_markdown(text, "", resolve)


def test_a_page_on_which_its_reader_works_for_hours_is_given_up(
    docs: MakeDocs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = "<p " + " ".join(f"a{number}=1" for number in range(200_000)) + ">words"
    documents = docs({"slow.html": slow})
    monkeypatch.setattr(apart, "MAX_SECONDS", 0.02)
    assert documents.refresh().skipped == {"slow.html": "it takes more than 0 seconds to read"}
    with pytest.raises(ToolError, match=r"`slow.html` cannot be opened: it takes more than"):
        asyncio.run(documents.fetch("slow.html"))
    monkeypatch.setattr(apart, "MAX_SECONDS", 60.0)
    (tmp_path / "docs" / "slow.html").unlink()
    docs({"good.html": "<p>good words"})
    assert names(documents, "words") == ["good.html"]
    resolve, polls = markup.web_resolve(""), iter((False, False))
    with pytest.raises(UnreadableError, match="was stopped"):
        apart.of_html(slow, "", resolve, stopped=lambda: next(polls, True))
    first, _ = apart._readers.take()
    apart._readers.give_back(first)
    first._process.kill()  # as if nobody had asked for a long time
    first._process.wait()
    assert apart.of_html("<p>more", "", resolve, stopped=lambda: False).text == "more"
    apart._readers.end()
    for child, reason in {"9": "the HTML reader broke off", "signal.SIGXCPU": "takes more than 60 seconds"}.items():
        monkeypatch.setattr(apart, "_CHILD", f"import os, signal; os.read(0, 9); os.kill(os.getpid(), {child})")
        with pytest.raises(UnreadableError, match=reason):
            apart.of_html("<p>more", "", resolve, stopped=lambda: False)


def test_a_pdf_that_ends_or_stalls_its_reader_harms_nobody_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.pdf"
    path.write_bytes(corpus.pdf([["one"], ["two"]], title="T"))
    monkeypatch.setenv("EXA_API_KEY", "secret")

    def read(stopped: bool = False) -> pdf.Pdf:
        with path.open("rb") as file:
            return pdf.read(file, 1 << 20, lambda: stopped)

    assert read() == ("T", ["one", "two"])
    with pytest.raises(UnreadableError, match="larger than 0 MiB"), path.open("rb") as file:
        pdf.read(file, 1, lambda: False)
    for child, reason in {
        "import os; os.kill(os.getpid(), 11)": "broke off",
        "x = bytearray(1 << 50)": "broke off",
        "import sys; sys.stdout.write('{')": "broke off",
        "while True: pass": "takes more than 0 seconds",
        "import os, signal; os.kill(os.getpid(), signal.SIGXCPU)": "takes more than 60 seconds",
        "import os, json; print(json.dumps({'reason': str('EXA_API_KEY' in os.environ)}))": "False",
    }.items():
        monkeypatch.setattr(apart, "_CHILD", child)
        monkeypatch.setattr(pdf, "MAX_SECONDS", 0.03 if "while" in child else 60.0)
        with pytest.raises(UnreadableError, match=reason):
            read()
    with pytest.raises(UnreadableError, match="was stopped"):
        monkeypatch.setattr(apart, "_CHILD", "while True: pass")
        read(stopped=True)
