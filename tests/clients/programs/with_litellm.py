"""litellm as a library, with its providers for OpenAI's and for Anthropic's API."""

import json
import os
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # it would fetch one
import litellm

litellm.telemetry = False
HELLO: Any = [{"role": "user", "content": "Say hello"}]
ROME: Any = [{"role": "user", "content": "How is the weather in Rome?"}]
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {"type": "function", "function": {"name": "get_weather", "description": "Weather", "parameters": PARAMETERS}}


def _ways(url: str) -> list[dict[str, Any]]:
    return [
        {"model": "openai/default", "api_base": f"{url}/v1", "api_key": "unused", "num_retries": 0},
        {"model": "anthropic/default", "api_base": url, "api_key": "unused", "max_tokens": 2048, "num_retries": 0},
    ]


def a_message_comes_whole_and_streamed(url: str) -> None:
    for way in _ways(url):
        answer = litellm.completion(messages=HELLO, **way)
        assert answer.choices[0].message.content == "Hello there, friend."
        assert answer.usage.completion_tokens
        said = ""
        for chunk in litellm.completion(messages=HELLO, stream=True, **way):
            said += chunk.choices[0].delta.content or ""
        assert said == "Hello there, friend."


def reasoning_is_found(url: str) -> None:
    plain, anthropics = _ways(url)
    assert litellm.completion(messages=HELLO, **plain).choices[0].message.reasoning_content == "A greeting."
    said = ""
    for chunk in litellm.completion(messages=HELLO, stream=True, **plain):
        said += getattr(chunk.choices[0].delta, "reasoning_content", None) or ""
    assert said == "A greeting."
    thinking = {"type": "enabled", "budget_tokens": 1024}
    # It does not know from a model's name of its own whether the model thinks.
    asked = {"thinking": thinking, "allowed_openai_params": ["thinking"]}
    message = litellm.completion(messages=HELLO, **asked, **anthropics).choices[0].message
    assert message.reasoning_content == "A greeting."


def tools_are_called_and_answered(url: str) -> None:
    for way in _ways(url):
        first = litellm.completion(messages=ROME, tools=[TOOL], **way).choices[0]
        assert first.finish_reason == "tool_calls"
        (call,) = first.message.tool_calls
        assert json.loads(call.function.arguments) == {"city": "Rome"}
        arguments = ""
        for chunk in litellm.completion(messages=ROME, tools=[TOOL], stream=True, **way):
            for part in chunk.choices[0].delta.tool_calls or ():
                arguments += part.function.arguments or ""
        assert json.loads(arguments) == {"city": "Rome"}
        result = {"role": "tool", "tool_call_id": call.id, "content": "24 degrees"}
        second = litellm.completion(messages=[*ROME, first.message, result], tools=[TOOL], **way)
        assert second.choices[0].message.content == "It is 24 degrees in Rome."


def the_responses_api_works_whole_and_streamed(url: str) -> None:
    way = _ways(url)[0]
    response = litellm.responses(input="Say hello", **way)
    assert response.output[-1].content[0].text == "Hello there, friend."
    events = list(litellm.responses(input="Say hello", stream=True, **way))
    kinds = [str(getattr(event.type, "value", event.type)) for event in events]
    assert kinds[-1] == "response.completed", kinds
    said = "".join(
        event.delta for event, kind in zip(events, kinds, strict=True) if kind == "response.output_text.delta"
    )
    assert said == "Hello there, friend."


async def the_asynchronous_way_works_too(url: str) -> None:
    for way in _ways(url):
        stream = await litellm.acompletion(messages=HELLO, stream=True, **way)
        said = [chunk.choices[0].delta.content or "" async for chunk in stream]
        assert "".join(said) == "Hello there, friend."


def smoke_of_the_default_model(url: str) -> None:
    question = [{"role": "user", "content": "What is the capital of France?"}]
    for way in _ways(url):
        way |= {"max_tokens": 80, "temperature": 0}
        assert "Paris" in litellm.completion(messages=question, **way).choices[0].message.content
