"""A folder of documents as a source: Markdown, text, HTML, PDF and program code, searched through an index.

Before a search the folder is looked through for what changed, which takes a tenth of the time at most; a first index of
a large folder is better made beforehand, by `refresh`, with its progress shown. Only files in the folder that would be
indexed can be opened: see folder.py for what never is. Writes only into its index.
"""

import hashlib
import os
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

from freehold import paths
from freehold.errors import DiskError, UsageError
from freehold.log import Progress, no_progress
from freehold.tools.base import ToolError
from freehold.tools.browser.apart import UnreadableError
from freehold.tools.browser.content import Content, Hit, one_line, shown_name, source_name, without_links
from freehold.tools.browser.folder import Folder, NotTextError
from freehold.tools.browser.index import SETTLED, Changes, Index, Passage, StoppedError
from freehold.tools.browser.threads import Stopped, Threads

_SHARE = 10  # a look through the folder may take one part in so many of the time
_WAIT = 2.0  # seconds for another process that is indexing, where there is something to search already
_KEPT_CHARACTERS = 32 << 20
_SUMMARY = 300
_WORD = re.compile(r"\w+")


class Documents:
    """One folder. Made once, for all conversations. Raises UsageError where `directory` is no folder."""

    local = True

    def __init__(self, directory: Path, index_dir: Path | None = None, *, name: str | None = None) -> None:
        """`index_dir` is by default a folder in Freehold's cache; `name` is what the model calls this source."""
        if not directory.is_dir():
            raise UsageError(f"{directory} is no folder; name one that has documents")
        directory = directory.resolve()
        key = hashlib.sha256(str(directory).encode("utf-8", "surrogateescape")).hexdigest()[:16]
        index_dir = index_dir or paths.cache_dir() / "browser" / key
        self.name = name or source_name(directory.name)
        self._folder = Folder(directory, leave_out=index_dir)
        self._index = Index(self._folder, index_dir)
        self._threads = Threads("documents")
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[str, int, int], Content] = OrderedDict()
        self._looked, self._took = float("-inf"), 0.0

    def refresh(self, *, progress: Progress = no_progress) -> Changes:
        """Bring the index up to date, now; waits for another process that does. Raises DiskError."""
        changes = self._index.refresh(progress=progress)
        assert changes is not None  # it waited for its turn
        self._looked, self._took = time.monotonic(), changes.look_seconds
        return changes

    def has(self, address: str) -> bool:
        name = self._folder.name_of(address)
        return name is not None and self._folder.is_there(name)

    async def search(self, query: str, topn: int) -> Sequence[Hit]:
        return await self._threads.run(lambda stopped: self._search(query, topn, stopped))

    async def fetch(self, address: str, *, as_source: bool = False) -> Content:
        return await self._threads.run(lambda stopped: self._fetch(address, as_source, stopped))

    def close(self) -> None:
        self._threads.close()
        self._index.close()

    def _search(self, query: str, topn: int, stopped: Stopped) -> Sequence[Hit]:
        if not _WORD.search(query):
            raise ToolError("The query has no words. Search for words that the documents may contain.")
        try:
            if time.monotonic() - self._looked >= _SHARE * self._took:
                wait = _WAIT if self._index.is_complete() else None
                changes = self._index.refresh(stopped=stopped, wait=wait, in_a_hurry=True)
                # Who waited in vain waits no more for a while: the other one looks.
                self._looked, self._took = time.monotonic(), _WAIT if changes is None else changes.look_seconds
            passages = self._index.search(query, 5 * topn)
        except StoppedError:
            raise ToolError("The search was stopped before the documents were indexed.") from None
        except DiskError as error:
            raise ToolError(f"The documents cannot be searched: {error}") from None
        hits: list[Hit] = []
        seen = set()
        for passage in passages:
            if passage.name in seen:
                continue
            seen.add(passage.name)
            hit = self._hit(passage, query, stopped)
            if hit is not None:
                hits.append(hit)
            if len(hits) == topn:
                break
        return hits

    def _hit(self, passage: Passage, query: str, stopped: Stopped) -> Hit | None:
        text = passage.kept
        if not text:
            try:
                text = self._content(passage.name, stopped).text[passage.start : passage.end]
            except (UnreadableError, NotTextError):
                return None  # it is gone, since the last look
        summary, line = best_line(text, query)
        return Hit(
            url=self._folder.url(passage.name),
            title=passage.title,
            place=shown_name(passage.name),
            summary=summary,
            line=passage.line + line,
        )

    def _fetch(self, address: str, as_source: bool, stopped: Stopped) -> Content:
        name = self._folder.name_of(address)
        if name is None:
            raise ToolError(f"`{one_line(address)}` is not among these documents. Open a link, or search.")
        try:
            if as_source:
                with self._folder.open(name) as file:
                    return self._folder.read(name, file, stopped, as_source=True)
            return self._content(name, stopped)
        except NotTextError:
            raise ToolError(
                f"`{one_line(name)}` is no text, and cannot be shown. Search for another document."
            ) from None
        except UnreadableError as error:
            raise ToolError(
                f"`{one_line(name)}` cannot be opened: {error}. Search for documents that are there."
            ) from None

    def _content(self, name: str, stopped: Stopped) -> Content:
        with self._folder.open(name) as file:
            now = os.fstat(file.fileno())
            key = (name, now.st_ctime_ns, now.st_size)
            with self._lock:
                if (content := self._kept.get(key)) is not None:
                    self._kept.move_to_end(key)
                    return content
            content = self._folder.read(name, file, stopped)
            if time.time_ns() - os.fstat(file.fileno()).st_ctime_ns < SETTLED:
                return content  # it may change once more within the same tick of the clock
        with self._lock:
            self._kept[key] = content
            while len(self._kept) > 1 and sum(len(kept.text) for kept in self._kept.values()) > _KEPT_CHARACTERS:
                self._kept.popitem(last=False)
        return content


def best_line(text: str, query: str) -> tuple[str, int]:
    """Of a passage, what to show of it for a query, and the index of the line in which that begins."""
    wanted = {word.lower() for word in _WORD.findall(query) if len(word) > 1} or {query.strip().lower()}
    lines = text.split("\n")
    best, most = 0, 0
    for index, line in enumerate(lines):
        lowered = line.lower()
        score = sum(word in lowered for word in wanted)
        if score > most:
            best, most = index, score
    line = without_links(lines[best])
    positions = [at for word in wanted if (at := line.lower().find(word)) >= 0]
    begin = max(0, min(positions, default=0) - _SUMMARY // 3) if len(line) > _SUMMARY else 0
    summary = line[begin:]
    for following in lines[best + 1 :]:
        if len(summary) > _SUMMARY:
            break
        summary += " " + without_links(following)
    return one_line(summary, _SUMMARY), best
