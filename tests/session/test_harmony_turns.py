"""The engine, a random model at temperature 2 and the turn's grammar: whatever comes out is a legal turn."""

import asyncio
import json
import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import freehold
from freehold.config import ModelConfig, RopeConfig
from freehold.engine.core import Engine
from freehold.engine.loop import AsyncEngine
from freehold.engine.options import EngineOptions
from freehold.engine.request import Completion, Request, TokenConstraint
from freehold.formats.byte_level import CHARACTERS
from freehold.formats.chat import TurnChoices
from freehold.formats.conversation import Conversation, Message, SystemContent, Tool, ToolNamespace, text_message
from freehold.formats.forms import Choice, FreeText, JsonObject, JsonSchema, Lark, Regex
from freehold.formats.harmony.grammar import AllowedTools, NamedTool, ToolChoice, TurnGrammar, TurnOptions
from freehold.formats.harmony.offer import Offer
from freehold.formats.harmony.parser import HarmonyParser
from freehold.formats.harmony.render import render
from freehold.formats.harmony.vocabulary import CONTROL_TOKENS
from freehold.formats.text_grammar import TextGrammar
from freehold.formats.tokenizer import Tokenizer
from freehold.sampling import GenerationDefaults, Sampling, SamplingOptions
from freehold.session.generation import Ask, SampleDone
from freehold.session.prompting import Prompting
from freehold.session.served import Served
from freehold.session.toolbox import Toolbox
from freehold.session.turn import TurnLimits, prepare
from freehold.tools.functions import FunctionToolset
from freehold.weights.synth import write_random_checkpoint
from tests.schemas import SCHEMAS, validator

CONTEXT = 1024
TURNS = 1000
# Needs a word or a list that chance does not find in time.
PATIENT = {"salesforce.soql", "sudoku", "bigquery.execute_sql"}
STRICT = [
    entry
    for entry in SCHEMAS
    if "refused" not in entry and entry["name"] not in PATIENT and entry["schema"].get("type") == "object"
]


class Said(NamedTuple):
    channel: str | None
    recipient: str | None
    text: str


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Bytes, a few words, and Harmony's control tokens."""
    words = ["assistant", "analysis", "commentary", "final", "json", "code", "functions", "to"]
    tokens, merges = list(CHARACTERS), []
    for word in words:
        for end in range(2, len(word) + 1):
            if word[:end] not in tokens:
                tokens.append(word[:end])
                merges.append(f"{word[: end - 1]} {word[end - 1]}")
    plain = Tokenizer.from_gguf(tokens=tokens, token_types=[1] * len(tokens), merges=merges, pre="smollm")
    return plain.with_control_tokens(CONTROL_TOKENS)


@pytest.fixture
def engine(tokenizer: Tokenizer, tmp_path: Path) -> Iterator[Engine]:
    config = ModelConfig(
        num_layers=2, hidden_size=64, expert_width=32, num_experts=4, num_active_experts=2, num_heads=4, num_kv_heads=2,
        head_dim=16, vocab_size=tokenizer.vocab_size + 5, windows=(70, None), max_context=CONTEXT,
        rope=RopeConfig(factor=1.0, original_context=CONTEXT),
    )  # fmt: skip
    write_random_checkpoint(tmp_path / "model", config)
    transformer = freehold.load(tmp_path / "model", device="cpu", dtype="float32").transformer
    engine = Engine(transformer, EngineOptions(context=CONTEXT, kv_tokens=32 * CONTEXT, chunk=64, max_num_seqs=32))
    yield engine
    engine.check_integrity()
    engine.close()


TEXTS: Sequence[FreeText | Regex | Lark] = (FreeText(), Regex("[a-f]{2,9}"), Lark('start: ("x" | "y")+ "]"'))


def offers() -> list[Offer]:
    """Of ten strict tools each, and free ones and such that are sent text, with built-in ones beside them."""
    builtins = (ToolNamespace(name="python"), ToolNamespace(name="browser", tools=(Tool(name="search"),)))
    tools = [Tool(name=entry["name"], parameters=entry["schema"], strict=True) for entry in STRICT]
    free = [Tool(name=f"free_{i}", parameters={"type": "object"}) for i in range(3)]
    free += [Tool(name=f"text_{i}", text_format=form) for i, form in enumerate(TEXTS)]
    return [Offer(functions=(*tools[i : i + 10], *free), builtins=builtins) for i in range(0, len(tools), 10)]


FORMS: Sequence[tuple[Any, Any]] = (
    (None, lambda text: None),
    (JsonObject(), lambda text: isinstance(json.loads(text), dict) or pytest.fail(text)),
    (JsonSchema(STRICT[0]["schema"]), lambda text: validate(STRICT[0]["schema"], text)),
    (Regex(r"[a-f]{2,9}-\d{1,3}"), lambda text: re.fullmatch(r"[a-f]{2,9}-\d{1,3}", text) or pytest.fail(text)),
    (Choice(("yes", "no", "no, never")), lambda text: text in ("yes", "no", "no, never") or pytest.fail(text)),
    (Lark('start: "yes" | "no" (", " "no")*'), lambda text: re.fullmatch("yes|no(, no)*", text) or pytest.fail(text)),
)


def options_of(index: int, offer: Offer) -> TurnOptions:
    texts = tuple(name for name in offer.callees if "text" in name)
    choices: Sequence[ToolChoice] = (
        *("auto", "required", "none", NamedTool(next(iter(offer.callees)))),
        *(AllowedTools(recipients=texts), AllowedTools(recipients=texts, required=True), "required"),
    )
    return TurnOptions(
        offer=offer,
        tool_choice=choices[index % len(choices)],
        parallel_tool_calls=index % 3 == 1,
        response_format=FORMS[index % len(FORMS)][0],
        max_reasoning_tokens=(None, 0, 7, 30)[index % 4],
    )


def is_of_its_form(form: FreeText | Regex | Lark, text: str) -> None:
    pattern = {FreeText: "(?s:.*)", Regex: "[a-f]{2,9}", Lark: r"[xy]+\]"}[type(form)]
    assert re.fullmatch(pattern, text), text


def validate(schema: Any, text: str) -> None:
    validator(schema).validate(json.loads(text))


def run(engine: Engine, requests: Sequence[Request]) -> list[Completion]:
    ids = [engine.submit(request) for request in requests]
    done = {i: [Completion() for _ in range(r.n)] for i, r in zip(ids, requests, strict=True)}
    while engine.has_work:
        for request_id, step in engine.step():
            done[request_id][step.index].add(step)
    return [completion for i in ids for completion in done[i]]


def messages(tokenizer: Tokenizer, tokens: Sequence[int], offer: Offer) -> list[Said]:
    """What a turn says, by our parser, which has nothing to remark."""
    parser = HarmonyParser(tokenizer, offer=offer)
    for token in tokens:
        parser.feed(token)
    parser.flush()
    assert not parser.diagnostics
    for message in parser.messages:
        assert message.recipient is None or read_again(tokenizer, message, offer) == (message,)
    return [Said(message.channel, message.recipient, message.text) for message in parser.messages]


def read_again(tokenizer: Tokenizer, message: Message, offer: Offer) -> tuple[Message, ...]:
    """The message as history writes it, read by the same parser."""
    parser = HarmonyParser(tokenizer, offer=offer, role=None)
    for token in render(Conversation(messages=(message,)), tokenizer, upto=None).ids:
        parser.feed(token)
    parser.flush()
    return parser.messages


def their_messages(oracle: Any, shown: str) -> list[Said]:
    """The same by openai-harmony's, which mends nothing, and does not know the end of several calls."""
    from openai_harmony import Role, StreamableParser

    parser = StreamableParser(oracle, role=Role.ASSISTANT)
    shown = shown.removesuffix("<|return|>") if shown.endswith("<|call|><|return|>") else shown
    for token in oracle.encode(shown, allowed_special="all"):
        parser.process(token)
    assert all(message.author.role == Role.ASSISTANT for message in parser.messages)
    return [Said(m.channel, m.recipient, "".join(part.text for part in m.content)) for m in parser.messages]


MESSAGE = (
    r"(?: to=(?P<early>[\w.-]+))?<\|channel\|>(?P<channel>analysis|commentary|final)(?: to=(?P<late>[\w.-]+))?"
    r"(?: json| code| ?<\|constrain\|>(?:json|code))?<\|message\|>(?P<text>.*?)<\|(?P<end>end|return|call)\|>"
)


def check(shown: str, said: Sequence[Said], options: TurnOptions, form: Any) -> None:
    """One turn against its options: its structure by a plain reading of the text, its contents by the messages."""
    found = list(re.finditer(MESSAGE, shown.replace("<|start|>assistant", ""), re.DOTALL))
    after = shown.replace("<|start|>assistant", "")[found[-1].end() :]
    assert after == ("<|return|>" if options.parallel_tool_calls and found[-1]["end"] == "call" else ""), shown
    assert "".join(match[0] for match in found) + after == shown.replace("<|start|>assistant", ""), shown
    assert [(m["channel"], m["early"] or m["late"], m["text"]) for m in found] == list(said)
    calls = 0
    for match, (channel, recipient, text) in zip(found, said, strict=True):
        is_last = match is found[-1]
        if recipient is not None:
            callee = {callee.recipient: callee for callee in options.callees}[recipient]
            assert (channel, match["end"]) == (callee.channel, "call")
            if callee.tool is not None and callee.tool.text_format is not None:
                is_of_its_form(callee.tool.text_format, text)
            elif callee.tool is not None:
                assert isinstance(json.loads(text), dict)
                if callee.tool.strict:
                    validate(callee.tool.parameters, text)
            calls += 1
        elif channel == "final":
            assert is_last and options.may_answer and match["end"] == "return"
            form(text)
        else:
            assert not is_last and not calls and match["end"] == "end"
            assert channel == "analysis" or options.callees
    assert calls <= 1 or options.parallel_tool_calls
    assert calls or options.may_answer


def test_a_thousand_turns(engine: Engine, tokenizer: Tokenizer, oracle: Any) -> None:
    prompt = [tokenizer.control_tokens["<|start|>"], *tokenizer.encode("assistant")]
    # A random model would write for ever: what ends a text is as likely as all else together.
    ends = [*tokenizer.control_tokens.values(), *(tokenizer.encode(end)[0] for end in '"}], ')]
    sampling = Sampling(temperature=2.0, seed=1, logit_bias=dict.fromkeys(ends, 8.0))
    all_options = [options_of(i, offer) for i, offer in enumerate(offers() * 2)]
    grammars = [TurnGrammar(tokenizer, options) for options in all_options]
    n = -(-TURNS // len(grammars)) + 1  # chance may make one too long for the context
    requests = [
        Request(
            prompt=prompt,
            max_tokens=CONTEXT - 16,
            stop_ids=g.stop_ids,
            sampling=sampling,
            n=n,
            cache=False,
            constraint=g,
        )
        for g in grammars
    ]
    completions = run(engine, requests)
    assert {completion.finish for completion in completions} <= {"stop", "length"}
    whole = [(i // n, completion.tokens) for i, completion in enumerate(completions) if completion.finish == "stop"]
    assert len(whole) >= TURNS
    for index, tokens in whole:
        shown = tokenizer.decode(tokens, control="show")
        options = all_options[index]
        said = messages(tokenizer, tokens, options.offer)
        assert said == their_messages(oracle, shown)
        check(shown, said, options, FORMS[index % len(FORMS)][1])
        budget = options.max_reasoning_tokens
        assert budget is None or num_reasoning_tokens(tokenizer, tokens) <= budget + 3


def num_reasoning_tokens(tokenizer: Tokenizer, tokens: Sequence[int]) -> int:
    shown = [tokenizer.decode([token], control="show") for token in tokens]
    count, header, reasons = 0, "", False
    for text in shown:
        if text == "<|start|>":
            header = ""
        elif text == "<|message|>":
            reasons = header.removeprefix("assistant") == "<|channel|>analysis"
        elif text in ("<|end|>", "<|return|>", "<|call|>"):
            reasons = False
        else:
            header += text
            count += reasons
    return count


def test_plain_text_of_a_form(engine: Engine, tokenizer: Tokenizer) -> None:
    """Whatever the random model says has the form that was asked for, and then it ends."""
    end = tokenizer.control_id("<|end|>")
    ends = [end, *(tokenizer.encode(character)[0] for character in '"}],')]
    sampling = Sampling(temperature=2.0, seed=1, logit_bias=dict.fromkeys(ends, 8.0))
    forms = [*FORMS[1:], *((JsonSchema(entry["schema"]), partial(validate, entry["schema"])) for entry in STRICT[::12])]
    requests = [
        Request(
            prompt=tokenizer.encode("to"),
            max_tokens=CONTEXT - 16,
            stop_ids=frozenset({end}),
            sampling=sampling,
            n=4,
            cache=False,
            constraint=TextGrammar(tokenizer, form, {end}),
        )
        for form, _ in forms
    ]
    completions, num_whole = run(engine, requests), 0
    for i, completion in enumerate(completions):
        if completion.finish == "stop":
            assert completion.tokens[-1] == end and end not in completion.tokens[:-1]
            forms[i // 4][1](tokenizer.decode(completion.tokens))
            num_whole += 1
        assert completion.finish in ("stop", "length")
    assert num_whole >= 0.9 * len(completions)


def test_a_step_computes_only_what_was_said_since_the_one_before(engine: Engine, tokenizer: Tokenizer) -> None:
    """The agent loop on the real engine: of a second step's prompt nearly all is known from the first."""

    def look(word: str) -> str:
        """Looks."""
        return "It is there."

    async def scenario() -> None:
        defaults = GenerationDefaults(stop_ids=frozenset({tokenizer.control_id("<|return|>")}))
        prompting = Prompting(
            source="the random model", tokenizer=tokenizer, vocab_size=tokenizer.vocab_size, context=CONTEXT,
            longest=CONTEXT, defaults=defaults,
        )  # fmt: skip
        served = Served(name="random", prompting=prompting, runner=AsyncEngine(engine))
        toolbox = await Toolbox.open([FunctionToolset([look])])
        system = SystemContent(identity=None, knowledge_cutoff=None, effort=None)
        messages = (Message(role="system", parts=(system,)), text_message("user", "Where is it? " * 10))
        ends = [*tokenizer.control_tokens.values(), *(tokenizer.encode(end)[0] for end in '"}], ')]
        ask = Ask(
            conversation=Conversation(messages=messages),
            choices=TurnChoices(tool_choice="required"),
            sampling=SamplingOptions(temperature=2.0, seed=1, logit_bias=dict.fromkeys(ends, 8.0)),
        )
        turn = await prepare(served, ask, toolbox, limits=TurnLimits(max_steps=2))
        events = [event async for batch in turn.events(served.runner) for event in batch]
        await served.runner.drain(5)
        done = events[-1]
        assert isinstance(done, SampleDone) and done.end == "stop" and done.stats is not None
        assert [message.role for message in done.messages] == ["assistant", "tool", "assistant"]
        num_first = done.num_prompt_tokens - done.stats.num_prompt_tokens + done.num_tokens - done.stats.num_tokens
        assert num_first > 300
        # The last tokens, which the grammar forced, were written and not computed.
        assert turn.num_cached_tokens == done.stats.num_cached_tokens >= num_first - 4

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_a_constraint_is_what_the_engine_wants(tokenizer: Tokenizer) -> None:
    constraint: TokenConstraint = TurnGrammar(tokenizer, TurnOptions(offer=Offer()))()  # says the type checker
    assert list(constraint.forced()) == [tokenizer.control_tokens["<|channel|>"]]
    constraint = TextGrammar(tokenizer, Choice(("<",)), {tokenizer.control_tokens["<|end|>"]})()
    assert list(constraint.forced())[:1] == tokenizer.encode("<")
