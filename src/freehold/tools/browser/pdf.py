"""The text of PDF files, read by pdfium in a process of its own.

A file that makes pdfium crash, loop or eat memory takes only that process with it: it has limits on memory and time,
no network where the kernel can refuse it, none of our environment, and the file as its standard input; it opens no
other. It is not a sandbox against a file that takes pdfium over: such code could read what this user can.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import BinaryIO, NamedTuple

from freehold.tools.browser import apart
from freehold.tools.browser.apart import UnreadableError

MAX_SECONDS = 60.0
_MAX_CHARACTERS = 16 << 20
_MAX_PAGES = 20_000


class Pdf(NamedTuple):
    """What a PDF says, page by page."""

    title: str
    pages: list[str]


def read(file: BinaryIO, max_bytes: int, stopped: Callable[[], bool]) -> Pdf:
    """The text of an open file. Raises UnreadableError; also when `stopped` says so meanwhile."""
    if os.fstat(file.fileno()).st_size > max_bytes:
        raise UnreadableError(f"it is larger than {max_bytes >> 20} MiB")
    file.seek(0)
    process = subprocess.Popen(
        apart.command("pdf"),
        stdin=file,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=apart.environment(),
    )
    with process:
        try:
            until = time.monotonic() + apart.PATIENCE * MAX_SECONDS
            while True:
                try:
                    output, _ = process.communicate(timeout=0.1)
                    break
                except subprocess.TimeoutExpired:
                    if stopped():
                        raise UnreadableError("reading it was stopped") from None
                    if time.monotonic() > until:
                        raise apart.too_slow(MAX_SECONDS) from None
        finally:
            process.kill()
    if process.returncode == -signal.SIGXCPU:
        raise apart.too_slow(MAX_SECONDS)
    try:
        told = json.loads(output) if process.returncode == 0 else None
    except ValueError:
        told = None
    if told is None:
        raise UnreadableError("the PDF reader broke off, at damage or at its limit of memory")
    if reason := told.get("reason"):
        raise UnreadableError(reason)
    return Pdf(told["title"], told["pages"])


def tell() -> None:
    """The child of `read`: the PDF on standard input as JSON on standard output."""
    apart.confine()
    apart.limit_cpu(MAX_SECONDS)

    import pypdfium2

    try:
        document = pypdfium2.PdfDocument(sys.stdin.buffer)
        pages: list[str] = []
        size = read_pages = 0
        for number in range(min(len(document), _MAX_PAGES)):
            try:
                page = document[number]
                text = page.get_textpage()
                pages.append(text.get_text_bounded())
                text.close()
                page.close()
            except pypdfium2.PdfiumError:  # this page; the others keep their numbers
                pages.append("")
                continue
            read_pages = len(pages)
            size += len(pages[-1])
            if size > _MAX_CHARACTERS:
                break
        if not read_pages:
            raise pypdfium2.PdfiumError("no page")
        told = {"title": document.get_metadata_value("Title"), "pages": pages[:read_pages]}
    except pypdfium2.PdfiumError as error:
        locked = "assword" in str(error)
        told = {"reason": "it has a password" if locked else "it is damaged, or no PDF"}
    sys.stdout.write(json.dumps(told))
