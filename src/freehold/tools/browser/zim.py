"""A ZIM file as a source: Wikipedia and others, offline, as Kiwix publishes them.

Needs libzim (`pip install freehold[zim]`). Searches the file's own full-text index, or its titles where it has none.
Reads articles only; nothing of a file is run, and its links lead to its own articles or to the web.
"""

import posixpath
import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from freehold.errors import BackendError, UsageError
from freehold.tools.base import ToolError
from freehold.tools.browser import apart, markup
from freehold.tools.browser.content import Content, Hit, one_line, shown_address, source_name
from freehold.tools.browser.documents import best_line
from freehold.tools.browser.threads import Stopped, Threads

_MAX_BYTES = 16 << 20


class Zim:
    """One file. Raises UsageError where it is none, and BackendError where libzim is not installed."""

    local = True

    def __init__(self, path: Path, *, name: str | None = None) -> None:
        try:
            from libzim.reader import Archive
        except ImportError:
            raise BackendError("ZIM files need libzim, which is not installed: pip install 'freehold[zim]'") from None
        try:
            self._archive = Archive(path)
        except (RuntimeError, ValueError, OSError):
            raise UsageError(f"{path} cannot be opened as a ZIM file; name a .zim file that is complete") from None
        self.name = name or source_name(path.stem)
        self._base = f"zim://{quote(self.name, safe='')}/"
        self._lock = threading.Lock()
        self._threads = Threads("zim", 2)

    def has(self, address: str) -> bool:
        return address.startswith(self._base)

    async def search(self, query: str, topn: int) -> Sequence[Hit]:
        return await self._threads.run(lambda stopped: self._search(query, topn, stopped))

    async def fetch(self, address: str, *, as_source: bool = False) -> Content:
        entry = unquote(address[len(self._base) :].partition("#")[0])
        return await self._threads.run(lambda stopped: self._fetch(entry, as_source, stopped))

    def close(self) -> None:
        self._threads.close()

    def _search(self, query: str, topn: int, stopped: Stopped) -> Sequence[Hit]:
        from libzim.search import Query, Searcher
        from libzim.suggestion import SuggestionSearcher

        with self._lock:
            if self._archive.has_fulltext_index:
                search = Searcher(self._archive).search(Query().set_query(query))
            else:
                search = SuggestionSearcher(self._archive).suggest(query)
            found = list(search.getResults(0, topn))
        hits = []
        for entry in found:
            if stopped():
                break
            try:
                content = self._fetch(entry, False, stopped)
            except ToolError:
                continue
            summary, line = best_line(content.text, query)
            hits.append(Hit(url=content.url, title=content.title, place="", summary=summary, line=line))
        return hits

    def _fetch(self, entry: str, as_source: bool, stopped: Stopped) -> Content:
        shown = one_line(entry)
        with self._lock:
            try:
                found = self._archive.get_entry_by_path(entry)
                item = found.get_item()  # where it redirects, the last of them
                path, media_type, size, title = item.path, item.mimetype, item.size, item.title
                if size > _MAX_BYTES:
                    raise ToolError(f"`{shown}` is too large to be shown. Open another article.")
                data = bytes(item.content)
            except (KeyError, RuntimeError):
                raise ToolError(f"There is no `{shown}` in {self.name}. Search for it.") from None
        media_type = media_type.partition(";")[0].strip()
        if not media_type.startswith("text/"):
            raise ToolError(f"`{shown}` is no text but {one_line(media_type, 80)}. Open another article.")
        written = markup.decode(data, is_html=media_type == "text/html")
        url = self._base + quote(path)
        if media_type == "text/html" and not as_source:
            try:
                text = apart.of_html(written, url, partial(_resolve, self._base, path), stopped=stopped)
            except apart.UnreadableError as error:
                raise ToolError(f"`{shown}` cannot be read: {error}. Open another article.") from None
        else:
            text = markup.of_text(written)
        return Content(
            url=url,
            shown=shown_address(url),
            title=text.title or one_line(title),
            text=text.text,
            links=text.links,
            own_lines=media_type != "text/html",
        )


def _resolve(base: str, entry: str, href: str) -> tuple[str, str | None] | None:
    if href.startswith(("http://", "https://")):
        return markup.web_resolve("")(href)
    try:
        parts = urlsplit(href)
    except ValueError:
        return None
    if parts.scheme or parts.netloc or not parts.path:
        return None
    path = posixpath.normpath(posixpath.join(posixpath.dirname(entry), unquote(parts.path))).lstrip("/.")
    return base + quote(path), ""
