"""Adapters by their names, `model:adapter`, in every API that generates, with OpenAI's own client."""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI, NotFoundError

import freehold
from freehold.errors import UsageError
from freehold.kernels import backends
from freehold.model.lora import EXPERT_KINDS
from freehold.serve.app import create_app
from freehold.serve.hosted import HostedServer, HostedTools
from freehold.serve.settings import ServeSettings
from freehold.session.served import Served, serve_model
from freehold.tools.functions import FunctionToolset
from freehold.weights.layouts import open_checkpoint
from tests.checkpoints import write_adapter
from tests.serve.http import with_sdk
from tests.train.tiny import make_tiny_model

BASES = ("smollm2", "default")


@pytest.mark.skipif(backends.native() is None, reason="the native kernels are not built")
def test_each_request_is_answered_with_the_adapter_that_its_model_names(
    base_folder: Path, native_settings: None, tmp_path: Path
) -> None:
    config = open_checkpoint(base_folder).config
    adapters = {
        "poet": write_adapter(tmp_path / "poet", config, EXPERT_KINDS, std=0.05),
        "clerk": write_adapter(tmp_path / "clerk", config, std=0.05, seed=2),
    }
    model = freehold.load(base_folder, context=256, threads=2, adapters=adapters)
    prompt, names = "The sea at night", (None, *adapters)
    want = {name: "".join(model.stream_text(prompt, max_tokens=6, temperature=0, adapter=name)) for name in names}
    assert len(set(want.values())) == 3
    served = serve_model(model, name="smollm2")

    def called(adapter: str | None, base: str = "default") -> str:
        return base if adapter is None else f"{base}:{adapter}"

    async def use(client: AsyncOpenAI) -> None:
        listed = [model.id async for model in client.models.list()]
        assert listed == [called(adapter, base) for adapter in names for base in BASES]
        assert (await client.models.retrieve("default:poet")).id == "default:poet"

        async def text(adapter: str | None) -> str:
            made = await client.completions.create(model=called(adapter), prompt=prompt, max_tokens=6, temperature=0)
            assert made.model == called(adapter)
            return made.choices[0].text

        asked: Sequence[str | None] = names * 2
        assert await asyncio.gather(*map(text, asked)) == [want[name] for name in asked]  # all of them in one batch

        messages: Any = [{"role": "user", "content": "Say something."}]

        async def said(adapter: str | None) -> str:
            """The same in three APIs."""
            model, limit = called(adapter, "smollm2"), 6
            chat, response, message = await asyncio.gather(
                client.chat.completions.create(model=model, messages=messages, max_tokens=limit, temperature=0),
                client.responses.create(model=model, input=messages, max_output_tokens=limit, temperature=0),
                client.post(
                    "/messages",
                    cast_to=dict[str, Any],
                    body={"model": model, "messages": messages, "max_tokens": limit, "temperature": 0},
                ),
            )
            assert chat.choices[0].message.content == response.output_text == message["content"][0]["text"]
            return str(response.output_text)

        assert len({await said(name) for name in names}) == 3
        for name in ("default:nobody", "poet", "default:", ":poet", "smollm2:poet:poet"):
            with pytest.raises(NotFoundError, match="does not exist here; this server has smollm2, default"):
                await client.completions.create(model=name, prompt=prompt)
        model.add_adapter("late", adapters["poet"])  # while it serves
        assert await text("late") == want["poet"]
        await served.runner.drain(0)

    with_sdk(served, use)
    with pytest.raises(UsageError, match="'gpt:poet' is what the adapter 'poet' goes by"):
        create_app(served, ServeSettings(model_names=("gpt", "gpt:poet")))


def _asked(model: str) -> list[tuple[str, dict[str, Any]]]:
    """What depends on how a model speaks, in every API that chats, or counts what a chat would have."""
    messages = [{"role": "user", "content": "Who is Ada?"}]
    schema = {"type": "object", "properties": {"name": {"enum": ["Ada"]}}, "required": ["name"]}
    chat, response = {"model": model, "messages": messages}, {"model": model, "input": messages}
    spoken: list[tuple[dict[str, Any], ...]] = [  # each as chat completions, Messages and Responses say it
        ({"reasoning_effort": "low"}, {"output_config": {"effort": "low"}}, {"reasoning": {"effort": "low"}}),
        ({"reasoning_effort": "none"}, {"thinking": {"type": "disabled"}}, {"reasoning": {"effort": "none"}}),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "person", "schema": schema}}},
            {"output_config": {"format": {"type": "json_schema", "schema": schema}}},
            {"text": {"format": {"type": "json_schema", "name": "person", "schema": schema}}},
        ),
        ({}, {}, {"tools": [{"type": "mcp", "server_label": "own", "require_approval": "never"}]}),
    ]
    asked: list[tuple[str, dict[str, Any]]] = []
    for of_chat, of_message, of_response in spoken:
        most = {"temperature": 0, "max_tokens": 24}
        if "response_format" not in of_chat:
            asked.append(("/tokenize", chat | of_chat))
        asked += [
            ("/v1/chat/completions", chat | of_chat | most),
            ("/v1/messages", chat | of_message | most),
            ("/v1/messages/count_tokens", chat | of_message),
            ("/v1/responses", response | of_response | {"temperature": 0, "max_output_tokens": 24}),
            ("/v1/responses/input_tokens", response | of_response),
        ]
    return asked


def _answers(served: Served, asked: Sequence[tuple[str, dict[str, Any]]]) -> list[tuple[Any, ...]]:
    """Of each: what was asked, whether it was answered, with how long a prompt and how much reasoning, or why not."""

    def echo(text: str) -> str:
        """Says it again."""
        return text

    async def send() -> list[httpx.Response]:
        tools = HostedTools(files=[HostedServer("own", FunctionToolset([echo]))])
        transport = httpx.ASGITransport(app=create_app(served, tools=tools))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as client:
            return [await client.post(path, json=body) for path, body in asked]

    def told(response: httpx.Response) -> tuple[Any, ...]:
        said = response.json()
        if response.status_code != 200:
            return response.status_code, said["error"]["message"]
        usage = said.get("usage", said)
        prompt = ("count", "prompt_tokens", "input_tokens", "cache_read_input_tokens")
        details = usage.get("completion_tokens_details", usage.get("output_tokens_details"))
        warned = response.headers.get("x-freehold-warnings")
        return 200, sum(usage.get(key, 0) for key in prompt), details, warned

    return [
        (path, json.dumps(body), *told(response))
        for (path, body), response in zip(asked, asyncio.run(send()), strict=True)
    ]


@pytest.mark.skipif(backends.native() is None, reason="the native kernels are not built")
def test_what_a_request_means_depends_on_what_its_adapter_speaks(tmp_path: Path, native_settings: None) -> None:
    folder = make_tiny_model(tmp_path / "own", harmony=True)
    config = open_checkpoint(folder).config
    adapters = {
        name: write_adapter(tmp_path / name, config, harmony=harmony)
        for name, harmony in {"thinker": True, "talker": False}.items()
    }
    served = serve_model(freehold.load(folder, threads=2, adapters=adapters), name="own")
    harmony_template = "<|start|>user<|message|>{{ messages }}<|end|>"  # and then there is no other format
    writes_harmony = replace(served, prompting=replace(served.prompting, chat_template=harmony_template))
    try:
        assert not served.speaks_harmony and writes_harmony.speaks_harmony
        answers = _answers(served, _asked("own:thinker"))
        assert answers == _answers(replace(served, harmony=True), _asked("own:thinker"))
        assert {status for _, _, status, *_ in answers} == {200}
        for path, asked, status, why, *_ in _answers(writes_harmony, _asked("own:talker")):
            assert (status, "do not decide against it" in str(why)) == (400, True), (path, asked)
    finally:
        asyncio.run(served.runner.drain())
