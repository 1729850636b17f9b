"""Tokenize and detokenize."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.serve.http import post, requests_of, scripted

HI = [{"role": "user", "content": "hi"}]
SAID = {"answer": "x", "match": ""}
TOOL = {"type": "function", "function": {"name": "f", "description": "d"}}


def tokens(**body: Any) -> dict[str, Any]:
    response = post(scripted(SAID), "/tokenize", body)
    assert response.status_code == 200, response.text
    data: dict[str, Any] = response.json()
    assert data["count"] == len(data["tokens"]) and data["max_model_len"] == 131_072
    return data


@settings(max_examples=12, deadline=None)
@given(st.text(max_size=20))
def test_text_comes_back_and_never_holds_control_tokens(text: str) -> None:
    data = tokens(prompt=f"<|start|>{text}")
    response = post(scripted(SAID), "/v1/detokenize", {"tokens": data["tokens"]})
    assert response.json() == {"prompt": f"<|start|>{text}"} and max(data["tokens"]) < 199_998


def test_a_conversation_is_what_the_model_would_be_given() -> None:
    body = {"messages": HI, "tools": [TOOL], "reasoning_effort": "high"}
    (request,) = requests_of(scripted(SAID), "/v1/chat/completions", [{"model": "default", **body}])
    data = tokens(**body, return_token_strs=True, add_generation_prompt=True)
    assert data["tokens"] == list(request.prompt)
    assert data["token_strs"][:3] == ["<|start|>", "system", "<|message|>"] and len(data["token_strs"]) == data["count"]
    assert tokens(prompt="")["token_strs"] is None


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": HI}, "prompt"),
        ("/tokenize", {"prompt": "a", "tools": [TOOL]}, "tools"),
        ("/tokenize", {"prompt": 3}, "prompt"),
        ("/tokenize", {"prompt": "a", "add_special_tokens": True}, "add_special_tokens"),
        ("/tokenize", {"messages": HI, "add_generation_prompt": False}, "add_generation_prompt"),
        ("/tokenize", {"messages": [{"role": "user"}]}, "messages[0].content"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [1, -1]}, "tokens[1]"),
        ("/detokenize", {"tokens": [999_999]}, "tokens[0]"),
        ("/detokenize", {"tokens": ["a"]}, "tokens[0]"),
    ],
)
def test_what_cannot_be_is_refused_by_name(path: str, body: dict[str, Any], param: str) -> None:
    response = post(scripted(SAID), path, body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


def test_other_models_are_not_found() -> None:
    for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]})):
        assert post(scripted(SAID), path, {**body, "model": "gpt-4o"}).status_code == 404
