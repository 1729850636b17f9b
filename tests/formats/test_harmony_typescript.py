"""Schemas as types: what openai-harmony does not know, and schemas that were made to do harm.

What that library does know is held against it in test_harmony_render.py, over thousands of random schemas.
"""

import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from freehold.errors import UsageError
from freehold.formats.harmony.typescript import MAX_DEPTH, compact_json, typescript


def openais(oracle: Any, schema: dict[str, Any]) -> str:
    """The type that openai-harmony writes for a function's parameters."""
    import openai_harmony as oh

    tool = oh.ToolDescription.new("f", "", parameters=schema)
    content = oh.DeveloperContent.new().with_function_tools([tool])
    text: str = oracle.decode(oracle.render(oh.Message.from_role_and_content(oh.Role.DEVELOPER, content)))
    return text.split("type f = (_: ", 1)[1].rsplit(") => any;\n\n", 1)[0]


POINT = {"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"]}

DIFFERENCES: dict[str, tuple[Any, str, str]] = {
    # why: a property's schema, the library's line, our line
    "a reference says where the words are": (
        {"$ref": "#/$defs/Point", "description": "Where"},
        "// Where\np?: any,",
        "// Where\np?:     // Where\n{\n    x: number,\n    },",
    ),
    "a list's items may be referred to": (
        {"type": "array", "items": {"$ref": "#/$defs/Point"}},
        "p?: any[],",
        "p?: {\n    x: number,\n    }[],",
    ),
    "a default may stand beside a reference": (
        {"$ref": "#/$defs/Color", "default": "red"},
        'p?: any, // default: "red"',
        'p?: "red" | "blue", // default: red',
    ),
    "a recursive type is written once, then any": (
        {"$ref": "#/$defs/Tree"},
        "p?: any,",
        "p?: {\n    kids?: any[],\n    },",
    ),
    "allOf is all of them": (
        {"allOf": [{"$ref": "#/$defs/Point"}, {"properties": {"y": {"type": "number"}}, "required": ["y"]}]},
        "p?: any,",
        "p?: {\n    x: number,\n    y: number,\n    },",
    ),
    "anyOf with null is nullable": (
        {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None},
        "p?: any, // default: null",
        "p?: string | null, // default: null",
    ),
    "null may come first": (
        {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/Color"}]},
        "p?: any,",
        'p?: "red" | "blue" | null,',
    ),
    "anyOf is a union as oneOf is": (
        {"anyOf": [{"type": "string"}, {"type": "integer", "description": "years"}], "description": "Age"},
        "// Age\np?: any,",
        "// Age\np?:\n | string\n | number // years\n,",
    ),
    "a nullable union keeps its lines": (
        {"anyOf": [{"oneOf": [{"type": "string", "description": "s"}, {"type": "number"}]}, {"type": "null"}]},
        "p?: any,",
        "p?:\n | \n    | string // s\n    | number\n | null\n,",
    ),
    "a list of a union is not a union with a list": (
        {"type": "array", "items": {"anyOf": [{"type": "string"}, {"type": "null"}]}},
        "p?: any[],",
        "p?: Array<string | null>,",
    ),
    "an enum needs no type": ({"enum": [1, "a", None]}, "p?: any,", 'p?: 1 | "a" | null,'),
    "a const is one value": ({"const": "cat", "type": "string"}, "p?: string,", 'p?: "cat",'),
    "properties make an object": ({"properties": {"x": {}}}, "p?: any,", "p?: {\n    x?: any,\n    },"),
    "items make a list": ({"items": {"type": "string"}}, "p?: any,", "p?: string[],"),
    "maps say what their values are": (
        {"type": "object", "additionalProperties": {"type": "integer", "description": "Points"}},
        "p?: {\n    },",
        "p?: {\n    // Points\n    [key: string]: number,\n    },",
    ),
    "null is a type": (
        {"oneOf": [{"type": "string"}, {"type": "null"}]},
        "p?:\n | string\n | any\n,",
        "p?:\n | string\n | null\n,",
    ),
    "false allows nothing": (False, "p?: any,", "p?: never,"),
    "large numbers keep their digits": (
        {"type": "integer", "default": 2**64 + 1},
        "p?: number, // default: 1.8446744073709552e19",
        "p?: number, // default: 18446744073709551617",
    ),
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_difference(oracle: Any, name: str) -> None:
    """Each keeps something from the model that it needs for a right call."""
    property_, library, ours = DIFFERENCES[name]
    definitions = {
        "Point": POINT,
        "Color": {"type": "string", "enum": ["red", "blue"]},
        "Tree": {"type": "object", "properties": {"kids": {"type": "array", "items": {"$ref": "#/$defs/Tree"}}}},
    }
    schema = {"type": "object", "properties": {"p": property_}, "$defs": definitions}
    assert openais(oracle, schema) == f"{{\n{library}\n}}"
    assert typescript(schema) == f"{{\n{ours}\n}}"


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "array", "items": {"type": "string", "enum": ["a", "b"]}},  # `"a" | "b"[]`
        {"type": ["object", "null"], "properties": {"lost": {"type": "string"}}},
        {"type": "object", "properties": {"p": {"type": "string", "description": "two\nlines"}}},
        {"type": "object", "properties": {"p": {"type": "array", "items": {"type": "string", "nullable": True}}}},
        {"type": "object", "properties": {"p": POINT | {"description": "said twice"}}},
        {"type": "object", "additionalProperties": False, "properties": {"p": {"oneOf": []}}},
        {"type": "object", "properties": {"p": {"type": "integer", "enum": [1, 2]}}},
    ],
)
def test_the_librarys_oddities_are_kept(oracle: Any, schema: dict[str, Any]) -> None:
    """The model has seen them so."""
    assert typescript(schema) == openais(oracle, schema)


@pytest.mark.parametrize("value", [1e-05, -2.5e-05, 1e-4, 1e16, 1.5e300, 1e-7, 10.0, -0.0, 2**64 - 1, 'é\x1f\x7f"\\/'])
def test_values_are_written_as_the_library_writes_them(oracle: Any, value: Any) -> None:
    schema = {"type": "object", "properties": {"p": {"default": [value]}}}
    assert typescript(schema) == openais(oracle, schema)
    assert json.loads(compact_json(value)) == value


# --- references -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reference", ["#", "#/properties/p", "#/$defs/a~1b~0c%20d", "#/$defs/list/1", "#/allOf/0/properties/p/anyOf/0"]
)
def test_pointers_lead_where_they_say(reference: str) -> None:
    schema = {
        "type": "object",
        "properties": {"p": {"$ref": reference}},
        "$defs": {"a/b~c d": {"type": "boolean"}, "list": [{}, {"type": "boolean"}]},
        "allOf": [{"properties": {"p": {"anyOf": [{"type": "boolean"}]}}}],
    }
    own = "any" if reference == "#/properties/p" else "{\n    p?: any,\n    }" if reference == "#" else "boolean"
    assert typescript(schema) == f"{{\np?: {own},\n}}"


@pytest.mark.parametrize(
    "reference",
    [
        "https://example.com/x.json",
        "#anchor",
        "#/no/where",
        "#/$defs/list/7",
        "#/$defs/list/-1",
        "#/$defs/list/x",
        5,
        "",
    ],
)
def test_references_that_lead_nowhere_are_any(reference: Any) -> None:
    assert typescript({"type": "object", "properties": {"p": {"$ref": reference}}, "$defs": {"list": [{}]}}) == (
        "{\np?: any,\n}"
    )


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#"},
        {"allOf": [{"$ref": "#"}, {"$ref": "#"}]},
        {"anyOf": [{"$ref": "#"}, {"type": "null"}]},
        {"oneOf": [{"$ref": "#"}]},
        {"type": "object", "properties": {"p": {"$ref": "#"}}, "additionalProperties": {"$ref": "#"}},
        {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
    ],
)
def test_circles_end(schema: Any) -> None:
    assert "any" in typescript(schema)


# --- made to do harm ------------------------------------------------------------------------------------------


def nested(depth: int, keyword: str) -> Any:
    schema: Any = {"type": "string"}
    for _ in range(depth):
        match keyword:
            case "properties":
                schema = {"type": "object", "properties": {"p": schema}}
            case "items":
                schema = {"type": "array", "items": schema}
            case "additionalProperties":
                schema = {"type": "object", "additionalProperties": schema}
            case "default":
                schema = {"default": schema} if "default" not in schema else {"default": [schema["default"]]}
            case "optional":
                schema = {"anyOf": [schema, {"type": "null"}]}
            case _:
                schema = {keyword: [schema]}
    return {"type": "object", "properties": {"p": schema}}


KEYWORDS = ["properties", "items", "additionalProperties", "oneOf", "anyOf", "optional", "allOf", "default"]


@pytest.mark.parametrize("keyword", KEYWORDS)
def test_depth(keyword: str) -> None:
    typescript(nested(50, keyword))
    for depth in (MAX_DEPTH + 1, 100_000):
        with pytest.raises(UsageError, match=r"nested more than 64 deep at #/properties/p/.*; make it flatter"):
            typescript(nested(depth, keyword))


def chained(num_links: int, link: Any) -> Any:
    """Definitions each of which refers to the next one, as `link` makes it."""
    definitions = {f"d{i}": link({"$ref": f"#/$defs/d{i + 1}"}) for i in range(num_links)}
    return {"$ref": "#/$defs/d0", "$defs": definitions}


@pytest.mark.parametrize(
    "schema",
    [
        chained(5000, lambda following: following),
        chained(5000, lambda following: {"allOf": [following]}),
        chained(5000, lambda following: {"type": "object", "properties": {"p": following}}),
        chained(40, lambda following: {"type": "object", "properties": {"p": following, "q": following}}),
        chained(40, lambda following: {"allOf": [following, {"allOf": [following]}]}),
        chained(40, lambda following: {"anyOf": [following, {"type": "null"}, following]}),
        chained(40, lambda following: {"anyOf": [{"anyOf": [following, {"type": "null"}]}, {"type": "null"}]}),
        {
            "allOf": [{"$ref": "#/$defs/wide"}] * 10_000,
            "$defs": {"wide": {"properties": {f"p{i}": {} for i in range(10_000)}}},
        },
        {
            "type": "object",
            "properties": {f"p{i}": {"$ref": "#/$defs/long"} for i in range(10_000)},
            "$defs": {"long": {"type": "object", "description": "x" * 10_000}},
        },
        {
            "allOf": [{"$ref": "#/$defs/deep"}] * 10_000,
            "$defs": {"deep": {"allOf": [{"properties": {f"p{i}": {} for i in range(10_000)}}]}},
        },
        {
            "allOf": [{"$ref": "#/$defs/keys"}] * 10_000,
            "$defs": {"keys": {f"k{i}": 1 for i in range(10_000)} | {"required": ["k"] * 10_000}},
        },
        {
            "type": "object",
            "properties": {f"p{i}": {"$ref": "#/$defs/long"} for i in range(10_000)},
            "$defs": {"long": {"type": "string", "description": "x" * 100_000, "default": [0] * 10_000}},
        },
        {
            "type": "object",
            "properties": {"p": {"oneOf": [{"$ref": "#/$defs/long"}] * 10_000}},
            "$defs": {"long": {"type": "string", "description": "x" * 100_000}},
        },
        {"items": {"oneOf": [{"$ref": "#/$defs/x"}] * 10_000}, "$defs": {"x": {"description": "x" * 100_000}}},
        {"allOf": [{"properties": {f"p{i}": {}}, "required": [f"p{i}"]} for i in range(20_000)]},
        {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(50_000)}},
        {"default": 0, "oneOf": [{"enum": list(range(100_000))}]},
    ],
)
def test_no_schema_takes_long(schema: Any) -> None:
    started = time.process_time()
    try:
        typescript(schema)
    except UsageError as error:
        assert "nested more than" in str(error) or "grows past all bounds" in str(error)
    assert time.process_time() - started < 5


json_values = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=5)
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
    max_leaves=8,
)
KEYS = [
    *(
        "type",
        "properties",
        "required",
        "items",
        "oneOf",
        "anyOf",
        "allOf",
        "$ref",
        "enum",
        "const",
        "default",
        "title",
    ),
    *("description", "examples", "nullable", "additionalProperties", "$defs"),
]
WORDS = ["object", "array", "string", "null", "#", "#/$defs/x", "#/properties/x", "#/items", "x"]
schemas = st.recursive(
    st.one_of(json_values, st.sampled_from(WORDS)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from([*KEYS, "x"]), inner, max_size=5),
    ),
    max_leaves=20,
)


@settings(max_examples=500, deadline=None)
@given(schema=st.dictionaries(st.sampled_from(KEYS), schemas, max_size=6))
def test_any_json_makes_some_type(schema: dict[str, Any]) -> None:
    assert isinstance(typescript(schema), str)
    assert json.loads(compact_json(schema)) == schema


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), {1, 2}, 10**5000, b"x"], ids=lambda value: type(value).__name__
)
def test_what_is_no_json_is_refused(value: Any) -> None:
    with pytest.raises(UsageError, match=rf"no such {type(value).__name__} as the one at #/properties/p/default/0"):
        typescript({"type": "object", "properties": {"p": {"default": [value]}}})
