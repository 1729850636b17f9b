"""What the KV cache keeps, what it forgets, and how much memory that takes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from freehold.config import ModelConfig
from freehold.model.kv_cache import FullLayer, KVCache, WindowedLayer
from tests.checkpoints import CPU, small_config

SHAPE = (2, 3)


def numbered(start: int, stop: int) -> torch.Tensor:
    """Keys that carry their position."""
    return torch.arange(start, stop, dtype=torch.float32).view(-1, 1, 1).expand(-1, *SHAPE)


def positions(keys: torch.Tensor) -> list[int]:
    return [int(position) for position in keys[:, 0, 0]]


@settings(max_examples=60, deadline=None)
@given(window=st.integers(1, 12) | st.none(), chunks=st.lists(st.integers(1, 20), min_size=1, max_size=40))
def test_a_query_finds_every_key_that_it_can_see(window: int | None, chunks: list[int]) -> None:
    layer = (
        FullLayer(SHAPE, 100, torch.float32, CPU)
        if window is None
        else WindowedLayer(SHAPE, window, torch.float32, CPU)
    )
    at = 0
    for chunk in chunks:
        seen = layer.append(numbered(at, at + chunk), -numbered(at, at + chunk))
        first = 0 if window is None else max(0, at - window + 1)
        assert positions(seen.keys) == list(range(first, at + chunk))
        assert torch.equal(seen.values, -seen.keys)
        at += chunk


@pytest.mark.parametrize("window", [1, 2, 7])
def test_windowed_layers_keep_one_key_less_than_the_window(window: int) -> None:
    layer = WindowedLayer(SHAPE, window, torch.bfloat16, CPU)
    for step in range(30):
        layer.append(numbered(step, step + 1).bfloat16(), numbered(step, step + 1).bfloat16())
        assert len(layer.keys) == min(step + 1, window - 1)
    layer.append(numbered(30, 130).bfloat16(), numbered(30, 130).bfloat16())  # a long prefill is not kept alive
    for kept in (layer.keys, layer.values):
        assert kept.untyped_storage().nbytes() == (window - 1) * 2 * 3 * 2


def filled(config: ModelConfig, count: int, step: int = 50) -> KVCache:
    cache = KVCache(config, dtype=torch.bfloat16, device=CPU)
    shape = (config.num_kv_heads, config.head_dim)
    for start in range(0, count, step):
        for layer in cache.layers:
            layer.append(*torch.zeros(2, min(step, count - start), *shape, dtype=torch.bfloat16))
    return cache


def test_memory_of_windows_is_constant_and_of_full_layers_follows_the_length() -> None:
    per_position = 2 * 2 * 16 * 2  # keys and values, heads, head size, bytes
    windowed = small_config(windows=(8, 8), max_context=10_000)
    assert filled(windowed, 3).num_bytes == 2 * 3 * per_position
    assert filled(windowed, 50).num_bytes == filled(windowed, 5000).num_bytes == 2 * 7 * per_position
    mixed = small_config(windows=(8, None), max_context=10_000)
    for length in (50, 300, 1000, 5000):
        full = filled(mixed, length).num_bytes - 7 * per_position
        assert length * per_position <= full <= (length + 1024) * per_position


def test_capacity_never_exceeds_the_context() -> None:
    config = small_config(windows=(None, None), max_context=1300)
    assert all(layer.keys.shape[0] == 1024 for layer in filled(config, 10).layers)
    assert all(layer.keys.shape[0] == 1300 for layer in filled(config, 1100).layers)
    small = small_config(windows=(None, None), max_context=40)
    assert all(layer.keys.shape[0] == 40 for layer in filled(small, 40).layers)


def test_types_are_the_models() -> None:
    cache = KVCache(small_config(), dtype=torch.bfloat16, device=CPU)
    assert cache.length == 0
    assert {layer.keys.dtype for layer in cache.layers} == {torch.bfloat16}
    assert [type(layer) for layer in cache.layers] == [WindowedLayer, FullLayer]
