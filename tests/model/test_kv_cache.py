"""What the KV cache keeps, what it forgets, and how much memory that takes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from freehold.config import ModelConfig
from freehold.engine.kv_store import kv_store_bytes, page_counts
from freehold.kernels import backends, ops
from freehold.kernels.kv import PAGE, KvType, num_pages
from freehold.model.batch import Batch, LayerKv
from freehold.model.kv_cache import KVCache
from tests.checkpoints import CPU, small_config
from tests.paged import store

KV_HEADS, HEAD_DIM = 2, 16


def draw(length: int, heads: int, seed: int) -> Tensor:
    return torch.randn(length, heads, HEAD_DIM, generator=torch.Generator().manual_seed(seed))


def write(batch: Batch, k: Tensor, v: Tensor) -> None:
    for layer in batch.layers:
        assert isinstance(layer, LayerKv)
        ops.kv_write(layer.pages, layer.sequences, k, v)


CHUNKS = st.lists(st.integers(1, 40) | st.sampled_from([63, 64, 65, 511, 512, 513, 600, 1500]), min_size=1, max_size=12)
WINDOWS = st.none() | st.integers(1, 70) | st.sampled_from([127, 128, 129, 511, 512, 513, 700, 1100, 3000])


def check_attention(type: KvType, window: int | None, chunks: list[int], *, exact: bool) -> None:
    """Over the cache it is, after every chunk, attention over everything that ever came."""
    total = sum(chunks)
    k, v = draw(total, KV_HEADS, 1), draw(total, KV_HEADS, 2)
    whole, at, sinks = store(type, KV_HEADS, total, HEAD_DIM), 0, torch.zeros(4)
    ops.kv_write(whole.pages, whole.last(total, total), k, v)
    config = small_config(windows=(window, None), max_context=100_000)
    cache = KVCache(config, type=type, device=CPU)
    for chunk in chunks:
        batch = cache.extend(chunk)
        write(batch, k[at : at + chunk], v[at : at + chunk])
        at += chunk
        assert cache.length == at
        assert batch.positions_T.tolist() == list(range(at - chunk, at))
        q = draw(chunk, 4, at)
        for layer, seen in zip(batch.layers, (window, None), strict=True):
            assert isinstance(layer, LayerKv)
            options = {"scale": HEAD_DIM**-0.5, "window": seen}
            ours = ops.attention(q, layer.pages, layer.sequences, sinks, **options)
            expected = ops.attention(q, whole.pages, whole.last(chunk, at), sinks, **options)
            if exact:
                assert torch.equal(ours, expected)
            else:
                torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-5)


@settings(max_examples=40, deadline=None)
@given(type=st.sampled_from(["f32", "bf16"]), window=WINDOWS, chunks=CHUNKS)
def test_attention_over_it_is_attention_over_everything(type: KvType, window: int | None, chunks: list[int]) -> None:
    check_attention(type, window, chunks, exact=backends.native() is not None)


@pytest.mark.usefixtures("reference_ops")
@pytest.mark.parametrize("type", ["f32", "bf16"])
@pytest.mark.parametrize("window", [None, 1, 100, 1100])
def test_with_reference_ops_too(type: KvType, window: int | None) -> None:
    check_attention(type, window, [1, 700, 512, 1, 64, 30], exact=False)


# --- memory -----------------------------------------------------------------------------------------------------


def filled(config: ModelConfig, count: int, step: int = 50, max_length: int | None = None) -> KVCache:
    cache = KVCache(config, type="bf16", device=CPU, max_length=max_length)
    for start in range(0, count, step):
        cache.extend(min(step, count - start))
    return cache


PER_PAGE = PAGE * 2 * KV_HEADS * HEAD_DIM * 2  # of a layer of small_config: positions, keys and values, bytes


def test_memory_of_windows_is_bounded_and_of_full_layers_follows_the_length() -> None:
    windowed = small_config(windows=(8, 8), max_context=100_000)
    assert filled(windowed, 20_000, step=500).num_bytes <= 2 * 9 * PER_PAGE
    assert filled(windowed, 20_000, step=1).num_bytes <= 2 * 2 * PER_PAGE
    full = small_config(windows=(None,), num_layers=1, max_context=100_000)
    for length in (50, 1024, 1025, 3000, 20_000):
        pages = filled(full, length, step=500).num_bytes / PER_PAGE
        assert num_pages(length) <= pages <= max(num_pages(length) + 16, num_pages(length) * 3 // 2)


def test_pages_never_exceed_the_context() -> None:
    config = small_config(windows=(None, None), max_context=1300)
    assert filled(config, 10).num_bytes == 2 * 16 * PER_PAGE
    assert filled(config, 1100).num_bytes == 2 * num_pages(1300) * PER_PAGE
    assert filled(small_config(windows=(None, None), max_context=40), 40).num_bytes == 2 * PER_PAGE
    assert filled(config, 1100, max_length=1100).num_bytes == 2 * num_pages(1100) * PER_PAGE


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
    pages = page_counts(config, tokens=context, max_num_seqs=1, chunk=512)
    planned = kv_store_bytes(config, pages, type)
    cache = KVCache(config, type=type, device=CPU, max_length=context)
    for chunk in chunks:
        cache.extend(chunk)
        assert cache.num_bytes <= planned


def test_types_are_what_was_asked_for() -> None:
    cache = KVCache(small_config(), type="bf16", device=CPU)
    assert cache.length == 0
    assert {kv.pages.keys.dtype for kv in cache.extend(3).layers if isinstance(kv, LayerKv)} == {torch.bfloat16}
