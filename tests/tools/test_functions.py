"""Your functions: what a signature and a docstring become, and what happens to a call."""

import asyncio
import enum
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal, Optional

import pytest
from pydantic import BaseModel, Field, model_serializer
from typing_extensions import TypedDict

import freehold
from freehold.errors import UsageError
from freehold.formats.harmony.typescript import typescript
from freehold.formats.schema import enforceable
from freehold.tools.base import ToolError
from freehold.tools.functions import FunctionTool, load_tools


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


@dataclass
class Point:
    x: float
    y: float = 0.0


class Person(BaseModel):
    """Somebody."""

    name: str
    age: Annotated[int, Field(ge=0)] = 0


class Strange(BaseModel):
    """Cannot say what it is."""

    @model_serializer
    def say(self) -> str:
        raise KeyError("x")


class Options(TypedDict, total=False):
    loud: bool


def called(function: Callable[..., Any], **arguments: Any) -> str:
    return asyncio.run(FunctionTool(function)(json.dumps(arguments)))


def weather(
    city: str,
    unit: Literal["C", "F"] = "C",
    days: Annotated[int, Field(ge=1, le=7, description="Not this.")] = 1,
    colour: Annotated[Colour | None, Field(description="Of the sky.")] = None,
    near: Optional[Point] = None,  # noqa: UP045 — the old way is written too
    people: list[Person] = [],  # noqa: B006
    options: Options = {},  # noqa: B006
    when: date | None = None,
) -> str:
    """What the weather is like.

    In more words.

    Args:
        city: Where, as people
            write it: with its country.
        unit (str, optional): Of the temperature.
        days: How many.

    Returns:
        A sentence.
    """
    return f"{city} {unit} {days} {colour} {near} {people} {options} {when}"


def test_signature_and_docstring_become_a_schema() -> None:
    tool = FunctionTool(weather).tool
    assert (tool.name, tool.strict) == ("weather", True)
    assert tool.description == "What the weather is like.\n\nIn more words.\n\nReturns:\n    A sentence."
    assert tool.parameters is not None
    properties = tool.parameters["properties"]
    assert properties["city"] == {"type": "string", "description": "Where, as people write it: with its country."}
    assert properties["unit"] == {
        "type": "string",
        "enum": ["C", "F"],
        "default": "C",
        "description": "Of the temperature.",
    }
    assert properties["days"] == {
        "type": "integer",
        "minimum": 1,
        "maximum": 7,
        "default": 1,
        "description": "How many.",
    }
    assert tool.parameters["required"] == ["city"] and tool.parameters["additionalProperties"] is False
    assert "title" not in json.dumps(tool.parameters)
    enforceable(tool.parameters)


def test_the_model_reads_every_type() -> None:
    tool = FunctionTool(weather).tool
    assert tool.parameters is not None
    text = typescript(tool.parameters)
    for line in (
        "// Where, as people write it: with its country.\ncity: string,",
        'unit?: "C" | "F", // default: C',
        "// Of the sky.\ncolour?: ",
        'colour?: "red" | "blue" | null,',
        "x: number,",
        "age?: number,",
    ):
        assert line in text


def test_values_arrive_as_what_they_are() -> None:
    seen: list[Any] = []

    def take(colour: Colour, near: Point, people: list[Person], when: date, options: Options, x: int | str = 3) -> None:
        """Take them."""
        seen.extend((colour, near, people, when, options, x))

    sent = {
        "colour": "blue",
        "near": {"x": 1},
        "people": [{"name": "Ada", "age": 36}],
        "when": "2026-11-22",
        "options": {"loud": True},
    }
    assert called(take, **sent) == "null"
    assert seen == [Colour.BLUE, Point(1.0), [Person(name="Ada", age=36)], date(2026, 11, 22), {"loud": True}, 3]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("{}", r"city: Field required"),
        ('{"city": "x", "days": 9}', r"days: .*less than or equal to 7, got 9"),
        ('{"city": "x", "unit": "K"}', r"unit: Input should be 'C' or 'F', got 'K'"),
        ('{"city": "x", "people": [{"age": 1}]}', r"people\.0\.name: Field required"),
        ('{"city": "x", "town": 1}', r"town: Extra inputs are not permitted"),
        ('{"city": ', r"Invalid JSON"),
        ("[1]", r"Input should be an object"),
        ("", r"city: Field required"),
    ],
)
def test_what_does_not_fit_names_the_field(arguments: str, complaint: str) -> None:
    with pytest.raises(ToolError, match=f"weather was not called: {complaint}"):
        asyncio.run(FunctionTool(weather)(arguments))


def test_results_are_text_or_json() -> None:
    def give(what: int) -> Any:
        """Give."""
        strange = Strange.model_construct()
        plain = ["text", {"é": [1, None]}, Point(1, 2), Person(name="Ada"), {date(2026, 1, 2)}, None]
        return [*plain, object(), (x for x in [1]), strange, "a\udce9b", "x" * 100_005][what]

    expected = ["text", '{"é":[1,null]}', '{"x":1,"y":2}', '{"name":"Ada","age":0}', '["2026-01-02"]', "null"]
    assert [called(give, what=index) for index in range(6)] == expected
    for index, kind in enumerate(("object", "generator", "Strange"), 6):
        with pytest.raises(ToolError, match=f"give returned a {kind}, which cannot be written as JSON"):
            called(give, what=index)
    assert called(give, what=9) == "a?b"  # half of a character, as in names of files that are not UTF-8
    assert called(give, what=10) == "x" * 100_000 + "\n[5 more characters are not shown]"


def test_what_a_function_raises_is_told_without_a_traceback() -> None:
    def fail(kind: str) -> None:
        """Fail."""
        raise errors[kind]

    async def fail_later(kind: str = "") -> None:
        """Fail."""
        raise errors.get(kind, KeyError("x"))

    class Mute(BaseException):
        def __str__(self) -> str:
            raise RuntimeError

    errors = {
        "value": ValueError("no such city"),
        "stop": StopIteration(3),
        "exit": SystemExit("bye"),
        "cancelled": asyncio.CancelledError("of its own"),
        "interrupted": KeyboardInterrupt(),
        "mute": Mute(),
    }
    for kind, told in {
        "value": "ValueError: no such city",
        "stop": "StopIteration: 3",
        "exit": "SystemExit: bye",
        "cancelled": "CancelledError: of its own",
        "interrupted": "KeyboardInterrupt",
        "mute": "Mute",
    }.items():
        with pytest.raises(ToolError) as raised:
            called(fail, kind=kind)
        assert str(raised.value) == f"fail failed: {told}"
    with pytest.raises(ToolError, match="fail_later failed: CancelledError: of its own"):
        called(fail_later, kind="cancelled")
    with pytest.raises(ToolError, match="fail_later failed: KeyError: 'x'") as raised:
        called(fail_later)
    assert __file__ not in str(raised.value)


def test_coroutine_functions_run_here_and_others_on_a_thread() -> None:
    async def here() -> bool:
        """Where."""
        await asyncio.sleep(0)
        return threading.current_thread() is threading.main_thread()

    def elsewhere() -> bool:
        """Where."""
        return threading.current_thread() is threading.main_thread()

    assert (called(here), called(elsewhere)) == ("true", "false")


def test_a_call_can_be_cancelled_and_a_function_that_never_ends_keeps_nobody() -> None:
    begun, ended = threading.Event(), threading.Event()

    def block() -> None:
        """Block."""
        begun.set()
        ended.wait(30)

    async def run() -> None:
        calling = asyncio.create_task(FunctionTool(block)("{}"))
        await asyncio.to_thread(begun.wait, 10)
        calling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await calling

    asyncio.run(run())  # would wait for threads of its own
    assert not ended.is_set()
    ended.set()


def test_signatures_that_cannot_be_are_refused() -> None:
    def stars(*rest: int) -> None:
        """D."""

    def named(**rest: int) -> None:
        """D."""

    def positional(a: int, /) -> None:
        """D."""

    def untyped(a) -> None:  # type: ignore[no-untyped-def]
        """D."""

    def undocumented(a: int) -> None:
        pass

    def fielded(a: int = Field(default=3, ge=1)) -> None:
        """D."""

    def hidden(a: Annotated[int, Field(default=3)]) -> None:
        """D."""

    def one_by_one() -> Iterator[int]:
        """D."""
        yield 1

    def foreign(a: threading.Lock) -> None:
        """D."""

    def callback(a: Callable[[], int]) -> None:
        """D."""

    def unknown(a: "Nowhere") -> None:  # type: ignore[name-defined]  # noqa: F821
        """D."""

    def misdescribed(a: int) -> None:
        """D.

        Args:
            b: What?
        """

    for function, complaint in (
        (stars, r"\*rest takes whatever comes"),
        (named, r"\*\*rest takes whatever comes"),
        (positional, "a is positional only"),
        (untyped, "a has no annotation"),
        (undocumented, "has no docstring"),
        (fielded, r"write Annotated\[TYPE, Field\(\.\.\.\)\]"),
        (hidden, r"a has its default in Field\(\.\.\.\)"),
        (one_by_one, "return a list of them"),
        (foreign, "tool foreign: "),
        (callback, "JSON cannot say what it takes"),
        (unknown, "signature cannot be read: name 'Nowhere'"),
        (misdescribed, "docstring describes b, which it does not take"),
    ):
        with pytest.raises(UsageError, match=complaint):
            FunctionTool(function)


def test_parameters_may_have_any_name() -> None:
    def f(model_config: int, _x: int, self: int, schema: int, p0: int) -> list[int]:
        """F."""
        return [model_config, _x, self, schema, p0]

    assert called(f, model_config=1, _x=2, self=3, schema=4, p0=5) == "[1,2,3,4,5]"


def test_none_without_parameters() -> None:
    def now() -> int:
        """When it is."""
        return 3

    tool = FunctionTool(now).tool
    assert tool.parameters is None and tool.strict
    assert asyncio.run(FunctionTool(now)("")) == "3"


@freehold.tool(name="renamed", description="Other words.")
def marked(a: int) -> int:
    """Words."""
    return a + 1


def test_a_marked_function_stays_a_function() -> None:
    assert marked(1) == 2
    tool = FunctionTool(marked).tool
    assert (tool.name, tool.description) == ("renamed", "Other words.")
    with pytest.raises(UsageError, match="cannot be a tool's name"):
        freehold.tool(name="a b")(weather)
    del weather.__freehold_tool__  # type: ignore[attr-defined]


def test_tools_are_read_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "neighbour.py").write_text('def helper() -> int:\n    """H."""\n    return 7\n')
    path = tmp_path / "my tools.py"
    plain = '''
from __future__ import annotations
from dataclasses import dataclass
from neighbour import helper

@dataclass
class Pair:
    a: int

def first(pair: Pair) -> int:
    """First."""
    return pair.a + helper()

async def second() -> str:
    """Second."""
    return "two"

def _private(x): ...
'''
    path.write_text(plain)
    tools = load_tools(path)
    assert [tool.name for tool in tools.functions] == ["first", "second"]

    async def run() -> list[str]:
        session = await tools.open()
        results = [await session.call("functions.first", '{"pair": {"a": 1}}'), await session.call("second", "{}")]
        with pytest.raises(ToolError, match=r"there is no tool functions\.third; there are first, second"):
            await session.call("functions.third", "{}")
        await session.aclose()
        return [result.text for result in results]

    assert asyncio.run(run()) == ["8", "two"]
    path.write_text(plain.replace("async def", "import freehold\n@freehold.tool\nasync def"))
    assert [tool.name for tool in load_tools(path).functions] == ["second"]


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("x = 1", "has no function"),
        ("x = 1\n1 / 0", r"cannot be run: ZeroDivisionError: division by zero \(line 2\)"),
        ("import sys\nsys.exit('not like this')", r"cannot be run: SystemExit: not like this \(line 2\)"),
        ("def f(:\n", r"cannot be run: SyntaxError.*\(line 1\)"),
        ("import nowhere_at_all", "cannot be run: ModuleNotFoundError"),
        ("def f(a):\n  'F.'", r"tools\.py: tool f: a has no annotation"),
        ("import freehold\n@freehold.tool\ndef f(a):\n  'F.'", r"tools\.py: tool f: a has no annotation"),
    ],
)
def test_a_file_that_cannot_be_used_is_told_with_its_line(tmp_path: Path, source: str, complaint: str) -> None:
    path = tmp_path / "tools.py"
    path.write_text(source)
    with pytest.raises(UsageError, match=complaint):
        load_tools(path)
    with pytest.raises(UsageError, match="is no Python file"):
        load_tools(tmp_path / "nowhere.py")


def test_the_decorator_costs_no_torch() -> None:
    program = "import sys, freehold; freehold.tool; sys.exit('torch' in sys.modules or 'pydantic' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
