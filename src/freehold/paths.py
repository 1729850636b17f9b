"""Where Freehold keeps what it makes: one cache directory, named by the user or the desktop standard."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """`$FREEHOLD_CACHE`, else `$XDG_CACHE_HOME/freehold`, else `~/.cache/freehold`. Not created here."""
    if named := os.environ.get("FREEHOLD_CACHE"):
        return Path(named).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "freehold"


def models_dir() -> Path:
    """Models that Freehold fetched or made, one folder each."""
    return cache_dir() / "models"


def downloads_dir() -> Path:
    """Files as they were fetched."""
    return cache_dir() / "downloads"


def packed_dir() -> Path:
    """Weights in the layout of the kernels, one file per model and form. All of it can be made again."""
    return cache_dir() / "packed"
