"""The `browser` tool: search, open and find, as gpt-oss was trained on them.

Every call that succeeds shows a page under the next number, its *cursor*; scrolling does too. Links are opened by their
number on a page, documents by their address. An answer cites lines as `【cursor†L8-L10】`, which `citations` turns into
lines of the file or page that was shown. A call that fails shows nothing and changes nothing.

Each conversation has its own pages. Where pages come from, and what may be read at all, is the sources' affair.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain, zip_longest
from typing import Any

from freehold.errors import UsageError
from freehold.formats.conversation import ToolNamespace
from freehold.formats.harmony.builtins import BROWSER
from freehold.formats.tokenizer import Tokenizer
from freehold.tools.base import Citation, ToolError, ToolResult
from freehold.tools.browser.content import Hit, Source, one_line, plain
from freehold.tools.browser.page import Page, Target
from freehold.tools.browser.threads import Stopped, Threads

_VIEW_SOURCE = "view-source:"
_MAX_ARGUMENTS = 64 << 10  # characters
_MAX_RESULTS = 20
_MAX_SHOWN_TOKENS = 8192  # where the model says how many lines it wants
_MAX_HELD = 64 << 20  # characters of pages in one conversation
_MAX_NUMBER = 1 << 31
_PARAMETERS = {tool.name: (tool.parameters or {})["properties"] for tool in BROWSER.tools}
_NUMBER = re.compile(r"\s*-?\d{1,9}\s*")
_CITATION = re.compile(r"【(\d{1,6})†\s*L(\d{1,9})(?:\s*[-–—]\s*L?(\d{1,9}))?\s*(?:†[^【】]{0,200})?】")


class Browser:
    """The tool. Made once; `sources` are its own from then on, and are closed with it.

    Without `source` a search asks all local sources, and the web only where there is no other. `tokenizer` is the
    model's: a view has `view_tokens` of it. Raises UsageError for sources that cannot be told apart.
    """

    def __init__(self, *, sources: Sequence[Source], tokenizer: Tokenizer, view_tokens: int = 1024) -> None:
        if not sources:
            raise UsageError("the browser needs a source: a folder, a ZIM file or the web")
        names = [source.name for source in sources]
        if doubled := sorted({name for name in names if names.count(name) > 1}):
            raise UsageError(f"two sources of the browser are called {doubled[0]!r}; give one another name")
        if not 64 <= view_tokens <= _MAX_SHOWN_TOKENS:
            raise UsageError(f"view_tokens must be between 64 and {_MAX_SHOWN_TOKENS}, got {view_tokens!r}")
        self._sources = {source.name: source for source in sources}
        self._tokenizer, self._view_tokens = tokenizer, view_tokens
        self._threads = Threads("browser")
        default = [source.name for source in sources if source.local] or names
        self._default = tuple(self._sources[name] for name in default)
        described = f"sources={', '.join(names)} (default: {', '.join(default)})"
        self._namespace = replace(
            BROWSER, description=BROWSER.description.replace("sources=web (default: web)", described)
        )

    @property
    def namespace(self) -> ToolNamespace:
        return self._namespace

    async def open(self) -> "BrowserSession":
        return BrowserSession(self._sources, self._default, self._tokenizer, self._view_tokens, self._threads)

    def close(self) -> None:
        """Stop what goes on, and give back what the sources hold."""
        self._threads.close()
        for source in self._sources.values():
            source.close()


class BrowserSession:
    """One conversation's pages. See ToolSession."""

    def __init__(
        self,
        sources: Mapping[str, Source],
        default: Sequence[Source],
        tokenizer: Tokenizer,
        view_tokens: int,
        threads: Threads,
    ) -> None:
        self._sources, self._default = sources, default
        self._tokenizer, self._view_tokens, self._threads = tokenizer, view_tokens, threads
        self._pages: list[Page] = []

    async def call(self, name: str, arguments: str) -> ToolResult:
        function = name.removeprefix("browser.")
        given = _arguments(function, arguments)
        if function == "search":
            text = await self._search(given)
        elif function == "open":
            text = await self._open(given)
        else:
            text = await self._find(given)
        return ToolResult(text=text)

    def citations(self, answer: str) -> Sequence[Citation]:
        found = []
        for match in _CITATION.finditer(answer):
            cursor, first = int(match[1]), int(match[2])
            if cursor >= len(self._pages):
                continue
            passage = self._pages[cursor].passage(first, int(match[3] or first))
            if passage is not None:
                found.append(
                    Citation(
                        start=match.start(),
                        end=match.end(),
                        url=passage.url.removeprefix(_VIEW_SOURCE),
                        title=passage.title,
                        first_line=passage.first_line,
                        last_line=passage.last_line,
                    )
                )
        return found

    def address(self, name: str, arguments: str) -> str:
        """Of the page that a call opens or searches in, as far as that can be told before it is made; else ""."""
        try:
            given = _arguments(name.removeprefix("browser."), arguments)
            id_ = given.get("id")
            if isinstance(id_, str) and not _NUMBER.fullmatch(id_):
                return id_.strip().removeprefix(_VIEW_SOURCE)
            number, page = _number(given, "id", -1), self._page(given)
            return (page.url if number < 0 else page.targets[number].url).removeprefix(_VIEW_SOURCE)
        except (ToolError, IndexError):
            return ""

    def links(self) -> Sequence[str]:
        """Where the links of the page lead that was shown last."""
        return [target.url for target in self._pages[-1].targets] if self._pages else []

    async def aclose(self) -> None:
        self._pages.clear()

    async def _search(self, given: Mapping[str, Any]) -> str:
        query = plain(_text(given, "query"))
        topn = min(max(_number(given, "topn", 10), 1), _MAX_RESULTS)
        lists, problems = [], []
        for source in self._asked(given):
            try:
                lists.append(await source.search(query, topn))
            except ToolError as error:
                problems.append(error)
        if problems and not any(lists):
            raise problems[0]
        hits: list[Hit] = [hit for hit in chain.from_iterable(zip_longest(*lists)) if hit is not None]
        return await self._show(Page.of_hits(query, hits[:topn]), 0, -1)

    async def _open(self, given: Mapping[str, Any]) -> str:
        loc, num_lines = _number(given, "loc", -1), _number(given, "num_lines", -1)
        as_source = given.get("view_source") or False
        if not isinstance(as_source, bool):
            raise ToolError(f"`view_source` is true or false, not `{as_source!r:.40}`.")
        id_ = given.get("id")
        if isinstance(id_, str) and not _NUMBER.fullmatch(id_):
            page, target = None, Target(id_.strip())
        else:
            number, current = _number(given, "id", -1), self._page(given)
            if number < 0 and not as_source:
                return await self._show(current, max(loc, 0), num_lines)
            if number >= len(current.targets):
                ids = f"0 to {len(current.targets) - 1}" if current.targets else "none"
                raise ToolError(f"Invalid link id `{number}`. Link ids on this page: {ids}.")
            target = Target(current.url) if number < 0 else current.targets[number]
            if number < 0 and (current.is_matches or not current.url):
                raise ToolError("A list of results has no source to view. Open one of its links.")
            # What a local source has may have changed since; but a match's lines are those of the page that it is on.
            is_read_anew = as_source or (self._is_local(target.url) and not target.is_display)
            page = None if is_read_anew else self._held(target.url)
        if page is None:
            as_source = as_source or target.url.startswith(_VIEW_SOURCE)
            asked = self._asked(given) if given.get("source") else self._sources.values()
            page = await self._fetched(target.url.removeprefix(_VIEW_SOURCE), as_source, asked)
        if loc < 0:
            loc = page.line_of(target)
        return await self._show(page, loc, num_lines)

    async def _find(self, given: Mapping[str, Any]) -> str:
        pattern, page = _text(given, "pattern"), self._page(given)
        if page.is_matches:
            raise ToolError("Cannot run `find` on a list of matches. Give the `cursor` of the page itself.")
        found = await self._threads.run(lambda stopped: page.find(pattern))
        return await self._show(found, 0, -1)

    def _asked(self, given: Mapping[str, Any]) -> Sequence[Source]:
        name = given.get("source")
        if name is None or name == "":
            return self._default
        if not isinstance(name, str) or name not in self._sources:
            raise ToolError(f"There is no source `{name!s:.80}`. Sources: {', '.join(self._sources)}.")
        return (self._sources[name],)

    def _page(self, given: Mapping[str, Any]) -> Page:
        if not self._pages:
            raise ToolError("No pages to access! Search first, or open a document by its address.")
        cursor = _number(given, "cursor", -1)
        if cursor >= len(self._pages):
            raise ToolError(
                f"Cursor `{cursor}` is out of range. Available cursor indices: [0 - {len(self._pages) - 1}]."
            )
        page = self._pages[cursor if cursor >= 0 else -1]
        if page.is_dropped:
            raise ToolError(f"The page at cursor `{cursor}` is no longer held. Open it again: `{page.shown}`.")
        return page

    def _is_local(self, address: str) -> bool:
        return any(source.local and source.has(address) for source in self._sources.values())

    def _held(self, url: str) -> Page | None:
        return next((page for page in reversed(self._pages) if page.url == url and url and not page.is_dropped), None)

    async def _fetched(self, address: str, as_source: bool, sources: Iterable[Source]) -> Page:
        for source in sources:
            if source.has(address):
                content = await source.fetch(address, as_source=as_source)
                if as_source:
                    content = replace(content, url=_VIEW_SOURCE + content.url, shown=_VIEW_SOURCE + content.shown)
                return await self._threads.run(lambda stopped, content=content: Page.of_content(content))  # type: ignore[misc]
        shown, names = one_line(address), ", ".join(self._sources)
        if address.startswith(("http://", "https://")):
            raise ToolError(f"`{shown}` cannot be opened: the web is not available here. Use {names}.")
        raise ToolError(f"`{shown}` is in none of the sources: {names}. Search, or open a link.")

    async def _show(self, page: Page, loc: int, num_lines: int) -> str:
        def shown(stopped: Stopped) -> str:
            return page.show(
                len(self._pages),
                loc=loc,
                num_lines=num_lines,
                view_tokens=self._view_tokens,
                max_tokens=_MAX_SHOWN_TOKENS,
                cut=self._cut,
            )

        text = await self._threads.run(shown)
        self._pages.append(page)
        self._drop()
        return text

    def _drop(self) -> None:
        """Forget the texts of the oldest pages when all of them are too much; citations still know their lines."""
        held = {id(page): page for page in reversed(self._pages) if not page.is_dropped}
        total = 0
        for number, page in enumerate(held.values()):
            total += page.size
            if number and total > _MAX_HELD:
                page.drop()

    def _cut(self, text: str, tokens: int) -> str:
        return self._tokenizer.decode(self._tokenizer.encode(text)[:tokens])


def _arguments(function: str, arguments: str) -> Mapping[str, Any]:
    if function not in _PARAMETERS:
        raise ToolError(f"There is no `browser.{function!s:.60}`. Call browser.search, browser.open or browser.find.")
    if len(arguments) > _MAX_ARGUMENTS:
        raise ToolError(f"The arguments are {len(arguments)} characters long; {_MAX_ARGUMENTS} are allowed.")
    try:
        given = json.loads(arguments) if arguments.strip() else {}
    except (ValueError, RecursionError):
        raise ToolError(f"The arguments of browser.{function} are not JSON. Write one JSON object.") from None
    if not isinstance(given, dict):
        raise ToolError(f"The arguments of browser.{function} must be one JSON object.")
    if "top_n" in given and function == "search":
        given.setdefault("topn", given.pop("top_n"))
    known = _PARAMETERS[function]
    if unknown := [name for name in given if name not in known]:
        raise ToolError(f"browser.{function} has no parameter `{unknown[0]:.60}`. It has: {', '.join(known)}.")
    return {name: value for name, value in given.items() if value is not None}


def _text(given: Mapping[str, Any], name: str) -> str:
    value = given.get(name)
    if not isinstance(value, str) or not value.strip():
        raise ToolError(f"`{name}` is missing: give a text that is not empty.")
    return value


def _number(given: Mapping[str, Any], name: str, default: int) -> int:
    value = given.get(name, default)
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        value = int(value)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value != int(value) or abs(value) > _MAX_NUMBER:
        raise ToolError(f"`{name}` should be an integer, not `{value!r:.40}`.")
    return int(value)
