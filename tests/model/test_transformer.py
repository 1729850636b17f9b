"""The whole model against transformers' GptOssForCausalLM, and against itself when fed in pieces."""

from pathlib import Path
from typing import Any

import pytest
import torch

from freehold.config import ExpertFormat, Layout, ModelConfig, RopeConfig, alternating_windows
from tests.checkpoints import (
    CPU,
    load,
    logits,
    oracle,
    oracle_logits,
    packed,
    plain,
    random_table,
    save,
    small_config,
    tokens_of,
)
from freehold.weights.layouts import open_checkpoint

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.15}

CONFIGS: dict[str, ModelConfig] = {
    "as published in small": small_config(num_layers=4),
    "wide heads, no sharing": small_config(num_heads=3, num_kv_heads=3, head_dim=64),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_transformers(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    table = random_table(config)
    theirs = oracle(config, table)
    theirs.save_pretrained(tmp_path)
    tokens = tokens_of(config, 100)
    expected = oracle_logits(theirs, tokens)
    print(expected.std(), expected.abs().max())
    ours = logits(load(tmp_path), tokens)
    print((ours - expected).abs().max())
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)
