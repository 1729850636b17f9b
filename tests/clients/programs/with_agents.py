"""OpenAI's Agents SDK: tools, hand-overs and streams, over both of its APIs."""

from typing import Any

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    SQLiteSession,
    function_tool,
    set_tracing_disabled,
)
from openai import AsyncOpenAI
from pydantic import BaseModel

set_tracing_disabled(True)


class City(BaseModel):
    city: str
    people: int


def _get_weather(city: str) -> str:
    """The weather of a city."""
    return f"24 degrees in {city}"


get_weather = function_tool(_get_weather, name_override="get_weather")


def _models(url: str) -> list[Any]:
    client = AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0)
    return [
        OpenAIResponsesModel(model="default", openai_client=client),
        OpenAIChatCompletionsModel(model="default", openai_client=client),
    ]


async def an_agent_uses_its_tool(url: str) -> None:
    for model in _models(url):
        agent = Agent(name="Reporter", instructions="Be brief.", model=model, tools=[get_weather])
        result = await Runner.run(agent, "How is the weather in Rome?")
        assert result.final_output == "It is 24 degrees in Rome.", result.final_output
        kinds = [item.type for item in result.new_items if item.type != "reasoning_item"]
        assert kinds == ["tool_call_item", "tool_call_output_item", "message_output_item"], kinds


async def an_agent_streams(url: str) -> None:
    for model in _models(url):
        agent = Agent(name="Reporter", model=model, tools=[get_weather])
        result = Runner.run_streamed(agent, "How is the weather in Rome?")
        text, names = "", []
        async for event in result.stream_events():
            if event.type == "raw_response_event" and event.data.type == "response.output_text.delta":
                text += event.data.delta
            if event.type == "run_item_stream_event":
                names.append(event.name)
        assert text == result.final_output == "It is 24 degrees in Rome."
        assert {"tool_called", "tool_output", "message_output_created"} <= set(names), names


async def an_agent_hands_over_to_another(url: str) -> None:
    for model in _models(url):
        historian = Agent(name="Historian", handoff_description="Knows the past", model=model)
        desk = Agent(name="Desk", model=model, handoffs=[historian])
        result = await Runner.run(desk, "When was Rome founded?")
        assert result.final_output == "Rome was founded in 753 BC."
        assert result.last_agent.name == "Historian"
        streamed = Runner.run_streamed(desk, "When was Rome founded?")
        agents = [event.new_agent.name async for event in streamed.stream_events() if event.type.startswith("agent_")]
        assert agents[-1] == "Historian" and streamed.final_output == "Rome was founded in 753 BC."


async def an_agent_gives_a_structured_output(url: str) -> None:
    for model in _models(url):
        agent = Agent(name="Geographer", model=model, output_type=City)
        assert (await Runner.run(agent, "Describe a city")).final_output == City(city="Rome", people=3)


async def sessions_and_stored_responses_go_on(url: str) -> None:
    for model in _models(url):
        agent = Agent(name="Friend", model=model)
        session = SQLiteSession("names")
        await Runner.run(agent, "My name is Ada", session=session)
        assert (await Runner.run(agent, "Who am I?", session=session)).final_output == "You are Ada."
    agent = Agent(name="Friend", model=_models(url)[0])
    first = await Runner.run(agent, "My name is Ada")
    second = await Runner.run(agent, "Who am I?", previous_response_id=first.last_response_id)
    assert second.final_output == "You are Ada."


async def smoke_of_the_default_model(url: str) -> None:
    for model in _models(url):
        agent = Agent(name="Helper", model=model, model_settings=ModelSettings(max_tokens=80, temperature=0))
        assert "Paris" in (await Runner.run(agent, "What is the capital of France?")).final_output
