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
