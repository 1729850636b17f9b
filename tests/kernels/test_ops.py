"""What the ops refuse: each message names the op, the argument and both shapes."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from freehold.errors import UsageError
from freehold.kernels import ops
from freehold.kernels.kv import (
    KV_TYPES,
    PAGE,
    KvPages,
    KvType,
    PagedSequences,
    kv_bytes_per_token,
    new_pages,
    num_pages,
)
from freehold.kernels.ops import Norm, Rotation, Routing
from freehold.weights.mxfp4 import pack
from freehold.weights.packed import PackedMatrix
from freehold.weights.packed import pack as pack_rows

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


def pages(K: int = 2, H: int = 8, type: KvType = "f32") -> KvPages:
    empty = new_pages(type, 3, K, H, torch.device("cpu"))
    for tensor in empty.tensors():
        tensor.zero_()
    return empty


def sequences(*counts: int) -> PagedSequences:
    return PagedSequences(counts, [5] * len(counts), torch.arange(len(counts), dtype=torch.int32).unsqueeze(1))


def paired(R: int, C: int) -> PackedMatrix:
    return pack_rows(pack(z(4, R, C)), "mxfp4", paired=True)


LINEAR: dict[str, Any] = {"x_TD": z(3, 4), "weight_OD": z(2, 4)}
ATTENTION: dict[str, Any] = {
    "q_TNH": z(3, 4, 8),
    "kv": pages(),
    "sequences": sequences(2, 1),
    "sinks_N": z(4),
    "scale": 1.0,
}
KV_WRITE: dict[str, Any] = {
    "kv": pages(),
    "sequences": sequences(2, 1),
    "k_TKH": z(3, 2, 8),
    "v_TKH": z(3, 2, 8),
}
PACKED_MOE: dict[str, Any] = MOE | {"gate_up": paired(64, 64), "down": pack_rows(pack(z(4, 64, 32)), "mxfp4")}


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
            ops.linear,
            LINEAR | {"norm": Norm(z(5), 1e-5)},
            "[linear] expected norm (4,), got (5,)",
        ),
        (
            ops.linear,
            LINEAR | {"norm": Norm(z(4).bfloat16(), 1e-5)},
            "[linear] expected one type and device",
        ),
        (
            ops.linear,
            LINEAR | {"residual_TO": z(3, 4)},
            "[linear] expected residual (3, 2), got (3, 4)",
        ),
        (
            ops.linear,
            LINEAR | {"residual_TO": z(3, 2).bfloat16()},
            "[linear] expected one type and device",
        ),
        (
            ops.linear,
            LINEAR | {"weight_OD": pack_rows(z(2, 5), "q8")},
            "[linear] expected weight (2, 4), got (2, 5)",
        ),
        (
            ops.linear,
            {"x_TD": z(3, 4).bfloat16(), "weight_OD": pack_rows(z(2, 4), "q8")},
            "[linear] expected float32 on the CPU for packed weights, got torch.bfloat16 on cpu",
        ),
        (
            ops.rope,
            {"x_TNH": z(3, 2, 7), "cos_TH": z(3, 3), "sin_TH": z(3, 3)},
            "[rope] expected heads of an even size, got 7",
        ),
        (
            ops.rope,
            {"x_TNH": z(3, 2, 8), "cos_TH": z(3, 4), "sin_TH": z(3, 4).bfloat16()},
            "[rope] expected sin in float32, got torch.bfloat16",
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
        (
            ops.attention,
            ATTENTION | {"kv": pages(H=4)},
            "[attention] expected pages (3, 2, 64, 8), got (3, 2, 64, 4)",
        ),
        (ops.attention, ATTENTION | {"sinks_N": z(2)}, "[attention] expected sinks (4,), got (2,)"),
        (ops.attention, ATTENTION | {"sinks_N": z(4).bfloat16()}, "[attention] expected one type and device"),
        (ops.attention, ATTENTION | {"window": 0}, "[attention] expected a window of at least 1 key, got 0"),
        (
            ops.attention,
            ATTENTION | {"sequences": sequences(1, 1)},
            "[attention] expected 2 tokens, as the sequences have, got 3",
        ),
        (ops.attention, ATTENTION | {"kv": pages(K=3)}, "expected N a multiple of K, got N 4, K 3"),
        (ops.kv_write, KV_WRITE | {"k_TKH": z(3, 16)}, "[kv_write] expected k with 3 dimensions, got (3, 16)"),
        (ops.kv_write, KV_WRITE | {"v_TKH": z(2, 2, 8)}, "[kv_write] expected v (3, 2, 8), got (2, 2, 8)"),
        (ops.kv_write, KV_WRITE | {"v_TKH": z(3, 2, 8).bfloat16()}, "[kv_write] expected one type and device"),
        (
            ops.kv_write,
            KV_WRITE | {"kv": pages(K=1)},
            "[kv_write] expected pages (3, 2, 64, 8), got (3, 1, 64, 8)",
        ),
        (
            ops.kv_write,
            KV_WRITE | {"rotation": Rotation(z(2, 4), z(3, 4))},
            "[kv_write] expected cos (3, 4), got (2, 4)",
        ),
        (
            ops.attention,
            ATTENTION | {"rotation": Rotation(z(3, 4), z(3, 4).double())},
            "[attention] expected sin in float32, got torch.float64",
        ),
        (
            ops.kv_write,
            KV_WRITE | {"sequences": sequences(4)},
            "[kv_write] expected 4 tokens, as the sequences have, got 3",
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
        (
            ops.moe,
            MOE | {"routing": Routing(z(3, 2), z(3, 2, dtype=torch.int32))},
            "[moe] expected routing experts in int64, got torch.int32",
        ),
        (ops.moe, MOE | {"norm": Norm(z(32), 1e-5)}, "[moe] expected norm (64,), got (32,)"),
        (ops.moe, MOE | {"norm": Norm(z(64).double(), 1e-5)}, "[moe] expected one type and device"),
        (ops.moe, MOE | {"residual_TD": z(3, 32)}, "[moe] expected residual (3, 64), got (3, 32)"),
        (ops.moe, MOE | {"residual_TD": z(3, 64).double()}, "[moe] expected one type and device"),
        (
            ops.moe,
            PACKED_MOE | {"gate_up": paired(64, 32)},
            "[moe] expected gate_up (4, 64, 64), got (4, 64, 32)",
        ),
        (
            ops.moe,
            PACKED_MOE | {"gate_up": pack_rows(pack(z(4, 64, 64)), "mxfp4")},
            "[moe] expected a packed gate_up with paired rows",
        ),
        (ops.moe, PACKED_MOE | {"down": MOE["down"]}, "[moe] expected both matrices packed, or neither"),
    ],
)
def test_wrong_arguments_are_named(op: Callable[..., Any], arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        op(**arguments)
    assert said in str(caught.value)


def test_right_arguments_pass() -> None:
    assert ops.linear(**LINEAR, norm=Norm(z(4), 1e-5), residual_TO=z(3, 2)).shape == (3, 2)
    assert ops.attention(**ATTENTION).shape == (3, 4, 8)
    assert ops.attention(**ATTENTION, rotation=Rotation(z(3, 4), z(3, 4))).shape == (3, 4, 8)
    ops.kv_write(**KV_WRITE)
    ops.kv_write(**KV_WRITE | {"k_TKH": z(0, 2, 8), "v_TKH": z(0, 2, 8), "sequences": sequences(0)})
    assert ops.moe(**MOE).shape == (3, 64)
    assert ops.moe(**MOE | {"gate_up": pack(z(4, 64, 64)), "down": pack(z(4, 64, 32))}).shape == (3, 64)
    assert ops.moe(**PACKED_MOE, norm=Norm(z(64), 1e-5), residual_TD=z(3, 64)).shape == (3, 64)


@pytest.mark.parametrize("op", [ops.attention, ops.moe])
def test_no_tokens_are_fine(op: Callable[..., Any]) -> None:
    if op is ops.moe:
        empty = Routing(z(0, 2), z(0, 2, dtype=torch.int64))
        for some in (MOE, PACKED_MOE):
            assert op(**some | {"x_TD": z(0, 64), "routing": empty}).shape == (0, 64)
    assert ops.rms_norm(z(0, 4), z(4), eps=1e-5).shape == (0, 4)
    assert ops.linear(z(0, 4), z(2, 4)).shape == (0, 2)
    assert ops.attention(**ATTENTION | {"q_TNH": z(0, 4, 8), "sequences": sequences()}).shape == (0, 4, 8)


@pytest.mark.parametrize(
    ("counts", "lengths", "table", "said"),
    [
        ([1, 2], [1], torch.zeros(1, 1, dtype=torch.int32), "as many lengths as counts"),
        ([3], [2], torch.zeros(1, 1, dtype=torch.int32), "none smaller"),
        ([-1], [2], torch.zeros(1, 1, dtype=torch.int32), "none smaller"),
        ([1], [2], torch.zeros(1, 1), "expected an int32 table of 1 rows, got torch.float32"),
        ([1], [2], torch.zeros(2, 1, dtype=torch.int32), "expected an int32 table of 1 rows"),
        ([1], [65], torch.zeros(1, 1, dtype=torch.int32), "65 positions do not fit a table of 1 pages"),
    ],
)
def test_sequences_that_make_no_sense(counts: list[int], lengths: list[int], table: Tensor, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        PagedSequences(counts, lengths, table)


def test_positions_of_a_batch() -> None:
    assert sequences(2, 0, 1).positions() == [3, 4, 4]
    assert [num_pages(n) for n in (0, 1, PAGE, PAGE + 1)] == [0, 1, 1, 2]


def test_types_of_pages() -> None:
    for type, size in (("f32", 4 * 64), ("bf16", 2 * 64), ("q8", 64 + 2 * 2)):
        made = new_pages(type, 10, 3, 64, torch.device("cpu"))  # type: ignore[arg-type]
        assert len(made) == 10
        assert made.num_bytes == 2 * 3 * 10 * PAGE * size
        assert made.num_bytes == 10 * PAGE * kv_bytes_per_token(type, 3, 64)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="must be one of f32, bf16, q8, got 'int4'"):
        new_pages("int4", 1, 1, 32, torch.device("cpu"))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="q8 KV cache needs heads of a multiple of 32, this model's have 48; use bf16"):
        new_pages("q8", 1, 1, 48, torch.device("cpu"))
    with pytest.raises(UsageError, match="bf16 KV cache needs heads of an even size, this model's have 7; use f32"):
        new_pages("bf16", 1, 1, 7, torch.device("cpu"))


@pytest.mark.parametrize("type", KV_TYPES)
def test_keys_lie_by_dimension_and_values_by_position(type: KvType) -> None:
    made = pages(K=2, H=64, type=type)
    for tensor in made.tensors():
        tensor.copy_(torch.arange(tensor.numel()).view(tensor.shape) % 127)
    together = 2 if type == "bf16" else 1
    keys, values = made.by_position()
    for page, head, row, h in ((0, 0, 0, 0), (0, 1, 5, 33), (2, 1, 63, 62)):
        at = (page, head, row, h // together, h % together)
        assert keys.numbers[at] == made.keys[page, head, h // together, row, h % together]
        assert values.numbers[at] == made.values[page, head, row, h]
        if keys.scales is not None and values.scales is not None:
            assert made.key_scales is not None
            assert keys.scales[page, head, row, h // 32] == made.key_scales[page, head, h // 32, row]
            assert values.scales is made.value_scales
    keys.numbers.zero_()  # they are views
    assert not made.keys.any()
    assert made.values.any()


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs the system's list of mappings")
def test_many_pages_ask_for_large_ones_of_memory() -> None:
    """In a process of its own: in this one, few may lie where many have lain and asked."""
    program = "from tests.kernels import test_ops; test_ops.ask_for_large_pages()"
    subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[2], check=True)


def ask_for_large_pages() -> None:
    many, few = (new_pages("bf16", count, 8, 64, torch.device("cpu")) for count in (80, 8))
    assert many.values.shape == (80, 8, PAGE, 64)
    assert many.values.is_contiguous()
    many.values.fill_(1)  # the mapping lives as long as the tensor
    for tensor, large in ((many.keys, True), (many.values, True), (few.values, False)):
        assert ("hg" in flags_of_mapping(tensor.data_ptr())) == large


def flags_of_mapping(address: int) -> list[str]:
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    return []
