"""The shape of a gpt-oss model: one frozen value, read from and written to both published `config.json` forms.

Refuses whatever the gpt-oss architecture does not have (other activations, missing biases, other kinds of RoPE), so
that a foreign checkpoint is turned away before any of its tensors are touched.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Any

from freehold.errors import CheckpointError, UnsupportedError, UsageError

SWIGLU_ALPHA = 1.702
SWIGLU_LIMIT = 7.0  # of every published gpt-oss; some runtimes know no other
_LARGEST = 1e30  # beyond any size or constant of a model: refused before arithmetic overflows
_MAX_LAYERS = 10_000  # a damaged file may ask for billions; no model comes near this


class Layout(Enum):
    """How a checkpoint names and arranges its tensors."""

    HF = "hf"
    ORIGINAL = "original"


class ExpertFormat(Enum):
    """How a checkpoint stores its experts."""

    MXFP4 = "mxfp4"
    BF16 = "bf16"


class Rounding(Enum):
    """How numbers that MXFP4 lacks become numbers that it has: by chance, with the right mean, or the nearest."""

    RANDOM = "random"
    NEAREST = "nearest"


class DenseFormat(Enum):
    """How a GGUF file stores the large matrices that are not MXFP4."""

    Q8 = "q8"
    BF16 = "bf16"
    F32 = "f32"


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding; `factor` > 1 stretches it by YaRN (https://arxiv.org/abs/2309.00071)."""

    theta: float = 150_000.0
    factor: float = 32.0
    original_context: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = False

    def __post_init__(self) -> None:
        if not 1 < self.theta < math.inf or not 1 <= self.factor <= 2**20 or self.original_context < 1:
            raise UsageError(
                "rope needs a theta above 1, a factor from 1 to 2^20 and a positive original context; "
                f"got theta {self.theta}, factor {self.factor}, original context {self.original_context}"
            )
        if not (0 < self.beta_fast < math.inf and 0 < self.beta_slow < math.inf):
            raise UsageError(f"rope needs positive betas; got beta_fast {self.beta_fast}, beta_slow {self.beta_slow}")

    @property
    def concentration(self) -> float:
        """YaRN's factor on both cos and sin."""
        return 0.1 * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Sizes and constants of one model. `windows[i]` is layer i's attention window in keys, None for all keys."""

    num_layers: int
    hidden_size: int
    expert_width: int
    num_experts: int
    num_active_experts: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    windows: tuple[int | None, ...]
    max_context: int
    rope: RopeConfig = RopeConfig()
    norm_eps: float = 1e-5
    swiglu_limit: float = SWIGLU_LIMIT
    tied_embeddings: bool = False

    def __post_init__(self) -> None:
        for name in (
            "num_layers", "hidden_size", "expert_width", "num_experts", "num_active_experts",
            "num_heads", "num_kv_heads", "head_dim", "vocab_size", "max_context",
        ):  # fmt: skip
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UsageError(f"model config: {name} must be a positive integer, got {value!r}")
        if self.num_active_experts > self.num_experts:
            raise UsageError(f"model config: {self.num_active_experts} active experts out of only {self.num_experts}")
        if self.num_heads % self.num_kv_heads:
            raise UsageError(
                f"model config: {self.num_heads} query heads cannot share {self.num_kv_heads} key/value heads evenly"
            )
        if self.head_dim % 2:
            raise UsageError(f"model config: head_dim must be even for rotary embedding, got {self.head_dim}")
        if len(self.windows) != self.num_layers:
            raise UsageError(f"model config: {len(self.windows)} layer types for {self.num_layers} layers")
        smallest = min((window for window in self.windows if window is not None), default=1)
        if smallest < 1:
            raise UsageError(f"model config: an attention window must hold at least one key, got {smallest}")
        for name in ("norm_eps", "swiglu_limit"):
            if not 0 < getattr(self, name) < math.inf:
                raise UsageError(f"model config: {name} must be positive and finite, got {getattr(self, name)}")

    @property
    def supports_mxfp4(self) -> bool:
        """MXFP4 blocks are 32 long, along both experts' input dimensions."""
        return self.hidden_size % 32 == 0 and self.expert_width % 32 == 0

    @property
    def num_parameters(self) -> int:
        """All parameters; tied embeddings count once."""
        return self._num_dense_parameters() + self.num_layers * self.num_experts * self._parameters_per_expert()

    @property
    def num_expert_weights(self) -> int:
        """Numbers in the experts' matrices, without their biases: what MXFP4 packs."""
        return self.num_layers * self.num_experts * 3 * self.expert_width * self.hidden_size

    @property
    def num_active_parameters(self) -> int:
        """Parameters that take part in one token: of the embedding table only what the output layer reads."""
        dense = self._num_dense_parameters()
        if not self.tied_embeddings:
            dense -= self.vocab_size * self.hidden_size
        return dense + self.num_layers * self.num_active_experts * self._parameters_per_expert()

    def _parameters_per_expert(self) -> int:
        D, F = self.hidden_size, self.expert_width
        return 2 * F * D + 2 * F + D * F + D

    def _num_dense_parameters(self) -> int:
        D, H, N, K = self.hidden_size, self.head_dim, self.num_heads, self.num_kv_heads
        attention = (N + 2 * K) * H * (D + 1) + D * (N * H + 1) + N
        router = self.num_experts * (D + 1)
        embeddings = self.vocab_size * D * (1 if self.tied_embeddings else 2)
        return self.num_layers * (attention + router + 2 * D) + D + embeddings


def alternating_windows(num_layers: int, window: int) -> tuple[int | None, ...]:
    """gpt-oss's pattern: even layers see a window, odd layers see everything."""
    return tuple(window if layer % 2 == 0 else None for layer in range(num_layers))


def _gpt_oss(num_layers: int, num_experts: int) -> ModelConfig:
    return ModelConfig(
        num_layers=num_layers,
        hidden_size=2880,
        expert_width=2880,
        num_experts=num_experts,
        num_active_experts=4,
        num_heads=64,
        num_kv_heads=8,
        head_dim=64,
        vocab_size=201_088,
        windows=alternating_windows(num_layers, 128),
        max_context=131_072,
    )


NAMED_CONFIGS: Mapping[str, ModelConfig] = {
    "gpt-oss-20b": _gpt_oss(num_layers=24, num_experts=32),
    "gpt-oss-120b": _gpt_oss(num_layers=36, num_experts=128),
    "tiny": ModelConfig(
        num_layers=4,
        hidden_size=64,
        expert_width=96,
        num_experts=8,
        num_active_experts=4,
        num_heads=8,
        num_kv_heads=2,
        head_dim=16,
        vocab_size=512,
        windows=alternating_windows(4, 16),
        max_context=2048,
        rope=RopeConfig(factor=32.0, original_context=64),
    ),
}


# --- Hugging Face's config.json ---------------------------------------------------------------------------------


def from_hf(raw: Mapping[str, Any], source: str) -> ModelConfig:
    """Read a Hugging Face `config.json`; `source` names the file in errors.

    Understands both `rope_scaling` + `rope_theta` (as published) and `rope_parameters` (transformers 5).
    Raises CheckpointError for another model family or a missing field.
    """
    if raw.get("model_type") != "gpt_oss":
        raise CheckpointError(
            f"{source}: model_type is {raw.get('model_type')!r}, not 'gpt_oss'; Freehold runs gpt-oss models only"
        )
    read = _Fields(raw, source)
    read.refuse_unless("hidden_act", "silu")
    read.refuse_unless("attention_bias", True)
    read.refuse_unless("swiglu_alpha", SWIGLU_ALPHA)
    num_layers = read.num_layers()
    max_context = read.integer("max_position_embeddings", 131_072)
    window = None if raw.get("sliding_window", 128) is None else read.integer("sliding_window", 128)
    if "layer_types" in raw and raw["layer_types"] is not None:
        known: dict[str, int | None] = {"sliding_attention": window, "full_attention": None}
        kinds = raw["layer_types"] if isinstance(raw["layer_types"], list) else [raw["layer_types"]]
        unknown = [kind for kind in kinds if kind not in list(known)]
        if unknown:
            raise CheckpointError(f"{source}: unknown layer type {unknown[0]!r}; known are {', '.join(known)}")
        windows = tuple(known[kind] for kind in kinds)
    else:
        windows = alternating_windows(num_layers, window) if window else (None,) * num_layers
    with _blaming(source):
        return ModelConfig(
            num_layers=num_layers,
            hidden_size=read.integer("hidden_size"),
            expert_width=read.integer("intermediate_size"),
            num_experts=read.integer("num_local_experts"),
            num_active_experts=read.integer("num_experts_per_tok", raw.get("experts_per_token", 4)),
            num_heads=read.integer("num_attention_heads"),
            num_kv_heads=read.integer("num_key_value_heads"),
            head_dim=read.integer("head_dim", 64),
            vocab_size=read.integer("vocab_size"),
            windows=windows,
            max_context=max_context,
            rope=_rope_from_hf(read, max_context),
            norm_eps=read.number("rms_norm_eps", 1e-5),
            swiglu_limit=read.number("swiglu_limit", SWIGLU_LIMIT),
            tied_embeddings=read.boolean("tie_word_embeddings", False),
        )


def _rope_from_hf(read: "_Fields", max_context: int) -> RopeConfig:
    # Where both are there, transformers takes the older name; where neither is, gpt-oss's own YaRN.
    rope = read.section("rope_scaling") or read.section("rope_parameters")
    if rope is None:
        return RopeConfig(theta=read.number("rope_theta", 150_000.0))
    theta = rope.number("rope_theta", read.number("rope_theta", 150_000.0))
    rope.refuse_unless("partial_rotary_factor", 1.0)
    kind = rope.text("rope_type", rope.text("type", "default"))
    if kind == "default":
        return RopeConfig(theta=theta, factor=1.0, original_context=max_context)
    if kind != "yarn":
        raise UnsupportedError(f"{read.source}: rope type {kind!r} is not one that gpt-oss uses (yarn or default)")
    config = RopeConfig(
        theta=theta,
        factor=rope.number("factor", 32.0),
        original_context=rope.integer("original_max_position_embeddings", max_context),  # as transformers falls back
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        truncate=rope.boolean("truncate", True),  # Hugging Face's own default where the field is absent
    )
    given = rope.number("attention_factor", config.concentration)
    if not math.isclose(given, config.concentration, rel_tol=1e-6):
        raise UnsupportedError(
            f"{read.source}: rope attention_factor {given} differs from YaRN's {config.concentration}"
        )
    for field in ("mscale", "mscale_all_dim"):
        rope.refuse_unless(field, 0)
    return config


def to_hf(config: ModelConfig, *, quantised: bool) -> dict[str, Any]:
    """The `config.json` that transformers, vLLM and Freehold read; `quantised` says that experts are MXFP4."""
    windows = {window for window in config.windows if window is not None}
    if len(windows) > 1:
        raise UnsupportedError(f"the Hugging Face layout holds one window size, this model has {sorted(windows)}")
    raw: dict[str, Any] = {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "attention_bias": True,
        "attention_dropout": 0.0,
        "dtype": "bfloat16",
        "experts_per_token": config.num_active_experts,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initial_context_length": config.rope.original_context,
        "intermediate_size": config.expert_width,
        "layer_types": ["full_attention" if w is None else "sliding_attention" for w in config.windows],
        "max_position_embeddings": config.max_context,
        "num_attention_heads": config.num_heads,
        "num_experts_per_tok": config.num_active_experts,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_heads,
        "num_local_experts": config.num_experts,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope.theta,
        # transformers wants a number even where no layer uses it
        "sliding_window": windows.pop() if windows else config.max_context,
        "swiglu_limit": config.swiglu_limit,
        "tie_word_embeddings": config.tied_embeddings,
        "use_cache": True,
        "vocab_size": config.vocab_size,
    }
    if config.rope.factor > 1:
        raw["rope_scaling"] = {
            "rope_type": "yarn",
            "factor": config.rope.factor,
            "original_max_position_embeddings": config.rope.original_context,
            "beta_fast": config.rope.beta_fast,
            "beta_slow": config.rope.beta_slow,
            "truncate": config.rope.truncate,
        }
    else:  # spelt out, since transformers falls back to gpt-oss's YaRN where nothing is said
        raw["rope_parameters"] = {"rope_type": "default", "rope_theta": config.rope.theta}
    if quantised:
        raw["quantization_config"] = {
            "quant_method": "mxfp4",
            "modules_to_not_convert": [
                "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head",
            ],
        }  # fmt: skip
    return raw


# --- the original config.json -----------------------------------------------------------------------------------


def from_original(raw: Mapping[str, Any], source: str) -> ModelConfig:
    """Read the `config.json` of OpenAI's original layout; `source` names the file in errors."""
    read = _Fields(raw, source)
    num_layers = read.num_layers()
    window = read.integer("sliding_window", 128)
    with _blaming(source):
        rope = RopeConfig(
            theta=read.number("rope_theta", 150_000.0),
            factor=read.number("rope_scaling_factor", 32.0),
            original_context=read.integer("initial_context_length", 4096),
            beta_fast=read.number("rope_ntk_beta", 32.0),
            beta_slow=read.number("rope_ntk_alpha", 1.0),
        )
        return ModelConfig(
            num_layers=num_layers,
            hidden_size=read.integer("hidden_size"),
            expert_width=read.integer("intermediate_size"),
            num_experts=read.integer("num_experts"),
            num_active_experts=read.integer("experts_per_token"),
            num_heads=read.integer("num_attention_heads"),
            num_kv_heads=read.integer("num_key_value_heads"),
            head_dim=read.integer("head_dim", 64),
            vocab_size=read.integer("vocab_size"),
            windows=alternating_windows(num_layers, window) if window else (None,) * num_layers,
            max_context=round(rope.original_context * rope.factor),
            rope=rope,
            swiglu_limit=read.number("swiglu_limit", SWIGLU_LIMIT),
        )


def to_original(config: ModelConfig) -> dict[str, Any]:
    """The original layout's `config.json`. Raises UnsupportedError for what that layout cannot say."""
    full = (None,) * config.num_layers
    window = next((w for w in config.windows if w is not None), 0)
    if config.windows != full and config.windows != alternating_windows(config.num_layers, window):
        raise UnsupportedError("the original layout knows only alternating windows, or none at all")
    if config.norm_eps != 1e-5:
        raise UnsupportedError(
            f"the original layout fixes the norm's epsilon at 1e-5, this model has {config.norm_eps}"
        )
    if config.rope.truncate and config.rope.factor > 1:
        raise UnsupportedError("the original layout does not truncate YaRN's correction range, this model does")
    if round(config.rope.original_context * config.rope.factor) != config.max_context:
        raise UnsupportedError(
            f"the original layout has a context of initial length × factor, here {config.rope.original_context} × "
            f"{config.rope.factor:g}, but this model's context is {config.max_context}"
        )
    return {
        "num_hidden_layers": config.num_layers,
        "num_experts": config.num_experts,
        "experts_per_token": config.num_active_experts,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.expert_width,
        "swiglu_limit": config.swiglu_limit,
        "head_dim": config.head_dim,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "sliding_window": window,
        "initial_context_length": config.rope.original_context,
        "rope_theta": config.rope.theta,
        "rope_scaling_factor": config.rope.factor,
        "rope_ntk_alpha": config.rope.beta_slow,
        "rope_ntk_beta": config.rope.beta_fast,
    }


@contextmanager
def _blaming(source: str) -> Iterator[None]:
    """A config that cannot be is the file's fault here, not the caller's."""
    try:
        yield
    except UsageError as error:
        raise CheckpointError(f"{source}: {error}; the file is damaged or foreign") from None


class _Fields:
    """Typed reads from a JSON object, with errors that name the file and the field."""

    def __init__(self, raw: Mapping[str, Any], source: str) -> None:
        self._raw = raw
        self.source = source

    def number(self, name: str, default: float | None = None) -> float:
        value = self._raw.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _LARGEST:
            raise self._error(name, "a number", value)
        return float(value)

    def integer(self, name: str, default: int | None = None) -> int:
        value = self.number(name, default)
        if not value.is_integer():
            raise self._error(name, "an integer", value)
        return int(value)

    def num_layers(self) -> int:
        """Bounded, since every layer costs a few entries in tables before any tensor is looked at."""
        value = self.integer("num_hidden_layers")
        if not 1 <= value <= _MAX_LAYERS:
            raise self._error("num_hidden_layers", f"from 1 to {_MAX_LAYERS}", value)
        return value

    def boolean(self, name: str, default: bool) -> bool:
        value = self._raw.get(name, default)
        if not isinstance(value, bool):
            raise self._error(name, "true or false", value)
        return value

    def text(self, name: str, default: str) -> str:
        value = self._raw.get(name, default)
        if not isinstance(value, str):
            raise self._error(name, "a string", value)
        return value

    def section(self, name: str) -> "_Fields | None":
        """A nested object, None if it is absent, null or empty."""
        value = self._raw.get(name)
        if value is not None and not isinstance(value, dict):
            raise self._error(name, "an object", value)
        return _Fields(value, self.source) if value else None

    def refuse_unless(self, name: str, expected: object) -> None:
        value = self._raw.get(name)
        if value is not None and value != expected:
            raise UnsupportedError(
                f"{self.source}: {name} is {_brief(value)}; gpt-oss has {expected!r}, and so has Freehold"
            )

    def _error(self, name: str, expected: str, value: object) -> CheckpointError:
        return CheckpointError(f"{self.source}: {name!r} must be {expected}, got {_brief(value)}; the file is damaged")


def _brief(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
