"""Logging and progress. Never logs prompts, replies or secrets; the library itself prints nothing."""

import logging
from collections.abc import Callable
from functools import cache

logger = logging.getLogger("freehold")

NOTICE = 25
"""The level, between INFO and WARNING, of what a person should see without asking: what a model will take."""

Progress = Callable[[str, int, int], None]
"""Called as `progress(label, done, total)` while something long runs, in bytes or steps; done == total ends it."""


def no_progress(label: str, done: int, total: int) -> None:
    """The default: long operations stay silent."""


@cache
def warn_once(message: str) -> None:
    """Log a warning the first time this exact message is given in this process."""
    logger.warning(message)


@cache
def info_once(message: str) -> None:
    """Log a piece of information the first time this exact message is given in this process."""
    logger.info(message)
