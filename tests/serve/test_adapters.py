"""Adapters by their names, `model:adapter`, in every API that generates, with OpenAI's own client."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from openai import AsyncOpenAI, NotFoundError

import freehold
from freehold.errors import UsageError
from freehold.kernels import backends
from freehold.model.lora import EXPERT_KINDS
from freehold.serve.app import create_app
from freehold.serve.settings import ServeSettings
from freehold.session.served import serve_model
from freehold.weights.layouts import open_checkpoint
from tests.checkpoints import write_adapter
from tests.serve.http import with_sdk

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
