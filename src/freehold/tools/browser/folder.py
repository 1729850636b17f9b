"""The files of a folder that may be read: found, opened, and told apart by what is in them.

Hidden files and folders (`.git`, `.env`, `.ssh`), symbolic links, devices, pipes and sockets are not looked at; a file
is opened without following a link in its last place, and refused if what was opened lies outside the folder, so that
no link and no `..` leads out of it. What is not text, HTML or PDF is left alone. Writes nothing.
"""

import os
import stat
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple
from urllib.parse import quote, unquote, urlsplit

from freehold.tools.browser import apart, markup, pdf
from freehold.tools.browser.apart import UnreadableError
from freehold.tools.browser.content import Content, one_line, plain, shown_name

MAX_FILE_BYTES = 16 << 20
MAX_PDF_BYTES = 256 << 20
_MAX_DEPTH = 64
_SNIFFED = 8192
_PDF = b"%PDF-"
_LEFT_OUT = frozenset(("node_modules", "__pycache__"))
_HTML = frozenset((".html", ".htm", ".xhtml"))
_MARKDOWN = frozenset((".md", ".markdown", ".mdx", ".mkd"))
_BINARY = frozenset(
    str.split(
        ".7z .a .avi .bin .bmp .bz2 .class .dll .doc .docx .dylib .ear .egg .eot .exe .flac .gguf .gif .gz .ico "
        ".iso .jar .jpeg .jpg .lz4 .m4a .mkv .mov .mp3 .mp4 .npy .npz .o .odp .ods .odt .ogg .onnx .otf .parquet "
        ".pkl .png .ppt .pptx .pt .pth .pyc .rar .safetensors .so .sqlite .tar .tgz .tif .tiff .ttf .war .wasm "
        ".wav .webm .webp .whl .woff .woff2 .xls .xlsx .xz .zim .zip .zst"
    )
)


class NotTextError(Exception):
    """A file of a kind that is not read."""


class Found(NamedTuple):
    """A file, by its path inside the folder with `/` between names, and what tells one state of it from the next."""

    name: str
    size: int
    modified: int  # nanoseconds
    changed: int  # of its inode, which no program sets at will
    inode: int


class Folder:
    """A folder that is read. Nothing is kept open; for any thread."""

    def __init__(self, path: Path, *, leave_out: Path | None = None) -> None:
        self.path = path.resolve()
        self._root = os.path.join(self.path, "")  # noqa: PTH118 — a string with its last slash
        self._leave_out = str(leave_out.resolve()) if leave_out else None

    def files(self, problem: Callable[[str, str], None]) -> Iterator[Found]:
        """All that could be read, folder by folder; `problem(name, reason)` is told what cannot be listed.

        Raises UnreadableError where the folder itself cannot.
        """
        waiting = [("", 0)]
        while waiting:
            folder, depth = waiting.pop()
            try:
                with os.scandir(self._root + folder) as entries:
                    for entry in entries:
                        if entry.name.startswith(".") or entry.name in _LEFT_OUT:
                            continue
                        name = folder + entry.name
                        try:
                            name.encode()
                            if entry.is_dir(follow_symlinks=False):
                                if depth < _MAX_DEPTH and entry.path != self._leave_out:
                                    waiting.append((name + "/", depth + 1))
                                continue
                            if not entry.is_file(follow_symlinks=False):
                                continue
                            if os.path.splitext(entry.name)[1].lower() in _BINARY:  # noqa: PTH122 — 100,000 times
                                continue
                            now = entry.stat(follow_symlinks=False)
                        except UnicodeError:
                            problem(name.encode("utf-8", "replace").decode(), "its name is not UTF-8")
                            continue
                        except OSError as error:
                            problem(name, _reason(error))
                            continue
                        yield Found(name, now.st_size, now.st_mtime_ns, now.st_ctime_ns, now.st_ino)
            except OSError as error:
                if not folder:
                    raise UnreadableError(_reason(error)) from None
                problem(folder.rstrip("/"), _reason(error))

    def url(self, name: str) -> str:
        return "file://" + quote(self._root + name)

    def name_of(self, address: str, beside: str = "") -> str | None:
        """The name of the file that an address means, in this folder or beside one of its files; None for others.

        An address is a `file:` URL, an absolute path, or a path inside this folder.
        """
        try:
            parts = urlsplit(address)
        except ValueError:
            return None
        if parts.scheme == "file" and parts.netloc in ("", "localhost"):
            path = unquote(parts.path)
        elif parts.netloc or (parts.scheme and (beside or "://" in address)):
            return None  # but a file may be called `Re: plans.txt`
        else:
            path = unquote(parts.path) if beside else address
        if "\0" in path or not path:
            return None
        if not path.startswith("/"):
            path = self._root + os.path.dirname(beside) + "/" + path  # noqa: PTH120
        path = os.path.normpath(path)
        if not path.startswith(self._root):
            return None
        name = path[len(self._root) :]
        hidden = any(part.startswith(".") or part in _LEFT_OUT for part in name.split("/"))
        return None if hidden else name

    def is_there(self, name: str) -> bool:
        return os.path.lexists(self._root + name)

    def open(self, name: str) -> BinaryIO:
        """Raises UnreadableError."""
        path = self._root + name
        try:
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise UnreadableError(_reason(error)) from None
        try:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise UnreadableError("it is no file")
            if os.path.realpath(f"/proc/self/fd/{handle}") != path:
                raise UnreadableError("a symbolic link leads to it")
            return os.fdopen(handle, "rb")
        except BaseException:
            os.close(handle)
            raise

    def max_bytes(self, name: str, file: BinaryIO) -> int:
        """How large an open file may be to be read."""
        return MAX_PDF_BYTES if _is_pdf(os.path.splitext(name)[1].lower(), file) else MAX_FILE_BYTES  # noqa: PTH122

    def read(self, name: str, file: BinaryIO, stopped: Callable[[], bool], *, as_source: bool = False) -> Content:
        """The document in an open file. Raises UnreadableError, and NotTextError."""
        suffix = os.path.splitext(name)[1].lower()  # noqa: PTH122
        if suffix in _BINARY:
            raise NotTextError
        url, title, own_lines = self.url(name), name.rpartition("/")[2], False
        pages: tuple[int, ...] = ()
        if _is_pdf(suffix, file):
            pages_of = pdf.read(file, MAX_PDF_BYTES, stopped)
            text, starts = "", []
            lines = 0
            for number, page in enumerate(pages_of.pages, 1):
                starts.append(lines)
                part = f"# Page {number}\n\n{plain(page).strip()}\n\n"
                text += part
                lines += part.count("\n")
            found, pages = markup.Text(text.rstrip("\n"), pages_of.title, ()), tuple(starts)
        else:
            data = _bytes(file)
            is_html = suffix in _HTML
            written = markup.decode(data, is_html=is_html)
            if is_html and not as_source:
                found = apart.of_html(written, url, self.resolver(name), stopped=stopped)
            elif suffix in _MARKDOWN and not as_source:
                found, own_lines = markup.of_markdown(written, url, self.resolver(name)), True
            else:
                found, own_lines = markup.of_text(written), True
        return Content(
            url=url,
            shown=shown_name(name),
            title=one_line(found.title) or one_line(title),
            text=found.text,
            links=found.links,
            own_lines=own_lines,
            page_lines=pages,
        )

    def resolver(self, name: str) -> markup.Resolve:
        """Links of one of our files: to others of them, and to the web."""
        return partial(_resolve, self, name)


def _resolve(folder: Folder, name: str, href: str) -> tuple[str, str | None] | None:
    if href.startswith(("http://", "https://")):
        return markup.web_resolve("")(href)
    target = None if href.startswith("//") else folder.name_of(href, beside=name)
    return None if target is None else (folder.url(target), "")


def _is_pdf(suffix: str, file: BinaryIO) -> bool:
    """By its name or, since downloads have any name, by how it begins."""
    head = file.read(len(_PDF))
    file.seek(0)
    return suffix == ".pdf" or head == _PDF


def _bytes(file: BinaryIO) -> bytes:
    try:
        head = file.read(_SNIFFED)
        if b"\0" in head and not head.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise NotTextError
        rest = file.read(max(MAX_FILE_BYTES + 1 - len(head), 0))
    except OSError as error:
        raise UnreadableError(_reason(error)) from None
    if len(head) + len(rest) > MAX_FILE_BYTES:
        raise UnreadableError(f"it is larger than {MAX_FILE_BYTES >> 20} MiB")
    return head + rest


def _reason(error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    return (error.strerror or type(error).__name__).lower()
