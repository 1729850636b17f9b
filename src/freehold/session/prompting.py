"""How one model is asked: text and conversations into requests for an engine, with the model's own defaults.

Knows the tokeniser, the chat format and the context, but neither weights nor who runs them: a loaded model has one of
these, and so has a scripted one.
"""

import json
import operator
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Unpack

from freehold.engine.request import Request, TokenConstraint, check_adapter
from freehold.errors import CheckpointError, ContextError, UnsupportedError, UsageError
from freehold.formats import chat
from freehold.formats.chat import ChatFormat, HarmonyFormat
from freehold.formats.conversation import (
    Conversation,
    DeveloperContent,
    Effort,
    SystemContent,
    Text,
    ToolNamespace,
)
from freehold.formats.tokenizer import Tokenizer
from freehold.sampling import GenerationDefaults, SamplingOptions

_FEW_CHARACTERS = 8
"""To a token: up to here a prompt is simply tokenised, at up to 350 bytes of memory a character meanwhile."""
_SLICE = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompting:
    """`source` is what messages call the model. `tokenizer` is None for one that knows token ids only. `context` is how
    many tokens a sequence may have as loaded, `longest` how many the model can have. `adapters` are the names of those
    that it can be asked with; more may come."""

    source: str
    tokenizer: Tokenizer | None
    vocab_size: int
    context: int
    longest: int
    defaults: GenerationDefaults
    chat_template: str | None = None
    template_variables: Mapping[str, str] = field(default_factory=dict)
    adapters: Collection[str] = ()

    def the_tokenizer(self) -> Tokenizer:
        """Raises CheckpointError where the model has none."""
        if self.tokenizer is None:
            raise CheckpointError(
                f"{self.source} has no tokenizer.json, so this model knows token ids only; add the tokeniser it was "
                "trained with"
            )
        return self.tokenizer

    def request(
        self,
        token_ids: Sequence[int],
        *,
        max_tokens: int | None = None,
        stop_ids: Iterable[int] | None = None,
        min_tokens: int = 0,
        n: int = 1,
        boundaries: Sequence[int] = (),
        constraint: Callable[[], TokenConstraint] | None = None,
        cache_salt: str = "",
        volatile: bool = False,
        adapter: str | None = None,
        deadline: float | None = None,
        prompt_logprobs: int | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> Request:
        """A request with the model's defaults for what is None, and no more tokens than the context has room for.

        Raises UsageError for values out of range; ContextError for a prompt that leaves no room for what is asked.
        """
        check_adapter(adapter, self.adapters)
        tokens = self.checked(token_ids)
        asked = {name: value for name, value in sampling.items() if value is not None}
        room = self.context - len(tokens)
        if not room and max_tokens != 0:
            raise ContextError(
                f"the prompt has {len(tokens)} tokens and fills the whole context of {self.context}; shorten it",
                num_tokens=len(tokens),
                context=self.context,
            )
        limit = self.defaults.max_tokens if max_tokens is None else max_tokens
        return Request(
            prompt=tokens,
            max_tokens=room if limit is None else min(limit, room) if isinstance(limit, int) else limit,
            min_tokens=min_tokens,
            stop_ids=self.defaults.stop_ids if stop_ids is None else frozenset(stop_ids),
            n=n,
            boundaries=boundaries,
            constraint=constraint,
            cache_salt=cache_salt,
            volatile=volatile,
            adapter=adapter,
            deadline=deadline,
            prompt_logprobs=prompt_logprobs,
            sampling=replace(self.defaults.sampling, **asked),  # type: ignore[arg-type]
        )

    def check_length(self, said: str | Conversation) -> None:
        """Raise ContextError for text that is far too long, having read no more of it than a few contexts.

        Whatever passes may still be too long; it takes seconds at most to find out.
        """
        texts = [said] if isinstance(said, str) else list(_texts(said))
        num_characters = sum(map(len, texts))
        if num_characters <= _FEW_CHARACTERS * self.context:
            return
        tokenizer = self.the_tokenizer()
        num_read = num_tokens = 0
        for text in texts:
            for at in range(0, len(text), _SLICE):
                piece = text[at : at + _SLICE]
                num_read += len(piece)
                num_tokens += len(tokenizer.encode(piece))
                if num_tokens > 2 * self.context:  # so much that it does not matter where it was cut
                    about = num_tokens * num_characters // num_read
                    raise ContextError(
                        f"the prompt has about {about} tokens and this model's context is {self.context}; shorten it",
                        num_tokens=about,
                        context=self.context,
                    )

    def chat_format(
        self,
        reasoning_effort: Effort | None = None,
        *,
        harmony: bool | None = None,
        builtins: tuple[ToolNamespace, ...] = (),
    ) -> ChatFormat:
        """How this model writes conversations; in Harmony, or not, where that is given; with `builtins` offered in all
        of them.

        Raises CheckpointError where its folder does not say, or lacks what it takes; UsageError for an effort that it
        has no word for, UnsupportedError for built-in tools that it does not know.
        """
        chosen = chat.choose(
            self.the_tokenizer(),
            self.chat_template,
            self.defaults.stop_ids,
            system=replace(SystemContent.today(reasoning_effort), tools=builtins),
            variables=self.template_variables,
            harmony=harmony,
        )
        if reasoning_effort is not None and not isinstance(chosen, HarmonyFormat):
            raise UsageError(
                f"reasoning effort {reasoning_effort!r}: this model does not speak Harmony and has no such setting"
            )
        if builtins and not isinstance(chosen, HarmonyFormat):
            names = ", ".join(namespace.name for namespace in builtins)
            raise UnsupportedError(f"the tools {names}: this model does not speak Harmony and does not know them")
        return chosen

    def checked(self, token_ids: Sequence[int]) -> list[int]:
        """The ids as a list. Raises UsageError for none and for ids that the model does not have, ContextError for more
        than the context."""
        if not len(token_ids):
            raise UsageError("the prompt is empty; give at least one token")
        if len(token_ids) > self.context:
            longer = "" if self.context == self.longest else ", or load with a larger one"
            whose = "this model's context is" if not longer else "it was loaded with a context of"
            raise ContextError(
                f"the prompt has {len(token_ids)} tokens and {whose} {self.context}; shorten it{longer}",
                num_tokens=len(token_ids),
                context=self.context,
            )
        try:
            tokens = [operator.index(token) for token in token_ids]
        except TypeError as error:
            raise UsageError(f"token ids are integers: {error}") from None
        for token in tokens:
            if not 0 <= token < self.vocab_size:
                raise UsageError(f"token id {token} is outside this model's vocabulary of {self.vocab_size}")
        return tokens


def _texts(conversation: Conversation) -> Iterator[str]:
    """All that callers wrote in it."""
    for message in conversation.messages:
        for part in message.parts:
            match part:
                case Text(text=text):
                    yield text
                case DeveloperContent(instructions=instructions, tools=tools, response_formats=forms):
                    yield instructions or ""
                    for tool in tools:
                        yield tool.description
                        yield json.dumps(tool.parameters)
                    for form in forms:
                        yield json.dumps(form.schema)
