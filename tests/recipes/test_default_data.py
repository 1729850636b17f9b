"""What the default model's training set promises: true calls, true results, and nothing of what is held out."""

import asyncio
import json
import random
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from freehold.formats.conversation import Message, Text, text_message
from freehold.formats.harmony.builtins import PYTHON
from freehold.formats.tokenizer import Tokenizer
from freehold.train.chats import Chat, read_example
from freehold.weights.layouts import open_checkpoint
from recipes.default.asking import ask_all, load_model, the_adapter
from recipes.default.builtins import Builtins, Sum, Sums
from recipes.default.calls import Calls, call_lines, plain_talk
from recipes.default.evaluate import asking, contains, held_out_turns, perplexity, same, score, states
from recipes.default.functions import ask, made_up, offer, read_functions, spoken
from recipes.default.general import Answered, Prompt, general_lines, good_part
from recipes.default.make_data import HERE, held_out_words, is_near, shares_with, word_problems
from recipes.default.questions import questions
from recipes.default.values import Values, distinct_words
from tests.checkpoints import write_adapter
from tests.train.tiny import make_tiny_model

TRAINING, HELD_OUT = (read_functions(HERE / name) for name in ("functions.txt", "heldout.txt"))


def read(raw: dict[str, Any]) -> Chat:
    chat = read_example(json.loads(json.dumps(raw)))
    assert isinstance(chat, Chat)
    return chat


def call(recipient: str, arguments: str) -> Message:
    return Message(role="assistant", parts=(Text(text=arguments),), channel="commentary", recipient=recipient)


# --- calls ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("held_out", [False, True])
def test_what_is_asked_says_every_argument_and_the_schema_takes_them(held_out: bool) -> None:
    rng = random.Random(3)
    values = Values(rng, held_out=held_out)
    written = HELD_OUT if held_out else TRAINING
    for function in [*written, *written, *(() if held_out else (made_up(rng) for _ in range(300)))]:
        offered = offer(function, rng)
        asked = ask(offered, values)
        schema = offered.tool["function"]["parameters"]
        jsonschema.validate(asked.arguments, schema)
        assert [*asked.arguments] == [name for name in schema["properties"] if name in asked.arguments]
        for name, value in asked.arguments.items():
            if "enum" in schema["properties"][name]:
                assert value.lower() in asked.said.lower(), (asked, name)
            elif not isinstance(value, bool):
                assert spoken(value) in asked.said, (asked, name)
        assert "{" not in asked.said and "[" not in asked.said


def test_lines_of_calls_can_be_trained_on_and_the_same_seed_makes_the_same() -> None:
    lines = [*call_lines(random.Random(5), TRAINING, plain_talk(), 150)]
    assert lines == [*call_lines(random.Random(5), TRAINING, plain_talk(), 150)]
    assert {kind for kind, _ in lines} == {
        "one call",
        "calls and answers",
        "no call needed",
        "no such tool",
        "asks back",
    }
    for kind, raw in lines:
        chat = read(raw)
        called = [turn.said[-1].recipient for turn in chat.turns]
        if kind in ("no such tool", "no call needed"):
            assert called == [None]
        elif kind == "one call":
            assert len(called) == 1 and called[0] is not None


# --- built-in tools -------------------------------------------------------------------------------------------


class Recorder:
    """Answers like python, and knows what it was sent."""

    def __init__(self) -> None:
        self.sent: list[str] = []

    async def call(self, name: str, arguments: str) -> Any:
        compile(arguments, "cell", "exec")
        self.sent.append(arguments)
        return Text(text=f"{len(self.sent)}\n")

    def citations(self, answer: str) -> tuple[()]:
        return ()

    async def aclose(self) -> None:
        pass


def builtins(seed: int, tokenizer: Any = None) -> Builtins:
    rng = random.Random(seed)
    return Builtins(rng, Calls(rng, TRAINING, plain_talk()), PYTHON, tokenizer)


def test_an_answer_from_python_is_what_python_said() -> None:
    async def lines() -> list[tuple[list[str], dict[str, Any]]]:
        made: list[tuple[list[str], dict[str, Any]]] = []
        for seed in range(40):
            session = Recorder()
            made.append(([], await builtins(seed).python(session)))
            made[-1][0].extend(session.sent)
        return made

    for sent, raw in asyncio.run(lines()):
        said = [message for turn in read(raw).turns for message in turn.said]
        assert [message.text for message in said if message.recipient == "python"] == sent
        answers = [message.text for message in said if message.channel == "final"]
        assert all(any(str(number) in answer for answer in answers) for number in range(1, len(sent) + 1))


def test_the_code_computes_what_the_question_asks() -> None:
    def run(problem: Sum) -> str:
        lines: list[str] = []
        exec(problem.code, {"print": lambda value: lines.append(str(value))})  # noqa: S102 - code of our own
        return lines[-1]

    sums = Sums(Values(random.Random(2)))
    seen = 0
    for problem in (sums.draw() for _ in range(400)):
        if found := re.fullmatch(r'How many times does the letter "(.)" occur in "(\w+)"\?', problem.question):
            assert run(problem) == str(found[2].count(found[1]))
            seen += 1
        elif found := re.fullmatch(r"What is (\d+) times (\d+)\?", problem.question):
            assert run(problem) == str(int(found[1]) * int(found[2]))
            seen += 1
        elif found := re.fullmatch(r"What is (\d+)% of (\d+)\?", problem.question):
            assert float(run(problem)) == pytest.approx(int(found[1]) * int(found[2]) / 100)
            seen += 1
    assert seen > 15


def test_an_answer_from_the_browser_stands_on_the_line_that_it_cites() -> None:
    tokenizer = Tokenizer.o200k_harmony()

    async def lines() -> list[dict[str, Any]]:
        return [await builtins(seed, tokenizer).browser() for seed in range(40)]

    cited = opened = 0
    for raw in asyncio.run(lines()):
        read(raw)
        messages = raw["harmony"]["messages"]
        answer = messages[-1]["content"]
        shown = [message["content"] for message in messages if message["role"] == "tool"]
        opened += any(message.get("recipient") == "browser.open" for message in messages)
        if found := re.fullmatch(r"(.*)【(\d+)†L(\d+)】", answer):
            cited += 1
            page = shown[int(found[2])]
            line = next(line for line in page.splitlines() if line.startswith(f"L{found[3]}: "))
            assert found[1][:20] in line
    assert cited > 20 and opened > 10


def test_word_problems_are_those_whose_last_step_is_the_answer(tmp_path: Path) -> None:
    import gzip

    path = tmp_path / "gsm8k.jsonl.gz"
    tasks = [
        {
            "question": "Ann has 3 boxes of 4 pens and loses 2. How many pens?",
            "answer": "3*4=<<3*4=12>>12\n<<12-2=10>>10\n#### 10",
        },
        {"question": "How many?", "answer": "It is <<1+1=2>>2 or so.\n#### 3"},
    ]
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(task) + "\n" for task in tasks)
    assert [problem.code for problem in word_problems(path)] == ["print(3 * 4)\nprint(12 - 2)"]


# --- general --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "good"),
    [
        (
            "Honey is made by bees. It is sweet and keeps for years.",
            "Honey is made by bees. It is sweet and keeps for years.",
        ),
        ("Honey is made by many bees. It is sweet and", "Honey is made by many bees."),
        ("As an AI language model, I have no favourite.", ""),
        ("It is it is it is it is it is it is it is it is it is.", ""),
        ("Here are three tips:\n1. Sleep.", ""),
        ("What do you think about honey?", ""),
    ],
)
def test_only_whole_sentences_of_good_answers_are_kept(said: str, good: str) -> None:
    assert good_part(said) == good


def test_low_effort_has_no_reasoning_and_every_answer_of_the_base_is_used() -> None:
    answers = [Answered(Prompt(f"Question {i}?", "Think."), f"Answer number {i}.") for i in range(20)]
    lines = [raw for _, raw in general_lines(random.Random(1), answers, 120)]
    for raw in lines:
        said = [message for turn in read(raw).turns for message in turn.said]
        effort = raw["harmony"]["messages"][0]["content"][0]["reasoning_effort"]
        assert any(message.channel == "analysis" for message in said) == (effort != "low")
    text = json.dumps(lines)
    assert all(one.answer in text for one in answers)


# --- what is held out -----------------------------------------------------------------------------------------


def test_held_out_functions_sentences_and_words_are_not_trained_on() -> None:
    def schemas(functions: Any) -> set[tuple[str, ...]]:
        return {tuple(sorted(parameter.key for parameter in function.parameters)) for function in functions}

    for what in ("names", "descriptions", "phrases"):
        trained = {text for function in TRAINING for text in getattr(function, what)}
        assert not trained & {text for function in HELD_OUT for text in getattr(function, what)}, what
    assert not schemas(TRAINING) & schemas(HELD_OUT)
    assert not distinct_words(held_out=False) & distinct_words(held_out=True)


def test_a_line_with_anything_held_out_is_left_out() -> None:
    held_out = held_out_words()
    turn = held_out_turns(1)[0]
    text = next(value for value in turn.arguments.values() if isinstance(value, str))
    assert is_near({"harmony": {"messages": [{"content": json.dumps({"x": [text]})}]}}, held_out)
    assert is_near({"tools": [{"name": turn.name}]}, held_out)
    assert is_near([questions()[0].text], held_out)
    assert not is_near({"content": "nothing of it"}, held_out)


def test_the_held_out_turns_are_two_hundred_and_every_function_is_asked_for_equally_often() -> None:
    turns = held_out_turns()
    assert len(turns) == 200 and turns == held_out_turns()
    assert {sum(turn.name == function.names[0] for turn in turns) for function in HELD_OUT} == {4}
    assert len({turn.said for turn in turns}) == 200
    assert {len(turn.tools) for turn in turns} == {1, 2, 3, 4}


def test_a_call_counts_when_its_function_and_its_json_are_the_expected_ones() -> None:
    turn = next(turn for turn in held_out_turns() if len(turn.arguments) > 1)
    right = dict(reversed([*turn.arguments.items()]))
    name = f"functions.{turn.name}"
    assert score(turn, [call(name, json.dumps(right, indent=1))])[:2] == (True, True)
    assert score(turn, [call(name, json.dumps({**right, "more": 1}))])[:2] == (True, False)
    assert score(turn, [call(name, "{")])[:2] == (True, False)
    assert score(turn, [call("functions.other", json.dumps(right))])[:2] == (False, False)
    assert score(turn, [text_message("assistant", "Yes.", channel="final")])[:2] == (False, False)
    assert score(turn, [])[:2] == (False, False)
    assert same(2.0, 2) and not same(True, 1) and not same("2", 2) and not same([1], [1, 1])


@pytest.mark.parametrize(
    ("answer", "expected", "is_right"),
    [
        ("It is 1,250.", "1250", True),
        ("It is 12.5.", "12", False),
        ("It is 12.", "12", True),
        ("It is 112.", "12", False),
        ("the Milky way", "Milky Way", True),
        ("It has seven.", "7|seven", True),
        ("Berlin", "Paris", False),
        ("Nearly a million are known.", "lion", False),
        ("They grow rice there.", "ice", False),
        ("It is -2.", "2", False),
        ("It is one of 1,2 and 3.", "12", False),
        ("There are 1,200.", "1200", True),
        ("Two pups.", "pup", True),
    ],
)
def test_an_answer_is_right_where_it_says_what_is_expected(answer: str, expected: str, is_right: bool) -> None:
    assert contains(answer, expected) is is_right


@pytest.mark.parametrize(
    ("question", "truth", "answer", "is_stated"),
    [
        ("What is 12 times 3?", "36\n", "12 * 3 = 36.", True),
        ("What is 12 times 3?", "36\n", "12 * 3 = 136.", False),
        ("What is 12 times 3?", "36\n", "12 * 3 = 36.5.", False),
        ("What is 1234 + 1?", "1235\n", "It is 1,235.", True),
        ('How many r\'s are in "strawberry 3"?', "3\n", 'The letter "r" occurs 2 times in "strawberry 3".', False),
        ('How many r\'s are in "strawberry 3"?', "3\n", 'The letter "r" occurs 3 times in "strawberry 3".', True),
        ("How many days are between 2031-05-03 and 2031-05-08?", "5\n", "There are 4 days until 2031-05-08.", False),
        ("What is 3 minus 5?", "-2\n", "3 - 5 = -2.", True),
        ("What is 5 minus 3?", "2\n", "5 - 3 = -2.", False),
        ("Sort these numbers: 3, 1", "[1, 3]\n", "In order: [1, 3].", True),
        ("Is 7919 a prime number?", "True\n", "Is 7919 prime: True.", True),
        ("Is 7919 a prime number?", "True\n", "", False),
        ("What is 1 / 0?", "", "It is 1.", False),
    ],
)
def test_a_computed_result_is_stated_where_an_answer_adds_it(
    question: str, truth: str, answer: str, is_stated: bool
) -> None:
    assert states(answer, truth, question) is is_stated


def test_a_model_is_measured_with_its_adapter(tmp_path: Path) -> None:
    own = make_tiny_model(tmp_path / "own")
    (own / "LICENSE").write_text("You may do with this what you like.\n")
    adapter = write_adapter(tmp_path / "adapter", open_checkpoint(own).config)
    bare, tuned = load_model(str(own)), load_model(str(own), adapter=adapter)
    assert (the_adapter(bare), the_adapter(tuned)) == (None, "adapter")
    assert perplexity(bare) != perplexity(tuned)
    asks = [asking([{"role": "user", "content": "Who is Ada?"}])]
    said = [ask_all(model, asks, harmony=False)[0] for model in (bare, tuned, load_model(str(own), adapter=adapter))]
    assert all(each is not None for each in said)
    texts = [each.messages[0].text for each in said if each is not None]
    assert texts[0] != texts[1] == texts[2]


def test_a_part_may_have_another_share() -> None:
    shares = shares_with(["browser=0.2", "general=0.3"])
    assert (shares["browser"], shares["general"]) == (0.2, 0.3)
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["functions"] / shares["python"] == pytest.approx(0.64 / 0.11)
    for given in (
        ["sofa=0.1"],
        ["browser=1"],
        ["browser=-0.1"],
        ["browser=x"],
        ["browser"],
        ["browser=nan"],
        [f"{part}=0.2" for part in shares],
    ):
        with pytest.raises(SystemExit, match="--share"):
            shares_with(given)
