"""The whole model against transformers' GptOssForCausalLM, and against itself: fed in pieces, and in packed weights."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from freehold.config import ExpertFormat, Layout, ModelConfig, RopeConfig, alternating_windows
from freehold.kernels import backends
from freehold.kernels.kv import KvType
from freehold.model.transformer import Transformer
from freehold.weights.layouts import WeightTable, open_checkpoint
from freehold.weights.packed import Form
from tests.checkpoints import (
    CPU,
    for_kernels,
    load,
    logits,
    oracle,
    oracle_logits,
    packed,
    random_table,
    save,
    small_config,
    tokens_of,
)

TOLERANCE = 1e-4  # of float32 logits of order 1; differences seen are around 3e-6

NO_YARN = RopeConfig(factor=1.0, original_context=128)
CONFIGS: dict[str, ModelConfig] = {
    "as gpt-oss, small": small_config(num_layers=4),
    "tied embeddings": small_config(tied_embeddings=True),
    "wide heads, one kv head": small_config(num_heads=4, num_kv_heads=1, head_dim=64),
    "no sharing of kv heads, odd count": small_config(num_heads=3, num_kv_heads=3, head_dim=2),
    "heads narrower than hidden": small_config(num_heads=2, num_kv_heads=1, head_dim=8),
    "one expert": small_config(num_experts=1, num_active_experts=1),
    "all experts active": small_config(num_experts=6, num_active_experts=6),
    "many experts, one active": small_config(num_experts=16, num_active_experts=1),
    "window of one": small_config(windows=alternating_windows(3, 1), num_layers=3),
    "window wider than the prompt": small_config(windows=alternating_windows(2, 500)),
    "no windows": small_config(windows=(None, None)),
    "windows only": small_config(windows=(8, 8)),
    "windows on odd layers": small_config(windows=(None, 8)),
    "no yarn": small_config(rope=NO_YARN),
    "yarn truncated": small_config(rope=RopeConfig(factor=4.0, original_context=32, truncate=True)),
    "yarn as published": small_config(head_dim=64, rope=RopeConfig(), max_context=131_072),
    "yarn with other betas": small_config(
        rope=RopeConfig(theta=1e4, factor=8, original_context=64, beta_fast=16, beta_slow=2)
    ),
    "expert width not of whole blocks": small_config(expert_width=41),
    "sizes not of whole blocks": small_config(hidden_size=50, expert_width=13),
    "both clamps bite": small_config(swiglu_limit=0.5),
    "another epsilon": small_config(norm_eps=0.1),
    "one layer": small_config(num_layers=1),
}


@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_checkpoints_saved_by_transformers(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    theirs = oracle(config, random_table(config))
    theirs.save_pretrained(tmp_path)
    ours = load(tmp_path)
    assert ours.config == config
    tokens = tokens_of(config, 100)  # longer than the window, and than the context before YaRN
    expected = oracle_logits(theirs, tokens)
    assert 0.5 < expected.std() < 2
    torch.testing.assert_close(logits(ours, tokens), expected, atol=TOLERANCE, rtol=0)


def test_three_shards_saved_by_transformers(tmp_path: Path) -> None:
    config = small_config()
    theirs = oracle(config, random_table(config))
    theirs.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) >= 3
    tokens = tokens_of(config, 40)
    torch.testing.assert_close(logits(load(tmp_path), tokens), oracle_logits(theirs, tokens), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("experts", list(ExpertFormat))
@pytest.mark.parametrize("shard_bytes", [1 << 40, 60_000])
@pytest.mark.parametrize("layout", list(Layout))
def test_every_layout_and_format(tmp_path: Path, layout: Layout, shard_bytes: int, experts: ExpertFormat) -> None:
    config = small_config(expert_width=64)
    table = random_table(config)
    if experts is ExpertFormat.MXFP4:
        table = packed(table)
    else:  # such files hold bfloat16, so that is what both sides compute with
        rounded = {n: t.bfloat16().float() for n, t in table.items() if n.endswith((".gate_up", ".down"))}  # type: ignore[union-attr]
        table = table | rounded
    theirs = oracle(config, table)
    save(tmp_path, config, table, layout, experts, shard_bytes)
    assert (len(list(tmp_path.glob("*.safetensors"))) >= 3) == (shard_bytes == 60_000)
    tokens = tokens_of(config, 50)
    torch.testing.assert_close(logits(load(tmp_path), tokens), oracle_logits(theirs, tokens), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", ["as gpt-oss, small", "no windows", "no yarn", "tied embeddings", "yarn truncated"])
def test_transformers_runs_what_we_write(name: str, tmp_path: Path) -> None:
    from transformers import GptOssForCausalLM

    config = CONFIGS[name]
    table = random_table(config)
    rounded = {n: t.bfloat16().float() for n, t in table.items() if n.endswith((".gate_up", ".down"))}  # type: ignore[union-attr]
    save(tmp_path, config, table, Layout.HF, ExpertFormat.BF16)
    theirs = GptOssForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    tokens = tokens_of(config, 60)
    model = Transformer(config, table | rounded, dtype=torch.float32, device=CPU)
    torch.testing.assert_close(logits(model, tokens), oracle_logits(theirs, tokens), atol=TOLERANCE, rtol=0)


def test_a_prompt_longer_than_a_block_of_queries(tmp_path: Path) -> None:
    config = small_config(windows=(200, None), max_context=1024, num_heads=2, num_kv_heads=1)
    table = random_table(config)
    tokens = tokens_of(config, 600)
    ours = Transformer(config, table, dtype=torch.float32, device=CPU)
    expected = oracle_logits(oracle(config, table), tokens)
    torch.testing.assert_close(logits(ours, tokens), expected, atol=TOLERANCE, rtol=0)


# --- in pieces --------------------------------------------------------------------------------------------------

IN_PIECES = ["as gpt-oss, small", "window of one", "windows only", "no windows", "all experts active"]


@pytest.mark.parametrize("name", IN_PIECES)
def test_step_by_step_equals_one_prefill(name: str) -> None:
    config = CONFIGS[name]
    model = Transformer(config, random_table(config), dtype=torch.float32, device=CPU)
    tokens = tokens_of(config, 60)
    whole = logits(model, tokens)
    torch.testing.assert_close(logits(model, tokens, [1] * 60), whole, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(logits(model, tokens, [37] + [1] * 23), whole, atol=TOLERANCE, rtol=0)


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(IN_PIECES),
    chunks=st.lists(st.integers(1, 30), min_size=1, max_size=8),
)
def test_any_chunking_equals_one_prefill(name: str, chunks: list[int]) -> None:
    config = CONFIGS[name]
    model = Transformer(config, random_table(config), dtype=torch.float32, device=CPU)
    tokens = tokens_of(config, sum(chunks))
    torch.testing.assert_close(logits(model, tokens, chunks), logits(model, tokens), atol=TOLERANCE, rtol=0)


def test_the_cache_grows_past_its_first_size() -> None:
    config = small_config(max_context=2048)
    model = Transformer(config, random_table(config), dtype=torch.float32, device=CPU)
    tokens = tokens_of(config, 1500)
    chunks = [250, 5, 1, 512, 300, 432]  # across 512 and 1024
    torch.testing.assert_close(logits(model, tokens, chunks), logits(model, tokens), atol=TOLERANCE, rtol=0)


def test_caches_do_not_know_each_other() -> None:
    config = small_config()
    model = Transformer(config, random_table(config), dtype=torch.float32, device=CPU)
    first, second = tokens_of(config, 20, seed=1), tokens_of(config, 20, seed=2)
    alone = logits(model, first)
    with torch.inference_mode():
        a, b = model.new_cache(), model.new_cache()
        out = []
        for i in range(20):
            out.append(model.unembed(model.run(first[i : i + 1], a)))
            model.run(second[i : i + 1], b)
    torch.testing.assert_close(torch.cat(out), alone, atol=TOLERANCE, rtol=0)


def test_later_tokens_change_nothing_before_them() -> None:
    config = small_config()
    model = Transformer(config, random_table(config), dtype=torch.float32, device=CPU)
    tokens = tokens_of(config, 30)
    changed = tokens.clone()
    changed[20:] = (changed[20:] + 1) % config.vocab_size
    before, after = logits(model, tokens), logits(model, changed)
    torch.testing.assert_close(before[:20], after[:20], atol=1e-5, rtol=0)
    assert (before[20:] - after[20:]).abs().amin(-1).max() > 1e-3


# --- packed for the native kernels ------------------------------------------------------------------------------

needs_native = pytest.mark.skipif(backends.native() is None, reason="the native kernels are not built")

PACKED: dict[str, ModelConfig] = {  # q8 and MXFP4 experts included
    "as gpt-oss, small": CONFIGS["as gpt-oss, small"],
    "tied embeddings": CONFIGS["tied embeddings"],
    "wide heads": small_config(num_heads=4, num_kv_heads=1, head_dim=32),
    "all experts active": small_config(num_experts=6, num_active_experts=6),
    "sizes not of whole panels": small_config(hidden_size=32, num_heads=3, num_kv_heads=1, vocab_size=51),
    "windows only": CONFIGS["windows only"],
}


def rounded(table: WeightTable) -> WeightTable:
    """Values that bfloat16 holds."""
    return {name: t.bfloat16().float() if isinstance(t, torch.Tensor) else t for name, t in table.items()}


@needs_native
@pytest.mark.parametrize("dense", ["f32", "bf16"])
@pytest.mark.parametrize("name", [*PACKED, "sizes not of whole blocks"])
def test_packed_plain_weights_give_the_same_logits(name: str, dense: Form) -> None:
    config = (PACKED | CONFIGS)[name]
    table = rounded(random_table(config))
    expected = logits(Transformer(config, table, dtype=torch.float32, device=CPU), tokens_of(config, 60))
    model = Transformer(config, for_kernels(config, table, dense), dtype=torch.float32, device=CPU)
    torch.testing.assert_close(logits(model, tokens_of(config, 60)), expected, atol=TOLERANCE, rtol=0)
    assert 0.5 < expected.std() < 2


@needs_native
@pytest.mark.parametrize("experts", list(ExpertFormat))
@pytest.mark.parametrize("dense", ["q8", "bf16"])
@pytest.mark.parametrize("name", PACKED)
def test_int8_activations_give_nearly_the_same_logits(name: str, dense: Form, experts: ExpertFormat) -> None:
    config = PACKED[name]
    table = rounded(random_table(config))
    if experts is ExpertFormat.MXFP4:
        table = packed(table)
    tokens = tokens_of(config, 60)
    expected = logits(Transformer(config, table, dtype=torch.float32, device=CPU), tokens)
    ours = logits(Transformer(config, for_kernels(config, table, dense), dtype=torch.float32, device=CPU), tokens)
    # Rounding may send a token to another expert, so single rows can differ; nearly all agree.
    errors = (ours - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert float(errors.median()) < 0.03
    assert torch.corrcoef(torch.stack((ours.flatten(), expected.flatten())))[0, 1] > 0.99


@needs_native
def test_packed_weights_on_reference_ops() -> None:
    """The same numbers but for the activations: what runs where something needs a gradient."""
    config = CONFIGS["tied embeddings"]
    table = packed(rounded(random_table(config)))
    laid_out = for_kernels(config, table, "bf16")
    tokens = tokens_of(config, 30)
    expected = logits(Transformer(config, table, dtype=torch.float32, device=CPU), tokens)
    with backends.reference_only():
        ours = logits(Transformer(config, laid_out, dtype=torch.float32, device=CPU), tokens)
    torch.testing.assert_close(ours, expected, atol=TOLERANCE, rtol=0)


@needs_native
@pytest.mark.parametrize("dense", ["q8", "f32"])
@pytest.mark.parametrize(
    ("name", "kv_type"),
    [
        ("as gpt-oss, small", "f32"),
        ("as gpt-oss, small", "bf16"),
        ("wide heads", "bf16"),
        ("wide heads", "q8"),
        ("tied embeddings", "bf16"),
        ("windows only", "f32"),
    ],
)
def test_native_logits_do_not_depend_on_how_tokens_are_fed(name: str, dense: Form, kv_type: KvType) -> None:
    """To the bit: what a cache or a batch changes about the arithmetic must be nothing."""
    config = PACKED[name]
    model = Transformer(
        config,
        for_kernels(config, packed(random_table(config)), dense),
        dtype=torch.float32,
        device=CPU,
        kv_type=kv_type,
    )
    assert model.kv_type == kv_type
    tokens = tokens_of(config, 110)
    whole = logits(model, tokens)
    assert torch.equal(logits(model, tokens, [1] * 110), whole)
    assert torch.equal(logits(model, tokens, [64, 1, 1, 33, 2, 9]), whole)


@needs_native
@pytest.mark.usefixtures("native_settings")
def test_nor_on_threads_nor_on_what_the_cache_dropped() -> None:
    from freehold.kernels import native

    config = small_config(windows=(100, None, 8), num_layers=3, max_context=4096, head_dim=32)
    table = for_kernels(config, packed(random_table(config)), "q8")
    model = Transformer(config, table, dtype=torch.float32, device=CPU, kv_type="q8")
    tokens = tokens_of(config, 1700)
    whole = logits(model, tokens)
    native.set_threads(3)
    assert torch.equal(logits(model, tokens, [512, 512, 512, 150, *[1] * 14]), whole)
    native.set_threads(1)
    assert torch.equal(logits(model, tokens, [1, 999, 30, 1, 669]), whole)


@needs_native
@pytest.mark.parametrize(("kv_type", "most"), [("bf16", 0.005), ("q8", 0.02)])
def test_smaller_caches_are_close(kv_type: KvType, most: float) -> None:
    config = PACKED["wide heads"]
    table = rounded(random_table(config))
    tokens = tokens_of(config, 100)
    expected = logits(Transformer(config, table, dtype=torch.float32, device=CPU), tokens)
    model = Transformer(config, table, dtype=torch.float32, device=CPU, kv_type=kv_type)
    errors = (logits(model, tokens) - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert 0 < float(errors.median()) < most


# --- types and memory -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("experts", list(ExpertFormat))
def test_bfloat16_is_close_to_float32(tmp_path: Path, experts: ExpertFormat) -> None:
    config = small_config(num_layers=4)
    table = random_table(config, dtype=torch.bfloat16)
    save(tmp_path, config, table, experts=experts)
    tokens = tokens_of(config, 60)
    exact, rounded = logits(load(tmp_path), tokens), logits(load(tmp_path, torch.bfloat16), tokens)
    assert rounded.dtype == torch.float32
    # Rounding may send a token to another expert, so single logits can differ; on the whole they agree.
    assert (exact - rounded).abs().median() < 0.05
    assert torch.corrcoef(torch.stack((exact.flatten(), rounded.flatten())))[0, 1] > 0.99
    stepwise = logits(load(tmp_path, torch.bfloat16), tokens, [1] * 60)
    assert torch.corrcoef(torch.stack((stepwise.flatten(), rounded.flatten())))[0, 1] > 0.99


def test_experts_keep_their_form_and_mapped_tensors_are_not_copied(tmp_path: Path) -> None:
    config = small_config()
    save(tmp_path, config, packed(random_table(config, dtype=torch.bfloat16)))
    table = open_checkpoint(tmp_path).table()
    model = Transformer(config, table, dtype=torch.bfloat16, device=CPU)
    assert model.layers[0].experts.gate_up.shape == (4, 64, 64)
    assert model.layers[0].experts.gate_up.blocks.data_ptr() == table["layers.0.gate_up"].blocks.data_ptr()  # type: ignore[union-attr]
    assert model.layers[1].attention.o.weight_OD.data_ptr() == table["layers.1.o.weight"].data_ptr()  # type: ignore[union-attr]
    assert model.embedding_VD.data_ptr() == table["embedding"].data_ptr()  # type: ignore[union-attr]


def test_loading_reports_every_layer() -> None:
    config = small_config(num_layers=3)
    seen: list[tuple[str, int, int]] = []
    Transformer(config, random_table(config), dtype=torch.float32, device=CPU, progress=lambda *step: seen.append(step))
    assert seen == [("loading layers", i, 3) for i in range(4)]


def test_gradients_reach_every_parameter() -> None:
    config = small_config(num_experts=2, num_active_experts=2)
    table = random_table(config)
    for tensor in table.values():
        assert isinstance(tensor, torch.Tensor)
        tensor.requires_grad_()
    model = Transformer(config, table, dtype=torch.float32, device=CPU)
    out = model.unembed(model.run(tokens_of(config, 12), model.new_cache()))
    torch.autograd.backward(torch.nn.functional.cross_entropy(out, tokens_of(config, 12, seed=1)))
    for name, tensor in table.items():
        assert isinstance(tensor, torch.Tensor)
        assert tensor.grad is not None, name
        assert tensor.grad.isfinite().all(), name
        assert tensor.grad.abs().sum() > 0, name
