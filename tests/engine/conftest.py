"""A small model with windowed and full layers, and engines for it."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import freehold
from freehold.config import ModelConfig, RopeConfig
from freehold.engine.core import Engine
from freehold.engine.options import EngineOptions
from freehold.model.transformer import Transformer
from freehold.weights.synth import write_random_checkpoint

VOCABULARY = 200
CONTEXT = 640

MakeEngine = Callable[..., Engine]


@pytest.fixture(scope="session")
def transformer(tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    config = ModelConfig(
        num_layers=4, hidden_size=64, expert_width=32, num_experts=4, num_active_experts=2, num_heads=4, num_kv_heads=2,
        head_dim=16, vocab_size=VOCABULARY, windows=(70, None, 70, None), max_context=CONTEXT,
        rope=RopeConfig(factor=1.0, original_context=CONTEXT),
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("engine") / "model"
    write_random_checkpoint(folder, config)
    return freehold.load(folder, device="cpu", dtype="float32").transformer


@pytest.fixture
def make_engine(transformer: Transformer) -> Iterator[MakeEngine]:
    """Engines whose books must balance when the test is over, with nothing left but cached prefixes."""
    engines: list[Engine] = []

    def make(*, clock: Any = None, **options: Any) -> Engine:
        given = EngineOptions(
            **{"context": CONTEXT, "kv_tokens": 8 * CONTEXT, "chunk": 64, "max_num_seqs": 40} | options
        )
        engines.append(Engine(transformer, given) if clock is None else Engine(transformer, given, clock=clock))
        return engines[-1]

    yield make
    for engine in engines:
        engine.check_integrity()
        engine.close()
        engine.clear_prefixes()
        engine.check_integrity()
        assert not any(engine.stats().pages_in_use)


@pytest.fixture
def engine(make_engine: MakeEngine) -> Engine:
    return make_engine()


@pytest.fixture(scope="session")
def model_folder(transformer: Transformer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return next(path for path in tmp_path_factory.getbasetemp().glob("engine*/model"))
