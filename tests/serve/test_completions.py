"""Completions, as OpenAI's client and lm-eval see them."""

import asyncio
import json
from dataclasses import replace
from typing import Any

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai import AsyncOpenAI
from openai.types import Completion
from openai.types.completion_create_params import CompletionCreateParamsNonStreaming, CompletionCreateParamsStreaming

from freehold.formats.tokenizer import Tokenizer
from freehold.serve.app import create_app
from freehold.serve.completions import CompletionRequest
from freehold.session.served import Served
from tests.serve.http import Recorder, chunks_of, post, post_all, requests_of, scripted, vanish, with_sdk
from tests.serve.sdk import check

COMPLETIONS = "/v1/completions"
UPON = {"completion": " upon a time<|return|>", "match": "Once"}


def ask(prompt: Any = "Once", **fields: Any) -> dict[str, Any]:
    return {"model": "default", "prompt": prompt, **fields}


def made(served: Served, prompt: Any = "Once", **fields: Any) -> dict[str, Any]:
    response = post(served, COMPLETIONS, ask(prompt, **fields))
    assert response.status_code == 200, response.text
    data: dict[str, Any] = response.json()
    fits(data)
    return data


def fits(data: dict[str, Any]) -> None:
    """OpenAI has null for the logprob of a first token, and for what comes with it, whatever its types say."""
    known = json.loads(json.dumps(data))
    for logprobs in (choice["logprobs"] for choice in known["choices"] if choice["logprobs"]):
        for field, stand_in in (("token_logprobs", 0.0), ("top_logprobs", {})):
            logprobs[field] = [stand_in if value is None else value for value in logprobs[field]]
    check(Completion, known)


def test_a_text_goes_on() -> None:
    data = made(scripted(UPON))
    assert [(c["index"], c["text"], c["finish_reason"], c["logprobs"]) for c in data["choices"]] == [
        (0, " upon a time", "stop", None)
    ]
    assert data["usage"] == {
        "prompt_tokens": 1,
        "completion_tokens": 4,
        "total_tokens": 5,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


def test_sixteen_tokens_are_the_default_and_the_end_is_told() -> None:
    (request,) = requests_of(scripted(UPON), COMPLETIONS, [ask()])
    assert request.max_tokens == 16 and request.prompt_logprobs is None and request.sampling.logprobs is None
    (choice,) = made(scripted(UPON), max_tokens=2)["choices"]
    assert (choice["text"], choice["finish_reason"]) == (" upon a", "length")


def test_echo_and_logprobs_cover_prompt_and_continuation() -> None:
    (choice,) = made(scripted(UPON), "Once more", echo=True, logprobs=1, max_tokens=2)["choices"]
    assert choice["text"] == "Once more upon a"
    assert choice["logprobs"] == {
        "tokens": ["Once", " more", " upon", " a"],
        "token_logprobs": [None, 0.0, 0.0, 0.0],
        "top_logprobs": [None, {" more": 0.0}, {" upon": 0.0}, {" a": 0.0}],
        "text_offset": [0, 4, 9, 14],
    }
    (alone,) = made(scripted(UPON), "Once more", echo=True, logprobs=0, max_tokens=0)["choices"]
    assert (alone["text"], alone["finish_reason"]) == ("Once more", "length")
    assert alone["logprobs"]["top_logprobs"] == [None, {" more": 0.0}]
    (bare,) = made(scripted(UPON), "Once more", echo=True, max_tokens=0)["choices"]
    assert (bare["text"], bare["logprobs"]) == ("Once more", None)


def test_the_token_that_ends_a_text_is_scored_like_the_others() -> None:
    (choice,) = made(scripted(UPON), logprobs=0)["choices"]
    assert choice["text"] == " upon a time" and choice["logprobs"]["tokens"] == [" upon", " a", " time", "<|return|>"]


def test_tokens_that_are_parts_of_characters_are_given_as_bytes() -> None:
    text = " \U0001f9a9 x"
    (choice,) = made(scripted({"completion": text, "match": "Once"}), logprobs=1)["choices"]
    tokens = choice["logprobs"]["tokens"]
    parts = [token for token in tokens if token.startswith("bytes:")]
    assert choice["text"] == text and parts and all(part[6:].count("\\x") for part in parts)
    written = b"".join(
        bytes.fromhex(token[6:].replace("\\x", "")) if token.startswith("bytes:") else token.encode()
        for token in tokens
    )
    assert written.decode() == text
    assert choice["logprobs"]["text_offset"][-1] == len(text) - len(" x")


def test_a_stop_string_ends_the_text_and_its_tokens() -> None:
    (choice,) = made(scripted(UPON), stop=["nothing", "a t"], logprobs=0)["choices"]
    assert (choice["text"], choice["finish_reason"]) == (" upon ", "stop")
    assert choice["logprobs"]["tokens"] == [" upon", " a"]
    (time,) = Tokenizer.o200k_harmony().encode(" time")
    (choice,) = made(scripted(UPON), stop_token_ids=[time])["choices"]
    assert (choice["text"], choice["finish_reason"]) == (" upon a", "stop")


def test_several_prompts_run_together_and_come_back_in_order() -> None:
    served = scripted({"completion": " one", "match": "^A"}, {"completion": " two", "match": "^B"})
    tokenizer = Tokenizer.o200k_harmony()
    for prompts in (["A", "B"], [tokenizer.encode("A"), tokenizer.encode("B")]):
        data = made(served, prompts, n=2, best_of=2)
        assert [c["text"] for c in data["choices"]] == [" one", " one", " two", " two"]
        assert [c["index"] for c in data["choices"]] == [0, 1, 2, 3]
        assert data["usage"]["prompt_tokens"] == 2 and data["usage"]["completion_tokens"] == 4


def test_text_never_becomes_control_tokens_and_ids_may() -> None:
    tokenizer = Tokenizer.o200k_harmony()
    start = tokenizer.control_id("<|start|>")
    served = scripted({"completion": "x", "match": ""})
    text, ids = requests_of(served, COMPLETIONS, [ask("<|start|>"), ask([start])])
    assert start not in text.prompt and tokenizer.decode(text.prompt) == "<|start|>"
    assert list(ids.prompt) == [start]


def test_a_fault_of_one_prompt_ends_all_of_them() -> None:
    served = scripted({"completion": "word " * 50, "match": "^A"}, {"completion": "x", "match": "^B", "fault": "lost"})
    response = post(served, COMPLETIONS, ask(["A", "B"], max_tokens=100))
    assert response.status_code == 500 and response.json()["error"]["message"] == "lost"
    assert served.runner.stats().running == 0


@settings(max_examples=25, deadline=None)
@given(
    texts=st.lists(st.text(st.sampled_from("ab \né–😀"), min_size=1, max_size=12), min_size=1, max_size=3),
    stop=st.lists(st.sampled_from(["b", " a", "😀"]), max_size=2),
    n=st.integers(1, 2),
    echo=st.booleans(),
)
def test_joining_a_stream_gives_the_whole_text(texts: list[str], stop: list[str], n: int, echo: bool) -> None:
    turns = [{"completion": text, "match": f"^{index}"} for index, text in enumerate(texts)]
    body = ask([str(index) for index in range(len(texts))], stop=stop, n=n, echo=echo, logprobs=1, max_tokens=8)
    whole, stream = post_all(scripted(*turns), COMPLETIONS, [body, {**body, "stream": True}])
    chunks = chunks_of(stream)
    joined: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        fits({**chunk, "choices": [{**c, "finish_reason": c["finish_reason"] or "stop"} for c in chunk["choices"]]})
        for choice in chunk["choices"]:
            sofar = joined.setdefault(choice["index"], {**choice, "text": "", "logprobs": {}})
            sofar["text"] += choice["text"]
            sofar["finish_reason"] = choice["finish_reason"]
            for field, values in choice["logprobs"].items():
                sofar["logprobs"].setdefault(field, []).extend(values)
    assert [joined[index] for index in sorted(joined)] == whole.json()["choices"]


def test_the_sdk_completes_and_streams() -> None:
    async def use(client: AsyncOpenAI) -> None:
        whole = await client.completions.create(model="default", prompt="Once")
        assert whole.choices[0].text == " upon a time"
        stream = await client.completions.create(
            model="default", prompt="Once", stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == " upon a time"
        assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 4
        faulty = await client.completions.create(model="default", prompt="Alas", stream=True)
        with pytest.raises(openai.APIError, match="lost"):
            async for _ in faulty:
                pass

    with_sdk(scripted(UPON, {"completion": "x", "fault": "lost"}), use)


def test_forms_and_sampling_reach_the_engine() -> None:
    served = scripted({"completion": "yes<|return|>", "match": ""})
    body = ask(guided_choice=["yes", "no"], temperature=0, top_k=5, n=2, min_tokens=1, logit_bias={"3": 1}, seed=-1)
    (request,) = requests_of(served, COMPLETIONS, [body])
    assert request.constraint is not None and request.n == 2 and request.min_tokens == 1
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_k, sampling.seed, sampling.logit_bias) == (0, 5, -1, {3: 1})
    assert post(served, COMPLETIONS, ask(structured_outputs={"regex": "[0-9]+"})).status_code == 500
    (endless,) = requests_of(served, COMPLETIONS, [ask(ignore_eos=True)])
    assert endless.stop_ids == frozenset()


REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": [1, "a"]}, "prompt"),
    ({"prompt": [True]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [999_999]}, "prompt"),
    ({"suffix": "end"}, "suffix"),
    ({"best_of": 2}, "best_of"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"echo": "yes"}, "echo"),
    ({"stop_token_ids": [999_999]}, "stop_token_ids"),
    ({"min_tokens": 17}, "min_tokens"),
    ({"ignore_eos": True, "guided_regex": "a"}, "ignore_eos"),
    ({"guided_regex": "("}, "guided_regex"),
    ({"guided_json": {"type": "object", "properties": {"a": {"not": {"type": "string"}}}}}, "guided_json"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"add_special_tokens": True}, "add_special_tokens"),
    ({"prompt_logprobs": 1}, "prompt_logprobs"),
    ({"prompt_embeds": "x"}, "prompt_embeds"),
    ({"truncate_prompt_tokens": 3}, "truncate_prompt_tokens"),
    ({"use_beam_search": True}, "use_beam_search"),
    ({"messages": []}, "messages"),
]


def test_what_is_not_done_is_refused_by_name() -> None:
    served = scripted({**UPON, "match": ""})
    wrong = []
    responses = post_all(served, COMPLETIONS, [{**ask(), **fields} for fields, _ in REFUSALS])
    for (fields, param), response in zip(REFUSALS, responses, strict=True):
        error = response.json().get("error", {})
        if (response.status_code, error.get("param"), error.get("type")) != (400, param, "invalid_request_error"):
            wrong.append((fields, param, response.status_code, response.text[:300]))
    assert not wrong


def test_a_prompt_longer_than_the_context_is_refused_with_both_numbers() -> None:
    served = scripted(UPON)
    short = replace(served, prompting=replace(served.prompting, context=10, longest=10))
    error = post(short, COMPLETIONS, ask("Once " * 30)).json()["error"]
    assert (error["param"], error["code"]) == ("prompt", "context_length_exceeded")
    assert "31" in error["message"] and "10" in error["message"]
    full = "Once" + " x" * 9
    assert made(short, full, echo=True, logprobs=0, max_tokens=0)["choices"][0]["text"] == full


def test_every_parameter_of_the_sdk_is_known() -> None:
    of_sdk = {
        name
        for params in (CompletionCreateParamsNonStreaming, CompletionCreateParamsStreaming)
        for name in params.__annotations__
    }
    assert of_sdk - CompletionRequest.model_fields.keys() == set()


def test_all_prompts_are_let_in_or_none() -> None:
    response = post(scripted(UPON), COMPLETIONS, ask(["Once"] * 3), max_running=1, max_queue=1)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "prompt")

    async def run() -> None:
        served = scripted(UPON)
        app = create_app(served)
        gate = app.state.server.gate
        gate.enter(32 + 256 - 2)
        sent = await vanish(app, COMPLETIONS, ask(["Once"] * 3), once=lambda: False)
        assert sent[0]["status"] == 429 and served.runner.stats().running == 0
        gate.enter(2)

    asyncio.run(run())


@pytest.mark.parametrize("stream", [False, True])
def test_who_goes_away_leaves_nothing_running(stream: bool) -> None:
    served = scripted({"completion": "word " * 1000, "match": ""}, speed=100.0)
    recorder = Recorder(served.runner)
    app = create_app(replace(served, runner=recorder))

    async def run() -> None:
        body = ask(["A", "B"], stream=stream, max_tokens=1000)
        sent = await vanish(app, COMPLETIONS, body, once=lambda: len(recorder.requests) == 2)
        assert not any(b"DONE" in message.get("body", b"") for message in sent)
        assert served.runner.stats().running == 0
        app.state.server.gate.enter(32 + 256)

    asyncio.run(run())
