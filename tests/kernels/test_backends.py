"""Which ops run is chosen by FREEHOLD_KERNELS, falls back loudly, and never silently loses a gradient."""

import importlib.util
import logging
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import freehold
from freehold.errors import BackendError, UsageError
from freehold.kernels import backends, ops, reference
from freehold.log import info_once, warn_once

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
        (torch.ones(2, 4).bfloat16(), torch.ones(4).bfloat16(), True),
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
