"""Where Freehold keeps what it makes: a cache directory, of which all can be made again, and a data directory, of which
nothing can; named by the user or the desktop standard."""

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


def data_dir() -> Path:
    """`$FREEHOLD_DATA`, else `$XDG_DATA_HOME/freehold`, else `~/.local/share/freehold`. Not created here."""
    if named := os.environ.get("FREEHOLD_DATA"):
        return Path(named).expanduser()
    base = os.environ.get("XDG_DATA_HOME")
    return (Path(base) if base else Path.home() / ".local" / "share") / "freehold"
