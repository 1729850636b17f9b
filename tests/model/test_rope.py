"""Rotary frequencies against transformers' YaRN, and tables against trigonometry."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from freehold.config import NAMED_CONFIGS, RopeConfig
from freehold.model import rope


@settings(max_examples=100, deadline=None)
@given(
    half=st.integers(1, 64),
    theta=st.sampled_from([10.0, 1e4, 150_000.0]),
    factor=st.sampled_from([1.0, 1.5, 32.0]),
    context=st.sampled_from([1, 7, 64, 4096]),
    betas=st.sampled_from([(32.0, 1.0), (16.0, 2.0), (1.5, 1.0)]),
    truncate=st.booleans(),
)
def test_frequencies_are_those_of_transformers(
    half: int, theta: float, factor: float, context: int, betas: tuple[float, float], truncate: bool
) -> None:
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRotaryEmbedding

    config = RopeConfig(
        theta=theta, factor=factor, original_context=context, beta_fast=betas[0], beta_slow=betas[1], truncate=truncate
    )
    parameters = {
        "rope_type": "yarn" if factor > 1 else "default",
        "rope_theta": theta,
        "factor": factor,
        "original_max_position_embeddings": context,
        "beta_fast": betas[0],
        "beta_slow": betas[1],
        "truncate": truncate,
    }
    names = parameters if factor > 1 else ("rope_type", "rope_theta")
    settings_of_theirs = GptOssConfig(
        head_dim=2 * half,
        max_position_embeddings=max(1, round(context * factor)),
        rope_parameters={name: parameters[name] for name in names},
    )
    theirs = GptOssRotaryEmbedding(settings_of_theirs)
    torch.testing.assert_close(rope.inverse_frequencies(config, 2 * half), theirs.inv_freq, rtol=2e-6, atol=0)
    assert config.concentration == pytest.approx(theirs.attention_scaling, rel=1e-12)


def test_gpt_oss_blends_between_the_published_pairs() -> None:
    # 64-wide heads: pairs up to 8.09 keep their frequency, those from 17.40 on are 32 times slower.
    config = NAMED_CONFIGS["gpt-oss-20b"].rope
    plain = rope.inverse_frequencies(RopeConfig(theta=config.theta, factor=1.0), 64)
    ratio = plain / rope.inverse_frequencies(config, 64)
    assert torch.allclose(ratio[:9], torch.ones(9))
    assert ((ratio[9:18] > 1) & (ratio[9:18] < 32)).all()
    assert torch.allclose(ratio[18:], torch.full((14,), 32.0))
    assert config.concentration == pytest.approx(1.3466, abs=1e-4)


def test_tables_of_any_positions() -> None:
    frequencies = torch.tensor([1.0, 0.01])
    cos, sin = rope.tables(frequencies, 1.5, torch.tensor([1000, 7, 1002]))
    for row, position in enumerate((1000, 7, 1002)):
        for pair, frequency in enumerate((1.0, 0.01)):
            assert float(cos[row, pair]) == pytest.approx(1.5 * math.cos(position * frequency), abs=1e-4)
            assert float(sin[row, pair]) == pytest.approx(1.5 * math.sin(position * frequency), abs=1e-4)
