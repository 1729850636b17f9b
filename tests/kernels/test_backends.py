"""Which ops run is chosen by FREEHOLD_KERNELS, falls back loudly, and never silently loses a gradient."""

import importlib.util
import logging
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import freehold
from freehold.errors import BackendError, UsageError
from freehold.kernels import backends, ops, reference
from freehold.kernels.ops import Routing
from freehold.log import info_once, warn_once
from freehold.weights.mxfp4 import pack as pack_mxfp4
from freehold.weights.packed import pack
from tests.paged import store

built = pytest.mark.skipif(
    importlib.util.find_spec("freehold._native") is None, reason="the native kernels are not built"
)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """The choice and the log lines are remembered once per process."""
    caches: list[Any] = [backends.native, warn_once, info_once]
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


@pytest.fixture
def absent(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the extension had not been built."""
    monkeypatch.delitem(sys.modules, "freehold.kernels.native", raising=False)
    monkeypatch.setitem(sys.modules, "freehold._native", None)
    monkeypatch.delattr(freehold, "_native", raising=False)


def norm() -> torch.Tensor:
    return ops.rms_norm(torch.ones(2, 4), torch.ones(4), eps=1e-5)


@built
@pytest.mark.parametrize("choice", [None, "auto", "native"])
def test_native_runs_where_it_is_built(
    choice: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("FREEHOLD_KERNELS", raising=False)
    if choice:
        monkeypatch.setenv("FREEHOLD_KERNELS", choice)
    with caplog.at_level(logging.INFO, "freehold"):
        norm(), norm()
    assert "rms_norm" in backends.native_ops(backends.native())
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert "native CPU kernels run: rms_norm" in caplog.text


def test_reference_on_request(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("FREEHOLD_KERNELS", "reference")
    with caplog.at_level(logging.INFO, "freehold"):
        norm(), norm()
    assert backends.native() is None
    assert caplog.messages == ["reference ops run: FREEHOLD_KERNELS=reference"]
    assert backends.for_op("rms_norm", torch.zeros(1)) is reference


@pytest.mark.usefixtures("absent")
def test_absence_is_said_once_and_everything_works(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("FREEHOLD_KERNELS", raising=False)
    torch.testing.assert_close(norm(), torch.ones(2, 4), atol=1e-4, rtol=0)
    norm()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "the native kernels are not built" in caplog.text
    assert "install g++" in caplog.text
    assert backends.native_ops(backends.native()) == []


@pytest.mark.usefixtures("absent")
def test_absence_is_an_error_where_native_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FREEHOLD_KERNELS", "native")
    with pytest.raises(BackendError, match="FREEHOLD_KERNELS=native, but the native kernels are not built"):
        norm()


def test_unknown_choices_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FREEHOLD_KERNELS", "cuda")
    with pytest.raises(UsageError, match="FREEHOLD_KERNELS is 'cuda'; choose one of auto, native, reference"):
        norm()


@built
@pytest.mark.parametrize(
    ("x", "weight", "is_native"),
    [
        (torch.ones(2, 4), torch.ones(4), True),
        (torch.ones(2, 4).bfloat16(), torch.ones(4).bfloat16(), False),
        (torch.ones(2, 4).half(), torch.ones(4).half(), False),
        (torch.ones(2, 4).double(), torch.ones(4).double(), False),
        (torch.ones(2, 4, requires_grad=True), torch.ones(4), False),
        (torch.ones(2, 4), torch.ones(4, requires_grad=True), False),
        (torch.ones(2, 4, device="meta"), torch.ones(4, device="meta"), False),
    ],
)
def test_what_the_kernels_cannot_do_goes_to_the_reference(
    x: torch.Tensor, weight: torch.Tensor, is_native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FREEHOLD_KERNELS", raising=False)
    assert (backends.for_op("rms_norm", x, weight) is not reference) == is_native
    out = ops.rms_norm(x, weight, eps=1e-5)
    assert out.dtype == x.dtype
    assert out.requires_grad == (x.requires_grad or weight.requires_grad)
    with torch.no_grad():
        wants_native = is_native or x.requires_grad or weight.requires_grad
        assert (backends.for_op("rms_norm", x, weight) is not reference) == wants_native
        assert not ops.rms_norm(x, weight, eps=1e-5).requires_grad


@built
def test_packed_weights_decide_where_matrices_are_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FREEHOLD_KERNELS", raising=False)
    ran: list[str] = []

    def watch(module: Any, op: str) -> None:
        original = getattr(module, op)

        def watched(*arguments: Any, **more: Any) -> Any:
            ran.append(module.__name__.rpartition(".")[2])
            return original(*arguments, **more)

        monkeypatch.setattr(module, op, watched)

    native = backends.native()
    for op in ("linear", "moe"):
        watch(reference, op)
        watch(native, op)
    watch(native, "moe_kept")  # where a gradient is wanted

    def runs(op: Any, *arguments: Any, **more: Any) -> str:
        ran.clear()
        op(*arguments, **more)
        return ran[0]

    x, plain = torch.randn(2, 32), torch.randn(64, 32)
    assert runs(ops.linear, x, plain) == "reference"
    assert runs(ops.linear, x, pack(plain, "q8")) == "native"
    assert runs(ops.linear, x.clone().requires_grad_(), pack(plain, "q8")) == "native"
    assert runs(ops.linear, x, pack(plain, "q8"), torch.zeros(64, requires_grad=True)) == "native"
    assert runs(ops.linear, x.clone().requires_grad_(), plain) == "reference"
    with torch.no_grad():
        assert runs(ops.linear, x.clone().requires_grad_(), pack(plain, "q8")) == "native"
    with backends.reference_only():
        assert runs(ops.linear, x, pack(plain, "q8")) == "reference"

    gate_up, down = pack_mxfp4(plain.unsqueeze(0)), pack_mxfp4(plain[:32].unsqueeze(0))
    routing, biases = (
        Routing(torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.int64)),
        (torch.zeros(1, 64), torch.zeros(1, 32)),
    )
    sizes: dict[str, Any] = {"alpha": 1.7, "limit": 7.0}
    assert runs(ops.moe, x, routing, gate_up, biases[0], down, biases[1], **sizes) == "reference"
    packed = pack(gate_up, "mxfp4", paired=True), pack(down, "mxfp4")
    assert runs(ops.moe, x, routing, packed[0], biases[0], packed[1], biases[1], **sizes) == "native"
    weighed = Routing(routing.weights_TA.requires_grad_(), routing.experts_TA)
    assert runs(ops.moe, x, weighed, packed[0], biases[0], packed[1], biases[1], **sizes) == "native"


@pytest.mark.usefixtures("reference_ops")
def test_the_reference_runs_packed_weights_too() -> None:
    """Not what it is for, but it is what the native kernels are compared with."""
    x, weight, bias = torch.randn(3, 32), torch.randn(16, 32), torch.randn(16)
    torch.testing.assert_close(ops.linear(x, pack(weight, "f32"), bias), ops.linear(x, weight, bias))
    gate_up, down = torch.randn(4, 8, 32), torch.randn(4, 32, 4)
    routing, biases = Routing(torch.ones(3, 1), torch.tensor([[0], [3], [0]])), (torch.randn(4, 8), torch.randn(4, 32))
    sizes: dict[str, Any] = {"alpha": 1.7, "limit": 7.0}
    packed = ops.moe(x, routing, pack(gate_up, "f32", paired=True), biases[0], pack(down, "f32"), biases[1], **sizes)
    torch.testing.assert_close(packed, ops.moe(x, routing, gate_up, biases[0], down, biases[1], **sizes))


@pytest.mark.parametrize("needs", ["q", "k", "v", "sinks"])
def test_no_gradient_is_lost_on_the_way_through_the_cache(needs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FREEHOLD_KERNELS", raising=False)
    tensors = {"q": torch.randn(3, 2, 8), "k": torch.randn(3, 1, 8), "v": torch.randn(3, 1, 8), "sinks": torch.randn(2)}
    tensors[needs].requires_grad_()
    kept = store("f32", 1, 3, 8)
    ops.kv_write(kept.pages, kept.last(3, 3), tensors["k"], tensors["v"])
    out = ops.attention(tensors["q"], kept.pages, kept.last(3, 3), tensors["sinks"], scale=0.3)
    torch.autograd.backward(out.sum())
    gradient = tensors[needs].grad
    assert gradient is not None
    assert gradient.abs().sum() > 0


def test_one_torch_thread() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    seen = []

    def elsewhere() -> None:
        torch.set_num_threads(2)
        with backends.one_torch_thread():
            seen.append(torch.get_num_threads())
        seen.append(torch.get_num_threads())

    with backends.one_torch_thread(), backends.one_torch_thread():
        other = threading.Thread(target=elsewhere)
        other.start()
        other.join()
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
    assert seen == [1, 2]
    torch.set_num_threads(before)
