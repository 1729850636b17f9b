"""LangChain's ChatOpenAI, over Chat Completions and over the Responses API."""

from typing import Any

from langchain_core.messages import AIMessageChunk, HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI
from pydantic import BaseModel


class City(BaseModel):
    """A city."""

    city: str
    people: int


def get_weather(city: str) -> str:
    """The weather of a city."""
    return f"24 degrees in {city}"


def _models(url: str, **options: Any) -> list[ChatOpenAI]:
    common: Any = {"model": "default", "base_url": f"{url}/v1", "api_key": "unused", "max_retries": 0, **options}
    return [ChatOpenAI(**common, stream_usage=True), ChatOpenAI(**common, use_responses_api=True)]


def a_message_comes_whole_and_streamed(url: str) -> None:
    for model in _models(url):
        answer = model.invoke("Say hello")
        assert answer.text == "Hello there, friend." and answer.usage_metadata is not None
        assert answer.usage_metadata["output_token_details"]["reasoning"] > 0
        chunks = list(model.stream("Say hello"))
        assert len(chunks) > 2 and "".join(chunk.text for chunk in chunks) == "Hello there, friend."
        whole = chunks[0]
        for chunk in chunks[1:]:
            whole += chunk
        assert isinstance(whole, AIMessageChunk) and whole.usage_metadata == answer.usage_metadata


def tools_are_bound_called_and_answered(url: str) -> None:
    for plain in _models(url):
        model = plain.bind_tools([get_weather])
        messages: list[Any] = [HumanMessage("How is the weather in Rome?")]
        messages.append(model.invoke(messages))
        (call,) = messages[-1].tool_calls
        assert (call["name"], call["args"]) == ("get_weather", {"city": "Rome"})
        messages.append(ToolMessage(get_weather(**call["args"]), tool_call_id=call["id"]))
        assert model.invoke(messages).text == "It is 24 degrees in Rome."
        streamed = [chunk for part in model.stream(messages[:1]) for chunk in part.tool_call_chunks]
        assert "".join(chunk["args"] or "" for chunk in streamed).replace(" ", "") == '{"city":"Rome"}'


def an_answer_is_structured_by_every_method(url: str) -> None:
    for model in _models(url):
        for method in ("json_schema", "json_mode"):
            structured: Any = model.with_structured_output(City, method=method)
            assert structured.invoke("Describe a city") == City(city="Rome", people=3)


def a_stored_response_is_gone_on_from(url: str) -> None:
    first = _models(url)[1].invoke("My name is Ada")
    second = _models(url)[1].invoke("Who am I?", previous_response_id=first.response_metadata["id"])
    assert second.text == "You are Ada."


async def the_asynchronous_way_works_too(url: str) -> None:
    for model in _models(url):
        assert (await model.ainvoke("Say hello")).text == "Hello there, friend."
        assert "".join([part.text async for part in model.astream("Say hello")]) == "Hello there, friend."


def smoke_of_the_default_model(url: str) -> None:
    for model in _models(url, temperature=0, max_tokens=80):
        assert "Paris" in model.invoke("What is the capital of France?").text
