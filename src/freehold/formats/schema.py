"""JSON Schemas as the grammar enforces them: fully, or not at all.

`enforceable` reads a client's schema and writes it anew with nothing but keywords that llguidance holds a model to;
whatever it would pass over or only half enforce is refused (SchemaError) with the JSON pointer of that part, and so
is a schema that it would take for ever over. Annotations and unknown words, which constrain nothing, are left out.
References are followed inside of the schema only: nothing is ever fetched. Called by `guidance.py`.

What is taken more strictly than written: an object's properties come in the order in which the schema lists them,
before any others; numbers with bounds are written without exponents; where a class like `[^"]` allows every control
character, U+0000 is left out. Patterns are ECMA-262's, so `\\d` and `\\w` are ASCII. Dates are dates of the calendar.
What is taken more loosely: `nullable` beside `type` adds null, as in OpenAPI 3.0; JSON Schema has no such word.
"""

import json
import math
import re
import sys
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from decimal import Decimal
from itertools import combinations, islice
from typing import Any, NamedTuple, TypeGuard
from urllib.parse import unquote

from freehold.errors import SchemaError
from freehold.formats.pointer import pointer_to, steps_of

MAX_DEPTH = 48
MAX_SUBSCHEMAS = 10_000
MAX_PROPERTIES = 1_000
MAX_NAMES = 50_000
"""Of the properties beside an `additionalProperties` with a schema: the squares of their lengths, added up."""
MAX_COUNTED_PROPERTIES = 100
"""In a schema with `minProperties`: the grammar lists who comes first, for each property anew."""
MAX_OPEN_PROPERTIES = 1_000
"""Of all options of a choice: optional properties that may come next. The grammar follows each of them."""
MAX_OPTIONS = 256
MAX_COMPARISONS = 100_000
"""Of the parts of the options of `oneOf`, in search of what tells them apart."""
MAX_REFERENCE_LEVELS = 400
"""Of the parts that are referred to, added up: llguidance follows references on its stack, which would overflow."""
MAX_MULTIPLE = 10_000
"""`multipleOf`, without its decimal point, in all: the grammar has a state for every remainder."""
MAX_CONSTANTS = 200_000
"""Characters of all constants: the grammar goes through them for every token."""
MAX_COUNT = 1_000_000
"""Of items, properties and characters: counts beyond this mean "many", and cost the grammar memory."""

_SECONDS_TO_LOCATE = 1.0

_EXACT = 2**53
"""Up to here every integer is a float, which is what llguidance counts in."""

_FAR = 2**62
"""Bounds beyond it are brought here: llguidance's integers have 64 bits. It forbids nothing that anybody means."""

_BOUNDS = ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum")

_TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")

# Keywords that constrain and that no grammar here can hold a model to.
_REFUSED = {
    *("not", "if", "then", "else", "contains", "minContains", "maxContains", "uniqueItems", "propertyNames"),
    *("dependencies", "dependentRequired", "dependentSchemas", "unevaluatedItems", "unevaluatedProperties"),
    *("$dynamicRef", "$recursiveRef", "extends", "disallow", "divisibleBy"),
}
# What the formats of strings are enforced by: a pattern of our own, or llguidance's format of that name.
_DATE = (
    r"(?:(?:[0-9]{3}[1-9]|[0-9]{2}[1-9]0|[0-9][1-9]00|[1-9]000)"
    r"-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)|02-(?:0[1-9]|1[0-9]|2[0-8]))"
    r"|(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)-02-29)"
)
_TIME = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,9})?(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
_STRING_FORMATS: Mapping[str, Mapping[str, str]] = {
    "date": {"pattern": f"^{_DATE}$"},
    "time": {"pattern": f"^{_TIME}$"},
    "date-time": {"pattern": f"^{_DATE}T{_TIME}$"},
    "password": {},  # a hint for forms
    **{name: {"format": name} for name in ("duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")},
}
_NUMBER_FORMAT = re.compile(r"(u?)int(8|16|32|64)?|float|double")

_Pointer = tuple[str | int, ...]
Clean = dict[str, Any] | bool
"""A schema that the grammar enforces; its references are `#/$defs/` and a number."""


def enforceable(schema: Any, what: str = "the schema") -> Clean:
    """The same schema, in keywords that llguidance enforces. Raises SchemaError; `what` begins its message."""
    return _Reader(schema, what).whole(schema, ())


def is_enforceable(schema: Any) -> bool:
    """Whether a grammar can hold a tool's parameters to this; what it cannot is checked after the call is written."""
    try:
        object_schema(schema, "the parameters")
    except SchemaError:
        return False
    return True


def object_schema(schema: Any, what: str) -> Clean:
    """Like `enforceable`, and whatever matches it is an object: the arguments of a call are."""
    clean = enforceable(schema, what)
    if clean is True:
        return {"type": "object"}
    if clean is False or clean.get("type") == "object":
        return clean
    definitions = clean.pop("$defs", {})
    return {"$defs": definitions, "type": "object", "allOf": [clean]}


def locate(schema: Any, what: str, complaint: Callable[[Clean], str]) -> SchemaError:
    """The refusal of a schema that `enforceable` takes and the compiler does not.

    `complaint` says what the compiler has against a schema, "" for nothing. The smallest part is looked for that it
    does not take on its own; then the keyword without which it would take that part.
    """
    until = time.monotonic() + _SECONDS_TO_LOCATE

    def complain(node: Any, pointer: _Pointer) -> str:
        try:
            return complaint(_Reader(schema, what).whole(node, pointer)) if time.monotonic() < until else ""
        except SchemaError as error:  # a part of it has been left out that another refers to
            return str(error)

    node: Any = schema
    pointer: _Pointer = ()
    reason = complain(node, pointer)
    if not reason:
        return _refusal(what, pointer, "the arguments of a call are an object, and none can match this")
    while True:
        for child, steps in _children(node):
            if child is not False and (found := complain(child, pointer + steps)):
                node, pointer, reason = child, pointer + steps, found
                break
        else:
            break
    if isinstance(node, Mapping):
        for keyword in sorted(node, key=("type", "properties", "required", "items").__contains__):
            if not complain({key: value for key, value in node.items() if key != keyword}, pointer):
                pointer = (*pointer, keyword)
                break
    return _refusal(what, pointer, f"the grammar cannot express this: {reason}")


def _refusal(what: str, pointer: _Pointer, reason: str) -> SchemaError:
    written = pointer_to(pointer)
    return SchemaError(f"{what} at {written or '/'}: {reason}", pointer=written)


def _children(node: Any) -> Iterator[tuple[Any, _Pointer]]:
    """The schemas right inside of one."""
    if not isinstance(node, Mapping):
        return
    for keyword, value in node.items():
        if keyword in ("properties", "patternProperties", "$defs", "definitions") and isinstance(value, Mapping):
            yield from ((child, (keyword, name)) for name, child in value.items())
        elif keyword in ("items", "prefixItems", "allOf", "anyOf", "oneOf") and isinstance(value, list):
            yield from ((child, (keyword, index)) for index, child in enumerate(value))
        elif keyword in ("items", "additionalProperties", "additionalItems"):
            yield value, (keyword,)


class _Reader:
    """Reads one document; `definitions` are the parts of it that are referred to, by the number they get."""

    def __init__(self, root: Any, what: str) -> None:
        self._root = root
        self._what = what
        self._draft = _draft(root)
        self._names: dict[_Pointer, str] = {}
        self._unread: list[_Pointer] = []
        self._definitions: dict[str, Clean] = {}
        self._bounded: list[tuple[dict[str, Any], str]] = []
        self._multiples: list[tuple[dict[str, Any], _Pointer]] = []
        self._merges = False
        self._unions: list[tuple[dict[str, Any], _Pointer]] = []
        self._known_widths: dict[int, _Width] = {}
        self._len_constants = 0
        self._choices: list[tuple[dict[str, Any], _Pointer]] = []
        self._open_objects: list[tuple[dict[str, Any], _Pointer]] = []
        self._len_names = 0
        self._anchors: dict[str, _Pointer] | None = None
        self._num_subschemas = 0
        self._deepest = 0
        self._num_levels = 0
        self._num_references = 0
        self._num_properties = 0
        self._counting: _Pointer | None = None
        self._num_comparisons = 0
        self._known_facts: dict[int, tuple[set[str], set[str] | None]] = {}

    def whole(self, node: Any, pointer: _Pointer) -> Clean:
        clean = self._schema(node, pointer, 0)
        self._read_definitions()
        if self._counting is not None and self._num_properties > MAX_COUNTED_PROPERTIES:
            raise self._refuse(
                self._counting, f"in a schema with more than {MAX_COUNTED_PROPERTIES} properties they cannot be counted"
            )
        for choice, where in self._choices:
            self._one_of(choice, where)
        self._check_ends(clean, pointer)
        for union, where in self._unions:
            if self._width(union).num_open > MAX_OPEN_PROPERTIES:
                raise self._refuse(
                    where, "too many optional properties in all options; let each begin with a required one of its own"
                )
        self._move_bounds()
        self._check_multiples()
        for node in {id(node): node for node, _ in (*self._bounded, *self._multiples)}.values():
            self._spell_out(node)
        for node, where in self._open_objects:
            self._close(node, where)
        if isinstance(clean, dict) and self._definitions:
            clean = {"$defs": self._definitions, **clean}
        return clean

    def _refuse(self, pointer: _Pointer, reason: str) -> SchemaError:
        return _refusal(self._what, pointer, reason)

    # --- one schema ---

    def _schema(self, node: Any, pointer: _Pointer, depth: int) -> Clean:
        if isinstance(node, bool):
            return node
        if not isinstance(node, Mapping):
            raise self._refuse(pointer, f"a schema is an object or a boolean, got {_short(node)}")
        self._num_subschemas += 1
        self._deepest = max(self._deepest, depth)
        if depth > MAX_DEPTH or self._num_subschemas > MAX_SUBSCHEMAS:
            raise self._refuse(
                pointer, f"the schema has more than {MAX_DEPTH} levels or {MAX_SUBSCHEMAS} parts; make it smaller"
            )
        self._check_keywords(node, pointer)
        clean: dict[str, Any] = {}
        self._type(node, pointer, clean)
        for keyword in ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"):
            if keyword in node:
                clean[keyword] = self._count(node[keyword], (*pointer, keyword))
        self._bounds(node, pointer, clean)
        if "pattern" in node:
            clean["pattern"] = self._pattern(node["pattern"], (*pointer, "pattern"))
        if "format" in node:
            self._format(node["format"], (*pointer, "format"), clean)
        self._object(node, pointer, depth, clean)
        self._array(node, pointer, depth, clean)
        self._values(node, pointer, clean)
        # These come last: llguidance merges what stands before one of them with it, in the order of the keys.
        if "$ref" in node:
            clean["$ref"] = self._reference(node["$ref"], (*pointer, "$ref"))
        for keyword in ("allOf", "anyOf", "oneOf"):
            if keyword in node:
                clean.setdefault(keyword, []).extend(
                    self._schema(option, (*pointer, keyword, index), depth + 1)
                    for index, option in enumerate(self._options(node[keyword], (*pointer, keyword)))
                )
        if "allOf" in clean or ({"$ref", "anyOf", "oneOf"} & clean.keys() and len(clean) > 1):
            self._merges = True
        self._check_sense(node, pointer, clean)
        if {"anyOf", "oneOf"} & clean.keys():
            self._unions.append((clean, pointer))
        if "oneOf" in clean:
            self._choices.append((clean, (*pointer, "oneOf")))
        return clean

    def _check_keywords(self, node: Mapping[str, Any], pointer: _Pointer) -> None:
        for keyword, value in node.items():
            harmless = keyword == "uniqueItems" and value is False
            if keyword in _REFUSED and not harmless:
                raise self._refuse(
                    (*pointer, keyword), f"{keyword!r} cannot be enforced while the model writes; leave it out"
                )
            if keyword == "$id" and pointer and not str(value).startswith("#"):
                raise self._refuse((*pointer, keyword), "a schema inside another cannot have an address of its own")

    def _type(self, node: Mapping[str, Any], pointer: _Pointer, clean: dict[str, Any]) -> None:
        if "type" not in node:
            return
        names = [node["type"]] if isinstance(node["type"], str) else node["type"]
        if not isinstance(names, list) or not names or not all(name in _TYPES for name in names):
            raise self._refuse((*pointer, "type"), f"expected one or several of {', '.join(_TYPES)}")
        if node.get("nullable") is True and "null" not in names:
            names = [*names, "null"]
        if "number" in names:  # it includes the integers, which would then be matched twice
            names = [name for name in names if name != "integer"]
        names = list(dict.fromkeys(names))
        clean["type"] = names[0] if len(names) == 1 else names

    def _count(self, value: Any, pointer: _Pointer) -> int:
        if not _is_number(value) or value < 0 or value != int(value):
            raise self._refuse(pointer, f"expected a whole number that is not negative, got {_short(value)}")
        if value > MAX_COUNT:
            raise self._refuse(pointer, f"{value} is more than the {MAX_COUNT:,} that can be counted to; leave it out")
        return int(value)

    def _bounds(self, node: Mapping[str, Any], pointer: _Pointer, clean: dict[str, Any]) -> None:
        for keyword, inward in (  # the inclusive one first
            ("minimum", math.inf),
            ("exclusiveMinimum", math.inf),
            ("maximum", -math.inf),
            ("exclusiveMaximum", -math.inf),
        ):
            if keyword not in node:
                continue
            value = node[keyword]
            if isinstance(value, bool) and self._draft == 4 and keyword.startswith("exclusive"):
                plain = keyword.removeprefix("exclusive").lower()
                if not value or plain not in node:
                    continue
                value = node[plain]
            clean[keyword] = self._bound(value, (*pointer, keyword), inward)
            self._bounded.append((clean, keyword))
        if "multipleOf" in node:
            value = self._number(node["multipleOf"], (*pointer, "multipleOf"))
            if value <= 0:
                raise self._refuse((*pointer, "multipleOf"), f"expected a number above 0, got {_short(value)}")
            clean["multipleOf"] = value
            self._multiples.append((clean, (*pointer, "multipleOf")))

    def _bound(self, value: Any, pointer: _Pointer, inward: float) -> float:
        number = self._number(value, pointer)
        if isinstance(number, int) and abs(number) > _EXACT:
            nearest = float(number)
            outside = nearest < number if inward > 0 else nearest > number
            number = math.nextafter(nearest, inward) if outside else nearest
        number = max(-_FAR, min(_FAR, number))
        return int(number) if number == int(number) else number

    def _number(self, value: Any, pointer: _Pointer) -> float:
        if not _is_number(value):
            raise self._refuse(pointer, f"expected a number, got {_short(value)}")
        if isinstance(value, float) and not _is_read_exactly(value):
            raise self._refuse(pointer, f"{value} has more digits than the grammar reads exactly; write 15 at most")
        return value

    def _pattern(self, pattern: Any, pointer: _Pointer) -> str:
        if not isinstance(pattern, str):
            raise self._refuse(pointer, f"expected a regular expression, got {_short(pattern)}")
        try:
            return _as_rust_regex(pattern)
        except ValueError as error:
            raise self._refuse(pointer, f"the pattern {pattern!r:.80} cannot be enforced: {error}") from None

    def _format(self, name: Any, pointer: _Pointer, clean: dict[str, Any]) -> None:
        types = _types(clean)
        number = _NUMBER_FORMAT.fullmatch(name) if isinstance(name, str) else None
        if number and types <= {"integer", "number", "null"}:
            if name in ("float", "double"):
                return
            bits = int(number[2] or 64)
            least = 0 if number[1] else -(2 ** (bits - 1))
            most = 2**bits - 1 if number[1] else 2 ** (bits - 1) - 1
            for keyword, value, inward in (("minimum", least, math.inf), ("maximum", most, -math.inf)):
                pick = max if inward > 0 else min
                clean[keyword] = pick(clean.get(keyword, -inward), self._bound(value, pointer, inward))
        elif isinstance(name, str) and name in _STRING_FORMATS:
            given = _STRING_FORMATS[name]
            if "pattern" in given and "pattern" in clean:
                clean["allOf"] = [{"type": "string", **given}] if types == {"string"} else [dict(given)]
            else:
                clean.update(given)
        else:
            raise self._refuse(
                pointer, f"the format {_short(name)} cannot be enforced; known are {', '.join(_STRING_FORMATS)}"
            )

    # --- objects and arrays ---

    def _object(self, node: Mapping[str, Any], pointer: _Pointer, depth: int, clean: dict[str, Any]) -> None:
        for keyword in ("properties", "patternProperties"):
            if keyword not in node:
                continue
            members = node[keyword]
            if not isinstance(members, Mapping) or not all(isinstance(name, str) for name in members):
                raise self._refuse((*pointer, keyword), f"expected schemas by name, got {_short(members)}")
            self._num_properties += len(members)
            if len(members) > MAX_PROPERTIES:
                raise self._refuse((*pointer, keyword), f"one object can have {MAX_PROPERTIES} properties at most")
            clean[keyword] = {
                (self._pattern(name, (*pointer, keyword, name)) if keyword == "patternProperties" else name): (
                    self._schema(member, (*pointer, keyword, name), depth + 1)
                )
                for name, member in members.items()
            }
            if len(clean[keyword]) != len(members):
                raise self._refuse((*pointer, keyword), "two of the patterns are one and the same")
        if "required" in node:
            required = node["required"]
            if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
                raise self._refuse((*pointer, "required"), f"expected a list of names, got {_short(required)}")
            if len(required) > MAX_PROPERTIES:
                raise self._refuse((*pointer, "required"), f"one object can have {MAX_PROPERTIES} properties at most")
            clean["required"] = list(dict.fromkeys(required))
        if "additionalProperties" in node:
            clean["additionalProperties"] = self._schema(
                node["additionalProperties"], (*pointer, "additionalProperties"), depth + 1
            )
        if clean.get("additionalProperties") is not False:
            if "patternProperties" in clean:
                raise self._refuse(
                    (*pointer, "patternProperties"),
                    "names that match no pattern cannot be told from those that do; set additionalProperties to false",
                )
            if "properties" in clean or "required" in clean:
                self._open_objects.append((clean, (*pointer, "additionalProperties")))
        merged = "properties" in clean or {"$ref", "allOf", "anyOf", "oneOf"} & node.keys()
        if merged or pointer[-2:-1] in (("allOf",), ("anyOf",), ("oneOf",), ("$defs",), ("definitions",)):
            for keyword in {"minProperties", "maxProperties"} & clean.keys():
                self._counting = (*pointer, keyword)
        # Names of properties that the schema does not list may be written twice, and would be counted twice.
        if clean.get("minProperties", 0) > len(clean.get("required", ())) + 1:
            raise self._refuse(
                (*pointer, "minProperties"), "more properties than the required ones and one other cannot be counted"
            )

    def _array(self, node: Mapping[str, Any], pointer: _Pointer, depth: int, clean: dict[str, Any]) -> None:
        first, rest = "prefixItems", "items"
        if isinstance(node.get("items"), list):
            if self._draft >= 2020 and "$schema" in self._root:
                raise self._refuse((*pointer, "items"), "from draft 2020-12 on a list of items is called 'prefixItems'")
            first, rest = "items", "additionalItems"
        elif self._draft < 2020 and "prefixItems" in node:
            raise self._refuse((*pointer, "prefixItems"), f"draft {self._draft} of JSON Schema has no 'prefixItems'")
        if first in node:
            clean["prefixItems"] = [
                self._schema(item, (*pointer, first, index), depth + 1)
                for index, item in enumerate(self._options(node[first], (*pointer, first)))
            ]
        if rest in node:
            clean["items"] = self._schema(node[rest], (*pointer, rest), depth + 1)

    def _options(self, value: Any, pointer: _Pointer) -> Sequence[Any]:
        if not isinstance(value, list) or not value:
            raise self._refuse(pointer, f"expected a list of schemas, got {_short(value)}")
        if len(value) > MAX_OPTIONS:
            raise self._refuse(pointer, f"{len(value)} schemas are more than the {MAX_OPTIONS} that can be told apart")
        return value

    # --- values ---

    def _check_sense(self, node: Mapping[str, Any], pointer: _Pointer, clean: dict[str, Any]) -> None:
        """Refuse what nothing matches, where that is plain: llguidance would leave such a property out."""
        for least, most in (
            *(("minLength", "maxLength"), ("minItems", "maxItems"), ("minProperties", "maxProperties")),
            *((least, most) for least in _BOUNDS[:2] for most in _BOUNDS[2:]),
        ):
            if least in clean and most in clean and clean[least] > clean[most]:
                where = (*pointer, most) if most in node else pointer
                raise self._refuse(where, f"no value can match this: {least} is above {most}")
        constants = {"const", "enum"} & node.keys()
        if constants and not _types(clean):
            raise self._refuse((*pointer, min(constants)), "no value can match this: it is not of the type")
        if len(constants) == 2 and (_constants({"const": node["const"]}) or set()).isdisjoint(
            _constants({"enum": node["enum"]}) or ()
        ):
            raise self._refuse((*pointer, "const"), "no value can match this: it is not in the enum")

    def _values(self, node: Mapping[str, Any], pointer: _Pointer, clean: dict[str, Any]) -> None:
        if "const" in node:
            self._check_value(node["const"], (*pointer, "const"))
            clean["const"] = _whole(node["const"])
        if "enum" in node:
            values = node["enum"]
            if not isinstance(values, list) or not values:
                raise self._refuse((*pointer, "enum"), f"expected a list of values, got {_short(values)}")
            for index, value in enumerate(values):
                self._check_value(value, (*pointer, "enum", index))
            clean["enum"] = _whole(values)
        for keyword in {"const", "enum"} & node.keys():
            self._len_constants += len(json.dumps(node[keyword]))
            if self._len_constants > MAX_CONSTANTS:
                raise self._refuse((*pointer, keyword), f"constants can have {MAX_CONSTANTS:,} characters in all")

    def _check_value(self, value: Any, pointer: _Pointer, depth: int = 0) -> None:
        """llguidance writes a value's text, and counts in floats."""
        if depth > MAX_DEPTH:
            raise self._refuse(pointer, f"a value nested more than {MAX_DEPTH} levels deep cannot be enforced")
        match value:
            case None | bool():
                return
            case int() | float() if abs(value) > _EXACT:
                raise self._refuse(pointer, f"{_short(value)} is too large a number to be told from its neighbours")
            case float() if not _is_read_exactly(value):
                raise self._refuse(pointer, f"{value} is not a number of JSON with 15 digits at most")
            case str():
                try:
                    value.encode()
                except UnicodeEncodeError:
                    raise self._refuse(pointer, "the value holds a lone surrogate, which no text has") from None
            case list():
                for index, item in enumerate(value):
                    self._check_value(item, (*pointer, index), depth + 1)
            case Mapping():
                for name, item in value.items():
                    self._check_value(item, (*pointer, name), depth + 1)

    # --- references ---

    def _reference(self, reference: Any, pointer: _Pointer) -> str:
        target = self._target(reference, pointer)
        self._num_references += 1
        if target not in self._names:
            self._names[target] = str(len(self._names))
            self._unread.append(target)
        return f"#/$defs/{self._names[target]}"

    def _read_definitions(self) -> None:
        """Those that were referred to, and so on: one after the other, however they nest."""
        while self._unread:
            target = self._unread.pop()
            node = self._root
            for step in target:
                node = node[step]
            self._deepest, num_references = 0, self._num_references
            self._definitions[self._names[target]] = self._schema(node, target, 0)
            if self._num_references > num_references:  # others are where a path ends
                self._num_levels += self._deepest + 1
            if self._num_levels > MAX_REFERENCE_LEVELS:
                raise self._refuse(target, "the parts that are referred to are too many or too deep; write fewer")

    def _target(self, reference: Any, pointer: _Pointer) -> _Pointer:
        if not isinstance(reference, str):
            raise self._refuse(pointer, f"expected a reference like '#/$defs/name', got {_short(reference)}")
        own = self._root.get("$id", self._root.get("id", "")) if isinstance(self._root, Mapping) else ""
        local = reference.removeprefix(str(own).removesuffix("#")) if own else reference
        if local in ("", "#"):
            return ()
        if not local.startswith("#"):
            raise self._refuse(
                pointer, f"{reference!r:.80} is another document, and none is fetched; write it out here"
            )
        path = unquote(local[1:])
        steps: list[str | int] = []
        node = self._root
        if not path.startswith("/"):
            if self._anchors is None:
                self._anchors = dict(_anchors(self._root, ()))
            if path not in self._anchors:
                raise self._refuse(pointer, f"nothing in the schema is called {reference!r:.80}")
            return self._anchors[path]
        for name in steps_of(path):
            is_index = isinstance(node, list) and name.isdecimal() and len(name) < 10
            step = int(name) if is_index else name
            try:
                node = node[step]
            except (KeyError, IndexError, TypeError):
                raise self._refuse(pointer, f"{reference!r:.80} leads nowhere in this schema") from None
            steps.append(step)
        return tuple(steps)

    # --- the whole ---

    def _move_bounds(self) -> None:
        """Where another bound is a fraction of the next integer, llguidance lets an excluded integer pass: past it."""
        fractions = sorted({value for node, keyword in self._bounded if (value := node[keyword]) != int(value)})
        for node, keyword in self._bounded:
            bound = node[keyword]
            sign = {"exclusiveMinimum": 1, "exclusiveMaximum": -1}.get(keyword, 0)
            low, high = sorted((bound, bound + sign))
            near = fractions[bisect_right(fractions, low) : bisect_left(fractions, high)]
            if sign * bound < 0 or not near:
                continue  # it fails on the side of zero only
            step = 10.0 ** -min(9, 14 - len(str(abs(int(bound)))))
            del node[keyword]
            plain, pick = ("minimum", max) if sign > 0 else ("maximum", min)
            inside = float(f"{bound + sign * step:.15g}")
            node[plain] = pick(node.get(plain, inside), inside)

    def _width(self, schema: Clean) -> "_Width":
        """How many objects a schema comes to when its choices are written out, and what may come first in them."""
        if isinstance(schema, bool):
            return _Width(1, 0)
        if id(schema) not in self._known_widths:
            self._known_widths[id(schema)] = _Width(1, 0)  # for the part of it that refers to it
            width = _Width(1, _num_open(schema))
            name = _name(schema.get("$ref", ""))
            for part in (*([self._definitions[name]] if name else []), *schema.get("allOf", ())):
                width = width.times(self._width(part))
            if options := [self._width(option) for option in schema.get("anyOf", ())]:
                num_options, num_open = (sum(numbers) for numbers in zip(*options, strict=True))
                width = width.times(_Width(num_options, num_open))
            self._known_widths[id(schema)] = width
        return self._known_widths[id(schema)]

    def _check_multiples(self) -> None:
        """llguidance has a state for each remainder, and counts in 32 bits."""
        if not self._multiples:
            return
        decimals = [_decimal(node["multipleOf"]) for node, _ in self._multiples]
        places = max(places for _, places in decimals)
        in_all, counted = 1, set[tuple[Any, ...]]()
        for (node, pointer), (digits, own_places) in zip(self._multiples, decimals, strict=True):
            in_all = math.lcm(in_all, digits * 10 ** (places - own_places))
            counted.add((digits, own_places, *(node.get(keyword) for keyword in _BOUNDS)))
            size = max(in_all if self._merges else digits, sum(key[0] for key in counted))
            if not _is_multiple_read_exactly(node["multipleOf"]):
                raise self._refuse(pointer, f"{node['multipleOf']} is not read exactly; multiples of it cannot be told")
            if size > MAX_MULTIPLE:
                raise self._refuse(
                    pointer,
                    f"divisors can be {MAX_MULTIPLE:,} at most, all together and without decimal points",
                )

    def _spell_out(self, node: dict[str, Any]) -> None:
        """Add the spellings that llguidance leaves out: 9.9 below 9.99, and 0.5 as a multiple of 0.25."""
        if _types(node).isdisjoint(("number",)):
            return
        kind = {"type": "number"} if node.get("type") == "number" else {}
        bounds = {keyword: node[keyword] for keyword in _BOUNDS if keyword in node}
        if prefixes := _prefixes(bounds):
            for keyword in bounds:
                del node[keyword]
            node.setdefault("allOf", []).append(
                {"anyOf": [{**kind, **bounds}, *({"const": value} for value in prefixes)]}
            )
        if "multipleOf" in node and not (self._merges and len({part["multipleOf"] for part, _ in self._multiples}) > 1):
            digits, places = _decimal(node["multipleOf"])
            shorter = [math.lcm(digits, 10 ** (places - kept)) / 10**places for kept in range(1, places)]
            if shorter and math.gcd(digits, 10) > 1:
                multiples = dict.fromkeys((node.pop("multipleOf"), *shorter))
                node.setdefault("allOf", []).append({"anyOf": [{**kind, "multipleOf": value} for value in multiples]})

    def _close(self, node: dict[str, Any], pointer: _Pointer) -> None:
        """Write `additionalProperties` as a pattern that the other names match.

        Where llguidance reads the keyword itself, a name with escapes in it (`\\u0061`) passes for none of the listed
        ones. Where anything goes all names may match, and so the patterns of objects that are merged are the same.
        """
        rest = node.get("additionalProperties", True)
        names = () if rest in (True, {}) else node.get("properties", ())
        self._len_names += sum(len(name) ** 2 for name in names)
        if self._len_names > MAX_NAMES:
            raise self._refuse(pointer, "too many names to tell the others from; make it true or false")
        node["patternProperties"] = {_other_names(names) if names else "": rest}
        node["additionalProperties"] = False

    def _one_of(self, node: dict[str, Any], pointer: _Pointer) -> None:
        """Where no two options have a value in common, "one of" is "any of"."""
        options = node.pop("oneOf")
        for (i, left), (j, right) in combinations(enumerate(options), 2):
            if not self._disjoint(left, right, 0):
                if self._num_comparisons > MAX_COMPARISONS:
                    raise self._refuse(pointer, "it takes too long to tell the options apart; use 'anyOf'")
                raise self._refuse(
                    pointer,
                    f"options {i} and {j} may both match one value, and only one may; give them a property whose "
                    "value tells them apart, or use 'anyOf'",
                )
        if "anyOf" in node:
            node.setdefault("allOf", []).append({"anyOf": options})
        else:
            node["anyOf"] = options

    def _disjoint(self, left: Clean, right: Clean, depth: int) -> bool:
        """Whether it can be shown that nothing matches both."""
        if left is False or right is False:
            return True
        lefts, rights = self._parts(left), self._parts(right)
        self._num_comparisons += 1 + len(lefts) * len(rights)
        if depth > 12 or self._num_comparisons > MAX_COMPARISONS:
            return False
        if any(self._simply_disjoint(a, b, depth) for a in lefts for b in rights):
            return True
        for parts, other in ((lefts, right), (rights, left)):
            for part in parts:
                for keyword in ("anyOf", "oneOf"):
                    options = part.get(keyword)
                    if options and all(self._disjoint(option, other, depth + 1) for option in options):
                        return True
        return False

    def _parts(self, schema: Clean) -> list[dict[str, Any]]:
        """Schemas that a value must all match to match this one, each once."""
        parts: dict[int, dict[str, Any]] = {}
        left = [schema]
        while left and self._num_comparisons <= MAX_COMPARISONS:
            part = left.pop()
            self._num_comparisons += 1
            if isinstance(part, bool) or id(part) in parts:
                continue
            parts[id(part)] = part
            if name := _name(part.get("$ref", "")):
                left.append(self._definitions[name])
            left.extend(part.get("allOf", ()))
        return list(parts.values())

    def _simply_disjoint(self, left: dict[str, Any], right: dict[str, Any], depth: int) -> bool:
        (left_types, lefts), (right_types, rights) = self._facts(left), self._facts(right)
        common = left_types & right_types
        if not common:
            return True
        if lefts is not None and rights is not None:
            self._num_comparisons += min(len(lefts), len(rights)) // 10
            if lefts.isdisjoint(rights):
                return True
        if common != {"object"}:
            return False
        names = {*left.get("required", ()), *right.get("required", ())}
        self._num_comparisons += len(names)
        return any(self._disjoint(_property(left, name), _property(right, name), depth + 1) for name in names)

    def _facts(self, schema: dict[str, Any]) -> tuple[set[str], set[str] | None]:
        """The types and constants of a schema, read once."""
        if id(schema) not in self._known_facts:
            self._known_facts[id(schema)] = _types(schema), _constants(schema)
        return self._known_facts[id(schema)]

    def _check_ends(self, clean: Clean, pointer: _Pointer) -> None:
        """Refuse what refers to itself without end: no value would match it, and the model would write for ever."""
        ending: set[str] = set()
        for _ in range(MAX_DEPTH):  # each time those that the last ones allow; what is referred to mostly comes first
            more = len(ending)
            for name, part in reversed(self._definitions.items()):
                if name not in ending and _ends(part, ending):
                    ending.add(name)
            if len(ending) == more:
                break
        for target, name in self._names.items():
            if name not in ending and self._definitions[name] is not False:
                raise self._refuse(target, "no value can match this: it requires itself, without end")
        if clean is not False and not _ends(clean, ending):
            raise self._refuse(pointer, "no value can match this schema")


class _Width(NamedTuple):
    num_options: int
    num_open: int
    """Properties of all options, of which any may come next."""

    def times(self, other: "_Width") -> "_Width":
        num_open = self.num_open * other.num_options + other.num_open * self.num_options
        return _Width(min(self.num_options * other.num_options, 10**6), min(num_open, 10**6))


def _num_open(schema: Mapping[str, Any]) -> int:
    """The optional properties before the first required one; a constant there leaves one option of a choice."""
    properties, required = schema.get("properties", {}), set(schema.get("required", ()))
    first = next((index for index, name in enumerate(properties) if name in required), len(properties))
    if first or not properties:
        return first
    tag = properties[next(iter(properties))]
    return 0 if isinstance(tag, dict) and _constants(tag) else len(properties.keys() - required) // 2


def _ends(schema: Clean, ending: set[str]) -> bool:
    """Whether some finite value may match, given the definitions for which that is known."""
    if isinstance(schema, bool):
        return schema
    if "$ref" in schema and _name(schema["$ref"]) not in ending:
        return False
    if not all(_ends(part, ending) for part in schema.get("allOf", ())):
        return False
    if "anyOf" in schema and not any(_ends(part, ending) for part in schema["anyOf"]):
        return False
    types = _types(schema)
    if types == {"object"}:
        return all(_ends(_property(schema, name), ending) for name in schema.get("required", ()))
    if types == {"array"}:
        first = schema.get("prefixItems", [])[: schema.get("minItems", 0)]
        rest = schema.get("items", True) if schema.get("minItems", 0) > len(first) else True
        return all(_ends(item, ending) for item in (*first, rest))
    return True


def _draft(root: Any) -> int:
    named = root.get("$schema") if isinstance(root, Mapping) else None
    for mark, draft in (("draft-04", 4), ("draft-06", 6), ("draft-07", 7), ("2019-09", 2019)):
        if mark in str(named):
            return draft
    return 2020


def _anchors(node: Any, pointer: _Pointer) -> Iterator[tuple[str, _Pointer]]:
    if isinstance(node, Mapping):
        for name in (node.get("$anchor"), node.get("$id"), node.get("id")):
            if isinstance(name, str):
                yield name.removeprefix("#"), pointer
    if len(pointer) <= 2 * MAX_DEPTH:
        for child, steps in _children(node):
            yield from _anchors(child, pointer + steps)


def _name(reference: str) -> str:
    return reference.removeprefix("#/$defs/")


def _types(schema: Mapping[str, Any]) -> set[str]:
    """The types that may match; numbers as "number" and "integer"."""
    given = schema.get("type", list(_TYPES))
    types = {given} if isinstance(given, str) else set(given)
    if "number" in types:
        types.add("integer")
    for value in [schema["const"]] if "const" in schema else []:
        types &= {_type_of(value)}
    if "enum" in schema:
        types &= {_type_of(value) for value in schema["enum"]}
    return types


def _type_of(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case int() | float():
            return "integer" if value == int(value) else "number"
        case str():
            return "string"
        case list():
            return "array"
    return "object"


def _constants(schema: Mapping[str, Any]) -> set[str] | None:
    """The only values that match, as text; None where there are others. Equal numbers are one value."""
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if values is None:
        return {"null"} if schema.get("type") == "null" else None
    return {json.dumps(_whole(value), sort_keys=True) for value in values}


def _whole(value: Any) -> Any:
    """The value with integers for floats that are whole: -0.0 would be written as "-0" only."""
    match value:
        case float() if value == int(value):
            return int(value)
        case list():
            return [_whole(item) for item in value]
        case Mapping():
            return {name: _whole(item) for name, item in value.items()}
    return value


def _property(schema: Mapping[str, Any], name: str) -> Clean:
    """What a property of this name must match, so far as that is plain."""
    if name in schema.get("properties", {}):
        found: Clean = schema["properties"][name]
        return found
    if schema.get("patternProperties"):
        return True
    rest: Clean = schema.get("additionalProperties", True)
    return rest


def _other_names(names: Collection[str]) -> str:
    """A pattern of all names but these: they leave one of them at some point, or stop before its end."""
    following: dict[str, set[str]] = {}
    for name in names:
        for end, character in enumerate(name):
            following.setdefault(name[:end], set()).add(_literally(character))
        following.setdefault(name, set())
    options = []
    for start, characters in following.items():
        departure = f"[^{''.join(sorted(characters))}]" if characters else "(?s:.)"
        optional = "" if start in names else "?"
        options.append(f"{''.join(map(_literally, start))}(?:{departure}(?s:.)*){optional}")
    return _as_rust_regex(f"^(?:{'|'.join(options)})$")


def _literally(character: str) -> str:
    return (
        character if character.isascii() and (character.isalnum() or character == "_") else f"\\x{{{ord(character):X}}}"
    )


def _decimal(value: float) -> tuple[int, int]:
    """The digits of a number without its point, and how many of them come after it."""
    _, digits, exponent = Decimal(str(value)).normalize().as_tuple()
    number = int("".join(map(str, digits)))
    assert isinstance(exponent, int)
    return (number * 10**exponent, 0) if exponent > 0 else (number, -exponent)


def _is_multiple_read_exactly(value: float) -> bool:
    """Whether llguidance finds these decimals, which it looks for by multiplying with ten."""
    digits, places = _decimal(value)
    shifted = float(value)
    for _ in range(places):
        shifted *= 10.0
    return shifted == digits and places < 9


def _prefixes(bounds: Mapping[str, float]) -> list[float]:
    """Numbers within the bounds that end early in the decimals of one: of 9.999 these are 9.9 and 9.99."""
    least = max(bounds.get("minimum", -math.inf), bounds.get("exclusiveMinimum", -math.inf))
    most = min(bounds.get("maximum", math.inf), bounds.get("exclusiveMaximum", math.inf))
    found = set()
    for far in (bound for bound in (least, most) if math.isfinite(bound) and bound != int(bound)):
        whole, _, decimals = f"{Decimal(str(far)):f}".partition(".")
        found |= {float(f"{whole}.{decimals[:kept]}") for kept in range(1, len(decimals))}
    return sorted(value for value in found if least < value < most and value != int(value))


def _is_number(value: Any) -> TypeGuard[float]:
    """Whether it is one, and a float has room for it."""
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and -sys.float_info.max <= value <= sys.float_info.max
    )


def _is_read_exactly(value: float) -> bool:
    """Whether llguidance, whose reader of floats rounds carelessly, takes the same number from its text."""
    if not math.isfinite(value) or (value and abs(value) < 1e-12):
        return False
    return value == int(value) or float(f"{value:.15g}") == value


def _as_rust_regex(pattern: str) -> str:
    """ECMA-262's reading of a pattern, where Rust's differs: in classes `[`, `&` and `~` are characters like others.

    Raises ValueError for what neither reading has, or only one.
    """
    pieces = list(_pieces(pattern))
    # To llguidance a set of characters with all controls, or all but the line feed, has the quote and the backslash in
    # it as well. So U+0000 is taken out of sets without these, where they may come to have all the others.
    narrow = [piece for piece in pieces if not _holds(piece, 0x22) or not _holds(piece, 0x5C)]
    if not all(any(_holds(piece, code) for piece in narrow) for code in range(0x20) if code != 0x0A):
        return "".join(pieces)
    for index, piece in enumerate(pieces):
        if piece in narrow and _holds(piece, 0):
            if piece[0] != "[" and piece[1:2] not in ("p", "P"):
                raise ValueError("beside other control characters U+0000 cannot be told from a quote")
            pieces[index] = f"[{piece}&&[^\\x00]]"
    return "".join(pieces)


def _pieces(pattern: str) -> Iterator[str]:
    """A pattern's classes, escapes and other characters, in Rust's syntax."""
    last = ""
    rest = iter(pattern)
    for character in rest:
        piece = character
        if character == "\\":
            piece = _escape(rest)
        elif character == "[":
            piece = _class(rest)
        elif character == "+" and last in ("*", "+", "?", "}"):
            raise ValueError("possessive quantifiers are not in ECMA-262")
        yield piece
        last = piece


def _escape(rest: Iterator[str]) -> str:
    escaped = next(rest, "")
    if not escaped:
        raise ValueError("it ends in a backslash")
    if escaped in "aAzZQEGKX<>":
        raise ValueError(f"'\\{escaped}' does not mean the same to all readers of patterns")
    width = {"x": 2, "u": 4, "p": 1, "P": 1}.get(escaped, 0)
    written = f"\\{escaped}"
    if width:
        written += (first := next(rest, ""))
        if first == "{":
            while not written.endswith("}") and (character := next(rest, "")):
                written += character
        else:
            written += "".join(islice(rest, width - 1))
    return written


def _class(rest: Iterator[str]) -> str:
    """What follows the bracket that opens a class, and the brackets."""
    written = ["["]
    character = next(rest, "")
    if character == "^":
        written.append(character)
        character = next(rest, "")
    if character in ("]", ""):
        raise ValueError("a class of characters cannot be empty")
    while character not in ("]", ""):
        if character == "\\":
            character = _escape(rest)
        elif character in "[&~":
            character = f"\\{character}"
        elif character == "-" and written[-1] == "-":
            raise ValueError("'--' in a class of characters does not mean the same to all readers of patterns")
        written.append(character)
        character = next(rest, "")
    return "".join((*written, character))


def _holds(piece: str, code: int) -> bool:
    """Whether a piece of a pattern can match this character of ASCII; of what is not plain, every control can."""
    if len(piece) == 1:
        return piece == "." or ord(piece) == code
    if "\\p" in piece or "\\P" in piece:
        return code < 0x20
    readable = re.sub(
        r"\\[xu]\{([0-9A-Fa-f]{1,6})\}", lambda found: f"\\U{int(found[1], 16):08x}", piece.replace("||", "|")
    )
    try:
        return re.compile(readable, re.ASCII).fullmatch(chr(code)) is not None
    except (re.error, OverflowError):
        return code < 0x20


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
