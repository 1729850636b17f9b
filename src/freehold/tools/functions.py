"""Your functions as tools: a typed Python function with a docstring is one.

    @freehold.tool
    def weather(city: str, unit: Literal["C", "F"] = "C") -> str:
        \"\"\"What the weather is like.

        Args:
            city: Where, as people write it.
            unit: Of the temperature.
        \"\"\"

The parameters' JSON Schema comes from the signature (whatever pydantic knows: Literal, enums, Optional, dataclasses,
models, TypedDict, dates), what they mean from the docstring: its text describes the tool, an `Args:` section in the
style of Google's each parameter. What the model sends is checked against it before the function runs. Coroutine
functions are awaited, others run on a thread, several conversations' at once. A result that is no text is sent as JSON,
100,000 characters of it at most. Generators are refused: nobody knows whether they end.
What a function raises reaches the model as type and message, never as a traceback.

The functions run in this process, with all that the user may do. Cancelled, a coroutine function is; one on a thread
cannot be stopped, and its result is dropped.
"""

import asyncio
import contextvars
import importlib.util
import inspect
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, get_type_hints, overload

from freehold.errors import FreeholdError, UsageError
from freehold.formats.conversation import Tool
from freehold.formats.schema import is_enforceable
from freehold.tools.base import KeepsNothing, ToolError, ToolResult, ToolSession, shortened

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError

_F = TypeVar("_F", bound=Callable[..., Any])
_MARK = "__freehold_tool__"
_NAME = re.compile(r"[A-Za-z_][\w\-]*", re.ASCII)
_SECTION = re.compile(r"(Args|Arguments|Parameters|Returns|Yields|Raises|Example|Examples|Note|Notes):\s*")
_ARGUMENT = re.compile(r"(\*{0,2}\w+)(?: *\([^)]*\))? *:(?: +(.*)|)$")
_SHOWN_ERRORS = 5
_SHOWN_CHARACTERS = 100_000


@dataclass(frozen=True, slots=True)
class _Mark:
    name: str | None
    description: str | None


@overload
def tool(function: _F, /) -> _F: ...
@overload
def tool(*, name: str | None = None, description: str | None = None) -> Callable[[_F], _F]: ...
def tool(function: Any = None, /, *, name: str | None = None, description: str | None = None) -> Any:
    """Mark a function as a tool for `load_tools`; it stays what it is. `name` and `description` replace its own.

    Raises UsageError for a function that cannot be one.
    """

    def mark(marked: _F) -> _F:
        setattr(marked, _MARK, _Mark(name, description))
        FunctionTool(marked)
        return marked

    return mark if function is None else mark(function)


class FunctionTool:
    """One function, described and callable. Raises UsageError, naming the parameter, where it cannot be a tool."""

    tool: Tool

    def __init__(self, function: Callable[..., Any]) -> None:
        marked: _Mark = getattr(function, _MARK, _Mark(None, None))
        self._function = function
        self._is_async = inspect.iscoroutinefunction(function)
        name: str = marked.name or getattr(function, "__name__", None) or type(function).__name__
        if not _NAME.fullmatch(name):
            raise UsageError(f"{name!r} cannot be a tool's name; use ASCII letters, digits, '_' and '-'")
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise UsageError(f"tool {name}: it yields its results one by one; return a list of them")
        text, meanings = _docstring(inspect.getdoc(function) or "")
        description = text if marked.description is None else marked.description
        if not description:
            raise UsageError(f"tool {name}: it has no docstring; say there what it does, for the model")
        self._model = _arguments_model(name, function, meanings)
        schema = _schema(name, self._model)
        self.tool = Tool(
            name=name,
            description=description,
            parameters=schema if schema.get("properties") else None,
            strict=is_enforceable(schema),
        )

    async def __call__(self, arguments: str) -> str:
        """Check the JSON that the model wrote, run the function, and write its result. Raises ToolError."""
        values = self._read(arguments)
        try:
            result = await self._function(**values) if self._is_async else (await _on_thread(self._function, values))()
            if inspect.isawaitable(result):  # of a plain function that returns a coroutine
                result = await result
        except ToolError:
            raise
        except FreeholdError as error:
            raise ToolError(f"{self.tool.name} failed: {error}") from error
        except BaseException as error:  # whatever it is, the model is told
            if _is_for_us(error, is_thread=not self._is_async):
                raise
            raise ToolError(f"{self.tool.name} failed: {_told(error)}") from error
        return _shown(result if isinstance(result, str) else (await _on_thread(self._json, {"result": result}))())

    def _read(self, arguments: str) -> dict[str, Any]:
        from pydantic import ValidationError

        text = arguments.strip() or "{}"
        try:
            model = self._model.model_validate_json(text)
        except ValidationError as error:
            raise ToolError(f"{self.tool.name} was not called: {_problems(error)}") from None
        # By field, not dumped: dataclasses and models arrive as what they are. What was not sent keeps its default.
        fields = type(model).model_fields
        return {fields[name].alias or name: getattr(model, name) for name in model.model_fields_set}

    def _json(self, result: Any) -> str:
        from pydantic_core import to_json

        try:
            if isinstance(result, Iterator):  # it might never end
                raise TypeError
            return to_json(result).decode()
        except Exception:  # noqa: BLE001 — its own code may run there too
            raise ToolError(
                f"{self.tool.name} returned a {type(result).__name__}, which cannot be written as JSON"
            ) from None


class FunctionToolset:
    """Functions offered together, in the namespace `functions`. They keep no state for a conversation."""

    def __init__(self, functions: Iterable[Callable[..., Any]]) -> None:
        """Raises UsageError for what cannot be a tool, and where two have one name."""
        self._tools: dict[str, FunctionTool] = {}
        for function in functions:
            made = FunctionTool(function)
            if made.tool.name in self._tools:
                raise UsageError(f"two tools are called {made.tool.name!r}; each needs its own name")
            self._tools[made.tool.name] = made

    @property
    def functions(self) -> tuple[Tool, ...]:
        return tuple(made.tool for made in self._tools.values())

    async def open(self) -> ToolSession:
        return _Session(self._tools)


class _Session(KeepsNothing):
    def __init__(self, tools: dict[str, FunctionTool]) -> None:
        self._tools = tools

    async def call(self, name: str, arguments: str) -> ToolResult:
        made = self._tools.get(name.removeprefix("functions."))
        if made is None:
            raise ToolError(f"there is no tool {name}; there are {', '.join(self._tools) or 'none'}")
        return ToolResult(text=await made(arguments))


def load_tools(path: Path) -> FunctionToolset:
    """The tools in a Python file: what is marked with `@freehold.tool`, or every public function defined there where
    nothing is. The file is run, as `python` would run an import of it.

    Raises UsageError for a file that cannot be read or run, and for functions that cannot be tools.
    """
    module = _run(path)
    own = [
        value
        for name, value in vars(module).items()
        if not name.startswith("_") and inspect.isfunction(value) and value.__module__ == module.__name__
    ]
    marked = [value for value in vars(module).values() if callable(value) and isinstance(_mark_of(value), _Mark)]
    chosen = list(dict.fromkeys(marked)) or own
    if not chosen:
        raise UsageError(f"{path} has no function that could be a tool; write one, or mark one with @freehold.tool")
    try:
        return FunctionToolset(chosen)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


def _mark_of(value: Any) -> object:
    # Not of classes' instances that answer to every name.
    return value.__dict__.get(_MARK) if hasattr(value, "__dict__") else None


def _run(path: Path) -> Any:
    name = f"freehold_tools_{path.stem}_{abs(hash(path.resolve())):x}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise UsageError(f"{path} is no Python file; give one that ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and annotations look their module up there
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)  # its neighbours can be imported, as from a script
    try:
        spec.loader.exec_module(module)
    except UsageError as error:
        del sys.modules[name]
        raise UsageError(f"{path}: {error}") from None
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise UsageError(f"{path} cannot be run: {_told(error)}{_line_in(path, error)}") from error
    finally:
        sys.path.remove(folder)
    return module


def _line_in(path: Path, error: BaseException) -> str:
    """Where in this file it happened, for the user."""
    if isinstance(error, SyntaxError) and error.lineno:
        return f" (line {error.lineno})"
    trace, line = error.__traceback__, None
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(path):
            line = trace.tb_lineno
        trace = trace.tb_next
    return f" (line {line})" if line else ""


def _is_for_us(error: BaseException, *, is_thread: bool) -> bool:
    """Whether it is we who are cancelled or interrupted, and not something that the function raised by itself."""
    if isinstance(error, asyncio.CancelledError):
        task = asyncio.current_task()
        return task is not None and task.cancelling() > 0
    return isinstance(error, GeneratorExit) or (isinstance(error, KeyboardInterrupt) and not is_thread)


def _shown(text: str) -> str:
    """A result as the model is shown it: of a size that a prompt can hold, and without halves of characters, which come
    from names of files that are not UTF-8."""
    return shortened(text, _SHOWN_CHARACTERS).encode("utf-8", "replace").decode()


async def _on_thread(function: Callable[..., Any], values: dict[str, Any]) -> Callable[[], Any]:
    """On a thread of its own that nobody waits for at exit: what never ends must not keep the program from ending.
    What comes back gives the result, or raises what the function did: not every exception can cross a future."""
    loop, context = asyncio.get_running_loop(), contextvars.copy_context()
    done: asyncio.Future[Callable[[], Any]] = loop.create_future()

    def finish(outcome: Callable[[], Any]) -> None:
        if not done.done():
            done.set_result(outcome)

    def run() -> None:
        outcome = context.run(_outcome, function, values)
        with suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(finish, outcome)

    threading.Thread(target=run, name=f"tool {getattr(function, '__name__', '')}", daemon=True).start()
    return await done


def _outcome(function: Callable[..., Any], values: dict[str, Any]) -> Callable[[], Any]:
    try:
        result = function(**values)
    except BaseException as error:  # noqa: BLE001 — raised again where it is awaited
        return partial(_raise, error)
    return lambda: result


def _raise(error: BaseException) -> NoReturn:
    raise error


# --- the signature ------------------------------------------------------------------------------------------


def _arguments_model(name: str, function: Callable[..., Any], meanings: dict[str, str]) -> "type[BaseModel]":
    """A model with a field for each parameter. Fields are called `p0`, `p1`… and go by alias: a parameter may have any
    name, `model_config` and `_x` too."""
    from pydantic import ConfigDict, Field, create_model
    from pydantic.errors import PydanticUserError

    try:
        signature = inspect.signature(function)
        target = function if inspect.isroutine(function) else type(function).__call__
        hints = get_type_hints(target, include_extras=True)
    except (NameError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"tool {name}: its signature cannot be read: {error}") from None
    fields: dict[str, Any] = {}
    for index, parameter in enumerate(signature.parameters.values()):
        _check_parameter(name, parameter, hints)
        about: dict[str, Any] = {"alias": parameter.name}
        if meaning := meanings.pop(parameter.name, None):  # otherwise an annotation's own may stand
            about["description"] = meaning
        field = Field(default=... if parameter.default is parameter.empty else parameter.default, **about)
        fields[f"p{index}"] = (hints[parameter.name], field)
    if meanings:
        raise UsageError(f"tool {name}: its docstring describes {', '.join(meanings)}, which it does not take")
    try:
        model: type[BaseModel] = create_model(
            name, __config__=ConfigDict(extra="forbid", arbitrary_types_allowed=False), **fields
        )
    except (PydanticUserError, TypeError, ValueError) as error:
        raise UsageError(f"tool {name}: {_first_line(error)}") from None
    for field, parameter in zip(model.model_fields.values(), signature.parameters.values(), strict=True):
        if parameter.default is parameter.empty and not field.is_required():
            raise UsageError(
                f"tool {name}: {parameter.name} has its default in Field(...), where the function itself does not see "
                "it; write it after the annotation"
            )
    return model


def _check_parameter(name: str, parameter: inspect.Parameter, hints: dict[str, Any]) -> None:
    if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
        stars = "*" if parameter.kind is parameter.VAR_POSITIONAL else "**"
        raise UsageError(f"tool {name}: {stars}{parameter.name} takes whatever comes; name each parameter")
    if parameter.kind is parameter.POSITIONAL_ONLY:
        raise UsageError(
            f"tool {name}: {parameter.name} is positional only, and arguments come by name; remove the '/'"
        )
    if type(parameter.default).__name__ == "FieldInfo":
        raise UsageError(
            f"tool {name}: {parameter.name} has Field(...) for a default, which the function itself would be given; "
            "write Annotated[TYPE, Field(...)]"
        )
    if parameter.name not in hints:
        raise UsageError(f"tool {name}: {parameter.name} has no annotation; write what type it is")


def _schema(name: str, model: "type[BaseModel]") -> dict[str, Any]:
    from pydantic.errors import PydanticInvalidForJsonSchema, PydanticUserError
    from pydantic.json_schema import PydanticJsonSchemaWarning

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PydanticJsonSchemaWarning)  # defaults that JSON cannot say are left out
            schema = model.model_json_schema()
    except (PydanticInvalidForJsonSchema, PydanticUserError) as error:
        raise UsageError(f"tool {name}: JSON cannot say what it takes: {_first_line(error)}") from None
    return {key: _untitled(value) for key, value in schema.items() if key != "title"}


def _untitled(node: Any) -> Any:
    """Without the titles that pydantic makes of names: they cost tokens and say nothing."""
    if isinstance(node, list):
        return [_untitled(item) for item in node]
    if not isinstance(node, dict):
        return node
    return {
        key: {name: _untitled(inner) for name, inner in value.items()}
        if key in ("properties", "$defs") and isinstance(value, dict)
        else value
        if key in ("default", "const", "enum", "examples")
        else _untitled(value)
        for key, value in node.items()
        if not (key == "title" and isinstance(value, str))
    }


# --- the docstring ------------------------------------------------------------------------------------------


def _docstring(text: str) -> tuple[str, dict[str, str]]:
    """What a docstring says of the function, and of each parameter in its `Args:` section. What it returns is kept,
    with its heading; what it raises, yields and its examples too."""
    about: list[str] = []
    meanings: dict[str, str] = {}
    lines = text.splitlines()
    index = 0
    while index < len(lines):
        section = _SECTION.fullmatch(lines[index])
        if section is None or section[1] not in ("Args", "Arguments", "Parameters"):
            about.append(lines[index].rstrip())
            index += 1
            continue
        index += 1
        body = []
        while index < len(lines) and (not lines[index].strip() or lines[index].startswith((" ", "\t"))):
            body.append(lines[index])
            index += 1
        meanings |= _meanings(body)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(about)).strip(), meanings


def _meanings(lines: Sequence[str]) -> dict[str, str]:
    margin = min((len(line) - len(line.lstrip()) for line in lines if line.strip()), default=0)
    found: dict[str, list[str]] = {}
    current: list[str] | None = None
    for line in lines:
        inner = line[margin:]
        if inner.strip() and not inner.startswith((" ", "\t")) and (match := _ARGUMENT.fullmatch(inner.rstrip())):
            current = found.setdefault(match[1].lstrip("*"), [])
            current.append(match[2] or "")
        elif current is not None:
            current.append(inner.strip())
    return {name: " ".join(part for part in parts if part) for name, parts in found.items()}


# --- errors, for the model ----------------------------------------------------------------------------------


def _problems(error: "ValidationError") -> str:
    """Which argument is wrong, and how."""
    problems = error.errors(include_url=False, include_context=False)
    told = []
    for problem in problems[:_SHOWN_ERRORS]:
        place = ".".join(str(step) for step in problem["loc"])
        shown = "" if problem["type"] in ("missing", "json_invalid") else f", got {problem['input']!r:.80}"
        told.append(f"{place}: {problem['msg']}{shown}" if place else f"{problem['msg']}{shown}")
    if len(problems) > _SHOWN_ERRORS:
        told.append(f"and {len(problems) - _SHOWN_ERRORS} more")
    return "; ".join(told)


def _told(error: BaseException) -> str:
    try:
        message = str(error)
    except Exception:  # noqa: BLE001 — its own code too
        message = ""
    return f"{type(error).__name__}: {message:.2000}" if message else type(error).__name__


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
