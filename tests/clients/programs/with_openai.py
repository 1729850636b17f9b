"""OpenAI's SDK, 2.x and 3.x: every endpoint, whole and streamed, and its helpers."""

import json
from typing import Any

import openai
from openai import AsyncOpenAI, OpenAI
from openai.types.chat import ChatCompletionMessageParam
from pydantic import BaseModel

HELLO = "Hello there, friend."
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
CHAT_TOOL: Any = {"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS, "strict": True}}
TOOL: Any = {"type": "function", "name": "get_weather", "parameters": PARAMETERS, "strict": True}
CALCULATE: Any = {
    "type": "custom",
    "name": "calculate",
    "format": {"type": "grammar", "syntax": "regex", "definition": r"\d+\+\d+"},
}


class City(BaseModel):
    city: str
    people: int


def _client(url: str) -> OpenAI:
    return OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0)


def _is_version(major: str) -> None:
    assert openai.__version__.split(".")[0] == major


def models_are_listed_and_answer_to_default(url: str) -> None:
    client = _client(url)
    names = [model.id for model in client.models.list()]
    assert "gpt-5.5" in names and client.models.retrieve(names[0]).id == names[0]
    assert client.models.retrieve("default").object == "model"
    with _raises(openai.NotFoundError) as caught:
        client.models.retrieve("nobody")
    assert caught.error.code == "model_not_found"


def completions_whole_streamed_and_several(url: str) -> None:
    client = _client(url)
    one = client.completions.create(model="default", prompt="Say hello", max_tokens=500, logprobs=1)
    choice = one.choices[0]
    assert choice.text and choice.logprobs is not None and one.usage is not None
    assert len(choice.logprobs.tokens or []) == one.usage.completion_tokens
    several = client.completions.create(model="default", prompt=["Say hello", "Count"], max_tokens=5)
    assert [choice.index for choice in several.choices] == [0, 1]
    chunks = list(client.completions.create(model="default", prompt="Say hello", max_tokens=500, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == choice.text


def chat_says_its_reasoning_in_both_fields(url: str) -> None:
    messages: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Say hello"}]
    whole = _client(url).chat.completions.create(model="default", messages=messages, logprobs=True, top_logprobs=1)
    message = whole.choices[0].message
    assert message.content == HELLO and whole.choices[0].finish_reason == "stop"
    assert message.model_extra == {"reasoning": "A greeting.", "reasoning_content": "A greeting."}
    usage = whole.usage
    assert usage is not None and usage.completion_tokens_details is not None and usage.prompt_tokens_details is not None
    assert usage.completion_tokens_details.reasoning_tokens and usage.prompt_tokens_details.cached_tokens == 0
    assert whole.choices[0].logprobs is not None and whole.choices[0].logprobs.content

    said = {"content": "", "reasoning": "", "reasoning_content": ""}
    last = None
    for chunk in _client(url).chat.completions.create(
        model="default", messages=messages, stream=True, stream_options={"include_usage": True}
    ):
        last = chunk
        for choice in chunk.choices:
            delta = choice.delta.model_dump()
            for name in said:
                said[name] += delta.get(name) or ""
    assert said == {"content": HELLO, "reasoning": "A greeting.", "reasoning_content": "A greeting."}
    assert last is not None and not last.choices and last.usage == usage


def chat_calls_a_tool_and_takes_its_result(url: str) -> None:
    client = _client(url)
    messages: list[Any] = [{"role": "user", "content": "How is the weather in Rome?"}]
    first = client.chat.completions.create(model="default", messages=messages, tools=[CHAT_TOOL]).choices[0]
    assert first.finish_reason == "tool_calls" and first.message.tool_calls
    call: Any = first.message.tool_calls[0]
    assert json.loads(call.function.arguments) == {"city": "Rome"}

    arguments = ""
    for chunk in client.chat.completions.create(model="default", messages=messages, tools=[CHAT_TOOL], stream=True):
        for choice in chunk.choices:
            for delta in choice.delta.tool_calls or ():
                arguments += (delta.function and delta.function.arguments) or ""
    assert json.loads(arguments) == {"city": "Rome"}

    messages += [first.message, {"role": "tool", "tool_call_id": call.id, "content": "24 degrees"}]
    answer = client.chat.completions.create(model="default", messages=messages, tools=[CHAT_TOOL])
    assert answer.choices[0].message.content == "It is 24 degrees in Rome."


def chat_parses_into_a_class_whole_and_streamed(url: str) -> None:
    client = _client(url)
    messages: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Describe a city"}]
    parsed = client.chat.completions.parse(model="default", messages=messages, response_format=City)
    assert parsed.choices[0].message.parsed == City(city="Rome", people=3)
    with client.chat.completions.stream(model="default", messages=messages, response_format=City) as stream:
        kinds = {event.type for event in stream}
        assert stream.get_final_completion().choices[0].message.parsed == City(city="Rome", people=3)
    assert {"chunk", "content.delta", "content.done"} <= kinds


def a_chat_stream_with_tools_tells_of_their_arguments(url: str) -> None:
    with _client(url).chat.completions.stream(
        model="default", messages=[{"role": "user", "content": "How is the weather in Rome?"}], tools=[CHAT_TOOL]
    ) as stream:
        done = [event for event in stream if event.type == "tool_calls.function.arguments.done"]
    assert [json.loads(event.arguments) for event in done] == [{"city": "Rome"}]


def a_response_has_every_field_even_if_null(url: str) -> None:
    response = _client(url).responses.create(
        model="default", input="Say hello", tools=[TOOL], include=["message.output_text.logprobs"], top_logprobs=1
    )
    assert response.output_text == HELLO and [item.type for item in response.output] == ["reasoning", "message"]
    raw = response.model_dump()
    assert {
        *("background", "completed_at", "created_at", "error", "frequency_penalty", "id", "incomplete_details"),
        *("instructions", "max_output_tokens", "max_tool_calls", "metadata", "model", "object", "output"),
        *("parallel_tool_calls", "presence_penalty", "previous_response_id", "prompt_cache_key", "reasoning"),
        *("service_tier", "status", "store", "temperature", "text", "tool_choice", "tools", "top_logprobs"),
        *("top_p", "truncation", "usage", "user"),
    } <= set(raw)
    assert set(raw["usage"]["input_tokens_details"]) >= {"cached_tokens", "cache_write_tokens"}
    assert raw["usage"]["output_tokens_details"]["reasoning_tokens"] > 0
    assert raw["text"]["format"] == {"type": "text"}
    assert {"strict", "description", "parameters"} <= set(raw["tools"][0]) and raw["tools"][0]["description"] is None
    assert raw["output"][1]["content"][0]["logprobs"]
    plain = _client(url).responses.create(model="default", input="Say hello").model_dump()
    assert plain["output"][1]["content"][0]["logprobs"] == []


def a_response_streams_its_reasoning_and_text(url: str) -> None:
    with _client(url).responses.stream(model="default", input="Say hello") as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert final.output_text == HELLO
    kinds = [event.type for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"] and kinds[-1] == "response.completed"
    assert {"response.reasoning_text.delta", "response.reasoning_text.done"} <= set(kinds)
    deltas: Any = [event for event in events if event.type == "response.output_text.delta"]
    assert "".join(event.delta for event in deltas) == HELLO and all(event.logprobs == [] for event in deltas)
    numbers: Any = [getattr(event, "sequence_number", None) for event in events]
    assert numbers == sorted(numbers)


def a_response_calls_a_tool_and_remembers(url: str) -> None:
    client = _client(url)
    with client.responses.stream(model="default", input="How is the weather in Rome?", tools=[TOOL]) as stream:
        done: Any = [event for event in stream if event.type == "response.function_call_arguments.done"]
        first = stream.get_final_response()
    assert [(event.name, json.loads(event.arguments)) for event in done] == [("get_weather", {"city": "Rome"})]
    call: Any = first.output[-1]
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "24 degrees"}
    second = client.responses.create(model="default", previous_response_id=first.id, input=[result], tools=[TOOL])
    assert second.output_text == "It is 24 degrees in Rome." and second.previous_response_id == first.id
    assert [item.type for item in client.responses.input_items.list(second.id)] == ["function_call_output"]


def reasoning_goes_round_encrypted_where_nothing_is_stored(url: str) -> None:
    client = _client(url)
    asked: list[Any] = [{"role": "user", "content": "How is the weather in Rome?"}]
    wanted: Any = {"store": False, "include": ["reasoning.encrypted_content"], "tools": [TOOL]}
    first = client.responses.create(model="default", input=asked, **wanted)
    thought: Any = first.output[0]
    assert thought.type == "reasoning" and thought.encrypted_content
    call: Any = first.output[1]
    asked += first.output
    asked.append({"type": "function_call_output", "call_id": call.call_id, "output": "24 degrees"})
    assert client.responses.create(model="default", input=asked, **wanted).output_text == "It is 24 degrees in Rome."
    with _raises(openai.NotFoundError):
        client.responses.retrieve(first.id)


def a_custom_tool_is_called_with_text_of_its_grammar(url: str) -> None:
    client = _client(url)
    first = client.responses.create(model="default", input="Add up one and two", tools=[CALCULATE])
    call: Any = first.output[-1]
    assert (call.type, call.name, call.input) == ("custom_tool_call", "calculate", "1+2")
    result: Any = {"type": "custom_tool_call_output", "call_id": call.call_id, "output": "3"}
    second = client.responses.create(model="default", previous_response_id=first.id, input=[result], tools=[CALCULATE])
    assert second.output_text == "The sum is 3."


def a_response_is_parsed_into_a_class(url: str) -> None:
    client = _client(url)
    parsed = client.responses.parse(model="default", input="Describe a city", text_format=City)
    assert parsed.output_parsed == City(city="Rome", people=3)
    with client.responses.stream(model="default", input="Describe a city", text_format=City) as stream:
        assert stream.get_final_response().output_parsed == City(city="Rome", people=3)


def a_background_response_is_followed_left_and_resumed(url: str) -> None:
    client = _client(url)
    stream = client.responses.create(model="default", input="Count", background=True, stream=True)
    seen: list[Any] = []
    for event in stream:
        seen.append(event)
        if len(seen) == 20:
            break
    stream.close()
    identity = seen[0].response.id
    rest: list[Any] = list(client.responses.retrieve(identity, stream=True, starting_after=seen[-1].sequence_number))
    assert rest[0].sequence_number == seen[-1].sequence_number + 1 and rest[-1].type == "response.completed"
    text = "".join(event.delta for event in seen + rest if event.type == "response.output_text.delta")
    assert text == client.responses.retrieve(identity).output_text and text.endswith(" 400")


def a_background_response_is_cancelled_and_deleted(url: str) -> None:
    client = _client(url)
    running = client.responses.create(model="default", input="Never end", background=True)
    assert running.status in ("queued", "in_progress")
    assert client.responses.cancel(running.id).status == "cancelled"
    assert client.responses.retrieve(running.id).status == "cancelled"
    client.responses.delete(running.id)
    with _raises(openai.NotFoundError):
        client.responses.retrieve(running.id)


def a_conversation_is_kept_and_read(url: str) -> None:
    client = _client(url)
    conversation = client.conversations.create(metadata={"topic": "names"})
    client.responses.create(model="default", conversation=conversation.id, input="My name is Ada")
    second = client.responses.create(model="default", conversation=conversation.id, input="Who am I?")
    assert second.output_text == "You are Ada." and second.conversation is not None
    items = client.conversations.items.list(conversation.id, order="asc")
    assert [getattr(item, "role", None) for item in items] == ["user", "assistant", "user", "assistant"]
    added: Any = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Say hello"}]}
    (more,) = client.conversations.items.create(conversation.id, items=[added]).data
    assert more.id is not None
    assert client.conversations.items.retrieve(more.id, conversation_id=conversation.id).type == "message"
    client.conversations.items.delete(more.id, conversation_id=conversation.id)
    updated = client.conversations.update(conversation.id, metadata={"topic": "people"})
    assert updated.metadata == {"topic": "people"}
    assert client.conversations.retrieve(conversation.id).metadata == {"topic": "people"}
    assert client.conversations.delete(conversation.id).deleted


def a_hosted_tool_that_is_off_is_left_out_and_named(url: str) -> None:
    tool: Any = {"type": "web_search"}
    raw = _client(url).responses.with_raw_response.create(model="default", input="Say hello", tools=[tool])
    assert "web_search" in raw.headers["x-freehold-warnings"]
    assert raw.parse().output_text == HELLO


def errors_have_their_classes_and_say_what_was_wrong(url: str) -> None:
    client = _client(url)
    with _raises(openai.BadRequestError) as caught:
        client.responses.create(model="default", input="Say hello", temperature=9)
    assert caught.error.param == "temperature"
    with _raises(openai.NotFoundError):
        client.responses.create(model="nobody", input="Say hello")
    with _raises(openai.NotFoundError):
        client.responses.create(model="default", input="Say hello", previous_response_id="resp_none")
    with _raises(openai.BadRequestError) as caught:
        client.completions.create(model="default", prompt="Say hello", suffix="!")
    assert caught.error.param == "suffix"


def what_fails_after_the_beginning_ends_the_stream_with_an_error(url: str) -> None:
    client = _client(url)
    with _raises(openai.APIError) as caught:
        list(
            client.chat.completions.create(model="default", messages=[{"role": "user", "content": "Fail"}], stream=True)
        )
    assert "the script ends badly here" in str(caught.error)
    events = list(client.responses.create(model="default", input="Fail", stream=True))
    assert events[-1].type == "response.failed" and events[-1].response.error is not None


async def the_asynchronous_client_does_all_of_it(url: str) -> None:
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client:
        messages: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Say hello"}]
        whole = await client.chat.completions.create(model="default", messages=messages)
        assert whole.choices[0].message.content == HELLO
        stream = await client.chat.completions.create(model="default", messages=messages, stream=True)
        deltas = [chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices]
        assert "".join(deltas) == HELLO
        city: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Describe a city"}]
        async with client.chat.completions.stream(model="default", messages=city, response_format=City) as chatting:
            parsed = await chatting.get_final_completion()
        assert parsed.choices[0].message.parsed == City(city="Rome", people=3)
        async with client.responses.stream(model="default", input="Say hello") as responding:
            assert (await responding.get_final_response()).output_text == HELLO
        response = await client.responses.parse(model="default", input="Describe a city", text_format=City)
        assert response.output_parsed == City(city="Rome", people=3)
        running = await client.responses.create(model="default", input="Never end", background=True)
        assert (await client.responses.cancel(running.id)).status == "cancelled"
        conversation = await client.conversations.create()
        await client.responses.create(model="default", conversation=conversation.id, input="My name is Ada")
        items = [item async for item in client.conversations.items.list(conversation.id)]
        assert len(items) == 2
        completion = await client.completions.create(model="default", prompt="Say hello", max_tokens=500)
        assert completion.choices[0].text
        assert [model.id async for model in client.models.list()]


def smoke_of_the_default_model(url: str) -> None:
    client = _client(url)
    question = "What is the capital of France?"
    chat = client.chat.completions.create(
        model="default", messages=[{"role": "user", "content": question}], max_tokens=80, temperature=0
    )
    assert "Paris" in (chat.choices[0].message.content or "")
    with client.responses.stream(model="default", input=question, max_output_tokens=80, temperature=0) as stream:
        assert "Paris" in stream.get_final_response().output_text
    completion = client.completions.create(
        model="default", prompt="The capital of France is", max_tokens=3, temperature=0
    )
    assert "Paris" in completion.choices[0].text


class _Caught:
    def __init__(self) -> None:
        self.error: Any = None


class _raises:  # noqa: N801 - reads as pytest's, which other interpreters may not have
    def __init__(self, kind: type[Exception]) -> None:
        self._kind = kind
        self._caught = _Caught()

    def __enter__(self) -> _Caught:
        return self._caught

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> bool:
        assert error is not None, f"no {self._kind.__name__} was raised"
        self._caught.error = error
        return isinstance(error, self._kind)
