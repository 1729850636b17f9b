"""JSON Schema as the TypeScript-like types in which gpt-oss knows its tools.

What openai-harmony can write is written as it writes it, to the letter and with its oddities: the model has seen it
so. What that library passes over or calls `any` is said here in the same terms: `$ref` and `allOf` are written out,
`anyOf` is a union like `oneOf`, and `const`, enums and shapes without a `type`, `null`, `false` and the schema of
`additionalProperties` get their types.

Pure text. References are followed inside the schema only; one that leads back into itself, or nowhere, is `any`.
Refuses (UsageError, with the place as a JSON pointer) what is nested too deeply or what references blow up.
"""

import json
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any, NamedTuple
from urllib.parse import unquote

from freehold.errors import UsageError
from freehold.formats.pointer import pointer_to, steps_of

Schema = Mapping[str, Any]

MAX_DEPTH = 64
"""How deeply schemas may be nested, and values within a schema."""

MAX_REFERENCED = 1_000_000
"""How many characters references may add: more than gpt-oss can read anyway."""

_REFERENCE_COST = 100  # in characters, so that those which add none come to an end too


def typescript(schema: Schema) -> str:
    """The type of what `schema` describes; an object's properties stand one to a line."""
    writer = _Writer(schema)
    return writer.type(writer.expanded(schema, _Place()), "")


def compact_json(value: Any, pointer: str = "#") -> str:
    """JSON without spaces, with numbers as openai-harmony's (Rust's) JSON writes them."""
    return _json(value, _Place(pointer))


class _Place(NamedTuple):
    """Where in the schema we are. `references` are those that led here: meeting one of them again is a cycle."""

    pointer: str = "#"
    depth: int = 0
    references: frozenset[str] = frozenset()

    def into(self, *steps: str | int) -> "_Place":
        pointer = self.pointer + pointer_to(steps)
        if self.depth == MAX_DEPTH:
            raise UsageError(f"the schema is nested more than {MAX_DEPTH} deep at {_shown(pointer)}; make it flatter")
        return _Place(pointer, self.depth + 1, self.references)


class _Node(NamedTuple):
    """A schema without `$ref` and `allOf`, and its place."""

    schema: Schema
    place: _Place


class _Writer:
    def __init__(self, root: Schema) -> None:
        self._root = root
        self._referenced = 0

    # --- references ---

    def expanded(self, raw: Any, place: _Place) -> _Node:
        """`raw` with what it refers to written out; its own words go before those it refers to."""
        if raw is False:
            return _Node({"enum": ()}, place)  # nothing is valid
        if not isinstance(raw, Mapping):
            return _Node({}, place)
        if "$ref" not in raw and "allOf" not in raw:
            return _Node(raw, place)
        whole: dict[str, Any] = {}
        references = place.references
        for part in self._parts(raw, place):
            if part.place.references:
                self._count(_REFERENCE_COST * _size(part.schema), part.place)
            _merge(whole, part.schema)
            references |= part.place.references
        _merge(whole, {key: value for key, value in raw.items() if key not in ("$ref", "allOf")})
        return _Node(whole, place._replace(references=references))

    def _parts(self, raw: Schema, place: _Place) -> Iterator[_Node]:
        for index, part in enumerate(_list(raw, "allOf")):
            yield self.expanded(part, place.into("allOf", index))
        reference = raw.get("$ref")
        if isinstance(reference, str) and reference not in place.references:
            inside = place.into("$ref")._replace(references=place.references | {reference})
            yield self.expanded(_target(self._root, reference), inside)

    def _counted(self, text: str, node: _Node) -> str:
        if node.place.references:
            self._count(len(text), node.place)
        return text

    def _count(self, num_characters: int, place: _Place) -> None:
        self._referenced += num_characters
        if self._referenced > MAX_REFERENCED:
            raise UsageError(
                f"the schema grows past all bounds where its references are written out, at {_shown(place.pointer)}; "
                "refer to less"
            )

    # --- types ---

    def type(self, node: _Node, indent: str) -> str:
        return self._counted(self._type(node, indent), node)

    def _type(self, node: _Node, indent: str) -> str:
        schema = node.schema
        if "oneOf" not in schema and "const" in schema:
            return _json(schema["const"], node.place.into("const"))
        if (variants := self._variants(node)) is not None:
            return "".join("\n" + self._alternative(variant, indent, _notes(variant)) for variant in variants)
        if names := [name for name in _list(schema, "type") if isinstance(name, str)]:
            return " | ".join("number" if name == "integer" else name for name in names)
        match _kind(schema):
            case "object":
                return self._object(node, indent)
            case "array":
                return self._array(node, indent)
            case "string":
                return " | ".join(f'"{value}"' for value in _list(schema, "enum") if isinstance(value, str)) or "string"
            case "number" | "integer":
                return "number"
            case "boolean" | "null" as name:
                return name
            case "enum":
                place = node.place.into("enum")
                return " | ".join(_json(value, place) for value in _list(schema, "enum")) or "never"
            case "optional":
                inner = self._optional(node)
                assert inner is not None, "a union with lines of its own was written above"
                return f"{self.type(inner, indent)} | null"
        return "any"

    def _array(self, node: _Node, indent: str) -> str:
        if "items" not in node.schema:
            return "Array<any>"
        items = self.expanded(node.schema["items"], node.place.into("items"))
        text = self.type(items, indent)
        # openai-harmony writes `"a" | "b"[]`, and so do we; unions that it does not know are not to be misread.
        return f"Array<{text}>" if _kind(items.schema) in ("enum", "anyOf", "optional") else f"{text}[]"

    def _object(self, node: _Node, indent: str) -> str:
        schema, place = node
        lines = [f"{indent}// {description}\n" for description in _strings(schema, "description")]
        lines.append("{\n")
        required = {name for name in _list(schema, "required") if isinstance(name, str)}
        for name, raw in _mapping(schema, "properties").items():
            property_ = self.expanded(raw, place.into("properties", name))
            lines.append(self._property(name if name in required else f"{name}?", property_, indent))
        if more := _mapping(schema, "additionalProperties"):
            values = self.expanded(more, place.into("additionalProperties"))
            lines.append(self._property("[key: string]", values, indent))
        return "".join([*lines, indent, "}"])

    def _property(self, name: str, node: _Node, indent: str) -> str:
        schema = node.schema
        variants = self._variants(node)
        description = _strings(schema, "description")
        comments = [f"{title}\n{indent}//" for title in _strings(schema, "title")]
        if variants is None:
            comments += description
        if examples := _list(schema, "examples"):
            comments += ["Examples:", *(f'- "{example}"' for example in examples if isinstance(example, str))]
        default = _default(node, quoted_enum=False)
        if variants is None:
            text = self._nullable(node, indent + "    ")
            body = f"{indent}{name}: {text},{_trailing(default)}\n"
        else:
            if variants and _strings(variants[0].schema, "description") == description:
                comments_above = []
            else:
                comments_above = description
            comments += comments_above + default
            body = f"{indent}{name}:\n"
            for index, variant in enumerate(variants):
                said = _strings(variant.schema, "description")
                notes = [] if said == description or (index == 0 and comments_above) else said
                body += self._alternative(variant, indent, notes + _default(variant, quoted_enum=False)) + "\n"
            body += f"{indent},\n"
        return self._counted("".join(f"{indent}// {comment}\n" for comment in comments) + body, node)

    def _alternative(self, variant: _Node, indent: str, notes: list[str]) -> str:
        return self._counted(f"{indent} | {self._nullable(variant, indent + '   ')}{_trailing(notes)}", variant)

    def _nullable(self, node: _Node, indent: str) -> str:
        text = self.type(node, indent)
        return f"{text} | null" if node.schema.get("nullable") is True and "null" not in text else text

    # --- unions ---

    def _variants(self, node: _Node) -> list[_Node] | None:
        """What a union that is written one alternative to a line consists of; None for anything else."""
        schema, place = node
        if isinstance(schema.get("oneOf"), list | tuple):
            keyword = "oneOf"
        elif _kind(schema) == "anyOf" or (_kind(schema) == "optional" and self._optional(node) is None):
            keyword = "anyOf"
        else:
            return None
        return [self.expanded(raw, place.into(keyword, index)) for index, raw in enumerate(_list(schema, keyword))]

    def _optional(self, node: _Node) -> _Node | None:
        """Of "this or null", this; None where it is a union itself, which takes lines of its own."""
        index, raw = next((i, raw) for i, raw in enumerate(_list(node.schema, "anyOf")) if not _is_null(raw))
        inner = self.expanded(raw, node.place.into("anyOf", index))
        return inner if self._variants(inner) is None else None


def _kind(schema: Schema) -> str:
    """The type's name, or the keyword that stands in for one."""
    name = schema.get("type")
    if isinstance(name, str):
        return name if name in ("object", "array", "string", "number", "integer", "boolean", "null") else "any"
    if "oneOf" in schema or "const" in schema or _list(schema, "type"):
        return "any"
    if isinstance(schema.get("enum"), list | tuple):
        return "enum"
    if variants := _list(schema, "anyOf"):
        return "optional" if [_is_null(raw) for raw in variants] in ([True, False], [False, True]) else "anyOf"
    if "properties" in schema or "additionalProperties" in schema:
        return "object"
    return "array" if "items" in schema else "any"


def _is_null(raw: Any) -> bool:
    return isinstance(raw, Mapping) and raw.get("type") == "null"


# --- comments -----------------------------------------------------------------------------------------------


def _default(node: _Node, *, quoted_enum: bool) -> list[str]:
    """The comment that tells the default, if there is one. An enum's stands bare beside properties."""
    if "default" not in node.schema:
        return []
    value = node.schema["default"]
    if isinstance(value, str) and not _list(node.schema, "enum"):
        return [f'default: "{value}"']
    if isinstance(value, str) and not quoted_enum:
        return [f"default: {value}"]
    return [f"default: {_json(value, node.place.into('default'))}"]


def _notes(variant: _Node) -> list[str]:
    """What is said behind an alternative of a union inside another type."""
    return _strings(variant.schema, "description") + _default(variant, quoted_enum=True)


def _trailing(notes: list[str]) -> str:
    return f" // {' '.join(notes)}" if notes else ""


# --- reading any JSON ---------------------------------------------------------------------------------------


def _list(schema: Schema, key: str) -> list[Any]:
    value = schema.get(key)
    return list(value) if isinstance(value, list | tuple) else []


def _mapping(schema: Schema, key: str) -> Mapping[str, Any]:
    value = schema.get(key)
    return value if isinstance(value, Mapping) else {}


def _strings(schema: Schema, key: str) -> list[str]:
    value = schema.get(key)
    return [value] if isinstance(value, str) else []


def _size(schema: Schema) -> int:
    """How much there is to merge."""
    return 1 + len(schema) + len(_mapping(schema, "properties")) + len(_list(schema, "required"))


def _merge(whole: dict[str, Any], part: Schema) -> None:
    for key, value in part.items():
        if key == "properties":
            whole.setdefault(key, {}).update(value if isinstance(value, Mapping) else {})
        elif key == "required":
            whole.setdefault(key, []).extend(value if isinstance(value, list | tuple) else ())
        else:
            whole[key] = value


def _target(root: Any, reference: str) -> Any:
    """What a JSON pointer leads to, `{}` if nowhere. Other documents are not fetched, anchors not looked for."""
    if reference != "#" and not reference.startswith("#/"):
        return {}
    found = root
    for step in steps_of(unquote(reference.removeprefix("#"))):
        if isinstance(found, Mapping) and step in found:
            found = found[step]
        elif isinstance(found, list | tuple) and step.isdecimal() and len(step) < 10 and int(step) < len(found):
            found = found[int(step)]
        else:
            return {}
    return found


def _json(value: Any, place: _Place) -> str:
    if isinstance(value, Mapping):
        members = (f"{_scalar(str(key), place)}:{_json(item, place.into(key))}" for key, item in value.items())
        return f"{{{','.join(members)}}}"
    if isinstance(value, list | tuple):
        return f"[{','.join(_json(item, place.into(index)) for index, item in enumerate(value))}]"
    return _scalar(value, place)


def _scalar(value: Any, place: _Place) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError):
        raise UsageError(
            f"JSON has no such {type(value).__name__} as the one at {_shown(place.pointer)}; leave it out"
        ) from None
    if not isinstance(value, float):
        return text
    if text.endswith("e-05"):
        return f"{Decimal(text):f}"
    return text.replace("e+", "e").replace("e-0", "e-")


def _shown(pointer: str) -> str:
    return pointer if len(pointer) <= 80 else f"{pointer[:40]}…{pointer[-40:]}"
