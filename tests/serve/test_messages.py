"""Anthropic's Messages, asked by Anthropic's own client of a scripted model; everything is held against its types."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from dataclasses import replace
from typing import Any

import httpx2
import pytest
from anthropic import APIStatusError, AsyncAnthropic, BadRequestError, NotFoundError
from anthropic.types import Message, MessageCountTokensParams, MessageTokensCount, RawMessageStreamEvent
from anthropic.types.beta import message_count_tokens_params, message_create_params
from anthropic.types.message_create_params import MessageCreateParamsStreaming
from fastapi import FastAPI
from pydantic import BaseModel, TypeAdapter

from freehold.engine.request import Request
from freehold.serve.app import create_app
from freehold.serve.messages_wire import CountTokens, CreateMessage
from freehold.serve.settings import ServeSettings
from freehold.session.scripted import ScriptedTurn, serve_script
from freehold.session.served import Served, Steps

HELLO: Any = [{"role": "user", "content": "Hello"}]
WEATHER: Any = {
    "name": "get_weather",
    "description": "Today's.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
ANSWER: Any = {"reasoning": "They greet me.", "answer": "Hi there, what is new?"}
# As the renderer writes calls: their recipient before the channel.
CALL: Any = {
    "completion": "<|channel|>analysis<|message|>Look it up.<|end|><|start|>assistant<|channel|>commentary<|message|>"
    "One moment.<|end|><|start|>assistant to=functions.get_weather<|channel|>commentary <|constrain|>json<|message|>"
    '{"city": "Rome"}<|call|>'
}


class _Noting:
    """A runner that keeps what was asked of it."""

    def __init__(self, served: Served) -> None:
        self.requests: list[Request] = []
        self._runner = served.runner
        self.metrics, self.stats, self.drain = served.runner.metrics, served.runner.stats, served.runner.drain

    def submit(self, request: Request) -> Steps:
        self.requests.append(request)
        return self._runner.submit(request)


class _Site:
    """A server with a script, and clients of it."""

    def __init__(self, *turns: Any, harmony: bool | None = None) -> None:
        self.served = serve_script([ScriptedTurn.from_json(turn) for turn in turns])
        self.noting = _Noting(self.served)
        self.app: FastAPI = create_app(replace(self.served, runner=self.noting, harmony=harmony), ServeSettings())
        self.http = httpx2.AsyncClient(transport=httpx2.ASGITransport(app=self.app), base_url="http://127.0.0.1:8000")
        self.client = AsyncAnthropic(
            api_key="any", base_url="http://127.0.0.1:8000", http_client=self.http, max_retries=0
        )

    async def post(self, path: str = "", **body: Any) -> httpx2.Response:
        return await self.http.post(f"/v1/messages{path}", json={"model": "default", "messages": HELLO, **body})

    async def events(self, **body: Any) -> list[dict[str, Any]]:
        """Those of a stream, each checked."""
        response = await self.post(max_tokens=500, stream=True, **body)
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        return _checked_events(response.text)


def _run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, 60))


# --- the wire -----------------------------------------------------------------------------------------------


def _fits(kind: Any, data: Any) -> None:
    """Every field of the type is there, and no other one."""
    model = TypeAdapter(kind).validate_python(data)
    assert model.model_dump(mode="json", by_alias=True) == data
    for part in _models(model):
        assert not part.model_extra, f"{type(part).__name__} has no {part.model_extra}"


def _models(value: Any) -> Iterator[BaseModel]:
    if isinstance(value, BaseModel):
        yield value
        value = [getattr(value, name) for name in type(value).model_fields]
    if isinstance(value, list):
        for item in value:
            yield from _models(item)


def _checked_events(text: str) -> list[dict[str, Any]]:
    """Reads a stream; raises where an event does not fit its type, or comes where it may not."""
    events = []
    for block in text.removesuffix("\n\n").split("\n\n"):
        head, body = block.split("\n")
        data = json.loads(body.removeprefix("data: "))
        assert head == f"event: {data['type']}"
        if data["type"] == "ping":
            assert data == {"type": "ping"}
        else:
            _fits(RawMessageStreamEvent, data)
            events.append(data)
    _check_order(events)
    return events


_DELTAS = {
    "text": {"text_delta"},
    "thinking": {"thinking_delta", "signature_delta"},
    "tool_use": {"input_json_delta"},
}


def _check_order(events: list[dict[str, Any]]) -> None:
    """message_start (start delta* stop)* message_delta message_stop; blocks are numbered, a signature is its block's
    last delta."""
    state, index, open_kind, signed = "new", -1, "", False
    for event in events:
        match state, event["type"]:
            case "new", "message_start":
                assert event["message"]["content"] == []
                assert event["message"]["stop_reason"] is None
                state = "message"
            case "message", "content_block_start":
                index += 1
                open_kind, signed = event["content_block"]["type"], False
                assert event["index"] == index
                state = "block"
            case "block", "content_block_delta":
                assert event["index"] == index
                assert event["delta"]["type"] in _DELTAS[open_kind]
                assert not signed
                signed = event["delta"]["type"] == "signature_delta"
            case "block", "content_block_stop":
                assert event["index"] == index
                assert signed == (open_kind == "thinking")
                state = "message"
            case "message", "message_delta":
                state = "ended"
            case "ended", "message_stop":
                state = "stopped"
            case _:
                raise AssertionError(f"{event['type']} in state {state}")
    assert state == "stopped"


# --- answers ------------------------------------------------------------------------------------------------


def test_who_did_not_ask_for_thinking_finds_the_answer_first() -> None:
    async def scenario() -> None:
        site = _Site(ANSWER)
        message = await site.client.messages.create(model="default", max_tokens=100, messages=HELLO)
        assert [block.type for block in message.content] == ["text"]
        assert message.content[0].text == "Hi there, what is new?"  # type: ignore[union-attr]
        assert (message.stop_reason, message.stop_sequence, message.model) == ("end_turn", None, "default")
        assert message.usage.output_tokens_details is not None
        assert message.usage.output_tokens_details.thinking_tokens == 8

    _run(scenario())


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"thinking": {"type": "adaptive"}},
        {"thinking": {"type": "enabled", "budget_tokens": 1024, "display": "omitted"}},
        {"tools": [WEATHER]},
        {"tools": [WEATHER], "thinking": {"type": "adaptive", "display": "omitted"}},
        {"stop_sequences": ["what"]},
        {"max_tokens": 3, "thinking": {"type": "adaptive"}},
    ],
)
def test_a_stream_adds_up_to_the_whole_message(body: Any) -> None:
    turn = CALL if "tools" in body else ANSWER

    async def scenario() -> None:
        site = _Site(turn, turn, turn)
        asked: Any = {"model": "default", "max_tokens": 500, "messages": HELLO, **body}
        whole = (await site.http.post("/v1/messages", json=asked)).json()
        _fits(Message, whole)
        raw = await site.http.post("/v1/messages", json={**asked, "stream": True})
        _checked_events(raw.text)
        async with site.client.messages.stream(**asked) as stream:
            streamed = await stream.get_final_message()
        assert _comparable(streamed.to_dict(mode="json", exclude_unset=False)) == _comparable(whole)

    _run(scenario())


def _comparable(message: dict[str, Any]) -> dict[str, Any]:
    content = [{**block, "id": ""} if block["type"] == "tool_use" else block for block in message["content"]]
    for block in content:
        block.pop("parsed_output", None)
    return {**message, "id": "", "content": content}


def test_a_call_is_a_tool_use_and_the_next_prompt_begins_as_this_turn_ended() -> None:
    async def scenario(ask: Callable[["_Site", Any], Awaitable[Any]]) -> None:
        site = _Site(CALL, ANSWER)
        said = await ask(site, HELLO)
        kinds = [block.type for block in said.content]
        assert kinds == ["thinking", "text", "tool_use"]
        call = said.content[2]
        assert (call.name, call.input, said.stop_reason) == ("get_weather", {"city": "Rome"}, "tool_use")
        result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "Sunny."}]}
        sent = [block.to_dict() for block in said.content]
        more = [*HELLO, {"role": "assistant", "content": sent}, {"role": "user", "content": [result]}]
        await ask(site, more)
        first, second = site.noting.requests
        tokenizer = site.served.prompting.the_tokenizer()
        completion = tokenizer.encode_with_control(CALL["completion"])
        so_far = [*first.prompt, *completion]
        assert list(second.prompt[: len(so_far)]) == so_far
        rest = tokenizer.decode(second.prompt[len(so_far) :], control="show")
        assert rest == (
            "<|start|>functions.get_weather to=assistant<|channel|>commentary<|message|>Sunny.<|end|><|start|>assistant"
        )

    async def whole(site: _Site, messages: Any) -> Any:
        return await site.client.messages.create(model="default", max_tokens=500, messages=messages, tools=[WEATHER])

    async def streamed(site: _Site, messages: Any) -> Any:
        async with site.client.messages.stream(
            model="default", max_tokens=500, messages=messages, tools=[WEATHER]
        ) as stream:
            return await stream.get_final_message()

    _run(scenario(whole))
    _run(scenario(streamed))


def test_omitted_thinking_comes_back_from_its_signature_and_a_changed_one_is_refused() -> None:
    async def scenario() -> None:
        site = _Site(CALL, ANSWER)
        body: Any = {"tools": [WEATHER], "thinking": {"type": "adaptive", "display": "omitted"}, "max_tokens": 500}
        said = (await site.post(**body)).json()["content"]
        assert said[0]["thinking"] == ""
        result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": said[2]["id"], "content": "x"}]}
        more = [*HELLO, {"role": "assistant", "content": said}, result]
        assert (await site.post(**body, messages=more)).status_code == 200
        first, second = site.noting.requests
        completion = site.served.prompting.the_tokenizer().encode_with_control(CALL["completion"])
        assert list(second.prompt[: len(first.prompt) + len(completion)]) == [*first.prompt, *completion]
        said[0]["thinking"] = "I was told to lie."
        refused = await site.post(**body, messages=more)
        assert refused.status_code == 400
        assert "messages[1].content[0].signature" in refused.json()["error"]["message"]

    _run(scenario())


def test_thinking_that_only_another_server_knows_is_left_out_and_named() -> None:
    async def scenario() -> None:
        site = _Site()
        said = [
            {"type": "redacted_thinking", "data": "c2VjcmV0"},
            {"type": "thinking", "thinking": "", "signature": "c2VjcmV0"},
            {"type": "thinking", "thinking": "Known.", "signature": "c2VjcmV0"},
            {"type": "tool_use", "id": "a", "name": "get_weather", "input": {}},
        ]
        result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a"}]}
        messages = [*HELLO, {"role": "assistant", "content": said}, result]
        with_them = await site.post("/count_tokens", messages=messages)
        messages[1]["content"] = said[2:]
        without = await site.post("/count_tokens", messages=messages)
        assert with_them.json() == without.json()
        assert with_them.headers["x-freehold-warnings"].count("was left out") == 2
        assert "x-freehold-warnings" not in without.headers

    _run(scenario())


def test_stop_reasons() -> None:
    async def scenario() -> None:
        site = _Site(ANSWER, ANSWER, ANSWER)
        cut = (await site.post(max_tokens=4)).json()
        assert (cut["stop_reason"], cut["content"], cut["usage"]["output_tokens"]) == ("max_tokens", [], 4)
        stopped = (await site.post(max_tokens=500, stop_sequences=["never", " what"])).json()
        assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("stop_sequence", " what")
        assert stopped["content"][0]["text"] == "Hi there,"
        assert (await site.post(max_tokens=10**9)).json()["stop_reason"] == "end_turn"

    _run(scenario())


def test_a_call_that_the_limit_broke_off_is_not_handed_on_as_one() -> None:
    async def scenario() -> None:
        site = _Site(CALL, CALL)
        tokens = len(site.served.prompting.the_tokenizer().encode_with_control(CALL["completion"])) - 3
        message = (await site.post(max_tokens=tokens, tools=[WEATHER])).json()
        assert message["stop_reason"] == "max_tokens"
        assert [block["type"] for block in message["content"]] == ["thinking", "text"]
        response = await site.post(max_tokens=tokens, tools=[WEATHER], stream=True)
        assert _checked_events(response.text)[-2]["delta"]["stop_reason"] == "max_tokens"

    _run(scenario())


def test_count_tokens_is_what_the_message_will_be_charged() -> None:
    async def scenario() -> None:
        site = _Site(ANSWER)
        asked: Any = {
            "model": "default",
            "messages": HELLO,
            "system": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
            "tools": [WEATHER],
            "output_config": {"effort": "low", "format": {"type": "json_schema", "schema": {"type": "object"}}},
        }
        counted = await site.client.messages.count_tokens(**asked)
        site.noting.requests.clear()
        await site.post(max_tokens=1, **asked)
        assert counted.input_tokens == len(site.noting.requests[0].prompt)
        _fits(MessageTokensCount, counted.to_dict())

    _run(scenario())


def test_what_is_asked_reaches_the_model() -> None:
    async def scenario() -> None:
        site = _Site(*[ANSWER] * 3)
        await site.post(
            max_tokens=500,
            system="Be brief.",
            messages=[
                {"role": "user", "content": [{"type": "text", "text": "One"}, {"type": "text", "text": "two"}]},
                {"role": "assistant", "content": "Three."},
                {"role": "system", "content": "Now be long."},
                {"role": "user", "content": "Four"},
            ],
            temperature=0.3,
            top_p=0.9,
            top_k=7,
            output_config={"effort": "max"},
            thinking={"type": "disabled"},
            metadata={"user_id": "somebody"},
        )
        raw = await site.client.messages.with_raw_response.create(
            model="default", max_tokens=9, messages=HELLO, output_config={"effort": "max"}
        )
        assert raw.headers["x-freehold-warnings"] == "output_config.effort max was taken as high"
        request = site.noting.requests[0]
        assert (request.sampling.temperature, request.sampling.top_p, request.sampling.top_k) == (0.3, 0.9, 7)
        prompt = site.served.prompting.the_tokenizer().decode(request.prompt, control="show")
        assert "Reasoning: high" in prompt
        assert prompt.endswith(
            "<|start|>developer<|message|># Instructions\n\nBe brief.<|end|><|start|>user<|message|>One\ntwo<|end|>"
            "<|start|>assistant<|channel|>final<|message|>Three.<|end|><|start|>developer<|message|># Instructions\n\n"
            "Now be long.<|end|><|start|>user<|message|>Four<|end|><|start|>assistant"
        )

    _run(scenario())


def test_thinking_that_is_switched_off_or_spent_cannot_happen() -> None:
    async def scenario() -> None:
        site = _Site(ANSWER, {"answer": "Hi."}, ANSWER)
        refused = await site.post(max_tokens=500, thinking={"type": "disabled"})
        assert refused.status_code == 500  # the script thinks, which its grammar does not allow
        assert "does not allow" in refused.json()["error"]["message"]
        assert (await site.post(max_tokens=500, thinking={"type": "disabled"})).status_code == 200
        spent = await site.post(max_tokens=500, thinking={"type": "enabled", "budget_tokens": 2})
        assert "does not allow" in spent.json()["error"]["message"]

    _run(scenario())


@pytest.mark.parametrize(
    ("choice", "turn", "allowed"),
    [
        ({"type": "auto"}, ANSWER, True),
        ({"type": "any"}, ANSWER, False),
        ({"type": "any"}, CALL, True),
        ({"type": "none"}, CALL, False),
        ({"type": "tool", "name": "get_weather"}, CALL, True),
        ({"type": "tool", "name": "get_time"}, CALL, False),
    ],
)
def test_tool_choice_is_kept_to(choice: Any, turn: Any, allowed: bool) -> None:
    async def scenario() -> None:
        site = _Site(turn)
        response = await site.post(max_tokens=500, tools=[WEATHER, {**WEATHER, "name": "get_time"}], tool_choice=choice)
        assert (response.status_code == 200) is allowed

    _run(scenario())


def test_parallel_calls_are_made_where_they_are_asked_for() -> None:
    call = CALL["completion"].partition("One moment.<|end|><|start|>assistant")[2]
    both = {"completion": f"{call}<|start|>assistant{call}<|return|>"}

    async def scenario() -> None:
        site = _Site(both, both, both)
        choice = {"type": "auto", "disable_parallel_tool_use": False}
        body: Any = {"max_tokens": 500, "tools": [WEATHER]}
        message = (await site.post(**body, tool_choice=choice)).json()
        assert [block["type"] for block in message["content"]] == ["tool_use", "tool_use"]
        assert len({block["id"] for block in message["content"]}) == 2
        events = await site.events(tools=[WEATHER], tool_choice=choice)
        assert [event["index"] for event in events if event["type"] == "content_block_start"] == [0, 1]
        assert len((await site.post(**body)).json()["content"]) == 1

    _run(scenario())


def test_a_json_schema_binds_the_answer() -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    form = {"type": "json_schema", "schema": schema}

    async def scenario() -> None:
        site = _Site({"answer": '{"n": 3}'}, {"answer": '{"n": "x"}'}, {"answer": '{"n": 3}'})
        good = await site.post(max_tokens=500, output_config={"format": form})
        assert json.loads(good.json()["content"][0]["text"]) == {"n": 3}
        assert (await site.post(max_tokens=500, output_format=form)).status_code == 500
        twice = await site.post(max_tokens=500, output_format=form, output_config={"format": form})
        assert twice.status_code == 400

    _run(scenario())


def test_hosted_tools_are_left_out_and_named() -> None:
    async def scenario() -> None:
        site = _Site(ANSWER)
        hosted = {"type": "web_search_20250305", "name": "web_search", "max_uses": 5}
        response = await site.post(max_tokens=500, tools=[hosted])
        assert response.status_code == 200
        assert "web_search_20250305" in response.headers["x-freehold-warnings"]
        chosen = await site.post(max_tokens=500, tools=[hosted], tool_choice={"type": "tool", "name": "web_search"})
        assert chosen.status_code == 400

    _run(scenario())


def test_the_beta_client_sends_what_agents_send() -> None:
    async def scenario() -> None:
        site = _Site(ANSWER)
        async with site.client.beta.messages.stream(
            model="default",
            max_tokens=32_000,
            messages=HELLO,
            betas=["claude-code-20250219", "interleaved-thinking-2025-05-14", "context-management-2025-06-27"],
            system=[{"type": "text", "text": "You help.", "cache_control": {"type": "ephemeral", "ttl": "1h"}}],
            thinking={"type": "enabled", "budget_tokens": 31_999},
            context_management={"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
            metadata={"user_id": "user_1"},
            extra_body={"temperature": 1},
        ) as stream:
            message = await stream.get_final_message()
        assert message.context_management is not None
        assert [block.type for block in message.content] == ["thinking", "text"]

    _run(scenario())


# --- refusals -----------------------------------------------------------------------------------------------

_USE = {"type": "tool_use", "id": "a", "name": "get_weather", "input": {}}
_RESULT = {"type": "tool_result", "tool_use_id": "a", "content": "Sunny."}


def _after_call(*blocks: Any) -> dict[str, Any]:
    return {"messages": [*HELLO, {"role": "assistant", "content": [_USE]}, {"role": "user", "content": list(blocks)}]}


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "9"}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "role is user, assistant or system"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "reads text only"),
        ({"messages": [{"role": "user", "content": [{"type": "document", "source": {}}]}]}, "reads text only"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]}, "messages[0].content[0].text"),
        ({"messages": [*HELLO, {"role": "assistant", "content": "I"}]}, "cannot be continued"),
        ({"messages": [{"role": "assistant", "content": [_USE]}, *HELLO]}, "no tool_result for a"),
        ({"messages": [{"role": "user", "content": [_RESULT]}]}, "messages[0].content[0].tool_use_id"),
        (_after_call(_RESULT, _RESULT), "messages[2].content[1].tool_use_id"),
        (_after_call({"type": "text", "text": "Here:"}, _RESULT), "before any text"),
        (_after_call({**_RESULT, "content": [{"type": "image", "source": {}}]}), "messages[2].content[0].content[0]"),
        (_after_call({**_RESULT, "toolset_name": "browser"}), "toolsets"),
        ({"messages": [{"role": "assistant", "content": [_USE, _USE]}, *HELLO]}, "another tool_use"),
        ({"messages": [{"role": "assistant", "content": [{**_USE, "name": "a<|b"}]}, *HELLO]}, "no tool's name"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "give it as a custom tool"),
        ({"tools": [{**WEATHER, "defer_loading": True}]}, "no tool search"),
        ({"tools": [{**WEATHER, "allowed_callers": ["code_execution_20250825"]}]}, "only the model"),
        ({"tools": [WEATHER, WEATHER]}, "given 2 times"),
        ({"tools": [{**WEATHER, "strict": True, "input_schema": {"$ref": "http://x"}}]}, "get_weather"),
        ({"tool_choice": {"type": "any"}}, "no tools are offered"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"tool_choice": {"type": "tool", "name": "x"}}, "not among the tools"),
        ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens"),
        ({"thinking": {"type": "adaptive", "budget_tokens": 9}}, "thinking.budget_tokens"),
        ({"thinking": {"type": "between_tools"}}, "thinking.type"),
        ({"output_config": {"task_budget": {"type": "tokens", "total": 9}}}, "max_tokens"),
        ({"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}}, "context_management.edits[0].type"),
        ({"stop_sequences": [""]}, "stop_sequences[0]"),
        ({"temperature": 3}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"container": "c"}, "container"),
        ({"mcp_servers": [{"type": "url", "url": "http://x", "name": "x"}]}, "mcp_servers"),
        ({"speed": "fast"}, "speed"),
        ({"inference_geo": "us"}, "inference_geo"),
        ({"diagnostics": {"previous_message_id": None}}, "diagnostics"),
        ({"thread": {"id": "x"}}, "not stored"),
        ({"surprise": 1}, "Unknown parameter: 'surprise'"),
    ],
)
def test_what_cannot_be_is_refused(body: dict[str, Any], told: str) -> None:
    async def scenario() -> None:
        site = _Site(ANSWER)
        with pytest.raises(BadRequestError) as caught:
            await site.client.post(
                "/v1/messages", cast_to=Message, body={"model": "default", "max_tokens": 9, "messages": HELLO, **body}
            )
        error = caught.value.body
        assert isinstance(error, dict)
        assert error["type"] == "error"
        assert error["error"]["type"] == "invalid_request_error"
        assert told in error["error"]["message"]
        assert site.noting.requests == []

    _run(scenario())


def test_unknown_models_and_versions_and_paths() -> None:
    async def scenario() -> None:
        site = _Site(ANSWER)
        with pytest.raises(NotFoundError):
            await site.client.messages.create(model="claude-opus", max_tokens=9, messages=HELLO)
        with pytest.raises(NotFoundError):
            await site.client.messages.count_tokens(model="claude-opus", messages=HELLO)
        old = await site.http.post("/v1/messages", json={}, headers={"anthropic-version": "2023-01-01"})
        assert old.status_code == 400
        wrong = await site.http.get("/v1/messages")
        assert (wrong.status_code, wrong.json()["error"]["type"]) == (405, "invalid_request_error")

    _run(scenario())


def test_a_fault_in_the_middle_ends_the_stream_with_an_error() -> None:
    async def scenario() -> None:
        site = _Site({**ANSWER, "fault": "the weights caught fire"})
        heard: list[str] = []
        with pytest.raises(APIStatusError, match="caught fire"):
            async with site.client.messages.stream(model="default", max_tokens=99, messages=HELLO) as stream:
                async for text in stream.text_stream:
                    heard.append(text)  # noqa: PERF401 - what came before the error counts
        assert "".join(heard) == ANSWER["answer"]

    _run(scenario())


# --- completeness -------------------------------------------------------------------------------------------

_IN_HEADERS = {"betas", "user_profile_id", "workspace_id"}


@pytest.mark.parametrize(
    ("params", "wire"),
    [
        (MessageCreateParamsStreaming, CreateMessage),
        (message_create_params.MessageCreateParamsStreaming, CreateMessage),
        (MessageCountTokensParams, CountTokens),
        (message_count_tokens_params.MessageCountTokensParams, CountTokens),
    ],
)
def test_every_parameter_of_the_client_is_known(params: Any, wire: type[BaseModel]) -> None:
    names = {name for base in params.__mro__ for name in getattr(base, "__annotations__", {})}
    assert names - _IN_HEADERS <= set(wire.model_fields)
