"""A message's header, as a model wrote it: who speaks, on which channel, to whom, in which form.

    <|start|>assistant to=functions.f<|channel|>commentary <|constrain|>json<|message|>

`read_header` makes sense of any string whatsoever and names every mending. Control tokens stand in it by name, and so
those that leaked as plain characters read like real ones: harmless here, where nothing of it becomes text.
`header_length` finds where a header ends that has no `<|message|>`, `leak_in` and `leak_at_end` the header in plain
words that a message may run into. Called by `parser.py`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from freehold.formats.conversation import CHANNELS, ROLES, Channel, Role, is_name
from freehold.formats.events import CallProblem, DiagnosticCode
from freehold.formats.harmony.offer import FUNCTIONS, Offer
from freehold.formats.harmony.vocabulary import CHANNEL, CONSTRAIN, MESSAGE, START

NOT_TOOLS = ("user", "assistant", "all")
"""Recipients that get text."""

_LEAKS = tuple(f"assistant{channel}" for channel in CHANNELS)
LEAK_BEGINNINGS = frozenset(leak[:length] for leak in _LEAKS for length in range(1, len(leak) + 1))
"""What the first token of a leaked header can read."""

_LEAK_AT_END = re.compile(rf"assistant(?:{'|'.join(CHANNELS)})?(?=\s*\Z)")

# A leak is stuck to the end of a sentence; "assistantfinal" in quotes, or in a path or a pattern, is spoken of.
_BEFORE_A_MENTION = frozenset(" \t\"'`“‘«([{<|/\\_-=")
_AFTER_A_MENTION = frozenset(" \t\"'`”’»)]}>|/\\_-=.,;:!?")

_QUOTES = "\"'`"
_TYPES = ("json", "code", "text")
_NAME = r"[A-Za-z0-9_.\-]+"
_TYPE = r"[A-Za-z0-9_.\-/+]+"
_MARKUP = re.compile(r"(<\|[^<>|\s]*\|>)")
_ANY_CHANNEL = "|".join(CHANNELS)
_ANY_TYPE = "|".join(_TYPES)
_GLUED_AUTHOR = re.compile(rf"((?:{re.escape(START)})?\s*assistant)(?i:{_ANY_CHANNEL})")
_ANY_TO = re.compile(r"(?i:to=)")
_ODD_TO = re.compile(r"\wto=|(?!to=)(?i:to=)")
_TO = f"(?:\\s*to=(?P<%s>{_NAME}))?"
_WRITTEN = re.compile(
    rf"(?P<start>{re.escape(START)}\s*)?(?P<author>(?:{'|'.join(ROLES)})(?::{_NAME})?)?{_TO % 'to'}"
    rf"(?:\s*(?P<mark>{re.escape(CHANNEL)}\s*)?(?P<channel>{_ANY_CHANNEL}))?{_TO % 'to_too'}"
    rf"(?:\s*{re.escape(CONSTRAIN)}\s*(?:{_ANY_TYPE})|\s+(?:json|code))?"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What a header says, and what was wrong with it; `call_problem` is why a call must not be carried out."""

    role: Role
    name: str | None = None
    channel: str | None = None
    recipient: str | None = None
    content_type: str | None = None
    call_problem: CallProblem | None = None
    problems: tuple[tuple[DiagnosticCode, str], ...] = ()


def read_header(text: str, offer: Offer, *, role: Role) -> Header:
    """What `text` says; `role` is the speaker's where no `<|start|>` says that one is named."""
    words = _Words(has_odd_to=_ODD_TO.search(text) is not None)
    if leaked := _GLUED_AUTHOR.match(text):
        words.problems.append(("leaked header", f"{CHANNEL} is missing in {leaked[0]!r}"))
        text = f"{leaked[1]}{CHANNEL}{text[leaked.end(1) :]}"
    words.read(_ANY_TO.sub(" to=", text), expected="author" if text.startswith(START) else None)
    return words.header(role, offer)


def header_length(pieces: Sequence[str]) -> int:
    """How many of the pieces of text are a header, where text follows without `<|message|>`; 0 where none are.

    Conservative, for where nothing marks a channel the words may be prose: "assistantfinal" is a header, "final" only
    where text follows that goes on like no sentence ("analysisWe need").
    """
    for length in range(len(pieces), 0, -1):
        written = _WRITTEN.fullmatch("".join(pieces[:length]))
        if written is None:
            continue
        following = "".join(pieces[length:])[:1]
        if written["start"] or written["mark"]:
            return length
        if written["author"] and written["channel"]:
            return length
        if written["to"] or (written["channel"] and _goes_on_like_no_sentence(following)):
            return length
    return 0


def may_precede_leak(text: str) -> bool:
    """Whether a leaked header can follow this text."""
    return text[-1:] not in _BEFORE_A_MENTION


def leak_in(text: str) -> Literal["no", "maybe", "yes"]:
    """Whether `text`, from where a token began, is a header in plain words: `assistantfinal` and more text, or
    `assistantcommentary to=`. In doubt (spaces or quotes follow) it is none; "maybe" until more text is known."""
    for leak in _LEAKS:
        if leak.startswith(text):
            return "maybe"
        if text.startswith(leak):
            following = text[len(leak) :]
            if not leak.endswith("final") and " to=".startswith(following):
                return "maybe"
            if not leak.endswith("final") and following.startswith(" to="):
                return "yes"
            return "no" if following[0] in _AFTER_A_MENTION else "yes"
    return "no"


def leak_at_end(text: str) -> str:
    """The header in plain words that `text` ends with, "" where it does not."""
    found = _LEAK_AT_END.search(text)
    return found[0] if found else ""


def _goes_on_like_no_sentence(following: str) -> bool:
    return following.isupper() or following in ("{", "[", "#", "*")


@dataclass(slots=True, kw_only=True)
class _Words:
    """A header's words by what they are meant to be."""

    has_odd_to: bool
    author: str | None = None
    channels: list[str] = field(default_factory=list)
    recipients: list[str] = field(default_factory=list)
    types: list[str] = field(default_factory=list)
    bare: list[str] = field(default_factory=list)
    problems: list[tuple[DiagnosticCode, str]] = field(default_factory=list)

    def read(self, text: str, *, expected: str | None) -> None:
        for index, piece in enumerate(_MARKUP.split(text)):
            if index % 2 == 0:
                for word in piece.split():
                    expected = self._take(word, expected)
            elif piece == CHANNEL:
                expected = "channel"
            elif piece == CONSTRAIN:
                expected = "type"
            elif piece not in (START, MESSAGE):
                self._report("misplaced control token", f"{piece!r} in a header was left out")

    def _take(self, word: str, expected: str | None) -> str | None:
        """Sort a word in; returns what is expected next."""
        if word.startswith("to="):
            self.recipients.append(word.removeprefix("to="))
            return expected
        match expected:
            case "author":
                self.author = word
            case "channel":
                self.channels.append(word)
            case "type":
                self.types.append(word)
            case _:
                self.bare.append(word)
        return None

    def header(self, role: Role, offer: Offer) -> Header:
        role, name = self._author(role, offer)
        if role == "assistant" and not any(self.recipients):
            self._find_recipient(offer)
        channel = self._channel()
        for word in list(self.bare):
            if word.lower() in CHANNELS and channel is None:
                self._report("leaked header", f"{CHANNEL} is missing before {word!r}")
                channel = word.lower()
                self.bare.remove(word)
        content_type = self._content_type()
        recipients = self._recipients()
        if role == "assistant":
            is_typed = content_type is not None
            recipients = [self._offered(recipient, offer, is_typed=is_typed) for recipient in recipients]
        # What names somebody who can be called is a call, if one that must not be carried out.
        recipient = max(recipients, key=lambda name: (name in offer.callees, name not in NOT_TOOLS), default=None)
        call_problem: CallProblem | None = None
        if len(set(recipients)) > 1:
            call_problem = "several recipients"
            self._report(call_problem, f"{' and '.join(recipients)}: it cannot be for all of them")
        for word in self.bare:
            self._report("junk in header", f"{word!r} was left out")
        return Header(
            role=role,
            name=name,
            channel=channel,
            recipient=recipient,
            content_type=content_type,
            call_problem=call_problem,
            problems=tuple(self.problems),
        )

    def _report(self, code: DiagnosticCode, detail: str) -> None:
        self.problems.append((code, detail))

    def _author(self, role: Role, offer: Offer) -> tuple[Role, str | None]:
        if self.author is None:
            if self.bare and self.bare[0] == role:
                del self.bare[0]
            return role, "tool" if role == "tool" else None  # a tool has a name
        written, _, name = self.author.partition(":")
        for known in ROLES:
            if written == known:
                if name and not is_name(name):
                    self._report("junk in header", f"{name!r} is no name")
                return known, name if is_name(name) else (known if known == "tool" else None)
        if self.author.lower() in CHANNELS:
            self._report("leaked header", f"a channel, {self.author!r}, where the role belongs")
            self.channels.insert(0, self.author.lower())
            return "assistant", None
        # A tool's message is headed by the tool's name alone.
        if is_name(self.author) and (self.recipients or "." in self.author or offer.meant(self.author)):
            return "tool", self.author
        self._report("unknown role", f"{self.author!r} was taken for the assistant")
        return "assistant", None

    def _find_recipient(self, offer: Offer) -> None:
        """Take a word without `to=` for the recipient that names somebody who can be called."""
        for words in (self.bare, self.channels, self.types):
            for word in words:
                for name in re.findall(_NAME, word) if word not in (*CHANNELS, *_TYPES) else ():
                    if name.startswith(f"{FUNCTIONS}.") or name in offer.callees:
                        self._report("recipient mended", f"{word!r} was taken for the recipient")
                        self.recipients = [name]
                        words.remove(word)
                        return

    def _channel(self) -> str | None:
        channel: str | None = None
        for word in self.channels:
            known = _known_channel(word)
            if known is not None and known != word:
                self._report("junk in header", f"{word!r} was read as {known!r}")
                behind = word.lower().partition(known)[2]
                self.types += [behind] if behind in _TYPES else []
                word = known
            if channel is not None and channel != word:
                self._report("junk in header", f"channel {channel!r} was followed by {word!r}")
            if channel is None or word in CHANNELS:
                channel = word
        return channel

    def _content_type(self) -> str | None:
        if self.types:
            written = re.match(_TYPE, self.types[-1])
            if written is None or written[0] != self.types[-1] or len(self.types) > 1:
                self._report("content type mended", f"{' '.join(self.types)!r} was written")
            return f"{CONSTRAIN}{written[0]}" if written else None
        known = [word for word in self.bare if word in _TYPES]
        if not known and self.recipients and len(self.bare) == 1:
            known = [word for word in self.bare if re.fullmatch(_TYPE, word)]
        if not known:
            return None
        self.bare.remove(known[-1])
        return known[-1]

    def _recipients(self) -> list[str]:
        names = [name[0] for word in self.recipients if (name := re.match(_NAME, word.lstrip(_QUOTES)))]
        if names != self.recipients or self.has_odd_to:
            words = " ".join(f"to={word}" for word in self.recipients)
            self._report("recipient mended", f"{words!r} was read as {', '.join(names) or 'nobody'}")
        return names

    def _offered(self, recipient: str, offer: Offer, *, is_typed: bool) -> str:
        if recipient in offer.callees or recipient in NOT_TOOLS:
            return recipient
        callee = offer.meant(recipient, is_typed=is_typed)
        if callee is None:
            self._report("recipient not offered", f"nobody is called {recipient!r}")
            return recipient
        self._report("recipient mended", f"{recipient!r} was read as {callee.recipient!r}")
        return callee.recipient


def _known_channel(word: str) -> Channel | None:
    """The channel that a word is, or has in it. Reasoning first: what may be meant for nobody is shown to nobody."""
    lower = word.lower()
    return next((channel for channel in CHANNELS if channel in lower), None)
