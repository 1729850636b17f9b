"""The engine and the default model behind the endpoints: what scripts cannot show."""

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import torch

import freehold
from freehold.serve.app import create_app
from freehold.session.served import serve_model
from tests.serve.http import chunks_of

CONTINUATIONS = [("The capital of France is", " Paris"), ("Water freezes at zero degrees", " Celsius – and boils.")]


def test_the_default_model_chats_keeps_to_forms_and_scores_texts(default_folder: Path, native_settings: None) -> None:
    model = freehold.load(default_folder, context=512, threads=2)
    tokenizer = model.prompting.the_tokenizer()

    async def run() -> None:
        served = serve_model(model, name="smollm2")
        transport = httpx.ASGITransport(app=create_app(served))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000", timeout=120) as client:

            async def post(path: str, **body: Any) -> httpx.Response:
                response = await client.post(f"/v1/{path}", json={"model": "default", "temperature": 0, **body})
                assert response.status_code == 200, response.text
                return response

            messages = [{"role": "user", "content": "What is the capital of France?"}]
            said = (await post("chat/completions", messages=messages, max_tokens=80)).json()
            assert "Paris" in said["choices"][0]["message"]["content"]
            streamed = chunks_of(await post("chat/completions", messages=messages, max_tokens=80, stream=True))
            deltas = [choice["delta"].get("content", "") for chunk in streamed for choice in chunk["choices"]]
            assert "".join(deltas) == said["choices"][0]["message"]["content"]

            schema = {
                "type": "object",
                "properties": {"city": {"enum": ["Paris", "Rome"]}, "people": {"type": "integer", "maximum": 9}},
                "required": ["city", "people"],
                "additionalProperties": False,
            }
            form = (await post("chat/completions", messages=messages, guided_json=schema, max_tokens=120)).json()
            assert json.loads(form["choices"][0]["message"]["content"]).keys() == {"city", "people"}

            prompts = [tokenizer.encode(begin) + tokenizer.encode(rest) for begin, rest in CONTINUATIONS]
            scored = await post("completions", prompt=prompts, echo=True, logprobs=1, max_tokens=1)
            for prompt, choice in zip(prompts, scored.json()["choices"], strict=True):
                wanted = model.logits(prompt).log_softmax(-1)
                given = torch.tensor(choice["logprobs"]["token_logprobs"][1:-1])
                places = torch.arange(len(prompt) - 1)
                torch.testing.assert_close(given, wanted[places, torch.tensor(prompt[1:])], atol=1e-3, rtol=0)
                best = [max(top.values()) for top in choice["logprobs"]["top_logprobs"][1:]]
                torch.testing.assert_close(torch.tensor(best), wanted.amax(-1), atol=1e-3, rtol=0)
                assert len(choice["logprobs"]["tokens"]) == len(prompt) + 1
        await served.runner.drain(0)

    asyncio.run(run())
