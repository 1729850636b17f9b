"""Reads the word lists of this folder: `name: a, b, c`, going on in lines that are indented; what follows a bar is held
out. Lines that begin with # say what a file is."""

import re
from functools import cache
from pathlib import Path

HERE = Path(__file__).parent


def lines_of(name: str) -> list[str]:
    """The lines of a file here that say something, joined where they go on."""
    text = re.sub(r"\n[ \t]+", " ", (HERE / name).read_text("utf-8"))
    return [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]


@cache
def lists_of(name: str) -> dict[str, tuple[tuple[str, ...], ...]]:
    """Of each list its entries: those to learn from, and those that are held out, where there are any."""
    found: dict[str, tuple[tuple[str, ...], ...]] = {}
    for line in lines_of(name):
        title, _, entries = line.partition(": ")
        found[title] = tuple(tuple(map(str.strip, side.split(","))) for side in entries.split(" | "))
    return found
