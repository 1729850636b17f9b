"""apply_patch: the published format, on real folders; all of a patch or nothing of it."""

import asyncio
import contextlib
import errno
import fcntl
import os
import random
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from freehold.errors import UsageError
from freehold.formats.forms import FreeText, Lark
from freehold.formats.text_grammar import TextGrammar
from freehold.formats.tokenizer import Tokenizer
from freehold.tools.apply_patch import ApplyPatchTool, ProposedPatch
from freehold.tools.base import ToolError, ToolResult
from freehold.tools.patch_files import ASIDE, PatchDirectory
from freehold.tools.patch_format import LARK, PatchError, parse
from freehold.tools.patch_plan import plan, unified_diff
from tests.tools.trees import contents, plant, tree_hash


def patch(*lines: str) -> str:
    return "\n".join(["*** Begin Patch", *lines, "*** End Patch"]) + "\n"


@pytest.fixture(scope="module")
def in_memory() -> Iterator[Path]:
    """A folder for tests that sync a thousand files: where there is one, on no disk."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if os.access(shared, os.W_OK) else None) as folder:
        yield Path(folder)


def patched(files: Mapping[str, str | bytes], text: str) -> dict[str, bytes]:
    """These files after a patch, on paper."""
    now = {name: content.encode() if isinstance(content, str) else content for name, content in files.items()}
    for change in plan(parse(text), now.get):
        if change.after is None:
            del now[change.path]
        else:
            now[change.path] = change.after
    return now


def apply(root: Path, text: str) -> None:
    directory = PatchDirectory(root)
    directory.apply(directory.plan(parse(text)))


def call(tool: ApplyPatchTool, text: str) -> ToolResult:
    async def run() -> ToolResult:
        session = await tool.open()
        try:
            return await session.call("functions.apply_patch", text)
        finally:
            await session.aclose()

    return asyncio.run(run())


# --- the format ---------------------------------------------------------------------------------------------


def test_the_example_of_the_specification(tmp_path: Path) -> None:
    plant(tmp_path, {"src/app.py": 'def greet():\nprint("Hi")\n', "obsolete.txt": "old\n"})
    result = call(
        ApplyPatchTool(tmp_path),
        patch(
            "*** Add File: hello.txt",
            "+Hello world",
            "*** Update File: src/app.py",
            "*** Move to: src/main.py",
            "@@ def greet():",
            '-print("Hi")',
            '+print("Hello, world!")',
            "*** Delete File: obsolete.txt",
        ),
    )
    assert contents(tmp_path) == {
        "hello.txt": b"Hello world\n",
        "src/main.py": b'def greet():\nprint("Hello, world!")\n',
    }
    assert result.text == "Done. Changed files:\nA hello.txt\nR src/app.py -> src/main.py\nD obsolete.txt"
    assert [(file.name, file.path) for file in result.files] == [
        ("hello.txt", tmp_path / "hello.txt"),
        ("src/main.py", tmp_path / "src/main.py"),
    ]


CLASSES = "class Base:\n    def search(self):\n        pass\n\nclass Sub(Base):\n    def search(self):\n        pass\n"

FITS: list[tuple[str, str, list[str], str | None]] = [
    (
        "nested headings narrow down where",
        CLASSES,
        ["@@ class Sub(Base):", "@@     def search(self):", "-        pass", "+        return 1"],
        CLASSES[: -len("        pass\n")] + "        return 1\n",
    ),
    ("several hunks in order", "a\nb\nc\nd\n", ["@@", "-a", "+A", "@@", " c", "-d", "+D"], "A\nb\nc\nD\n"),
    ("the first hunk may lack its @@", "a\nb\n", [" a", "-b", "+B"], "a\nB\n"),
    ("no heading and nothing to find: at the end", "a\n", ["@@", "+b", "+c"], "a\nb\nc\n"),
    ("nothing to find below a heading", "def f():\n    pass\nend\n", ["@@ def f():", "+    x = 1"],
     "def f():\n    x = 1\n    pass\nend\n"),
    ("only lines taken out", "a\nb\nc\n", ["@@", " a", "-b", " c"], "a\nc\n"),
    ("the end of the file, of two places that fit", "x\ny\nx\n", ["@@", "-x", "+z", "*** End of File"], "x\ny\nz\n"),
    ("an empty line as context without its space", "a\n\nb\n", ["@@", " a", "", "-b", "+c"], "a\n\nc\n"),
    ("an empty first line, and a star in the next", "\n * a\nb\n", ["", "  * a", "-b", "+c"], "\n * a\nc\n"),
    ("blank lines between hunks", "a\nb\n", ["@@", "-a", "+A", "", "@@", "-b", "+B", ""], "A\nB\n"),
    ("an empty last line that is not there", "a\nb\n", ["@@", "-b", "+c", " "], "a\nc\n"),
    ("spaces at line ends", "a  \nb\t\nc\n", ["@@", " a", "-b", "+B", " c"], "a  \nB\nc\n"),
    ("another indentation, which the new lines take", "\tif x:\n\t\ty\n",
     ["@@", " if x:", "-\ty", "+\tz", "+", "+\tw"], "\tif x:\n\t\tz\n\n\t\tw\n"),
    ("typographic punctuation", "a “quoted” – dash\nb\n", ["@@", ' a "quoted" - dash', "-b", "+c"],
     "a “quoted” – dash\nc\n"),
    ("line numbers of unified diffs", "a\nb\n", ["@@ -1,2 +1,2 @@", " a", "-b", "+B"], "a\nB\n"),
    ("a heading that is the first line too", "def f():\n    a\n", ["@@ def f():", " def f():", "-    a", "+    b"],
     "def f():\n    b\n"),
    ("a heading that an earlier hunk has passed", "def f():\n  a\n  b\n",
     ["@@ def f():", "-  a", "+  A", "@@ def f():", "-  b", "+  B"], "def f():\n  A\n  B\n"),
    ("CR LF stays, and is what new lines end in", "a\r\nb\r\nc\n", ["@@", "-a", "+A", "+A2"], "A\r\nA2\r\nb\r\nc\n"),
    ("a patch in CR LF", "a\nb\n", ["@@\r", "-a\r", "+A\r"], "A\nb\n"),
    ("a last line without an end", "a\nb", ["@@", "-a", "+A"], "A\nb"),
    ("a last line without an end, changed", "a\nb", ["@@", "-b", "+B", "+C"], "a\nB\nC"),
    ("a byte order mark", "\ufeffa\nb\n", ["@@", "-a", "+A"], "\ufeffA\nb\n"),
    ("into an empty file", "", ["@@", "+a"], "a\n"),
    ("all lines taken out", "a\n", ["@@", "-a"], ""),
    ("form feeds are no line ends", "a\x0cb\nc\n", ["@@", " a\x0cb", "-c", "+d"], "a\x0cb\nd\n"),
    ("context that is not there", "a\nb\n", ["@@", " x", "-b", "+c"], None),
    ("a heading that is not there", "a\nb\n", ["@@ class X:", "-b", "+c"], None),
    ("hunks against the order of the file", "a\nb\n", ["@@", "-b", "+B", "@@", "-a", "+A"], None),
    ("the same lines twice", "a\n", ["@@", "-a", "+b", "@@", "-a", "+c"], None),
]  # fmt: skip


@pytest.mark.parametrize(("before", "hunks", "after"), [case[1:] for case in FITS], ids=[case[0] for case in FITS])
def test_where_a_hunk_belongs(before: str, hunks: list[str], after: str | None) -> None:
    text = patch("*** Update File: f", *hunks)
    if after is None:
        with pytest.raises(PatchError, match=r"f: hunk \d of \d does not fit"):
            patched({"f": before}, text)
    else:
        assert patched({"f": before}, text)["f"].decode() == after


@pytest.mark.parametrize(
    "wrapped",
    [
        "<<'EOF'\n{}EOF\n",
        "apply_patch <<EOF\n{}EOF",
        "```\n{}```",
        "```diff\n{}\n```\n",
        "\n\n  {}\n\n",
        '{{"input": {json}}}',
    ],
)
def test_what_models_put_around_a_patch(wrapped: str) -> None:
    import json

    text = patch("*** Add File: a", "+1")
    assert parse(wrapped.format(text, json=json.dumps(text))) == parse(text)


def test_sections_follow_each_other() -> None:
    files: dict[str, str | bytes] = {"a": "1\n", "b": "2\n", "bin": b"\xff\x00"}
    text = patch(
        "  *** Update File: a  ",
        "*** Move to: c",
        "*** Add File: a",
        "+new",
        "",
        "*** Update File: c",
        "@@",
        "-1",
        "+one",
        "*** Delete File: b",
        "*** Delete File: bin",
        "*** Add File: b",
        "+two",
        "*** Add File: empty",
    )
    assert patched(files, text) == {"a": b"new\n", "b": b"two\n", "c": b"one\n", "empty": b""}
    changes = {change.path: change for change in plan(parse(text), {"a": b"1\n", "b": b"2\n", "bin": b"\xff"}.get)}
    assert changes["c"].moved_from == "a" and changes["c"].verb == "R"
    assert unified_diff(list(changes.values())).splitlines()[:3] == ["diff --git a/a b/a", "--- a/a", "+++ b/a"]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "begins with a line"),
        ("hello", "begins with a line"),
        ("*** Begin Patch\n*** Add File: a\n+1", "ends with a line"),
        (patch(), "the patch is empty"),
        (patch("*** Frobnicate File: foo"), "line 2 of the patch: expected"),
        (patch("*** Add File: a", "no plus"), r"begins with '\+'"),
        (patch("*** Update File: a"), "neither hunks nor"),
        (patch("*** Update File: a", "@@"), "line 4 of the patch|no lines"),
        (patch("*** Update File: a", "@@", "-a", "?b"), "line 5 of the patch: the lines of a hunk"),
        (patch("*** Update File: a", "@@", "-a", "*** End of File", " b"), "a hunk begins with '@@'"),
        (patch("*** Delete File: "), "names no file"),
        (patch("*** Delete File: a", "-x"), "line 3 of the patch"),
        ("*** Begin Patch\n" + "\n" * 4_000_000, "characters"),
    ],
)
def test_what_is_no_patch_is_refused_with_its_line(text: str, complaint: str) -> None:
    with pytest.raises(PatchError, match=complaint):
        parse(text)


def test_a_failing_hunk_is_shown_with_what_comes_nearest() -> None:
    before = "import os\n\ndef f(x):\n    y = x + 1\n    return y\n"
    text = patch(
        "*** Update File: m.py", "@@ import os", " def f(x):", "     y = x + 2", "-    return y", "+    return 2"
    )
    with pytest.raises(PatchError) as raised:
        patched({"m.py": before}, text)
    assert str(raised.value) == (
        "m.py: hunk 1 of 1 does not fit: its lines cannot be found below line 1. Nothing was changed.\n"
        "The hunk:\n"
        "  @@ import os\n"
        "   def f(x):\n"
        "       y = x + 2\n"
        "  -    return y\n"
        "  +    return 2\n"
        "The nearest in the file, where 2 of 3 lines agree:\n"
        "  = 3: def f(x):\n"
        "  ! 4:     y = x + 1\n"
        "  = 5:     return y\n"
        "Write context and removed lines as they are in the file."
    )


def test_what_is_not_utf8_is_named() -> None:
    change = ["@@", "-a", "+b"]
    with pytest.raises(PatchError, match=r"f is not UTF-8: byte 0xe9 in line 2, at offset 5"):
        patched({"f": b"a\ncaf\xe9\n"}, patch("*** Update File: f", *change))
    with pytest.raises(PatchError, match="f is UTF-16 text"):
        patched({"f": "a\n".encode("utf-16")}, patch("*** Update File: f", *change))


# --- the grammar --------------------------------------------------------------------------------------------

TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\0\r\n"), max_size=12)
NAMES = st.text("ab./-é ", min_size=1, max_size=6).filter(lambda name: name.strip("/ ") == name)


@st.composite
def grammatical(draw: st.DrawFn) -> str:
    """Texts of the grammar, from the grammar."""
    lines = []
    for _ in range(draw(st.integers(1, 3))):
        path = draw(NAMES)
        kind = draw(st.sampled_from(["Add", "Delete", "Update", "Move"]))
        lines.append(f"*** {'Update' if kind == 'Move' else kind} File: {path}")
        if kind == "Add":
            lines += [f"+{text}" for text in draw(st.lists(TEXTS, min_size=1, max_size=3))]
        if kind == "Move":
            lines.append(f"*** Move to: {draw(NAMES)}")
        if kind in ("Update", "Move"):
            for _ in range(draw(st.integers(1 if kind == "Update" else 0, 3))):
                lines += [f"@@ {text}" for text in draw(st.lists(TEXTS, max_size=2))] or ["@@"]
                marked = st.builds("{}{}".format, st.sampled_from(" -+"), TEXTS)
                lines += draw(st.lists(marked, min_size=1, max_size=4))
                lines += draw(st.sampled_from([[], ["*** End of File"]]))
    return patch(*lines).removesuffix(draw(st.sampled_from(["", "\n"])))


END = 2  # of the small vocabulary


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(grammatical())
def test_what_is_a_patch_the_grammar_lets_a_model_write(small: Tokenizer, text: str) -> None:
    constraint = TextGrammar(small, Lark(LARK), (END,))()
    for token in small.encode(text):
        constraint.accept(token)  # raises for what may not come
    constraint.accept(END)
    parse(text)


def test_whatever_the_grammar_lets_a_model_write_parses(small: Tokenizer) -> None:
    import numpy as np

    random_ = random.Random(7)
    grammar = TextGrammar(small, Lark(LARK), (END,))
    data = [small.token_bytes(token) for token in range(small.vocab_size)]
    newline, star = data.index(b"\n"), data.index(b"*")
    kinds: set[str] = set()
    for _ in range(300):
        constraint, tokens = grammar(), list[int]()
        while True:
            row = np.zeros(-(-small.vocab_size // 32), np.int32)
            constraint.fill_mask(row)
            may = set(np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little"))[: small.vocab_size].tolist())
            if END in may and (may == {END} or random_.random() < 0.8):
                break
            # At random, but lines end and sections are ended, or it would go on for ever.
            steer = [token for token in (newline, star) if token in may]
            token = random_.choice(steer) if steer and random_.random() < 0.5 else random_.choice(sorted(may - {END}))
            if len(tokens) > 120:
                wanted = [token for token in may if data[token][:1] in b"*E"] if newline not in may else [newline]
                token = min(wanted, key=lambda token: len(data[token])) if wanted else token
            constraint.accept(token)
            tokens.append(token)
            assert len(tokens) < 3000
        text = b"".join(data[token] for token in tokens).decode("utf-8", "replace")
        kinds |= {type(section).__name__ for section in parse(text).sections}
    assert kinds == {"AddFile", "DeleteFile", "UpdateFile"}


# --- any edit, as a patch -----------------------------------------------------------------------------------

LINES = st.lists(
    st.sampled_from(["a", "b", "  b", "b  ", "", "c", "“c”", "*** End Patch", "@@", "+", "-a"]), max_size=12
)
TREES = st.dictionaries(st.sampled_from(["a", "b", "d/a", "d/e/b", "ü.txt"]), LINES, max_size=4)


def _text(lines: list[str]) -> str:
    return "".join(f"{line}\n" for line in lines)


def _edit(before: list[str], after: list[str]) -> list[str]:
    """A hunk that makes one of the other: all lines, so that there is no doubt about the place."""
    import difflib

    return ["@@", *(line for line in (f"{d[0]}{d[2:]}" for d in difflib.ndiff(before, after)) if line[0] != "?")]


@settings(max_examples=60, deadline=None)
@given(before=TREES, after=TREES, corruption=st.data())
def test_any_edit_can_be_written_and_no_corrupt_patch_changes_anything_by_halves(
    in_memory: Path, before: dict[str, list[str]], after: dict[str, list[str]], corruption: Any
) -> None:
    sections: list[str] = []
    for name in sorted(before.keys() | after.keys()):
        if name not in after:
            sections.append(f"*** Delete File: {name}")
        elif name not in before:
            sections += [f"*** Add File: {name}", *(f"+{line}" for line in after[name])]
        elif before[name] != after[name]:
            sections += [f"*** Update File: {name}", *_edit(before[name], after[name])]
    root = Path(tempfile.mkdtemp(dir=in_memory))
    plant(root, {name: _text(lines) for name, lines in before.items()})
    if not sections:
        return
    text = patch(*sections)

    at = corruption.draw(st.integers(0, len(text)))
    to = corruption.draw(st.integers(at, min(len(text), at + 20)))
    corrupt = text[:at] + corruption.draw(st.text("ab +-*@\n/.\0\ud800", max_size=4)) + text[to:]
    was, directory = tree_hash(root), PatchDirectory(root)
    try:
        directory.plan(parse(corrupt))
    except ToolError:
        with pytest.raises(ToolError):
            apply(root, corrupt)
    assert tree_hash(root) == was

    apply(root, text)
    assert contents(root) == {name: _text(lines).encode() for name, lines in after.items()}


# --- in its folder, and nowhere else ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "complaint"),
    [
        ("/etc/passwd", "absolute path"),
        ("../outside", "leads out of its folder"),
        ("sub/../../outside", "leads out of its folder"),
        ("sub/../a", "leads out of its folder"),
        ("link/secret", "symbolic link"),
        ("inner/secret", "symbolic link"),
        ("file-link", "symbolic link"),
        ("dangling", "symbolic link"),
        ("a\0b", "control character"),
        ("a\u202egpj.b", "control character"),
        ("sub", "is a folder"),
        ("a/b", "no folder"),
        (".", "names no file"),
        ("sub/", "names no file"),
        (".git/hooks/pre-commit", "not for patches"),
        ("sub/.GIT/config", "not for patches"),
        (f"{ASIDE}00000000/x", "not for patches"),
        ("x" * 300, "too long"),
        ("pipe", "no regular file"),
        ("socket", "no regular file"),
    ],
)
@pytest.mark.parametrize("section", ["Add", "Update", "Delete", "Move", "MoveFrom"])
def test_a_patch_stays_in_its_folder(tmp_path: Path, path: str, complaint: str, section: str) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    plant(root, {"a": "1\n", "sub/b": "2\n"})
    plant(outside, {"secret": "1\n"})
    (root / "link").symlink_to(outside)
    (root / "inner").symlink_to(root / "sub")
    (root / "file-link").symlink_to(outside / "secret")
    (root / "dangling").symlink_to(outside / "nothing")
    os.mkfifo(root / "pipe")
    listener = socket.socket(socket.AF_UNIX)
    here = Path.cwd()
    os.chdir(root)  # the name of a socket may have 108 bytes
    try:
        listener.bind("socket")
    finally:
        os.chdir(here)
        listener.close()
    was = tree_hash(tmp_path)
    sections = {
        "Add": [f"*** Add File: {path}", "+x"],
        "Update": [f"*** Update File: {path}", "@@", "-1", "+x"],
        "Delete": [f"*** Delete File: {path}"],
        "Move": ["*** Update File: a", f"*** Move to: {path}"],
        "MoveFrom": [f"*** Update File: {path}", "*** Move to: new"],
    }
    with pytest.raises(PatchError, match=complaint):
        apply(root, patch("*** Add File: first", "+x", *sections[section]))
    assert tree_hash(tmp_path) == was


def test_one_file_is_not_patched_under_two_names(tmp_path: Path) -> None:
    plant(tmp_path, {"a": "1\n2\n"})
    (tmp_path / "b").hardlink_to(tmp_path / "a")
    with pytest.raises(PatchError, match="the same file"):
        apply(tmp_path, patch("*** Update File: a", "@@", "-1", "+x", "*** Update File: b", "@@", "-2", "+y"))
    apply(tmp_path, patch("*** Update File: ./a", "@@", "-1", "+x", "*** Update File: a", "@@", "-2", "+y"))
    assert contents(tmp_path) == {"a": b"x\ny\n", "b": b"1\n2\n"}


def test_permissions_stay(tmp_path: Path) -> None:
    plant(tmp_path, {"run.sh": "a\n", "moved.sh": "a\n", "locked": "a\n"})
    for name, mode in (("run.sh", 0o750), ("moved.sh", 0o711), ("locked", 0o444)):
        (tmp_path / name).chmod(mode)
    apply(
        tmp_path,
        patch(
            *("*** Update File: run.sh", "@@", "-a", "+b"),
            *("*** Update File: moved.sh", "*** Move to: bin/there.sh", "@@", "-a", "+b"),
            *("*** Add File: new", "+1"),
        ),
    )
    modes = {name: stat.S_IMODE((tmp_path / name).stat().st_mode) for name in contents(tmp_path)}
    mask = os.umask(0o22)
    os.umask(mask)
    assert modes == {"run.sh": 0o750, "bin/there.sh": 0o711, "locked": 0o444, "new": 0o666 & ~mask}
    was = tree_hash(tmp_path)
    with pytest.raises(PatchError, match="write-protected"):
        apply(tmp_path, patch("*** Delete File: new", "*** Update File: locked", "@@", "-a", "+b"))
    assert tree_hash(tmp_path) == was


def test_a_file_is_no_folder_of_another(tmp_path: Path) -> None:
    with pytest.raises(PatchError, match="a/b cannot be written: a is a file of this patch"):
        PatchDirectory(tmp_path).plan(parse(patch("*** Add File: a", "+1", "*** Add File: a/b", "+2")))


def test_what_runs_as_somebody_else_does_so_no_more_once_it_is_patched(tmp_path: Path) -> None:
    plant(tmp_path, {"a": "1\n"})
    (tmp_path / "a").chmod(0o6755)
    apply(tmp_path, patch("*** Update File: a", "@@", "-1", "+2"))
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o755


def test_long_repetitions_cost_no_more_than_other_lines() -> None:
    lines, part = ["x"] * 60_000, 10_000  # 10^9 comparisons, if each place was compared with all of the hunk
    text = patch("*** Update File: f", "@@", *[" x"] * part, " y", *[" x"] * part, "+z")
    begun = time.process_time()
    after = patched({"f": _text([*lines, "y", *lines])}, text)["f"]
    assert after == _text([*lines, "y", *lines[:part], "z", *lines[part:]]).encode()
    with pytest.raises(PatchError, match="does not fit"):
        patched({"f": _text([*lines, "Y", *lines])}, text)
    assert time.process_time() - begun < 5


def test_more_different_lines_than_there_are_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("freehold.tools.patch_plan._LAST_CHARACTER", 1)
    before = _text(["a", "b", "c", "d", "b", "e", "f"])
    assert patched({"f": before}, patch("*** Update File: f", "@@", " b", "-e", "+x"))["f"] == b"a\nb\nc\nd\nb\nx\nf\n"
    with pytest.raises(PatchError, match="does not fit"):
        patched({"f": before}, patch("*** Update File: f", "@@", " c", "-e", "+x"))


# --- all or nothing -----------------------------------------------------------------------------------------

WIDE = {"keep": "0\n", "update": "1\n2\n", "delete": "3\n", "move": "4\n", "deep/update": "5\n"}
WIDE_PATCH = patch(
    *("*** Update File: update", "@@", "-2", "+two"),
    *("*** Add File: new/folder/file", "+new"),
    *("*** Delete File: delete",),
    *("*** Update File: move", "*** Move to: other/moved", "@@", "-4", "+four"),
    *("*** Update File: deep/update", "@@", "-5", "+five"),
)
WIDE_AFTER = {
    "keep": b"0\n",
    "update": b"1\ntwo\n",
    "new/folder/file": b"new\n",
    "other/moved": b"four\n",
    "deep/update": b"five\n",
}


def test_whatever_step_fails_nothing_is_changed(in_memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = (errno.ENOSPC, errno.EACCES, errno.EIO)

    def failing(do: Callable[..., Any], calls: Iterator[int], step: int) -> Callable[..., Any]:
        def instead(*arguments: Any, **named: Any) -> Any:
            if next(calls) == step:
                raise OSError(numbers[step % 3], os.strerror(numbers[step % 3]))
            return do(*arguments, **named)

        return instead

    tmp_path = Path(tempfile.mkdtemp(dir=in_memory))
    root, num_undone = plant(tmp_path / "0", WIDE), 0
    for step in count():
        was, directory, calls = tree_hash(root), PatchDirectory(root), count()
        changes = directory.plan(parse(WIDE_PATCH))
        with monkeypatch.context() as patching:
            for name in ("mkdir", "rename", "link", "fsync", "fchmod", "unlink", "open", "stat"):
                patching.setattr(os, name, failing(getattr(os, name), calls, step))
            with contextlib.suppress(PatchError):
                directory.apply(changes)
        if {name: data for name, data in contents(root).items() if not name.startswith(ASIDE)} != WIDE_AFTER:
            assert tree_hash(root) == was, f"after step {step}"
            num_undone += 1
        elif next(calls) > step:  # there was another way, or it was done by then
            root = plant(tmp_path / str(step + 1), WIDE)
        else:
            break
    assert num_undone > 40


def test_where_files_cannot_be_linked_they_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*arguments: Any, **named: Any) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    plant(tmp_path, WIDE)
    monkeypatch.setattr(os, "link", link)
    apply(tmp_path, WIDE_PATCH)
    assert contents(tmp_path) == WIDE_AFTER


def test_somebodys_new_file_of_that_name_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(tmp_path, WIDE)
    fsync = os.fsync

    def meanwhile(handle: int) -> None:
        plant(tmp_path, {"new/folder/file": ""})
        fsync(handle)

    monkeypatch.setattr(os, "fsync", meanwhile)
    with pytest.raises(PatchError, match=r"nothing was changed: .*File exists"):
        apply(tmp_path, WIDE_PATCH)
    assert contents(tmp_path) == {name: text.encode() for name, text in WIDE.items()} | {"new/folder/file": b""}


@pytest.mark.parametrize("section", [["*** Delete File: a"], ["*** Update File: a", "@@", "-1", "+2"]])
def test_what_somebody_saves_while_a_patch_is_written_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, section: list[str]
) -> None:
    plant(tmp_path, {"a": "1\n", "0": "0\n"})
    fsync, saved = os.fsync, list[int]()

    def meanwhile(handle: int) -> None:
        if not saved:
            saved.append(handle)
            plant(tmp_path, {"a": "theirs\n"})
        fsync(handle)

    monkeypatch.setattr(os, "fsync", meanwhile)
    with pytest.raises(PatchError, match="nothing was changed: a was changed by somebody else meanwhile"):
        apply(tmp_path, patch("*** Update File: 0", "@@", "-0", "+x", *section))
    assert contents(tmp_path) == {"a": b"theirs\n", "0": b"0\n"}


def test_a_folder_where_a_new_file_was_to_be_is_no_hindrance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync = os.fsync

    def meanwhile(handle: int) -> None:
        (tmp_path / "new").mkdir(exist_ok=True)
        fsync(handle)

    monkeypatch.setattr(os, "fsync", meanwhile)
    with pytest.raises(PatchError, match=r"nothing was changed: .*File exists"):
        apply(tmp_path, patch("*** Add File: new", "+1"))
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_who_holds_the_lock_for_ever_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("freehold.tools.patch_files._LOCK_SECONDS", 0.0)
    held = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    with pytest.raises(PatchError, match="another program holds the folder's lock"):
        apply(tmp_path, patch("*** Add File: a", "+1"))
    os.close(held)
    apply(tmp_path, patch("*** Add File: a", "+1"))


@pytest.mark.parametrize(
    "journal",
    [
        None,
        b"\xff",
        b"[" * 100_000,
        b"[1]",
        b'{"changes": [[null, null, null]], "made": []}',
        b'{"changes": [["../a", null, null]], "made": []}',
        b'{"changes": [[".git/config", null, null]], "made": []}',
    ],
)
def test_a_journal_that_somebody_else_wrote_is_refused(tmp_path: Path, journal: bytes | None) -> None:
    plant(tmp_path / "root", {"b": "1\n", ".git/config": "", f"{ASIDE}0/old-0": "evil\n"})
    plant(tmp_path, {"a": "1\n"})
    path = tmp_path / "root" / f"{ASIDE}0" / "journal.json"
    os.mkfifo(path) if journal is None else path.write_bytes(journal)
    was = tree_hash(tmp_path)
    with pytest.raises(PatchError, match="cannot be undone"):
        PatchDirectory(tmp_path / "root").recover()
    assert tree_hash(tmp_path) == was


def test_killed_at_any_step_it_is_undone_or_done(in_memory: Path) -> None:
    tmp_path = Path(tempfile.mkdtemp(dir=in_memory))
    folder, out = plant(tmp_path / "folder", WIDE), tmp_path / "out"
    (tmp_path / "patch").write_text(WIDE_PATCH, encoding="utf-8")
    program = Path(__file__).with_name("killed_patch.py")
    subprocess.run([sys.executable, program, folder, tmp_path / "patch", out], check=True, timeout=60)
    left = sorted(out.iterdir())
    assert len(left) > 30
    before, was, ends, halves = contents(folder), tree_hash(folder), [], 0
    for root in left:
        now = contents(root)
        for name in ("update", "deep/update"):
            assert now[name] in (before[name], WIDE_AFTER[name])  # never half a file
        if any(path.name.startswith(ASIDE) for path in root.iterdir()):
            halves += 1
        asyncio.run(ApplyPatchTool(root).open())
        now = contents(root)
        assert now in (before, WIDE_AFTER)
        if now == before:
            assert tree_hash(root) == was
        ends.append(now == WIDE_AFTER)
    assert halves > 20 and ends == sorted(ends) and ends[-1] and not ends[0]


def test_what_was_changed_since_a_kill_stays(tmp_path: Path) -> None:
    plant(tmp_path, {"a": "1\n", "b": "2\n"})
    aside = tmp_path / f"{ASIDE}00000000"
    from hashlib import sha256

    def name(content: str) -> str:
        return sha256(content.encode()).hexdigest()

    import json

    entries = [["a", name("0\n"), name("1\n")], ["b", name("0\n"), name("1\n")]]
    plant(aside, {"journal.json": json.dumps({"changes": entries, "made": []}), "old-0": "0\n", "old-1": "0\n"})
    assert PatchDirectory(tmp_path).recover() == ["a"]
    assert contents(tmp_path) == {"a": b"0\n", "b": b"2\n"}


def test_a_file_that_changed_while_the_user_thought_stops_the_patch(tmp_path: Path) -> None:
    plant(tmp_path, {"a": "1\n", "b": "2\n"})

    async def approve(proposed: ProposedPatch) -> bool:
        (tmp_path / "b").write_text("3\n", encoding="utf-8")
        return True

    text = patch("*** Delete File: a", "*** Update File: b", "@@", "-2", "+x")
    with pytest.raises(ToolError, match="b was changed by somebody else meanwhile"):
        call(ApplyPatchTool(tmp_path, approve=approve), text)
    assert contents(tmp_path) == {"a": b"1\n", "b": b"3\n"}


# --- the tool -----------------------------------------------------------------------------------------------


def test_nothing_is_written_before_the_user_agrees(tmp_path: Path) -> None:
    plant(tmp_path, {"a.txt": "1\n2\n"})
    was, shown = tree_hash(tmp_path), list[str]()

    async def approve(proposed: ProposedPatch) -> bool:
        assert tree_hash(tmp_path) == was
        shown.append(proposed.diff)
        return len(shown) > 1

    tool = ApplyPatchTool(tmp_path, approve=approve)
    text = patch("*** Update File: a.txt", "*** Move to: b.txt", "@@", "-2", "+two", "*** Add File: n", "+x")
    with pytest.raises(ToolError, match="does not want"):
        call(tool, text)
    assert tree_hash(tmp_path) == was
    assert "R a.txt -> b.txt" in call(tool, text).text
    assert contents(tmp_path) == {"b.txt": b"1\ntwo\n", "n": b"x\n"}
    assert (
        shown[0]
        == shown[1]
        == (
            "diff --git a/a.txt b/b.txt\nrename from a.txt\nrename to b.txt\n--- a/a.txt\n+++ b/b.txt\n"
            "@@ -1,2 +1,2 @@\n 1\n-2\n+two\n"
            "diff --git a/n b/n\nnew file\n--- /dev/null\n+++ b/n\n@@ -0,0 +1 @@\n+x\n"
        )
    )


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    plant(tmp_path, {"a": "1\n"})
    plant(tmp_path / f"{ASIDE}0", {"old-0": ""})  # a killed patch, which is not undone either
    was, tool = tree_hash(tmp_path), ApplyPatchTool(tmp_path, dry_run=True)
    assert call(tool, patch("*** Delete File: a")).text.startswith("Dry run: nothing was written.")
    with pytest.raises(ToolError, match="there is no such file"):
        call(tool, patch("*** Delete File: b"))
    assert tree_hash(tmp_path) == was


def test_cancelled_before_it_writes_it_writes_nothing(tmp_path: Path) -> None:
    asked = asyncio.Event()

    async def approve(proposed: ProposedPatch) -> bool:
        asked.set()
        await asyncio.Event().wait()
        return True

    async def run() -> None:
        session = await ApplyPatchTool(tmp_path, approve=approve).open()
        calling = asyncio.create_task(session.call("apply_patch", patch("*** Add File: a", "+1")))
        await asked.wait()
        calling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await calling

    asyncio.run(run())
    assert contents(tmp_path) == {}


def test_how_it_is_described(tmp_path: Path) -> None:
    (grammar,) = ApplyPatchTool(tmp_path).functions
    (text,) = ApplyPatchTool(tmp_path, form="text").functions
    (json_,) = ApplyPatchTool(tmp_path, form="json").functions
    assert (grammar.name, grammar.text_format, text.text_format) == ("apply_patch", Lark(LARK), FreeText())
    assert json_.text_format is None and json_.parameters is not None
    with pytest.raises(UsageError, match="is no folder"):
        ApplyPatchTool(tmp_path / "nowhere")
    with pytest.raises(ToolError, match=r"there is no tool functions\.other"):
        asyncio.run(asyncio.wait_for(_other(tmp_path), 10))


async def _other(root: Path) -> None:
    await (await ApplyPatchTool(root).open()).call("functions.other", "")
