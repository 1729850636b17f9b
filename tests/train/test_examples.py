"""What is taught, held against openai-harmony and a slow second opinion: every token of the assistant once, after the
very tokens that precede it in inference."""

from collections import Counter
from random import Random
from typing import Any

import pytest

from freehold.errors import UnsupportedError, UsageError
from freehold.formats.byte_level import CHARACTERS
from freehold.formats.chat import ChatFormat, HarmonyFormat, choose
from freehold.formats.conversation import Conversation, Message, SystemContent, openai_messages
from freehold.formats.harmony.grammar import TurnGrammar, TurnOptions
from freehold.formats.harmony.offer import Offer
from freehold.formats.templates import CHATML
from freehold.formats.tokenizer import Tokenizer
from freehold.train.chats import Chat, PlainText, read_example, read_preference
from freehold.train.examples import NO_TARGET, Example, chat_examples, cut, preference_pair, text_examples
from tests.harmony import theirs

SYSTEM = SystemContent(date="2025-08-05")
TOOLS = [
    {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}},
    {"type": "custom", "custom": {"name": "say"}},
]


def taught(tokenizer: Tokenizer, example: Example) -> list[str]:
    """The stretches of targets in a row."""
    stretches: list[list[int]] = [[]]
    for target in example.targets:
        if target != NO_TARGET:
            stretches[-1].append(target)
        elif stretches[-1]:
            stretches.append([])
    return [tokenizer.decode(stretch, control="show") for stretch in stretches if stretch]


def examples_of(chat_format: ChatFormat, *messages: Any, **more: Any) -> list[Example]:
    chat = read_example({"messages": list(messages), **more})
    assert isinstance(chat, Chat)
    return chat_examples(chat, chat_format)


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str | None = None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def call(id: str, arguments: str = "{}") -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": "add", "arguments": arguments}}


def result(id: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": id, "content": "4"}


# --- Harmony, by example ------------------------------------------------------------------------------------


def test_a_turn_is_taught_with_the_control_tokens_that_the_model_writes(
    gpt_oss: Tokenizer, harmony: HarmonyFormat
) -> None:
    (example,) = examples_of(harmony, user("2 + 2?"), assistant("4", thinking="Easy."))
    assert taught(gpt_oss, example) == [
        "<|channel|>analysis<|message|>Easy.<|end|><|start|>assistant<|channel|>final<|message|>4<|return|>"
    ]
    assert gpt_oss.decode(example.tokens, control="show").endswith("<|channel|>final<|message|>4")


def test_turns_without_reasoning_share_an_example_where_return_is_taught_and_end_is_seen(
    gpt_oss: Tokenizer, harmony: HarmonyFormat
) -> None:
    (example,) = examples_of(harmony, user("2 + 2?"), assistant("4"), user("Sure?"), assistant("Yes."))
    assert taught(gpt_oss, example) == [
        "<|channel|>final<|message|>4<|return|>",
        "<|channel|>final<|message|>Yes.<|return|>",
    ]
    seen = gpt_oss.decode(example.tokens, control="show")
    assert "<|message|>4<|end|><|start|>user<|message|>Sure?<|end|><|start|>assistant" in seen
    assert "<|return|>" not in seen


def test_reasoning_is_taught_in_its_turn_and_not_seen_in_later_ones(gpt_oss: Tokenizer, harmony: HarmonyFormat) -> None:
    chat = user("2 + 2?"), assistant("4", thinking="Easy."), user("Sure?"), assistant("Yes.", reasoning_content="Am I?")
    first, second = examples_of(harmony, *chat)
    assert "Easy." in "".join(taught(gpt_oss, first))
    assert "Easy." not in gpt_oss.decode(second.tokens)
    assert taught(gpt_oss, second) == [
        "<|channel|>analysis<|message|>Am I?<|end|><|start|>assistant<|channel|>final<|message|>Yes.<|return|>"
    ]


def test_a_call_and_the_answer_after_its_result_share_an_example_with_the_reasoning(
    gpt_oss: Tokenizer, harmony: HarmonyFormat
) -> None:
    calls = assistant(None, thinking="Add.", tool_calls=[call("a")])
    (example,) = examples_of(harmony, user("2 + 2?"), calls, result("a"), assistant("4"), tools=TOOLS)
    assert taught(gpt_oss, example) == [
        "<|channel|>analysis<|message|>Add.<|end|><|start|>assistant to=functions.add<|channel|>commentary "
        "<|constrain|>json<|message|>{}<|call|>",
        "<|channel|>final<|message|>4<|return|>",
    ]


def test_a_harmony_conversation_teaches_calls_of_built_in_tools_at_its_own_effort(
    gpt_oss: Tokenizer, harmony: HarmonyFormat
) -> None:
    system = {
        "type": "system_content",
        "reasoning_effort": "Low",
        "tools": {"python": {"name": "python", "description": "Runs code.", "tools": []}},
    }
    code = {"role": "assistant", "channel": "analysis", "recipient": "python", "content_type": "code"}
    shown = {"role": "tool", "name": "python", "recipient": "assistant", "channel": "analysis", "content": "4"}
    messages = [
        {"role": "system", "content": [system]}, user("2 + 2?"), {**code, "content": "print(2 + 2)"}, shown,
        {**assistant("It is 4."), "channel": "final"}, user("Thanks"), {**assistant("Welcome."), "channel": "final"},
    ]  # fmt: skip
    chat = read_example({"harmony": {"messages": messages}})
    assert isinstance(chat, Chat)
    first, second = chat_examples(chat, harmony)
    assert taught(gpt_oss, first) == [
        " to=python<|channel|>analysis code<|message|>print(2 + 2)<|call|>",
        "<|channel|>final<|message|>It is 4.<|return|>",
    ]
    assert taught(gpt_oss, second) == ["<|channel|>final<|message|>Welcome.<|return|>"]
    assert "Reasoning: low" in gpt_oss.decode(second.tokens) and "print" not in gpt_oss.decode(second.tokens)


def test_parallel_calls_are_one_turn_that_return_ends(gpt_oss: Tokenizer, harmony: HarmonyFormat) -> None:
    calls = assistant(None, tool_calls=[call("a"), call("b")])
    chat = user("2 + 2, twice?"), calls, result("a"), result("b"), assistant("4 and 4")
    (example,) = examples_of(harmony, *chat, tools=TOOLS)
    one = " to=functions.add<|channel|>commentary <|constrain|>json<|message|>{}<|call|>"
    assert taught(gpt_oss, example)[0] == f"{one}<|start|>assistant{one}<|return|>"
    assert "<|return|>" not in gpt_oss.decode(example.tokens, control="show")


def test_messages_of_weight_0_are_seen_and_not_taught(gpt_oss: Tokenizer, harmony: HarmonyFormat) -> None:
    chat = user("2 + 2?"), assistant("5", weight=0), user("Sure?"), assistant("No: 4.", weight=1)
    (example,) = examples_of(harmony, *chat)
    assert taught(gpt_oss, example) == ["<|channel|>final<|message|>No: 4.<|return|>"]
    assert "<|message|>5<|end|>" in gpt_oss.decode(example.tokens, control="show")


def test_reasoning_of_weight_0_before_an_answer_is_seen_and_not_taught(
    gpt_oss: Tokenizer, harmony: HarmonyFormat
) -> None:
    (example,) = examples_of(harmony, user("?"), assistant(thinking="Hm.", weight=0), assistant("4"))
    assert taught(gpt_oss, example) == ["<|start|>assistant<|channel|>final<|message|>4<|return|>"]
    assert "Hm.<|end|>" in gpt_oss.decode(example.tokens, control="show")


def test_text_that_reads_like_a_control_token_is_taught_as_text(gpt_oss: Tokenizer, harmony: HarmonyFormat) -> None:
    (example,) = examples_of(harmony, user("<|end|>"), assistant("<|return|>"))
    return_, end = gpt_oss.control_id("<|return|>"), gpt_oss.control_id("<|end|>")
    assert example.targets.count(return_) == 1
    assert example.tokens.count(end) == 2  # of the system message and the user's


# --- Harmony, by the oracle ---------------------------------------------------------------------------------


def random_chat(random: Random) -> dict[str, Any]:
    """Turns with and without reasoning, weights, calls and answers."""
    texts = ["Four.", "", "a  b\n", "日本", "<|end|>", "1234567", "Adding."]

    def words() -> str:
        return random.choice(texts) + str(random.random())

    messages: list[dict[str, Any]] = [{"role": "system", "content": "Be brief."}] if random.random() < 0.3 else []
    has_tools, number = random.random() < 0.6, 0

    def said(**fields: Any) -> dict[str, Any]:
        more = {random.choice(["thinking", "reasoning_content"]): words()} if random.random() < 0.5 else {}
        weight = {"weight": random.randrange(2)} if random.random() < 0.3 else {}
        return {"role": "assistant", **more, **weight, **fields}

    for _ in range(random.randint(1, 4)):
        messages.append(user(words()))
        while has_tools and random.random() < 0.5:
            ids = [f"call{number + i}" for i in range(random.choice([1, 1, 2]))]
            number += len(ids)
            preamble = {"content": words()} if random.random() < 0.3 else {}
            messages.append(said(tool_calls=[call(id_, f'{{"a": {number}}}') for id_ in ids], **preamble))
            messages += [result(id_) for id_ in random.sample(ids, len(ids))]
        messages.append(said(content=words()))
    messages[-1].pop("weight", None)
    return {"messages": messages, **({"tools": TOOLS[:1]} if has_tools else {})}


def as_inference_has_it(oracle: Any, tokenizer: Tokenizer, raw: dict[str, Any]) -> Counter[tuple[tuple[int, ...], int]]:
    """Every taught token and all that comes before it, by openai-harmony and the rules said the slow way: one message
    at a time, one token at a time."""
    return_, end = tokenizer.control_id("<|return|>"), tokenizer.control_id("<|end|>")
    bare = [{key: value for key, value in message.items() if key != "weight"} for message in raw["messages"]]
    is_parallel = any(len(message.get("tool_calls", ())) > 1 for message in bare)
    found: Counter[tuple[tuple[int, ...], int]] = Counter()
    for index, message in enumerate(raw["messages"]):
        if message["role"] != "assistant":
            continue
        before = Conversation.from_openai(bare[:index], tools=raw.get("tools"))
        context = prompt_by_oracle(oracle, before)
        for number, said in enumerate(messages := openai_messages(bare[: index + 1])[-1]):
            said = Message(
                role=said.role,
                parts=said.parts,
                channel=said.channel or "final",
                recipient=said.recipient,
                content_type=said.content_type,
            )
            ids = oracle.render(theirs(Conversation(messages=(said,))).messages[0])
            if number == 0:
                ids = ids[2:]  # the prompt has <|start|>assistant
            if number == len(messages) - 1:
                if ids[-1] == end:
                    ids[-1] = return_
                elif is_parallel:
                    ids.append(return_)
            for token in ids:
                if message.get("weight", 1):
                    found[tuple(context), token] += 1
                context.append(token)
    return found


def prompt_by_oracle(oracle: Any, conversation: Conversation) -> list[int]:
    import openai_harmony as oh

    whole = HarmonyFormat(Tokenizer.o200k_harmony(), system=SYSTEM)._whole(conversation)
    kept: list[Message] = []
    for message in reversed(whole.messages):
        is_answered = any(m.channel == "final" and m.role == "assistant" for m in kept)
        if not (is_answered and message.channel == "analysis"):
            kept.append(message)
    config = oh.RenderConversationConfig(auto_drop_analysis=False)
    shown = theirs(Conversation(messages=tuple(reversed(kept))))
    ids: list[int] = oracle.render_conversation_for_completion(shown, oh.Role.ASSISTANT, config=config)
    return ids


def test_every_token_of_the_assistant_is_taught_once_after_what_precedes_it_in_inference(
    gpt_oss: Tokenizer, harmony: HarmonyFormat, oracle: Any
) -> None:
    num_several = num_shared = 0
    for seed in range(60):
        raw = random_chat(Random(seed))
        chat = read_example(raw)
        assert isinstance(chat, Chat)
        examples = chat_examples(chat, harmony)
        found = Counter(
            (tuple(example.tokens[: place + 1]), target)
            for example in examples
            for place, target in enumerate(example.targets)
            if target != NO_TARGET
        )
        assert found == as_inference_has_it(oracle, gpt_oss, raw), f"seed {seed}"
        assert all(len(example.tokens) == len(example.targets) for example in examples)
        num_several += len(examples) > 1
        num_shared += len(examples) < len(chat.turns)
    assert min(num_several, num_shared) > 15


def test_a_last_turn_is_what_openai_trains_on(gpt_oss: Tokenizer, harmony: HarmonyFormat, oracle: Any) -> None:
    import openai_harmony as oh

    (example,) = examples_of(harmony, user("2 + 2?"), assistant("4", thinking="Easy."))
    whole = harmony._whole(Conversation.from_openai([user("2 + 2?"), assistant("4", thinking="Easy.")]))
    config = oh.RenderConversationConfig(auto_drop_analysis=False)
    ids = oracle.render_conversation_for_training(theirs(whole), config=config)
    assert [*example.tokens, example.targets[-1]] == ids


def test_the_grammar_lets_the_model_write_what_it_was_taught(gpt_oss: Tokenizer, harmony: HarmonyFormat) -> None:
    num_calls = 0
    for seed in range(12):
        chat = read_example(random_chat(Random(seed)))
        assert isinstance(chat, Chat)
        for turn in chat.turns:
            options = TurnOptions(offer=Offer.of(turn.before), parallel_tool_calls=chat.parallel_calls)
            constraint = TurnGrammar(gpt_oss, options)()
            for token in harmony.reply(turn.before, turn.said, parallel_tool_calls=chat.parallel_calls).ids:
                constraint.accept(token)
            assert constraint.is_finished()
            num_calls += any(said.recipient for said in turn.said)
    assert num_calls > 5


# --- templates ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chatml_tokenizer() -> Tokenizer:
    merges = ["Ċ Ċ", "h i"]
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = [*control, *CHARACTERS, *(merge.replace(" ", "") for merge in merges)]
    return Tokenizer.from_gguf(tokens, [3 if token in control else 1 for token in tokens], merges, "smollm")


@pytest.fixture(scope="module")
def chatml(chatml_tokenizer: Tokenizer) -> ChatFormat:
    return choose(chatml_tokenizer, CHATML, {chatml_tokenizer.control_id("<|im_end|>")})


def test_a_template_teaches_the_answer_and_its_stop_token(chatml: ChatFormat, chatml_tokenizer: Tokenizer) -> None:
    (example,) = examples_of(chatml, user("hi"), assistant("4"), user("hi?"), assistant("5"))
    assert taught(chatml_tokenizer, example) == ["4<|im_end|>", "5<|im_end|>"]


def test_an_answer_that_merges_with_its_prompt_is_taught_after_the_prompt_of_inference(
    chatml: ChatFormat, chatml_tokenizer: Tokenizer
) -> None:
    first, second = examples_of(chatml, user("hi"), assistant("\n hi"), user("hi?"), assistant("5"))
    assert taught(chatml_tokenizer, first) == ["\n hi<|im_end|>"]
    prompt = chatml.render(Conversation.from_openai([user("hi")])).ids
    assert first.tokens[: len(prompt)] == prompt
    # Rendered as history the two line ends are one token, so that what was said is seen otherwise than it was said.
    assert taught(chatml_tokenizer, second) == ["5<|im_end|>"]


def test_a_template_that_has_no_place_for_reasoning_is_not_taught_any(chatml: ChatFormat) -> None:
    with pytest.raises(UnsupportedError, match="no place for reasoning"):
        examples_of(chatml, user("hi"), assistant("4", thinking="Easy."))


# --- preference pairs ---------------------------------------------------------------------------------------


def test_both_outputs_of_a_pair_are_taught_after_one_prompt(gpt_oss: Tokenizer, harmony: HarmonyFormat) -> None:
    raw: dict[str, Any] = {
        "input": {"messages": [user("2 + 2?"), assistant("5"), user("Sure?")], "tools": TOOLS},
        "preferred_output": [assistant("4", thinking="Again.")],
        "non_preferred_output": [assistant(None, tool_calls=[call("a")])],
    }
    chosen, rejected = preference_pair(read_preference(raw), harmony)
    assert taught(gpt_oss, chosen) == [
        "<|channel|>analysis<|message|>Again.<|end|><|start|>assistant<|channel|>final<|message|>4<|return|>"
    ]
    assert taught(gpt_oss, rejected) == [
        " to=functions.add<|channel|>commentary <|constrain|>json<|message|>{}<|call|>"
    ]
    prompt = harmony.render(Conversation.from_openai(raw["input"]["messages"], tools=TOOLS)).ids
    assert chosen.tokens[: len(prompt)] == rejected.tokens[: len(prompt)] == prompt


def test_a_pair_in_trl_s_shape_is_the_same_pair_with_its_prompt_or_without() -> None:
    before = [user("2 + 2?"), assistant("5"), user("Sure?")]
    chosen, rejected = [assistant("4", thinking="Again.")], [assistant(None, tool_calls=[call("a")])]
    pair = read_preference(
        {"input": {"messages": before, "tools": TOOLS}, "preferred_output": chosen, "non_preferred_output": rejected}
    )
    assert pair == read_preference({"prompt": before, "chosen": chosen, "rejected": rejected, "tools": TOOLS})
    assert pair == read_preference({"chosen": before + chosen, "rejected": before + rejected, "tools": TOOLS})
    # What both say first is a part of what they say.
    first = assistant(None, thinking="Let me see.")
    thought = read_preference({"chosen": [*before, first, *chosen], "rejected": [*before, first, assistant("7")]})
    assert [len(turn.said) for turn in (thought.chosen, thought.rejected)] == [3, 2]


# --- plain text, and too long -------------------------------------------------------------------------------


@pytest.mark.parametrize("max_length", [2, 3, 7, 1000])
def test_all_of_a_text_but_its_first_token_is_taught_once_however_it_is_cut(
    gpt_oss: Tokenizer, max_length: int
) -> None:
    text = "It was the best of times, it was the worst of times."
    ids = [*gpt_oss.encode(text), gpt_oss.control_id("<|endoftext|>")]
    pieces = list(text_examples(PlainText(text), gpt_oss, max_length))
    assert [target for piece in pieces for target in piece.targets] == ids[1:]
    assert [token for piece in pieces for token in piece.tokens] == ids[:-1]
    assert max(len(piece.tokens) for piece in pieces) <= max_length


def test_what_is_too_long_keeps_its_beginning_as_far_as_it_teaches_something() -> None:
    no = NO_TARGET
    example = Example([1, 2, 3, 4, 5, 6], [no, 3, no, no, 6, 7])
    assert cut(example, 6) == (example, 0, 0)
    assert cut(example, 5) == (Example([1, 2, 3, 4, 5], [no, 3, no, no, 6]), 1, 1)
    assert cut(example, 4) == (Example([1, 2], [no, 3]), 4, 2)
    assert cut(example, 1) == (None, 6, 3)


def test_a_text_of_one_token_is_no_example(chatml_tokenizer: Tokenizer) -> None:
    bare = Tokenizer.from_gguf(CHARACTERS, [1] * len(CHARACTERS), [], "smollm")
    with pytest.raises(UsageError, match="single token"):
        list(text_examples(PlainText("a"), bare, 10))
    assert len(list(text_examples(PlainText("a"), chatml_tokenizer, 10))) == 1
