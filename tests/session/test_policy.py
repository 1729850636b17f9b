"""How a model is going to run is decided from what was asked for: honoured, or refused with the remedy."""

from typing import Any

import pytest
import torch

from freehold import machine
from freehold.config import NAMED_CONFIGS
from freehold.errors import BackendError, UsageError
from freehold.kernels import backends
from freehold.session.policy import Policy, decide
from tests.checkpoints import CPU

TINY, BIG = NAMED_CONFIGS["tiny"], NAMED_CONFIGS["gpt-oss-20b"]

needs_native = pytest.mark.skipif(backends.native() is None, reason="the native kernels are not built")


@needs_native
def test_native_defaults() -> None:
    policy = decide(BIG, device="cpu")
    assert policy == Policy(device=CPU, dtype=torch.float32, kv="bf16", dense="q8", threads=machine.physical_cores())
    assert policy.native


@needs_native
def test_native_choices_are_honoured() -> None:
    policy = decide(BIG, device=CPU, dtype="float32", dense="f32", kv_dtype="q8", threads=7)
    assert policy == Policy(device=CPU, dtype=torch.float32, kv="q8", dense="f32", threads=7)


@pytest.mark.usefixtures("reference_ops")
def test_reference_choices() -> None:
    assert not decide(BIG, device="cpu").native
    for dtype, kv in (("float32", "f32"), (torch.bfloat16, "bf16")):
        policy = decide(BIG, device="cpu", dtype=dtype)
        assert (policy.dense, policy.kv) == (None, kv)
    assert decide(BIG, device="cpu", dtype="float32", kv_dtype="q8").kv == "q8"


@pytest.mark.usefixtures("reference_ops")
def test_the_reference_s_type_depends_on_the_machine_and_not_on_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the same seed would give one text today and another tomorrow."""
    for total, dtype in ((64 << 30, torch.float32), (8 << 30, torch.bfloat16)):
        monkeypatch.setattr(machine, "total_memory", lambda total=total: total)
        for available in (1, 1 << 40):
            monkeypatch.setattr(machine, "available_memory", lambda available=available: available)
            assert decide(BIG, device="cpu").dtype == dtype


@needs_native
@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"dtype": "float16"}, "dtype must be float32 or bfloat16, got 'float16'"),
        ({"dtype": torch.int8}, "dtype must be float32 or bfloat16, got torch.int8"),
        (
            {"dtype": "bfloat16"},
            "the native kernels compute in float32; for bfloat16 weights use dense bf16 (--dense bf16), for reference "
            "ops in bfloat16 set FREEHOLD_KERNELS=reference",
        ),
        ({"dense": "mxfp4"}, "dense must be one of q8, bf16, f32, got 'mxfp4'"),
        ({"kv_dtype": "fp8"}, "the KV cache's type must be one of f32, bf16, q8, got 'fp8'"),
        (
            {"kv_dtype": "q8"},
            "a q8 KV cache needs heads of a multiple of 32, this model's have 16; use bf16",
        ),
        ({"threads": 0}, "threads must be between 1 and 1024, got 0"),
        ({"threads": 1025}, "threads must be between 1 and 1024, got 1025"),
        ({"threads": 1.5}, "threads must be between 1 and 1024, got 1.5"),
        ({"threads": True}, "threads must be between 1 and 1024, got True"),
    ],
)
def test_refused(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        decide(TINY, device="cpu", **asked)
    assert str(caught.value) == message


@pytest.mark.usefixtures("reference_ops")
def test_refused_where_the_reference_runs() -> None:
    with pytest.raises(UsageError, match="dense 'q8': only the native CPU kernels pack weights"):
        decide(TINY, device="cpu", dense="q8")
    with pytest.raises(UsageError, match="q8 KV cache needs heads of a multiple of 32"):
        decide(TINY, device="cpu", kv_dtype="q8")


@pytest.mark.parametrize("device", ["nonsense", "meta", "cuda:99", "xpu"])
def test_devices_that_cannot_be_used(device: str) -> None:
    with pytest.raises(BackendError, match=f"device '{device}' cannot be used here .*choose cpu"):
        decide(TINY, device=device)


@needs_native
@pytest.mark.parametrize(
    ("dense", "experts", "words"),
    [
        (
            "q8",
            "mxfp4",
            "dense q8, experts mxfp4, int8 activations per block of 32, summed in float32; residual stream",
        ),
        ("q8", "bf16", "dense q8, experts q8, int8 activations per block of 32, summed in float32; residual stream"),
        ("bf16", "bf16", "dense bf16, experts bf16, float32 activations; residual stream float32, KV cache bf16"),
        ("f32", "bf16", "dense f32, experts f32, float32 activations; residual stream float32, KV cache bf16"),
        ("f32", "mxfp4", "experts mxfp4, float32 activations, for the experts int8 per block of 32; residual stream"),
    ],
)
def test_what_is_said_is_what_runs(dense: str, experts: str, words: str) -> None:
    said = decide(BIG, device="cpu", dense=dense, threads=1).describe(experts)
    assert said.startswith("native kernels (")
    assert ", 1 thread): " in said
    assert words in said


@pytest.mark.usefixtures("reference_ops")
def test_what_is_said_of_the_reference() -> None:
    said = decide(TINY, device="cpu", dtype="bfloat16").describe("mxfp4")
    assert said == "reference ops in bfloat16 on cpu, experts in mxfp4, KV cache bf16"
