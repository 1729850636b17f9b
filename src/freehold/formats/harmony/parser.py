"""Harmony token ids, as a model makes them, into events: a message starts, its text comes, it ends.

Total: takes any ids in any order, raises nothing and loses nothing. Every token fed, once `flush` was called, is

- in one `MessageStart.tokens`, the header of a message as it was written;
- or text of that message: the plain tokens after its header, decoded in a row, are its `MessageDone.message.text`;
- or its ending, `MessageDone.stop_id`;
- or the end of a turn after its calls, `TurnDone.stop_id`;
- or in one `Diagnostic.tokens`.

No control token ever becomes text, part of a name or of arguments; text that merely reads like one stays text. What
is not as it should be is mended where the meaning is plain, reported as a `Diagnostic` and, where a call is concerned,
not to be carried out in doubt (`CallDone.problem`). tests/formats/test_harmony_parser.py has a test for each rule.

Feed stop tokens as well: a call that nothing ends counts as broken off. Called by `chat.py`.
"""

from collections.abc import Iterable, Sequence

from freehold.formats.conversation import CHANNELS, ROLES, Message, Role
from freehold.formats.events import CallProblem, Diagnostic, DiagnosticCode, Event, MessageDone, MessageStart, TurnDone
from freehold.formats.harmony.body import Body, Report
from freehold.formats.harmony.header import Header, header_length, leak_at_end, leak_in, may_precede_leak, read_header
from freehold.formats.harmony.offer import Offer
from freehold.formats.harmony.vocabulary import START, HarmonyVocabulary
from freehold.formats.tokenizer import Tokenizer

_ASSISTANT: Role = "assistant"
_END_OF_TEXT = "<|endoftext|>"
_HEADER_CHARS = 256  # and the longest recipient: what goes on for longer without <|message|> is text
_LONGEST_LEAK = 32  # characters, and so pieces of text at most


class HarmonyParser:
    """Feed it what comes after the prompt; `role` is the one that the prompt's last header names, None where the ids
    begin with a header of their own. `offer` is who can be called. `plain_headers`: whether a header in plain words, in
    the middle of a text, begins a message. Where a grammar sees to it that headers have their control tokens, such
    words are text: read otherwise, they would be an answer or a call that the grammar never saw."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        offer: Offer | None = None,
        role: Role | None = _ASSISTANT,
        plain_headers: bool = True,
    ) -> None:
        self._tokenizer = tokenizer
        self._seen_texts = tokenizer.seen_texts
        self._known = known = HarmonyVocabulary.of(tokenizer)
        self._stops = {known.end, known.return_, known.call}
        self._of_headers = {known.start, known.channel, known.constrain}
        self._named_in_headers = {*self._of_headers, known.message}
        self._end_of_text = tokenizer.control_tokens.get(_END_OF_TEXT)
        self._offer = offer or Offer()
        self._max_header_chars = _HEADER_CHARS + max(map(len, self._offer.callees), default=0)
        self._is_reply = role == _ASSISTANT
        self._plain_headers = plain_headers

        self._position = 0  # of the token that is being fed
        self._events: list[Event] = []
        self._messages: list[Message] = []
        self._diagnostics: list[Diagnostic] = []

        self._header = _Header([], 0, role=role) if role is not None else None
        self._body: Body | None = None
        self._held: list[int] = []  # the body's last tokens, which may begin a leaked header
        self._called = False  # whether the last thing that was said is a call, closed as one
        self._plain: Body | None = None  # the body, where plain text can go straight into it

    @property
    def messages(self) -> tuple[Message, ...]:
        """The assistant's messages so far, as history keeps them."""
        return tuple(self._messages)

    @property
    def diagnostics(self) -> tuple[Diagnostic, ...]:
        """All that was reported so far."""
        return tuple(self._diagnostics)

    def feed(self, token_id: int) -> list[Event]:
        """The events that this token completes."""
        body = self._plain
        if body is not None and (text := self._seen_texts.get(token_id)) and text not in body.beginnings:
            self._position += 1
            body.text.append(text)
            return [body.delta(text)]
        self._step(token_id, self._position)
        self._position += 1
        return self._take_events()

    def flush(self) -> list[Event]:
        """Close whatever is open: no more tokens will come. Any that do stand where a message may start."""
        self._break_off("no more tokens came", ())
        return self._take_events()

    def _take_events(self) -> list[Event]:
        events, self._events = self._events, []
        body = self._body
        self._plain = body if body is not None and body.is_plain and not self._held else None
        return events

    def _report(self, code: DiagnosticCode, detail: str, position: int, tokens: Iterable[int] = ()) -> None:
        diagnostic = Diagnostic(code=code, detail=detail, position=position, tokens=tuple(tokens))
        self._diagnostics.append(diagnostic)
        self._events.append(diagnostic)

    def _pass_on(self, events: Iterable[Event | Report], position: int) -> None:
        for event in events:
            if isinstance(event, Report):
                self._report(event.code, event.detail, position)
            else:
                self._events.append(event)

    def _step(self, token_id: int, position: int) -> None:
        if self._body is not None:
            self._in_body(self._body, token_id, position)
        elif self._header is not None:
            self._in_header(self._header, token_id, position)
        else:
            self._between_messages(token_id, position)

    def _is_plain(self, token_id: int) -> bool:
        return self._tokenizer.control_name(token_id) is None and self._tokenizer.is_token(token_id)

    def _report_stranger(self, token_id: int, position: int) -> None:
        """A token that means nothing where it stands."""
        name = self._tokenizer.control_name(token_id)
        if name is None:
            self._report("unknown token", f"the vocabulary has no token {token_id}", position, (token_id,))
        else:
            self._report("misplaced control token", f"{name} was left out", position, (token_id,))

    def _break_off(self, why: str, tokens: Sequence[int]) -> None:
        """End whatever is open; `tokens` are those that did it."""
        while self._header is not None:  # one may hold another, which leaked
            self._break_off_header(self._header, why)
        if self._body is not None:
            self._report("broken off", f"{why} in the middle of a message", self._position, tokens)
            self._close(None, is_broken_off=True)
        elif tokens:
            self._report("misplaced control token", why, self._position, tokens)

    # --- between messages ---

    def _between_messages(self, token_id: int, position: int) -> None:
        known = self._known
        if token_id == known.start:
            self._header = _Header([token_id], position)
        elif token_id in (known.channel, known.message):
            self._report("missing start", "a message began without <|start|>", position)
            self._header = _Header([], position)
            self._step(token_id, position)
        elif self._is_plain(token_id):
            self._header = _Header([], position, is_stray=True)
            self._step(token_id, position)
        elif token_id == known.return_ and self._called:
            self._called = False
            self._events.append(TurnDone(token_id))
        else:
            self._report_stranger(token_id, position)

    # --- headers ---

    def _in_header(self, header: "_Header", token_id: int, position: int) -> None:
        known = self._known
        if token_id in self._stops:
            self._end_header(header, token_id)
        elif token_id == known.start:
            self._end_header(header, None)
            self._header = _Header([token_id], position)
        elif token_id == self._end_of_text:
            self._break_off(f"{_END_OF_TEXT} was written", (token_id,))
        elif header.is_stray and token_id in (known.channel, known.message):
            if self._reads_like_a_header(header.tokens):
                self._report("missing start", "a header began without <|start|>", header.position)
                header.is_stray, header.role = False, None
            else:
                self._end_header(header, None)
            self._step(token_id, position)
        elif token_id == known.message:
            header.tokens.append(token_id)
            self._begin(header.tokens, header)
        else:
            header.tokens.append(token_id)
            header.size += len(self._piece(token_id)) or 1
            if header.size > self._max_header_chars:
                self._begin_without_message(header)

    def _piece(self, token_id: int) -> str:
        """How a token reads in a header. No name there has characters that are split over tokens.

        Harmony's control tokens read by name, others as markup with their id: whatever theirs is, it is no word.
        """
        name = self._tokenizer.control_name(token_id)
        if name is not None:
            return name if token_id in self._named_in_headers else f"<|{token_id}|>"
        return self._tokenizer.decode((token_id,)) if self._tokenizer.is_token(token_id) else ""

    def _pieces(self, tokens: Iterable[int]) -> list[str]:
        return [self._piece(token) for token in tokens]

    def _reads_like_a_header(self, tokens: Sequence[int]) -> bool:
        pieces = self._pieces(tokens)
        return "".join(pieces).strip() in (*ROLES, *CHANNELS) or header_length(pieces) == len(pieces)

    def _length_of_header(self, tokens: Sequence[int]) -> int:
        """How many of the tokens are to be read as a header, the others being text."""
        last = max((i for i, token in enumerate(tokens, 1) if token in self._of_headers), default=0)
        return max(header_length(self._pieces(tokens)), last)

    def _read(self, tokens: Sequence[int], header: "_Header") -> Header:
        text = "".join(self._pieces(tokens))
        if header.role is None and not text.startswith(START):
            text = START + header.spoken + text
        return read_header(text, self._offer, role=header.role or _ASSISTANT)

    def _begin(self, tokens: Sequence[int], header: "_Header", *, is_leaked: bool = False) -> None:
        """Start the message whose header these tokens are."""
        read = self._read(tokens, header)
        for problem, detail in read.problems:
            self._report(problem, detail, header.position)
        for position, token in enumerate(tokens, header.position):
            if not self._tokenizer.is_token(token):
                self._report("unknown token", f"the vocabulary has no token {token}; a header had it", position)
        if "<|" in "".join(self._piece(token) for token in tokens if self._is_plain(token)):
            code: DiagnosticCode = "leaked header" if read.recipient is None else "recipient mended"
            self._report(code, "control tokens were written in plain characters", header.position)
        if self._is_reply and read.role != _ASSISTANT:
            self._report("role not the assistant's", f"{read.role!r} is no part of the reply", header.position)
        start = MessageStart(
            role=read.role,
            channel=read.channel,
            recipient=read.recipient,
            content_type=read.content_type,
            name=read.name,
            position=header.position,
            tokens=tuple(tokens),
        )
        call_problem: CallProblem | None = "leaked" if is_leaked else read.call_problem
        self._header, self._body = None, Body(self._tokenizer, start, self._offer, call_problem)
        self._events.append(start)
        self._pass_on(self._body.open(), header.position)

    def _begin_without_message(self, header: "_Header") -> None:
        """Text followed a header, if there was one at all, without `<|message|>` between the two."""
        length, first = self._length_of_header(header.tokens), header.position
        is_leaked = length > 0 and not self._of_headers.intersection(header.tokens)
        if header.is_stray and not length:
            self._report("text between messages", "it was taken for a message", first)
        elif is_leaked:
            self._report("leaked header", "a header was written in plain text", first)
        else:
            self._report("missing message", "text came without <|message|>", first + length)
        self._begin(header.tokens[:length], header, is_leaked=is_leaked)
        for position, token in enumerate(header.tokens[length:], first + length):
            self._step(token, position)

    def _end_header(self, header: "_Header", stop_id: int | None) -> None:
        """A header ended, as a message does, before its `<|message|>` came."""
        self._header = None
        ending = () if stop_id is None else (stop_id,)
        length = self._length_of_header(header.tokens)
        read = self._read(header.tokens[:length], header)
        text = "".join(self._pieces(header.tokens[length:]))
        if not text.strip() and read.channel is None and read.recipient is None:
            code: DiagnosticCode = "text between messages" if header.is_stray else "missing message"
            self._report(code, "there was no message in it", header.position, (*header.tokens, *ending))
            return
        self._begin_without_message(header)
        if self._body is not None:
            self._end(stop_id)
        elif self._header is not None:  # the text led to a header of its own, which leaked
            self._end_header(self._header, stop_id)

    def _break_off_header(self, header: "_Header", why: str) -> None:
        """A header without text behind it leads to no message: its words are none for the user."""
        self._header = None
        text = "".join(self._pieces(header.tokens[self._length_of_header(header.tokens) :]))
        # Behind a control token, what has no space or goes on with "to=" is the header's next word, cut short.
        is_word = not any(map(str.isspace, text)) or " to=".startswith(text)
        if text.strip() and not (is_word and self._of_headers.intersection(header.tokens)):
            self._begin_without_message(header)
        elif header.tokens:
            self._report("broken off", f"{why} in the middle of a header", header.position, header.tokens)

    # --- bodies ---

    def _in_body(self, body: Body, token_id: int, position: int) -> None:
        if self._plain_headers and body.may_leak and self._is_plain(token_id):
            self._watch(body, token_id, position)
        elif self._is_plain(token_id):
            self._events += body.feed(token_id)
        elif token_id in self._stops:
            self._end(token_id)
        elif token_id == self._known.start:
            self._end(None)
            self._header = _Header([token_id], position)
        elif token_id == self._known.channel:
            self._begin_next(token_id, position)
        elif token_id == self._known.message and body.may_leak and (words := self._leak_before_message(body)):
            self._begin_after(words, token_id, position)
        elif token_id == self._end_of_text:
            self._break_off(f"{_END_OF_TEXT} was written", (token_id,))
        else:
            self._release(body)
            self._report_stranger(token_id, position)

    def _begin_next(self, channel_id: int, position: int) -> None:
        """`<|channel|>` belongs to a header: `<|end|>` and `<|start|>` are missing, and the role is, or was text."""
        role = self._held if "".join(self._pieces(self._held)) == _ASSISTANT else []
        self._held = [] if role else self._held
        self._end(None)
        self._report("missing start", "a header began without <|start|>", position - len(role))
        self._header = _Header([*role, channel_id], position - len(role))

    def _leak_before_message(self, body: Body) -> str:
        """The header in plain words, of which only `<|message|>` is a control token."""
        return leak_at_end("".join([*body.text[-_LONGEST_LEAK:], *self._pieces(self._held)]))

    def _begin_after(self, words: str, message_id: int, position: int) -> None:
        """Start the message whose header but for `<|message|>` is `words`, which were handed out as text and stay it:
        what follows was meant for another channel, and may be the answer."""
        self._end(None)
        self._begin([message_id], _Header([], position, role=None, spoken=words))

    def _watch(self, body: Body, token_id: int, position: int) -> None:
        """Text that may run into a header whose control tokens are missing: "...done.assistantfinalThe answer".

        Only where the words are tokens of their own, as in headers. As long as they can be a leak, they wait.
        """
        if not self._held and not (
            self._piece(token_id) in body.beginnings and may_precede_leak(body.text[-1] if body.text else "")
        ):
            self._events += body.feed(token_id)
            return
        self._held.append(token_id)
        pieces = self._pieces(self._held)
        verdict = leak_in("".join(pieces))
        if verdict == "yes" and header_length(pieces):
            self._leak(position)
        elif verdict != "maybe":
            *before, last = self._held
            self._held = before
            self._release(body)
            self._watch(body, last, position)  # it may begin a leak itself

    def _leak(self, position: int) -> None:
        header = _Header(self._held, position + 1 - len(self._held))
        self._held = []
        self._report("leaked header", "a header stood in the text, without its control tokens", header.position)
        self._close(None)
        self._header = header
        if "to=" not in "".join(self._pieces(header.tokens)):
            self._begin_without_message(header)

    def _release(self, body: Body) -> None:
        held, self._held = self._held, []
        for token_id in held:
            self._events += body.feed(token_id)

    def _end(self, stop_id: int | None) -> None:
        """The message ends in `stop_id`, or because the next one begins."""
        body, known = self._body, self._known
        assert body is not None
        if stop_id is None:
            self._report("missing end", "a message ended where the next one began", self._position)
        elif body.is_call and stop_id != known.call:
            name = self._tokenizer.control_name(stop_id)
            self._report("wrong end of a call", f"{name} where <|call|> belongs", self._position)
        elif body.calls_nobody and stop_id == known.call:
            self._report("wrong end of a message", "<|call|> ended a message to nobody", self._position)
        self._close(stop_id)

    def _close(self, stop_id: int | None, *, is_broken_off: bool = False) -> None:
        body = self._body
        assert body is not None
        self._release(body)
        self._pass_on(body.close(is_broken_off=is_broken_off), self._position)
        self._called = body.is_call and stop_id == self._known.call
        message = body.message()
        self._events.append(MessageDone(message=message, stop_id=stop_id))
        if message.role == _ASSISTANT:
            self._messages.append(message)
        self._body = None


class _Header:
    """A header while it comes. `role` is who speaks, None where its first word says that without a `<|start|>` before
    it. A stray one was begun by text between messages, and may be just that. `spoken` are its first words where they
    are text of the message before."""

    __slots__ = ("is_stray", "position", "role", "size", "spoken", "tokens")

    def __init__(
        self,
        tokens: list[int],
        position: int,
        *,
        role: Role | None = _ASSISTANT,
        is_stray: bool = False,
        spoken: str = "",
    ) -> None:
        self.tokens, self.position, self.spoken = tokens, position, spoken
        self.role, self.is_stray = role, is_stray
        self.size = 0
