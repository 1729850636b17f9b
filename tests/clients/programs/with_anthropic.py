"""Anthropic's SDK: whole and streamed messages, tools, thinking, counting."""

from typing import Any

import anthropic
from anthropic import Anthropic, AsyncAnthropic

HELLO: Any = [{"role": "user", "content": "Say hello"}]
ROME: Any = [{"role": "user", "content": "How is the weather in Rome?"}]
TOOL: Any = {
    "name": "get_weather",
    "description": "The weather of a city",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}


def _client(url: str) -> Anthropic:
    return Anthropic(base_url=url, api_key="unused", max_retries=0)


def a_message_comes_whole(url: str) -> None:
    message = _client(url).messages.create(model="default", max_tokens=500, messages=HELLO)
    assert [block.type for block in message.content] == ["text"] and message.stop_reason == "end_turn"
    assert message.content[0].text == "Hello there, friend."  # type: ignore[union-attr]
    assert message.usage.input_tokens and message.usage.output_tokens


def thinking_comes_where_it_is_asked_for(url: str) -> None:
    thinking: Any = {"type": "enabled", "budget_tokens": 1024}
    message = _client(url).messages.create(model="default", max_tokens=2048, messages=HELLO, thinking=thinking)
    thought: Any = message.content[0]
    assert (thought.type, thought.thinking) == ("thinking", "A greeting.") and thought.signature
    with _client(url).messages.stream(model="default", max_tokens=2048, messages=HELLO, thinking=thinking) as stream:
        said: dict[str, str] = {}
        for event in stream:
            if event.type in ("thinking", "text"):
                said[event.type] = said.get(event.type, "") + getattr(event, event.type)
    assert said == {"thinking": "A greeting.", "text": "Hello there, friend."}


def a_tool_is_called_and_its_result_taken(url: str) -> None:
    client = _client(url)
    with client.messages.stream(model="default", max_tokens=500, messages=ROME, tools=[TOOL]) as stream:
        partial = "".join(event.partial_json for event in stream if event.type == "input_json")
        first = stream.get_final_message()
    call: Any = first.content[-1]
    assert first.stop_reason == "tool_use" and call.input == {"city": "Rome"} and "Rome" in partial
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "24 degrees"}
    going_on: Any = [*ROME, {"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
    second = client.messages.create(model="default", max_tokens=500, messages=going_on, tools=[TOOL])
    assert second.content[-1].text == "It is 24 degrees in Rome."  # type: ignore[union-attr]


def tokens_are_counted(url: str) -> None:
    client = _client(url)
    count = client.messages.count_tokens(model="default", messages=HELLO).input_tokens
    assert count == client.messages.create(model="default", max_tokens=500, messages=HELLO).usage.input_tokens
    assert client.messages.count_tokens(model="default", messages=HELLO, tools=[TOOL]).input_tokens > count


def models_are_listed(url: str) -> None:
    assert "gpt-5.5" in [model.id for model in _client(url).models.list()]


def errors_have_their_classes(url: str) -> None:
    client = _client(url)
    for kind, wrong in (
        (anthropic.NotFoundError, {"model": "nobody", "max_tokens": 5}),
        (anthropic.BadRequestError, {"model": "default", "max_tokens": 0}),
    ):
        try:
            client.messages.create(messages=HELLO, **wrong)  # type: ignore[call-overload]
        except anthropic.APIStatusError as error:
            assert isinstance(error, kind) and error.request_id
        else:
            raise AssertionError(f"no {kind.__name__}")


async def the_asynchronous_client_streams(url: str) -> None:
    client = AsyncAnthropic(base_url=url, api_key="unused", max_retries=0)
    async with client, client.messages.stream(model="default", max_tokens=500, messages=HELLO) as stream:
        assert "".join([text async for text in stream.text_stream]) == "Hello there, friend."


def smoke_of_the_default_model(url: str) -> None:
    question: Any = [{"role": "user", "content": "What is the capital of France?"}]
    with _client(url).messages.stream(model="default", max_tokens=80, messages=question) as stream:
        assert "Paris" in "".join(stream.text_stream)
