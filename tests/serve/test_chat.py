"""Chat Completions, as OpenAI's client sees them: a scripted model behind the real application."""

import asyncio
import json
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai import AsyncOpenAI
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.chat.completion_create_params import (
    CompletionCreateParamsNonStreaming,
    CompletionCreateParamsStreaming,
)
from pydantic import BaseModel

from freehold.engine.metrics import EngineStats
from freehold.engine.request import Request, Step
from freehold.formats.templates import CHATML
from freehold.formats.tokenizer import Tokenizer
from freehold.serve.app import create_app
from freehold.serve.chat_wire import ChatRequest
from freehold.serve.errors import ApiError
from freehold.serve.gate import Gate
from freehold.session.served import Served
from tests.serve.http import Recorder, chunks_of, post, post_all, requests_of, scripted, vanish, with_sdk
from tests.serve.sdk import check

CHAT = "/v1/chat/completions"
HI = [{"role": "user", "content": "hi"}]
SUNNY = {"reasoning": "Look out.", "answer": "It is sunny."}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
PATCH = {
    "type": "custom",
    "custom": {
        "name": "patch",
        "format": {"type": "grammar", "grammar": {"syntax": "regex", "definition": "[a-z ]+"}},
    },
}
ROME = {"name": "get_weather", "arguments": {"city": "Rome"}}
PREAMBLE_AND_CALL = {"reasoning": "Look it up.", "answer": "One moment.", "calls": [ROME]}


def ask(**fields: Any) -> dict[str, Any]:
    return {"model": "default", "messages": HI, **fields}


def answer(served: Served, **fields: Any) -> ChatCompletion:
    response = post(served, CHAT, ask(**fields))
    assert response.status_code == 200, response.text
    check(ChatCompletion, response.json())
    return ChatCompletion.model_validate(response.json())


def by_template(text: str) -> Served:
    """A model that does not speak Harmony, and always says this."""
    served = scripted({"completion": f"{text}<|return|>", "match": ""})
    return replace(served, harmony=False, prompting=replace(served.prompting, chat_template=CHATML))


def joined(chunks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The choices that a stream's chunks make, by the rules of OpenAI's clients: text is appended, lists by index."""
    choices: dict[int, dict[str, Any]] = {}
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        delta = choice["delta"]
        index = choice["index"]
        assert ("role" in delta) == (index not in choices), "the first chunk of a choice has the role, and no other"
        whole = choices.setdefault(index, {"message": {"content": None}, "logprobs": None, "finish_reason": None})
        assert whole["finish_reason"] is None, "nothing comes after the end"
        whole["finish_reason"] = choice["finish_reason"]
        if choice["logprobs"] is not None:
            whole["logprobs"] = whole["logprobs"] or {"content": [], "refusal": None}
            whole["logprobs"]["content"] += choice["logprobs"]["content"]
        message = whole["message"]
        for field, value in delta.items():
            if field == "tool_calls":
                for call in value:
                    add_call(message.setdefault("tool_calls", []), call)
            else:
                message[field] = (message.get(field) or "") + value
    return [choices[index] for index in sorted(choices)]


def add_call(calls: list[dict[str, Any]], call: dict[str, Any]) -> None:
    (kind,) = call.keys() & {"function", "custom"}
    if call["index"] == len(calls):
        assert call["id"].startswith("call_") and call["type"] == kind and call[kind]["name"]
        calls.append({"id": call["id"], "type": kind, kind: dict(call[kind])})
    else:
        assert call["index"] == len(calls) - 1 and call.keys() == {"index", kind}
        for field, text in call[kind].items():
            assert text, "a delta that says nothing is not sent"
            calls[-1][kind][field] += text


def comparable(choices: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without what is drawn anew for each answer, or only in whole ones."""
    text = json.dumps([{key: value for key, value in choice.items() if key != "index"} for choice in choices])
    result: list[dict[str, Any]] = json.loads(text)
    for choice in result:
        choice["message"].pop("refusal", None)
        choice["message"].pop("annotations", None)
        for call in choice["message"].get("tool_calls", ()):
            del call["id"]
    return result


# --- whole answers and streams ------------------------------------------------------------------------------


def test_an_answer_has_reasoning_under_both_names_and_counts_its_tokens() -> None:
    completion = answer(scripted(SUNNY), metadata={"for": "test"})
    (choice,) = completion.choices
    assert choice.finish_reason == "stop" and choice.logprobs is None
    message = choice.message.model_dump()
    assert message["content"] == "It is sunny."
    assert message["reasoning"] == message["reasoning_content"] == "Look out."
    assert message["tool_calls"] is None and completion.metadata == {"for": "test"}
    usage = completion.usage
    assert usage is not None and usage.completion_tokens_details is not None and usage.prompt_tokens_details is not None
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert 0 < (usage.completion_tokens_details.reasoning_tokens or 0) < usage.completion_tokens
    assert usage.prompt_tokens_details.cached_tokens == 0


def test_reasoning_can_be_left_out() -> None:
    message = answer(scripted(SUNNY), include_reasoning=False).choices[0].message.model_dump()
    assert message["content"] == "It is sunny." and "reasoning" not in message


def test_calls_are_as_openai_writes_them_and_preambles_are_content() -> None:
    (choice,) = answer(scripted(PREAMBLE_AND_CALL), tools=[WEATHER]).choices
    assert choice.finish_reason == "tool_calls" and choice.message.content == "One moment."
    (call,) = choice.message.tool_calls or []
    assert call.type == "function"
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments) == {"city": "Rome"}
    (alone,) = answer(scripted({"calls": [ROME]}), tools=[WEATHER]).choices
    assert alone.message.content is None


def test_where_a_form_is_asked_for_content_is_the_answer_alone() -> None:
    said = (
        "<|channel|>commentary<|message|>One moment.<|end|><|start|>assistant"
        '<|channel|>final<|message|>{"a": 1}<|return|>'
    )
    form = {"response_format": {"type": "json_object"}, "tools": [WEATHER]}
    message = answer(scripted({"completion": said}), **form).choices[0].message.model_dump()
    assert message["content"] == '{"a": 1}' and message["reasoning"] == "One moment."
    plain = answer(scripted({"completion": said}), tools=[WEATHER]).choices[0].message
    assert plain.content == 'One moment.\n\n{"a": 1}'


def test_calls_of_custom_tools_carry_their_text() -> None:
    said = {"completion": "<|channel|>commentary to=functions.patch<|message|>add a line<|call|>"}
    body = {"tools": [PATCH, WEATHER], "tool_choice": {"type": "custom", "custom": {"name": "patch"}}}
    (call,) = answer(scripted(said), **body).choices[0].message.tool_calls or []
    assert call.type == "custom"
    assert call.custom.name == "patch" and call.custom.input == "add a line"
    streamed = joined(chunks_of(post(scripted(said), CHAT, ask(stream=True, **body))))
    assert streamed[0]["message"]["tool_calls"][0]["custom"] == {"name": "patch", "input": "add a line"}


def test_parallel_calls_are_several_in_one_turn() -> None:
    said = "<|start|>assistant".join(
        f'<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{{"city": "{city}"}}<|call|>'
        for city in ("Rome", "Oslo")
    )
    turn = {"completion": f"{said}<|return|>"}
    two = answer(scripted(turn), tools=[WEATHER], parallel_tool_calls=True).choices[0]
    assert [json.loads(c.function.arguments)["city"] for c in two.message.tool_calls or () if c.type == "function"] == [
        "Rome",
        "Oslo",
    ]
    assert len({call.id for call in two.message.tool_calls or ()}) == 2 and two.finish_reason == "tool_calls"
    assert len(answer(scripted(turn), tools=[WEATHER]).choices[0].message.tool_calls or ()) == 1


def test_every_chunk_is_one_of_openais_and_usage_comes_last() -> None:
    body = ask(stream=True, n=2, tools=[WEATHER], logprobs=True, stream_options={"include_usage": True})
    chunks = chunks_of(post(scripted(PREAMBLE_AND_CALL), CHAT, body))
    for chunk in chunks:
        check(ChatCompletionChunk, chunk)
        assert {key: chunk[key] for key in ("id", "created", "model")} == {
            key: chunks[0][key] for key in ("id", "created", "model")
        }
    *said, last = chunks
    assert last["choices"] == [] and last["usage"]["completion_tokens"] > 0
    assert all(chunk["choices"] and chunk["usage"] is None for chunk in said)
    assert [choice["finish_reason"] for choice in joined(said)] == ["tool_calls", "tool_calls"]
    bare = chunks_of(post(scripted(SUNNY), CHAT, ask(stream=True)))
    assert all(chunk["choices"] and "usage" not in chunk for chunk in bare)


class Spoken:
    """A runner that says token lists, a sample each, in steps of any size and in any order."""

    def __init__(self, served: Served, samples: list[list[int]], sizes: list[int], *, stops: bool) -> None:
        self.metrics = served.runner.metrics
        self._samples, self._sizes, self._stops = samples, sizes, stops

    def submit(self, request: Request) -> "_SpokenSteps":
        return _SpokenSteps(self._steps())

    def stats(self) -> EngineStats:
        raise NotImplementedError

    async def drain(self, timeout: float | None = None) -> None:
        raise NotImplementedError

    async def _steps(self) -> AsyncGenerator[Step, None]:
        rest = [list(tokens) for tokens in self._samples]
        sizes = iter(self._sizes * 1000)
        while any(rest):
            for index, tokens in enumerate(rest):
                if tokens:
                    count = next(sizes)
                    step, tokens[:count] = tuple(tokens[:count]), []
                    ended = None if tokens else "stop" if self._stops else "length"
                    yield Step(index=index, tokens=step, finish=ended)  # type: ignore[arg-type]


class _SpokenSteps:
    def __init__(self, steps: AsyncGenerator[Step, None]) -> None:
        self._steps = steps

    def __aiter__(self) -> "_SpokenSteps":
        return self

    async def __anext__(self) -> Step:
        return await anext(self._steps)

    async def aclose(self) -> None:
        await self._steps.aclose()


TEXTS = st.text(st.sampled_from('ab \n"\\{}é–😀\u2028\x07'), max_size=8)
MESSAGES = st.one_of(
    TEXTS.map(lambda text: f"<|channel|>analysis<|message|>{text}<|end|>"),
    TEXTS.map(lambda text: f"<|channel|>commentary<|message|>{text}<|end|>"),
    TEXTS.map(
        lambda text: f"<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{text}<|call|>"
    ),
    TEXTS.map(lambda text: f"<|channel|>final<|message|>{text}<|return|>"),
)
TURNS = st.lists(MESSAGES, min_size=1, max_size=4).map("<|start|>assistant".join)


@st.composite
def tokenised(draw: st.DrawFn) -> list[int]:
    """A turn cut into tokens anywhere, also within words."""
    tokenizer, text = Tokenizer.o200k_harmony(), draw(TURNS)
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=6)))
    ids: list[int] = []
    for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        ids += tokenizer.encode_with_control(text[begin:end])
    return ids


@settings(max_examples=40, deadline=None)
@given(
    samples=st.lists(tokenised(), min_size=1, max_size=3),
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    stops=st.booleans(),
    stop=st.lists(st.sampled_from(["a", "b ", "ab", "😀", '"']), max_size=2),
)
def test_joining_a_stream_gives_the_whole_answer_however_it_was_cut(
    samples: list[list[int]], sizes: list[int], stops: bool, stop: list[str]
) -> None:
    served = replace(BARE, runner=Spoken(BARE, samples, sizes, stops=stops))
    body = ask(n=len(samples), stop=stop, tools=[WEATHER])
    whole, stream = post_all(served, CHAT, [body, {**body, "stream": True}])
    assert whole.status_code == 200, whole.text
    check(ChatCompletion, whole.json())
    streamed = joined(chunks_of(stream))
    assert comparable(streamed) == comparable(whole.json()["choices"])


BARE = replace(scripted(SUNNY), grammar=False)


# --- OpenAI's own client ------------------------------------------------------------------------------------


class City(BaseModel):
    city: str
    people: int


def test_the_sdk_parses_streams_and_calls() -> None:
    rome = {"reasoning": "Big.", "answer": '{"city": "Rome", "people": 2700000}'}
    served = scripted(rome, rome, PREAMBLE_AND_CALL, SUNNY, SUNNY)

    async def use(client: AsyncOpenAI) -> None:
        messages: Any = HI
        parsed = await client.chat.completions.parse(model="default", messages=messages, response_format=City)
        assert parsed.choices[0].message.parsed == City(city="Rome", people=2_700_000)
        async with client.chat.completions.stream(model="default", messages=messages, response_format=City) as stream:
            kinds = [event.type async for event in stream]
            final = await stream.get_final_completion()
        assert "content.done" in kinds and final.choices[0].message.parsed == City(city="Rome", people=2_700_000)
        tools: Any = [{**WEATHER, "function": {**WEATHER["function"], "strict": True}}]  # type: ignore[dict-item]
        tools[0]["function"]["parameters"]["additionalProperties"] = False
        async with client.chat.completions.stream(model="default", messages=messages, tools=tools) as stream:
            done = [event async for event in stream if event.type == "tool_calls.function.arguments.done"]
            called = await stream.get_final_completion()
        assert [json.loads(event.arguments) for event in done] == [{"city": "Rome"}]
        # What the client has is sent back as it is.
        said = called.choices[0].message
        result: Any = {"role": "tool", "tool_call_id": (said.tool_calls or [])[0].id, "content": "sunny"}
        messages = [*messages, said.model_dump(exclude_none=True), result]
        again = await client.chat.completions.create(model="default", messages=messages, tools=tools)
        assert again.choices[0].message.content == "It is sunny."
        plain = await client.chat.completions.create(model="default", messages=messages, stream=True)
        pieces = [chunk.choices[0].delta async for chunk in plain]
        assert "".join(piece.content or "" for piece in pieces) == "It is sunny."

    with_sdk(served, use)


def test_a_fault_in_a_stream_is_an_error_of_the_sdk() -> None:
    served = scripted({**SUNNY, "fault": "the wires are cut"})

    async def use(client: AsyncOpenAI) -> None:
        messages: Any = HI
        stream = await client.chat.completions.create(model="default", messages=messages, stream=True)
        with pytest.raises(openai.APIError, match="the wires are cut"):
            async for _ in stream:
                pass

    with_sdk(served, use)
    *_, fault, done, rest = post(scripted({**SUNNY, "fault": "the wires are cut"}), CHAT, ask(stream=True)).text.split(
        "\n\n"
    )
    assert json.loads(fault.removeprefix("data: "))["error"]["message"] == "the wires are cut"
    assert (done, rest) == ("data: [DONE]", "")


# --- what a request asks for --------------------------------------------------------------------------------


@pytest.mark.parametrize("harmony", [True, False])
def test_logprobs_are_of_the_answer_with_bytes(*, harmony: bool) -> None:
    served = scripted({**SUNNY, "match": ""}) if harmony else by_template("It is sunny.")
    completion = answer(served, logprobs=True, top_logprobs=1)
    logprobs = completion.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    assert "".join(entry.token for entry in logprobs.content) == "It is sunny."
    assert bytes(byte for entry in logprobs.content for byte in entry.bytes or ()) == b"It is sunny."
    assert all(entry.top_logprobs[0].token == entry.token for entry in logprobs.content)
    streamed = joined(chunks_of(post(served, CHAT, ask(stream=True, logprobs=True, top_logprobs=1))))
    whole = post(served, CHAT, ask(logprobs=True, top_logprobs=1)).json()["choices"][0]
    assert streamed[0]["logprobs"] == whole["logprobs"]


def test_an_answer_ends_at_a_stop_string_and_at_max_tokens() -> None:
    stopped = answer(scripted(SUNNY), stop=" is").choices[0]
    assert stopped.message.content == "It" and stopped.finish_reason == "stop"
    cut = answer(scripted(SUNNY), max_completion_tokens=5)
    assert cut.choices[0].finish_reason == "length" and cut.choices[0].message.content == ""
    assert cut.usage is not None and cut.usage.completion_tokens == 5


def test_fields_reach_the_engine() -> None:
    fields: dict[str, Any] = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.3,
        "frequency_penalty": -0.4,
        "seed": 11,
    }
    served = scripted({**SUNNY, "match": ""})
    bodies = [
        ask(**fields, logit_bias={"17": -100, "18": 2.5}, n=3, max_tokens=40, min_tokens=2),
        ask(ignore_eos=True, top_k=-1, logprobs=True, top_logprobs=3),
    ]
    first, second = requests_of(served, CHAT, bodies)
    assert {name: getattr(first.sampling, name) for name in fields} == fields
    assert first.sampling.logit_bias == {17: -100, 18: 2.5}
    assert (first.n, first.max_tokens, first.min_tokens) == (3, 40, 2) and first.constraint is not None
    assert second.stop_ids == frozenset() and second.constraint is None
    assert (second.sampling.top_k, second.sampling.logprobs) == (0, 3)


@pytest.mark.parametrize(
    ("effort", "line"),
    [("minimal", "low"), ("low", "low"), ("medium", "medium"), ("high", "high"), ("xhigh", "high"), ("max", "high")],
)
def test_reasoning_effort_is_the_nearest_that_gpt_oss_has(effort: str, line: str) -> None:
    served = scripted({**SUNNY, "match": ""})
    (request,) = requests_of(served, CHAT, [ask(reasoning_effort=effort)])
    assert f"Reasoning: {line}" in served.prompting.the_tokenizer().decode(request.prompt)
    for stream in (False, True):
        warning = post(served, CHAT, ask(reasoning_effort=effort, stream=stream)).headers.get("x-freehold-warnings")
        assert warning == (None if effort == line else f"reasoning_effort {effort} was taken as {line}")


def test_no_effort_leaves_no_room_for_reasoning() -> None:
    assert answer(scripted({"answer": "Yes."}), reasoning_effort="none").choices[0].message.content == "Yes."
    response = post(scripted(SUNNY), CHAT, ask(reasoning_effort="none"))
    assert response.status_code == 500 and "does not allow" in response.json()["error"]["message"]


def test_a_model_without_harmony_has_no_effort_but_answers() -> None:
    template = by_template("It is sunny.")
    message = answer(template, reasoning_effort="none", parallel_tool_calls=True, tool_choice="auto").choices[0].message
    assert message.content == "It is sunny."
    error = post(template, CHAT, ask(reasoning_effort="low")).json()["error"]
    assert error["param"] == "reasoning_effort" and "does not speak Harmony" in error["message"]
    assert post(template, CHAT, ask(tools=[WEATHER])).json()["error"]["param"] == "tools"
    assert answer(template, guided_choice=["It is sunny.", "No."]).choices[0].message.content == "It is sunny."


def test_a_response_format_is_told_and_enforced() -> None:
    form = {
        "type": "json_schema",
        "json_schema": {"name": "weather", "schema": {"type": "object", "properties": {"sun": {"type": "boolean"}}}},
    }
    served = scripted({"answer": '{"sun": true}'}, SUNNY)
    (request,) = requests_of(served, CHAT, [ask(response_format=form)])
    assert "# Response Formats\n\n## weather" in served.prompting.the_tokenizer().decode(request.prompt)
    response = post(served, CHAT, ask(response_format=form))
    assert response.status_code == 500 and "does not allow" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("said", "fields"),
    [
        ('{"a": 1}', {"guided_json": {"type": "object"}}),
        ('{"a": 1}', {"guided_json": '{"type": "object"}'}),
        ("42", {"guided_regex": "[0-9]+"}),
        ("yes", {"guided_choice": ["yes", "no"]}),
        ("ab", {"guided_grammar": 'start: "a" "b"'}),
        ('{"a": 1}', {"structured_outputs": {"json": {"type": "object"}}}),
        ('{"a": 1}', {"structured_outputs": {"json_object": True}}),
        ("42", {"structured_outputs": {"regex": "[0-9]+"}}),
        ("yes", {"structured_outputs": {"choice": ["yes", "no"]}}),
        ("ab", {"structured_outputs": {"grammar": 'start: "a" "b"'}}),
        ('{"a": 1}', {"response_format": {"type": "json_object"}}),
    ],
)
def test_forms_are_enforced(said: str, fields: dict[str, Any]) -> None:
    assert answer(scripted({"answer": said}), **fields).choices[0].message.content == said
    assert post(scripted(SUNNY), CHAT, ask(**fields)).status_code == 500


NAMED: dict[str, Any] = {"type": "function", "function": {"name": "get_weather"}}
AUTO = {"mode": "auto", "tools": [NAMED]}
ALLOWED = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [NAMED]}}


@pytest.mark.parametrize(
    ("choice", "may_answer"), [("none", 1), ("auto", 1), ("required", 0), (NAMED, 0), (ALLOWED, 0)]
)
def test_tool_choice_is_kept_to(choice: Any, may_answer: int) -> None:
    tools = [WEATHER, PATCH]
    turns: dict[str, dict[str, Any]] = {
        "answer": SUNNY,
        "weather": {"calls": [ROME]},
        "patch": {"completion": "<|channel|>commentary to=functions.patch<|message|>a b<|call|>"},
    }
    statuses = {
        name: post(scripted(turn), CHAT, ask(tools=tools, tool_choice=choice)).status_code
        for name, turn in turns.items()
    }
    assert (statuses["answer"] == 200) == bool(may_answer)
    assert (statuses["weather"] == 200) == (choice != "none")
    assert (statuses["patch"] == 200) == (choice in ("auto", "required"))


# --- what is refused ----------------------------------------------------------------------------------------

BAD_SCHEMA = {"type": "object", "properties": {"a": {"not": {"type": "string"}}}}
REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"model": 3}, "model"),
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "boss", "content": "a"}]}, "messages[1]"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
    ({"messages": [{"role": "tool", "content": "a", "tool_call_id": "x"}]}, "messages[0].tool_call_id"),
    ({"messages": [{"role": "user", "content": "a", "mood": "good"}]}, "messages[0].mood"),
    ({"tools": [{"type": "web_search"}]}, "tools[0]"),
    ({"tools": [WEATHER, WEATHER]}, "tools"),
    ({"tools": [WEATHER, {"type": "function", "function": {"name": "f", "strict": True, "parameters": BAD_SCHEMA}}]},
     "tools[1].function.parameters"),
    ({"tools": [{"type": "custom", "custom": {"name": "p", "format": {"type": "grammar", "grammar":
     {"syntax": "regex", "definition": "("}}}}]}, "tools[0].custom.format"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": "maybe"}, "tool_choice"),
    ({"tool_choice": NAMED}, "tool_choice"),
    ({"tools": [WEATHER], "tool_choice": {"type": "custom", "custom": {"name": "get_weather"}}}, "tool_choice"),
    ({"tools": [WEATHER], "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [{}]}}},
     "tool_choice.allowed_tools.tools[0]"),
    ({"functions": []}, "functions"),
    ({"function_call": "auto"}, "function_call"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}}},
     "response_format.json_schema.name"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": BAD_SCHEMA}}},
     "response_format.json_schema.schema"),
    ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex"),
    ({"guided_regex": "("}, "guided_regex"),
    ({"guided_grammar": "start: <|call|>"}, "guided_grammar"),
    ({"guided_choice": []}, "guided_choice"),
    ({"guided_json": "{"}, "guided_json"),
    ({"guided_json": BAD_SCHEMA}, "guided_json"),
    ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs.choice"),
    ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
    ({"ignore_eos": True, "response_format": {"type": "json_object"}}, "response_format"),
    ({"reasoning_effort": "extreme"}, "reasoning_effort"),
    ({"temperature": 2.5}, "temperature"),
    ({"temperature": "1"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"min_p": 1.5}, "min_p"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"frequency_penalty": -3}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"logit_bias": {"hello": 1}}, "logit_bias"),
    ({"logit_bias": {"999999": 1}}, "logit_bias"),
    ({"logit_bias": {"1": 101}}, "logit_bias"),
    ({"seed": 2**63}, "seed"),
    ({"seed": 1.5}, "seed"),
    ({"n": 0}, "n"),
    ({"n": 129}, "n"),
    ({"stop": [""]}, "stop[0]"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop": 3}, "stop"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 4, "max_completion_tokens": 5}, "max_tokens"),
    ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"continuous_usage_stats": True}}, "stream_options.continuous_usage_stats"),
    ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
    ({"stream": 1}, "stream"),
    ({"store": True}, "store"),
    ({"metadata": {"a": 1}}, "metadata.a"),
    ({"service_tier": "flex"}, "service_tier"),
    ({"modalities": ["audio"]}, "modalities"),
    ({"audio": {"voice": "x"}}, "audio"),
    ({"prediction": {"type": "content", "content": "x"}}, "prediction"),
    ({"web_search_options": {}}, "web_search_options"),
    ({"verbosity": "low"}, "verbosity"),
    ({"moderation": {"model": "x"}}, "moderation"),
    ({"prompt_cache_retention": "24h"}, "prompt_cache_retention"),
    ({"stop_token_ids": [1]}, "stop_token_ids"),
    ({"skip_special_tokens": False}, "skip_special_tokens"),
    ({"include_stop_str_in_output": True}, "include_stop_str_in_output"),
    ({"add_generation_prompt": False}, "add_generation_prompt"),
    ({"continue_final_message": True}, "continue_final_message"),
    ({"echo": True}, "echo"),
    ({"chat_template": "x"}, "chat_template"),
    ({"chat_template_kwargs": {"a": 1}}, "chat_template_kwargs"),
    ({"priority": 1}, "priority"),
    ({"request_id": "x"}, "request_id"),
    ({"return_token_ids": True}, "return_token_ids"),
    ({"prompt_logprobs": 1}, "prompt_logprobs"),
    ({"shoe_size": 43}, "shoe_size"),
    ({"ignore_eos": True, "reasoning_effort": "none"}, "reasoning_effort"),
    ({"tools": [WEATHER], "tool_choice": {**NAMED, "name": "get_weather"}}, "tool_choice.name"),
    ({"tools": [WEATHER], "tool_choice": {**NAMED, "function": {**NAMED["function"], "x": 1}}},
     "tool_choice.function.x"),
    ({"tools": [WEATHER], "tool_choice": {"type": "allowed_tools", "allowed_tools": {**AUTO, "x": 1}}},
     "tool_choice.allowed_tools.x"),
]  # fmt: skip


def test_what_is_not_done_is_refused_by_name() -> None:
    served = scripted({**SUNNY, "match": ""})
    wrong = []
    responses = post_all(served, CHAT, [ask(**fields) for fields, _ in REFUSALS])
    for (fields, param), response in zip(REFUSALS, responses, strict=True):
        error = response.json().get("error", {})
        if (response.status_code, error.get("param"), error.get("type")) != (400, param, "invalid_request_error"):
            wrong.append((fields, param, response.status_code, response.text[:300]))
    assert not wrong


def test_harmless_values_of_what_is_refused_are_taken() -> None:
    harmless = {
        name: extra.unless[-1]
        for name, field in ChatRequest.model_fields.items()
        for extra in field.metadata
        if hasattr(extra, "unless")
    }
    assert len(harmless) > 30
    answer(
        scripted(SUNNY),
        **harmless,
        user="me",
        safety_identifier="me",
        prompt_cache_key="k",
        response_format={"type": "text"},
    )


def test_every_parameter_of_the_sdk_is_known() -> None:
    of_sdk = {
        name
        for params in (CompletionCreateParamsNonStreaming, CompletionCreateParamsStreaming)
        for name in params.__annotations__
    }
    assert of_sdk - ChatRequest.model_fields.keys() == set()


def test_other_models_are_not_found() -> None:
    response = post(scripted(SUNNY), CHAT, ask(model="gpt-4o"))
    assert response.status_code == 404 and response.json()["error"]["code"] == "model_not_found"


def test_a_prompt_longer_than_the_context_is_refused_with_both_numbers() -> None:
    served = scripted(SUNNY)
    short = replace(served, prompting=replace(served.prompting, context=70, longest=70))
    error = post(short, CHAT, ask(messages=[{"role": "user", "content": "word " * 100}])).json()["error"]
    assert (error["param"], error["code"]) == ("messages", "context_length_exceeded")
    assert "70" in error["message"] and "tokens" in error["message"]


# --- the queue, and clients that go away --------------------------------------------------------------------


def test_more_answers_than_the_server_lets_in_are_refused() -> None:
    assert post(scripted(SUNNY), CHAT, ask(n=3), max_running=1, max_queue=1).json()["error"]["param"] == "n"


def test_a_full_queue_says_when_to_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[int] = []

    def enter(self: Gate, samples: int = 1) -> None:
        entered.append(samples)
        raise ApiError(429, "full", headers={"retry-after": "1"})

    monkeypatch.setattr(Gate, "enter", enter)
    response = post(scripted(SUNNY), CHAT, ask(n=3))
    assert (response.status_code, response.headers["retry-after"], entered) == (429, "1", [3])


@pytest.mark.parametrize("stream", [False, True])
def test_who_goes_away_leaves_nothing_running(stream: bool) -> None:
    served = scripted({"answer": "word " * 1000}, speed=100.0)
    recorder = Recorder(served.runner)
    app = create_app(replace(served, runner=recorder))

    async def run() -> None:
        sent = await vanish(app, CHAT, ask(stream=stream, n=2), once=lambda: bool(recorder.requests))
        assert not any(b"DONE" in message.get("body", b"") for message in sent)
        assert served.runner.stats().running == 0
        app.state.server.gate.enter(32 + 256)  # all places are free again

    asyncio.run(run())
