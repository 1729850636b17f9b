"""The memory plan against sizes that are known otherwise."""

import torch

from freehold.config import NAMED_CONFIGS
from freehold.model.kv_cache import KVCache
from freehold.weights.memory import plan_memory
from tests.checkpoints import CPU, small_config


def test_weights_of_gpt_oss_20b_are_its_checkpoint() -> None:
    plan = plan_memory(NAMED_CONFIGS["gpt-oss-20b"], context=4096, expert_bits=4.25, dense_bytes=2)
    assert round((plan.dense + plan.experts) / 2**30, 1) == 12.8
    # 12 full layers of 4,096 and 12 windowed ones of 127 positions, each 2 · 8 heads · 64 · 2 bytes.
    assert plan.kv_cache == 12 * (4096 + 127) * 2 * 8 * 64 * 2
    assert plan.total == plan.dense + plan.experts + plan.kv_cache + plan.scratch


def test_the_kv_cache_holds_what_was_planned() -> None:
    config = small_config(num_layers=4, max_context=512)
    cache = KVCache(config, dtype=torch.float32, device=CPU)
    for _ in range(2):
        for layer in cache.layers:
            layer.append(torch.zeros(256, 2, 16), torch.zeros(256, 2, 16))
    assert cache.num_bytes == plan_memory(config, context=512, expert_bits=4.25, dense_bytes=4).kv_cache


def test_short_contexts_do_not_fill_the_window() -> None:
    config = small_config()
    one, two = (plan_memory(config, context=n, expert_bits=16, dense_bytes=2).kv_cache for n in (1, 2))
    assert two == 2 * one
