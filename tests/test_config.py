"""config.json in both published forms: what was published, what transformers makes of ours, and what is refused."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from freehold.config import (
    NAMED_CONFIGS,
    ModelConfig,
    RopeConfig,
    alternating_windows,
    from_hf,
    from_original,
    to_hf,
    to_original,
)
from freehold.errors import CheckpointError, FreeholdError, UnsupportedError, UsageError
from tests.checkpoints import small_config

# As published at huggingface.co/openai/gpt-oss-20b, in config.json and original/config.json.
PUBLISHED_HF: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": 200002,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072,
    "model_type": "gpt_oss",
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "output_router_logits": False,
    "pad_token_id": 199999,
    "quantization_config": {
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
        "quant_method": "mxfp4",
    },
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "router_aux_loss_coef": 0.9,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "transformers_version": "4.55.0.dev0",
    "use_cache": True,
    "vocab_size": 201088,
}
PUBLISHED_ORIGINAL: dict[str, Any] = {
    "num_hidden_layers": 24,
    "num_experts": 32,
    "experts_per_token": 4,
    "vocab_size": 201088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "swiglu_limit": 7.0,
    "head_dim": 64,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "sliding_window": 128,
    "initial_context_length": 4096,
    "rope_theta": 150000,
    "rope_scaling_factor": 32.0,
    "rope_ntk_alpha": 1,
    "rope_ntk_beta": 32,
}


@pytest.mark.parametrize(("name", "total", "active"), [("gpt-oss-20b", 20.91, 3.61), ("gpt-oss-120b", 116.83, 5.13)])
def test_parameter_counts_are_the_published_ones(name: str, total: float, active: float) -> None:
    # https://arxiv.org/abs/2508.10925, table 1.
    config = NAMED_CONFIGS[name]
    assert round(config.num_parameters / 1e9, 2) == total
    assert round(config.num_active_parameters / 1e9, 2) == active


def test_tied_embeddings_count_once() -> None:
    untied, tied = small_config(), small_config(tied_embeddings=True)
    assert untied.num_parameters - tied.num_parameters == 96 * 64
    assert untied.num_active_parameters == tied.num_active_parameters


def test_the_published_files_are_gpt_oss_20b() -> None:
    assert from_hf(PUBLISHED_HF, "config.json") == NAMED_CONFIGS["gpt-oss-20b"]
    assert from_original(PUBLISHED_ORIGINAL, "config.json") == NAMED_CONFIGS["gpt-oss-20b"]


def test_what_we_write_says_what_was_published() -> None:
    ours = to_hf(NAMED_CONFIGS["gpt-oss-20b"], quantised=True)
    for name, value in ours.items():
        if name != "dtype":  # newer than the published file
            assert PUBLISHED_HF[name] == value, name
    assert to_original(NAMED_CONFIGS["gpt-oss-20b"]) == PUBLISHED_ORIGINAL


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    num_layers, num_kv_heads = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    context, factor = draw(st.integers(1, 10_000)), draw(st.sampled_from([1.0, 1.5, 2.0, 32.0]))
    window = draw(st.integers(1, 300))
    kinds = st.lists(st.booleans(), min_size=num_layers, max_size=num_layers)
    windows = draw(
        st.sampled_from([alternating_windows(num_layers, window), (None,) * num_layers])
        | kinds.map(lambda sliding: tuple(window if slides else None for slides in sliding))
    )
    max_context = draw(st.just(round(context * factor)) | st.integers(1, 10**6))
    rope: dict[str, Any] = {"theta": draw(st.floats(1.5, 1e7)), "factor": factor, "original_context": context}
    if factor > 1:
        rope |= {"beta_fast": draw(st.floats(2, 64)), "beta_slow": draw(st.floats(0.1, 2))}
        rope |= {"truncate": draw(st.booleans())}
    else:
        rope |= {"original_context": max_context}  # without a stretch there is only one context length
    sizes = {name: draw(st.integers(1, 5000)) for name in ("hidden_size", "expert_width", "num_experts", "vocab_size")}
    return ModelConfig(
        num_layers=num_layers,
        num_active_experts=draw(st.integers(1, sizes["num_experts"])),
        num_heads=num_kv_heads * draw(st.integers(1, 8)),
        num_kv_heads=num_kv_heads,
        head_dim=2 * draw(st.integers(1, 64)),
        windows=windows,
        max_context=max_context,
        rope=RopeConfig(**rope),
        norm_eps=draw(st.sampled_from([1e-5, 1e-6])),
        swiglu_limit=draw(st.floats(0.5, 1e4)),
        tied_embeddings=draw(st.booleans()),
        **sizes,
    )


def through_json(raw: dict[str, Any]) -> Any:
    return json.loads(json.dumps(raw))


@settings(max_examples=150, deadline=None)
@given(configs(), st.booleans())
def test_hf_round_trip(config: ModelConfig, quantised: bool) -> None:
    raw = through_json(to_hf(config, quantised=quantised))
    assert from_hf(raw, "config.json") == config
    assert ("quantization_config" in raw) == quantised


@settings(max_examples=150, deadline=None)
@given(configs())
def test_original_round_trip_or_refusal(config: ModelConfig) -> None:
    window = next((w for w in config.windows if w), None)
    expressible = (
        config.windows in ((None,) * config.num_layers, alternating_windows(config.num_layers, window or 1))
        and config.norm_eps == 1e-5
        and not config.rope.truncate
        and config.max_context == round(config.rope.original_context * config.rope.factor)
    )
    if not expressible:
        with pytest.raises(UnsupportedError, match="original layout"):
            to_original(config)
        return
    back = from_original(through_json(to_original(config)), "config.json")
    # This layout stores tied embeddings twice, so the model that comes back is the same function of untied ones.
    assert {f: getattr(back, f) for f in ModelConfig.__slots__ if f != "tied_embeddings"} == {
        f: getattr(config, f) for f in ModelConfig.__slots__ if f != "tied_embeddings"
    }


def test_hf_holds_one_window_only() -> None:
    with pytest.raises(UnsupportedError, match="one window"):
        to_hf(small_config(windows=(8, 16)), quantised=False)


@settings(max_examples=30, deadline=None)
@given(configs())
def test_transformers_understands_ours(config: ModelConfig) -> None:
    from transformers import GptOssConfig

    theirs = GptOssConfig.from_dict(through_json(to_hf(config, quantised=False)))
    assert theirs.num_hidden_layers == config.num_layers
    assert theirs.hidden_size == config.hidden_size
    assert theirs.intermediate_size == config.expert_width
    assert theirs.num_local_experts == config.num_experts
    assert theirs.num_experts_per_tok == config.num_active_experts
    assert theirs.num_attention_heads == config.num_heads
    assert theirs.num_key_value_heads == config.num_kv_heads
    assert theirs.head_dim == config.head_dim
    assert theirs.vocab_size == config.vocab_size
    assert theirs.max_position_embeddings == config.max_context
    assert theirs.rms_norm_eps == config.norm_eps
    assert theirs.swiglu_limit == config.swiglu_limit
    assert theirs.swiglu_alpha == 1.702
    assert theirs.tie_word_embeddings == config.tied_embeddings
    windows = {"sliding_attention": theirs.sliding_window, "full_attention": None}
    assert tuple(windows[kind] for kind in theirs.layer_types) == config.windows
    rope = theirs.rope_parameters
    assert rope["rope_theta"] == config.rope.theta
    if config.rope.factor == 1:
        assert rope["rope_type"] == "default"
        return
    assert rope["rope_type"] == "yarn"
    assert rope["factor"] == config.rope.factor
    assert rope["original_max_position_embeddings"] == config.rope.original_context
    assert (rope["beta_fast"], rope["beta_slow"]) == (config.rope.beta_fast, config.rope.beta_slow)
    assert rope["truncate"] == config.rope.truncate


def hf(**changes: Any) -> dict[str, Any]:
    return to_hf(small_config(), quantised=True) | changes


def hf_without(*names: str) -> dict[str, Any]:
    return {name: value for name, value in hf().items() if name not in names}


def test_silence_means_what_it_means_to_transformers() -> None:
    from transformers import GptOssConfig

    raw = hf_without("rope_scaling", "rope_theta", "layer_types", "sliding_window", "rms_norm_eps", "head_dim")
    ours, theirs = from_hf(raw, "config.json"), GptOssConfig.from_dict(dict(raw))
    assert ours.rope == RopeConfig(
        theta=theirs.rope_parameters["rope_theta"],
        factor=theirs.rope_parameters["factor"],
        original_context=theirs.rope_parameters["original_max_position_embeddings"],
        beta_fast=theirs.rope_parameters["beta_fast"],
        beta_slow=theirs.rope_parameters["beta_slow"],
        truncate=theirs.rope_parameters["truncate"],
    )
    assert ours.windows == (theirs.sliding_window, None)
    assert theirs.layer_types == ["sliding_attention", "full_attention"]
    assert (ours.norm_eps, ours.head_dim) == (theirs.rms_norm_eps, theirs.head_dim)


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_both_names_of_the_rope_section(key: str) -> None:
    section = {"rope_type": "yarn", "factor": 2, "original_max_position_embeddings": 64, "rope_theta": 1e4}
    rope = from_hf(hf_without("rope_scaling") | {key: section}, "config.json").rope
    assert rope == RopeConfig(theta=1e4, factor=2, original_context=64, truncate=True)


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"model_type": "llama"}, CheckpointError, "'llama', not 'gpt_oss'"),
        ({"hidden_act": "gelu"}, UnsupportedError, "hidden_act is 'gelu'"),
        ({"attention_bias": False}, UnsupportedError, "attention_bias"),
        ({"swiglu_alpha": 1.0}, UnsupportedError, "swiglu_alpha"),
        ({"rope_scaling": {"rope_type": "llama3"}}, UnsupportedError, "'llama3'"),
        ({"rope_scaling": {"rope_type": "yarn", "mscale": 0.7}}, UnsupportedError, "mscale"),
        ({"rope_scaling": {"rope_type": "yarn", "attention_factor": 2.0}}, UnsupportedError, "attention_factor"),
        ({"rope_scaling": {"rope_type": "yarn", "partial_rotary_factor": 0.5}}, UnsupportedError, "partial_rotary"),
        ({"rope_scaling": {"rope_type": "yarn", "beta_slow": 0}}, CheckpointError, "beta_slow"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 0.5}}, CheckpointError, "factor"),
        ({"rope_scaling": "yarn"}, CheckpointError, "'rope_scaling' must be an object"),
        ({"rope_theta": 1.0}, CheckpointError, "theta"),
        ({"layer_types": ["full_attention"]}, CheckpointError, "1 layer types for 2 layers"),
        ({"layer_types": ["chunked_attention"] * 2}, CheckpointError, "chunked_attention"),
        ({"layer_types": 7}, CheckpointError, "layer type"),
        ({"sliding_window": 0}, CheckpointError, "window"),
        ({"sliding_window": "8"}, CheckpointError, "'sliding_window' must be a number"),
        ({"num_experts_per_tok": 5}, CheckpointError, "5 active experts"),
        ({"num_key_value_heads": 3}, CheckpointError, "3 key/value heads"),
        ({"head_dim": 15}, CheckpointError, "head_dim must be even"),
        ({"hidden_size": 64.5}, CheckpointError, "'hidden_size' must be an integer"),
        ({"vocab_size": True}, CheckpointError, "'vocab_size' must be a number"),
        ({"vocab_size": 0}, CheckpointError, "vocab_size"),
        ({"num_hidden_layers": 10**12, "layer_types": None}, CheckpointError, "num_hidden_layers"),
        ({"rms_norm_eps": float("nan")}, CheckpointError, "rms_norm_eps"),
        ({"rms_norm_eps": -1e-5}, CheckpointError, "norm_eps"),
        ({"swiglu_limit": 0}, CheckpointError, "swiglu_limit"),
        ({"tie_word_embeddings": "no"}, CheckpointError, "'tie_word_embeddings' must be true or false"),
    ],
)
def test_what_is_not_gpt_oss_is_refused_by_name(changes: dict[str, Any], error: type, said: str) -> None:
    with pytest.raises(error) as caught:
        from_hf(hf(**changes), "/models/x/config.json")
    assert str(caught.value).startswith("/models/x/config.json: ")
    assert said in str(caught.value)


@pytest.mark.parametrize("name", ["num_hidden_layers", "hidden_size", "num_local_experts", "vocab_size"])
def test_missing_fields_are_named(name: str) -> None:
    with pytest.raises(CheckpointError, match=f"config.json: '{name}' must be a number, got None"):
        from_hf(hf_without(name), "config.json")


absurd = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from([10**400, -(10**400), 1e308, -1, 0, 2**63, float("inf"), float("nan"), "8", [], {}, [[]], [{}]])
    | st.dictionaries(st.sampled_from(["rope_type", "factor", "rope_theta", "beta_fast"]), st.floats() | st.text())
)


@settings(max_examples=400, deadline=None)
@given(data=st.data(), in_rope=st.booleans())
def test_absurd_values_never_raise_anything_else(data: st.DataObject, in_rope: bool) -> None:
    form, raw = data.draw(
        st.sampled_from([(from_hf, hf()), (from_original, to_original(small_config(max_context=128)))])
    )
    place = raw["rope_scaling"] if in_rope and "rope_scaling" in raw else raw
    for name in data.draw(st.lists(st.sampled_from(sorted(place)), min_size=1, max_size=3)):
        place[name] = data.draw(absurd)
    try:
        form(raw, "the/config.json")
    except FreeholdError as error:
        assert not isinstance(error, UsageError)
        assert str(error).startswith("the/config.json: ")
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_layers": 0}, "num_layers must be a positive integer"),
        ({"hidden_size": 64.0}, "hidden_size must be a positive integer"),
        ({"num_active_experts": 9}, "9 active experts out of only 4"),
        ({"num_heads": 5}, "5 query heads"),
        ({"head_dim": 3}, "head_dim must be even"),
        ({"windows": (8,)}, "1 layer types for 2 layers"),
        ({"windows": (8, 0)}, "at least one key, got 0"),
        ({"norm_eps": float("inf")}, "norm_eps"),
        ({"swiglu_limit": float("nan")}, "swiglu_limit"),
    ],
)
def test_impossible_models_cannot_be_made(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        small_config(**changes)


@pytest.mark.parametrize(
    "changes",
    [{"theta": 1.0}, {"factor": 0.9}, {"factor": float("nan")}, {"original_context": 0}, {"beta_fast": 0.0}],
)
def test_impossible_ropes_cannot_be_made(changes: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="rope needs"):
        RopeConfig(**changes)
