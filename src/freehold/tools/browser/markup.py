"""HTML, Markdown, program code and plain text as a document's text and links.

HTML is read by libxml2, which mends whatever it is given, and walked without recursion. Of a page of the web
trafilatura picks the article, where there is one. Nothing is fetched, run or rendered; scripts, styles and what a page
hides by markup are left out. Whatever the input is, the result is text: no function here raises for bad markup.
"""

import codecs
import logging
import re
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple
from urllib.parse import urljoin

from freehold.tools.browser.content import Links, one_line, plain

Resolve = Callable[[str], tuple[str, str | None] | None]
"""Of a link as it is written: where it leads and what is shown of that; None where it is no link for the model."""

MAX_LINKS = 20_000
_MIN_ARTICLE = 250  # characters: with less, trafilatura has not found what the page is about


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_SKIPPED = _words(
    "script style noscript template head title svg math iframe object embed canvas audio video map select "
    "button input textarea dialog frameset"
)
_BLOCKS = _words(
    "p div section article main header footer nav aside ul ol dl dt dd blockquote figure figcaption table "
    "form fieldset address details summary body html h1 h2 h3 h4 h5 h6 pre hr"
)
_SPACED = _words("p ul ol dl blockquote figure table h1 h2 h3 h4 h5 h6 pre hr")
_SAME = {  # as what of HTML the elements of trafilatura's trees are read
    "ref": "a",
    "lb": "br",
    "graphic": "img",
    "item": "li",
    "row": "tr",
    "cell": "td",
    "list": "ul",
    "quote": "blockquote",
}
_SPACE = re.compile(r"[ \t\n]+")
_BLANKS = re.compile(r"\n{3,}")
_HIDING = re.compile(r"display\s*:\s*none|visibility\s*:\s*hidden", re.IGNORECASE)
_META_CHARSET = re.compile(rb"<meta[^>]{0,200}charset\s*=\s*[\"']?\s*([A-Za-z0-9_.:-]{2,40})", re.IGNORECASE)
_OTHER_LINKS = ("mailto:", "javascript:", "data:", "tel:", "about:", "blob:")


class Text(NamedTuple):
    """A document's text, its title if it says one, and where its links lead."""

    text: str
    title: str
    links: tuple[str, ...]


def decode(data: bytes, charset: str | None = None, *, is_html: bool = False) -> str:
    """Bytes as text: by their byte order mark, what was promised, what HTML says of itself, UTF-8, and else Latin."""
    for mark, encoding in (
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF32_LE, "utf-32"),
        (codecs.BOM_UTF16_LE, "utf-16"),
        (codecs.BOM_UTF16_BE, "utf-16"),
    ):
        if data.startswith(mark):
            return data[len(codecs.BOM_UTF8) if encoding == "utf-8" else 0 :].decode(encoding, "replace")
    promised = [charset] if charset else []
    if is_html and (said := _META_CHARSET.search(data[:4096])):
        promised.append(said[1].decode("ascii"))
    for encoding in [*promised, "utf-8"]:
        try:
            return data.decode(encoding)
        except (UnicodeError, LookupError, ValueError):
            continue
    return data.decode("cp1252", "replace")


def web_resolve(base_url: str) -> Resolve:
    """Links of a page of the web."""
    return partial(_web_resolve, base_url)


def _web_resolve(base_url: str, href: str) -> tuple[str, str | None] | None:
    try:
        url = urljoin(base_url, href)
    except ValueError:
        return None
    url = "".join(c for c in url if c.isprintable()).strip()
    return (url, None) if url.startswith(("http://", "https://")) and len(url) <= 2048 else None


def of_html(html: str, base_url: str, resolve: Resolve, *, article_only: bool = False) -> Text:
    """The text of a page, all of it or its article, in the order of the markup."""
    root = _parse(html)
    if root is None:
        return Text("", "", ())
    title = one_line("".join(root.xpath("string(//title)")))
    if base := "".join(root.xpath("string(//base/@href)")).strip():
        resolve = _from(base, resolve)
    if article_only and (body := _article(html, base_url)) is not None:
        links = Links(base_url)
        text = _Walk(links, resolve).text_of(body)
        if len(text) >= _MIN_ARTICLE:
            return Text(text, title, links.targets)
    links = Links(base_url)
    return Text(_Walk(links, resolve).text_of(root), title, links.targets)


def _from(base: str, resolve: Resolve) -> Resolve:
    def resolve_from_base(href: str) -> tuple[str, str | None] | None:
        try:
            return resolve(urljoin(base, href))
        except ValueError:
            return None

    return resolve_from_base


def _parse(html: str) -> Any:
    from lxml import etree
    from lxml import html as lxml_html

    # Bytes, because text with an encoding declaration is refused.
    data = html.encode("utf-8", "replace").replace(b"\0", b"")
    parser = lxml_html.HTMLParser(encoding="utf-8", remove_comments=True, remove_pis=True, no_network=True)
    try:
        return lxml_html.document_fromstring(data, parser=parser)
    except (etree.LxmlError, ValueError, AssertionError):
        return None


def _article(html: str, base_url: str) -> Any:
    import trafilatura

    logging.getLogger("trafilatura").propagate = False  # it tells the log which pages it could not read
    try:
        document = trafilatura.bare_extraction(
            html,
            url=base_url or None,
            include_links=True,
            include_formatting=True,
            include_tables=True,
            include_comments=True,
            favor_recall=True,
            with_metadata=False,
        )
    except Exception:  # noqa: BLE001 — of foreign code on foreign input, whatever it is; the whole page does instead
        return None
    return getattr(document, "body", None)


class _Walk:
    """Collects the text of one tree."""

    def __init__(self, links: Links, resolve: Resolve) -> None:
        self._links, self._resolve = links, resolve
        self._out: list[str] = []  # finished text
        self._line: list[str] = []  # pieces of the current line, white space not yet folded
        self._anchor: tuple[str, str | None, int] | None = None  # where it leads, and where in the line it begins
        self._pre = self._depth = 0

    def text_of(self, root: Any) -> str:
        from lxml import etree

        walk = etree.iterwalk(root, events=("start", "end"))
        for event, element in walk:
            tag = _kind(element)
            if event == "start":
                if tag in _SKIPPED:
                    walk.skip_subtree()
                    continue
                self._begin(tag, element)
                self._say(element.text)
            else:
                if tag not in _SKIPPED:
                    self._end(tag)
                if element is not root:
                    self._say(element.tail)
        self._flush()
        lines = (line.rstrip() for line in "".join(self._out).split("\n"))
        return _BLANKS.sub("\n\n", "\n".join(lines)).strip("\n")

    def _say(self, text: str | None) -> None:
        if text:
            self._line.append(plain(text))

    def _begin(self, tag: str, element: Any) -> None:
        if tag == "a" and self._anchor is None:
            href = (element.get("href") or element.get("target") or "").strip()
            if href and not href.startswith("#") and not href.lower().startswith(_OTHER_LINKS):
                resolved = self._resolve(href)
                if resolved is not None and len(self._links) < MAX_LINKS:
                    self._anchor = (*resolved, len(self._line))
        elif tag == "br":
            self._break()
        elif tag == "img":
            if alt := one_line(element.get("alt") or element.get("title") or ""):
                self._say(f"[Image: {alt}]")
        elif tag == "li":
            self._break()
            self._line.append("  " * max(self._depth, 1) + "* ")
        elif tag == "tr":
            self._break()
        elif tag in ("td", "th"):
            if any(piece.strip() for piece in self._line):
                self._line.append(" | ")
        elif tag in _BLOCKS:
            self._break(blank=tag in _SPACED and not (tag in ("ul", "ol") and self._depth))
            if tag in ("ul", "ol"):
                self._depth += 1
            elif tag == "pre":
                self._pre += 1
            elif tag == "hr":
                self._line.append("-" * 20)
            elif tag[0] == "h" and tag[1:].isdigit() and self._anchor is None:
                self._line.append("#" * int(tag[1:]) + " ")

    def _end(self, tag: str) -> None:
        if tag == "a":
            if self._anchor is not None:
                target, place, start = self._anchor
                self._anchor = None
                words = "".join(self._line[start:])
                del self._line[start:]
                if words.strip():
                    self._line.append(self._links.mark(target, words, place))
        elif tag in ("li", "tr"):
            self._break()
        elif tag in _BLOCKS:
            if tag == "pre":
                self._flush()
                self._pre -= 1
            if tag in ("ul", "ol"):
                self._depth -= 1
            self._break(blank=tag in _SPACED and not (tag in ("ul", "ol") and self._depth))

    def _break(self, *, blank: bool = False) -> None:
        if self._anchor is not None:  # a link is one line, whatever is in it
            self._line.append(" ")
            return
        self._flush()
        if self._out and not self._out[-1].endswith("\n"):
            self._out.append("\n")
        if blank and self._out:
            self._out.append("\n")

    def _flush(self) -> None:
        text = "".join(self._line)
        self._line = []
        if not self._pre:
            head = re.match(r" +\* ", text)
            indent = head[0] if head else ""
            text = indent + _SPACE.sub(" ", text[len(indent) :]).strip() if text.strip() else ""
        if text:
            self._out.append(text)


def _kind(element: Any) -> str:
    """The element's name in HTML; that of one which is left out where it is hidden."""
    tag = element.tag if isinstance(element.tag, str) else ""
    if tag == "head" and (rend := element.get("rend")):
        return rend if re.fullmatch(r"h[1-6]", rend) else "h2"
    if tag == "code" and "\n" in (element.text or ""):
        return "pre"
    hidden = element.get("hidden") is not None or element.get("aria-hidden") == "true"
    if hidden or ((style := element.get("style")) and _HIDING.search(style)):
        return "template"
    return _SAME.get(tag, tag)


_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
_HEADING = re.compile(r" {0,3}#{1,6}\s+(.+?)\s*#*\s*$")
_DEFINITION = re.compile(r" {0,3}\[([^\[\]]{1,200})\]:\s*<?([^\s<>]+)>?")
_MARKDOWN = re.compile(
    r"(?P<code>(?P<ticks>`+)[^`]*(?P=ticks))"
    r"|(?P<image>!)?\[(?P<text>(?:[^\[\]\\]|\\.){0,500})\]"
    r"(?:\(\s{0,8}<?(?P<target>[^\s<>()]{1,2000}(?:\([^\s()]{0,500}\)[^\s()]{0,500}){0,4})>?"
    r"(?:\s{1,8}(?:\"[^\"]{0,500}\"|'[^']{0,500}'))?\s{0,8}\)"
    r"|\[(?P<label>[^\[\]]{0,200})\])"
    r"|<(?P<bare>https?://[^\s<>]{1,2000})>"
)


def of_markdown(text: str, base_url: str, resolve: Resolve) -> Text:
    """Markdown with its links as ours; line for line, otherwise as it was written."""
    links, lines, title = Links(base_url), plain(text).split("\n"), ""
    definitions: dict[str, str] = {}
    for line in lines:
        if found := _DEFINITION.match(line):
            definitions.setdefault(_label(found[1]), found[2])

    def rewrite(found: re.Match[str]) -> str:
        if found["code"] or found["image"]:
            return found[0]
        target = found["target"] or found["bare"] or definitions.get(_label(found["label"] or found["text"] or ""))
        if not target or target.startswith("#") or target.lower().startswith(_OTHER_LINKS):
            return found[0]
        resolved = resolve(target)
        if resolved is None or len(links) >= MAX_LINKS:
            return found[0]
        words = re.sub(r"\\(.)", r"\1", found["text"] or "") or target
        return links.mark(resolved[0], words, resolved[1])

    fence = ""
    for index, line in enumerate(lines):
        if found := _FENCE.match(line):
            if not fence:
                fence = found[1]
            elif line.strip().startswith(fence) and not line.strip(" `~"):
                fence = ""
        elif not fence:
            if not title and (heading := _HEADING.match(line)):
                title = one_line(heading[1])
            if ("[" in line or "<http" in line) and not _DEFINITION.match(line):
                lines[index] = _MARKDOWN.sub(rewrite, line)
    return Text("\n".join(lines), title, links.targets)


def _label(text: str) -> str:
    return _SPACE.sub(" ", text.strip()).casefold()


def of_text(text: str) -> Text:
    """Text and program code, as they are."""
    return Text(plain(text), "", ())
