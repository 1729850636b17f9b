"""What the ops refuse: each message names the op, the argument and both shapes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from freehold.errors import UsageError
from freehold.kernels import ops
from freehold.kernels.ops import Routing
from freehold.weights.mxfp4 import pack

z = torch.zeros
ROUTING = Routing(z(3, 2), z(3, 2, dtype=torch.int64))
MOE: dict[str, Any] = {
    "x_TD": z(3, 64),
    "routing": ROUTING,
    "gate_up": z(4, 64, 64),
    "gate_up_bias": z(4, 64),
    "down": z(4, 64, 32),
    "down_bias": z(4, 64),
    "alpha": 1.0,
    "limit": 7.0,
}
ATTENTION: dict[str, Any] = {
    "q_TNH": z(3, 4, 8),
    "k_SKH": z(5, 2, 8),
    "v_SKH": z(5, 2, 8),
    "sinks_N": z(4),
    "scale": 1.0,
}


@pytest.mark.parametrize(
    ("op", "arguments", "said"),
    [
        (
            ops.rms_norm,
            {"x_TD": z(3), "weight_D": z(3), "eps": 1e-5},
            "[rms_norm] expected x with 2 dimensions, got (3,)",
        ),
        (ops.rms_norm, {"x_TD": z(3, 4), "weight_D": z(5), "eps": 1e-5}, "[rms_norm] expected weight (4,), got (5,)"),
        (
            ops.rms_norm,
            {"x_TD": z(3, 4), "weight_D": z(4).bfloat16(), "eps": 1e-5},
            "[rms_norm] expected one type and device, got torch.float32 on cpu and torch.bfloat16 on cpu",
        ),
        (
            ops.linear,
            {"x_TD": z(3, 4, 5), "weight_OD": z(2, 5)},
            "[linear] expected x with 2 dimensions, got (3, 4, 5)",
        ),
        (ops.linear, {"x_TD": z(3, 4), "weight_OD": z(2)}, "[linear] expected weight with 2 dimensions, got (2,)"),
        (ops.linear, {"x_TD": z(3, 4), "weight_OD": z(2, 5)}, "[linear] expected weight (2, 4), got (2, 5)"),
        (
            ops.linear,
            {"x_TD": z(3, 4), "weight_OD": z(2, 4), "bias_O": z(3)},
            "[linear] expected bias (2,), got (3,)",
        ),
        (ops.linear, {"x_TD": z(3, 4), "weight_OD": z(2, 4).double()}, "[linear] expected one type and device"),
        (
            ops.linear,
            {"x_TD": z(3, 4), "weight_OD": z(2, 4), "bias_O": z(2).double()},
            "[linear] expected one type and device",
        ),
        (
            ops.rope,
            {"x_TNH": z(3, 8), "cos_TH": z(3, 4), "sin_TH": z(3, 4)},
            "[rope] expected x with 3 dimensions, got (3, 8)",
        ),
        (
            ops.rope,
            {"x_TNH": z(3, 2, 8), "cos_TH": z(2, 4), "sin_TH": z(3, 4)},
            "[rope] expected cos (3, 4), got (2, 4)",
        ),
        (
            ops.rope,
            {"x_TNH": z(3, 2, 8), "cos_TH": z(3, 4), "sin_TH": z(3, 8)},
            "[rope] expected sin (3, 4), got (3, 8)",
        ),
        (ops.attention, ATTENTION | {"q_TNH": z(3, 32)}, "[attention] expected q with 3 dimensions, got (3, 32)"),
        (ops.attention, ATTENTION | {"k_SKH": z(5, 16)}, "[attention] expected k with 3 dimensions, got (5, 16)"),
        (ops.attention, ATTENTION | {"k_SKH": z(5, 2, 4)}, "[attention] expected k (5, 2, 8), got (5, 2, 4)"),
        (ops.attention, ATTENTION | {"v_SKH": z(4, 2, 8)}, "[attention] expected v (5, 2, 8), got (4, 2, 8)"),
        (ops.attention, ATTENTION | {"sinks_N": z(2)}, "[attention] expected sinks (4,), got (2,)"),
        (ops.attention, ATTENTION | {"v_SKH": z(5, 2, 8).bfloat16()}, "[attention] expected one type and device"),
        (ops.attention, ATTENTION | {"window": 0}, "[attention] expected a window of at least 1 key, got 0"),
        (
            ops.attention,
            ATTENTION | {"k_SKH": z(2, 2, 8), "v_SKH": z(2, 2, 8)},
            "[attention] expected S >= T and N a multiple of K, got T 3, S 2, N 4, K 2",
        ),
        (
            ops.attention,
            ATTENTION | {"k_SKH": z(5, 3, 8), "v_SKH": z(5, 3, 8)},
            "[attention] expected S >= T and N a multiple of K, got T 3, S 5, N 4, K 3",
        ),
        (ops.route, {"logits_TE": z(3), "num_active": 1}, "[route] expected logits with 2 dimensions, got (3,)"),
        (ops.route, {"logits_TE": z(3, 4), "num_active": 5}, "[route] expected 1 to 4 active experts, got 5"),
        (ops.route, {"logits_TE": z(3, 4), "num_active": 0}, "[route] expected 1 to 4 active experts, got 0"),
        (ops.moe, MOE | {"x_TD": z(64)}, "[moe] expected x with 2 dimensions, got (64,)"),
        (ops.moe, MOE | {"gate_up": z(4, 64, 32)}, "[moe] expected gate_up (4, 64, 64), got (4, 64, 32)"),
        (ops.moe, MOE | {"gate_up": z(4, 63, 64)}, "[moe] expected gate_up (4, 62, 64), got (4, 63, 64)"),
        (ops.moe, MOE | {"gate_up": z(64, 64)}, "[moe] expected gate_up with 3 dimensions, got (64, 64)"),
        (ops.moe, MOE | {"gate_up": pack(z(4, 64, 32))}, "[moe] expected gate_up (4, 64, 64), got (4, 64, 32)"),
        (ops.moe, MOE | {"gate_up_bias": z(4, 32)}, "[moe] expected gate_up_bias (4, 64), got (4, 32)"),
        (ops.moe, MOE | {"down": z(3, 64, 32)}, "[moe] expected down (4, 64, 32), got (3, 64, 32)"),
        (ops.moe, MOE | {"down": pack(z(4, 64, 64))}, "[moe] expected down (4, 64, 32), got (4, 64, 64)"),
        (ops.moe, MOE | {"down_bias": z(64)}, "[moe] expected down_bias (4, 64), got (64,)"),
        (
            ops.moe,
            MOE | {"routing": Routing(z(3, 2), z(2, 2, dtype=torch.int64))},
            "[moe] expected routing experts (3, 2), got (2, 2)",
        ),
        (
            ops.moe,
            MOE | {"routing": Routing(z(3, 1), z(3, 2, dtype=torch.int64))},
            "[moe] expected routing experts (3, 1), got (3, 2)",
        ),
    ],
)
def test_wrong_arguments_are_named(op: Callable[..., Any], arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        op(**arguments)
    assert said in str(caught.value)


def test_right_arguments_pass() -> None:
    assert ops.attention(**ATTENTION).shape == (3, 4, 8)
    assert ops.moe(**MOE).shape == (3, 64)
    assert ops.moe(**MOE | {"gate_up": pack(z(4, 64, 64)), "down": pack(z(4, 64, 32))}).shape == (3, 64)


@pytest.mark.parametrize("op", [ops.attention, ops.moe])
def test_no_tokens_are_fine(op: Callable[..., Any]) -> None:
    if op is ops.moe:
        empty = Routing(z(0, 2), z(0, 2, dtype=torch.int64))
        assert op(**MOE | {"x_TD": z(0, 64), "routing": empty}).shape == (0, 64)
    assert ops.rms_norm(z(0, 4), z(4), eps=1e-5).shape == (0, 4)
    assert ops.linear(z(0, 4), z(2, 4)).shape == (0, 2)
    assert ops.attention(z(0, 4, 8), z(3, 2, 8), z(3, 2, 8), z(4), scale=1.0).shape == (0, 4, 8)
