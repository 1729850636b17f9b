"""Freehold: run, inspect, adapt and deploy gpt-oss on hardware you own.

    import freehold

    model = freehold.load("default")
    print(model.chat([{"role": "user", "content": "What is the capital of France?"}]))

Importing this package is cheap: torch is loaded when the first attribute below is used.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Model", "__version__", "load"]

if TYPE_CHECKING:
    from freehold.session.model import Model, load


def __getattr__(name: str) -> Any:
    if name in ("Model", "load"):
        from freehold.session import model

        return getattr(model, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
