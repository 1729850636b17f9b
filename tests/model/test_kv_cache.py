"""What the KV cache keeps, what it forgets, and how much memory that takes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from freehold.config import ModelConfig
from freehold.kernels import backends, ops
from freehold.kernels.kv import ALIGNMENT, KvBuffer, KvType, new_buffer
from freehold.model.kv_cache import KVCache, LayerCache, kv_cache_bytes
from tests.checkpoints import CPU, small_config

KV_HEADS, HEAD_DIM = 1, 32


def layer(type: KvType, window: int | None, max_length: int = 100_000) -> LayerCache:
    return LayerCache(type, KV_HEADS, HEAD_DIM, window=window, max_length=max_length, device=CPU)


def draw(length: int, heads: int, seed: int) -> Tensor:
    return torch.randn(length, heads, HEAD_DIM, generator=torch.Generator().manual_seed(seed))


def whole(type: KvType, k: Tensor, v: Tensor) -> KvBuffer:
    """A buffer with everything that ever came."""
    buffer = new_buffer(type, KV_HEADS, len(k), HEAD_DIM, CPU)
    ops.kv_write(buffer, k, v, 0)
    return buffer


def attention(q: Tensor, buffer: KvBuffer, length: int, window: int | None) -> Tensor:
    return ops.attention(q, buffer, length, torch.zeros(q.shape[1]), scale=HEAD_DIM**-0.5, window=window)


CHUNKS = st.lists(
    st.integers(1, 40) | st.sampled_from([511, 512, 513, 600, 1023, 1024, 1025, 1500]), min_size=1, max_size=12
)
WINDOWS = st.none() | st.integers(1, 40) | st.sampled_from([127, 128, 511, 512, 513, 700, 1024, 1100, 3000])


@settings(max_examples=60, deadline=None)
@given(type=st.sampled_from(["f32", "bf16", "q8"]), window=WINDOWS, chunks=CHUNKS)
def test_attention_over_it_is_attention_over_everything(type: KvType, window: int | None, chunks: list[int]) -> None:
    total = sum(chunks)
    k, v = draw(total, KV_HEADS, 1), draw(total, KV_HEADS, 2)
    everything, cache, at = whole(type, k, v), layer(type, window), 0
    for chunk in chunks:
        cache.append(k[at : at + chunk], v[at : at + chunk])
        at += chunk
        assert cache.first + cache.length == at
        assert cache.first % ALIGNMENT == 0
        q = draw(min(chunk, 40), 2, at)  # of long chunks the last queries
        ours, expected = attention(q, cache.buffer, cache.length, window), attention(q, everything, at, window)
        if backends.native() is not None:
            assert torch.equal(ours, expected)
        else:
            torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.usefixtures("reference_ops")
@pytest.mark.parametrize("type", ["f32", "bf16", "q8"])
@pytest.mark.parametrize("window", [None, 1, 100, 1100])
def test_with_reference_ops_too(type: KvType, window: int | None) -> None:
    k, v = draw(3000, KV_HEADS, 1), draw(3000, KV_HEADS, 2)
    everything, cache, at = whole(type, k, v), layer(type, window), 0
    for chunk in (1, 700, 512, 1200, 500, 1, 30):
        cache.append(k[at : at + chunk], v[at : at + chunk])
        at += chunk
        q = draw(min(chunk, 40), 2, at)
        ours = attention(q, cache.buffer, cache.length, window)
        torch.testing.assert_close(ours, attention(q, everything, at, window), atol=1e-6, rtol=1e-5)


@settings(max_examples=60, deadline=None)
@given(type=st.sampled_from(["f32", "bf16", "q8"]), window=WINDOWS, chunks=CHUNKS)
def test_rows_are_the_positions_they_say(type: KvType, window: int | None, chunks: list[int]) -> None:
    """Every key from the window of the first query on, and no fewer."""
    total = sum(chunks)
    k, v = draw(total, KV_HEADS, 1), draw(total, KV_HEADS, 2)
    everything, cache, at = whole(type, k, v), layer(type, window), 0
    for chunk in chunks:
        cache.append(k[at : at + chunk], v[at : at + chunk])
        assert cache.first <= (0 if window is None else max(0, at - window + 1))
        at += chunk
        for held, all_of_it in zip(cache.buffer.tensors(), everything.tensors(), strict=True):
            assert torch.equal(held[:, : cache.length], all_of_it[:, cache.first : at])


# --- memory -----------------------------------------------------------------------------------------------------


def filled(config: ModelConfig, count: int, step: int = 50, max_length: int | None = None) -> KVCache:
    cache = KVCache(config, type="bf16", device=CPU, max_length=max_length)
    shape = (config.num_kv_heads, config.head_dim)
    for start in range(0, count, step):
        for one in cache.layers:
            one.append(*torch.zeros(2, min(step, count - start), *shape, dtype=torch.bfloat16))
    return cache


PER_POSITION = 2 * 2 * 16 * 2  # of a layer of small_config: keys and values, heads, head size, bytes


def test_memory_of_windows_is_bounded_and_of_full_layers_follows_the_length() -> None:
    windowed = small_config(windows=(8, 8), max_context=100_000)
    assert filled(windowed, 20_000, step=500).num_bytes == 2 * 1024 * PER_POSITION
    mixed = small_config(windows=(8, None), max_context=100_000)
    for length in (50, 1024, 1025, 3000, 20_000):
        full = filled(mixed, length, step=500).num_bytes - 1024 * PER_POSITION
        assert length * PER_POSITION <= full <= max(length + 1024, length * 3 // 2) * PER_POSITION


def test_capacity_never_exceeds_the_context() -> None:
    config = small_config(windows=(None, None), max_context=1300)
    assert all(one.buffer.capacity == 1024 for one in filled(config, 10).layers)
    assert all(one.buffer.capacity == 1300 for one in filled(config, 1100).layers)
    small = small_config(windows=(None, None), max_context=40)
    assert all(one.buffer.capacity == 40 for one in filled(small, 40).layers)
    assert all(one.buffer.capacity == 1100 for one in filled(config, 1100, max_length=1100).layers)


@settings(max_examples=60, deadline=None)
@given(
    type=st.sampled_from(["f32", "bf16"]),
    window=WINDOWS,
    chunks=st.lists(st.integers(1, 40) | st.sampled_from([511, 512]), min_size=1, max_size=16),
    spare=st.integers(0, 3000),
)
def test_it_never_takes_more_than_was_planned(type: KvType, window: int | None, chunks: list[int], spare: int) -> None:
    config = small_config(windows=(window, None), max_context=100_000)
    context = sum(chunks) + spare
    planned = kv_cache_bytes(config, type=type, context=context, chunk=512)
    cache = KVCache(config, type=type, device=CPU, max_length=context)
    for chunk in chunks:
        for one in cache.layers:
            one.append(*torch.zeros(2, chunk, config.num_kv_heads, config.head_dim))
        assert cache.num_bytes <= planned
    if not spare and (window is None or window >= context):
        assert cache.num_bytes == planned


def test_short_contexts_do_not_fill_the_window() -> None:
    one, two = (kv_cache_bytes(small_config(), type="bf16", context=n, chunk=512) for n in (1, 2))
    assert two == 2 * one == 2 * 2 * PER_POSITION


def test_types_are_what_was_asked_for() -> None:
    cache = KVCache(small_config(), type="bf16", device=CPU)
    assert cache.length == 0
    assert {one.buffer.keys.dtype for one in cache.layers} == {torch.bfloat16}
    assert [one.window for one in cache.layers] == [8, None]
