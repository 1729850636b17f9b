"""Freehold: run, inspect, adapt and deploy gpt-oss on hardware you own.

    import freehold

    model = freehold.load("default")
    print(model.chat([{"role": "user", "content": "What is the capital of France?"}]))

Importing this package is cheap: torch is loaded when `load` or `Model` is first used.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Model", "__version__", "load", "tool"]

if TYPE_CHECKING:
    from freehold.session.model import Model, load
    from freehold.tools.functions import tool


def __getattr__(name: str) -> Any:
    if name in ("Model", "load"):
        from freehold.session import model

        return getattr(model, name)
    if name == "tool":
        from freehold.tools import functions

        return functions.tool
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
