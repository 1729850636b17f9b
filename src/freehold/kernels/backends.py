"""Which implementation of an op runs, and why. Decided per call from the tensors alone; said once in the log.

`FREEHOLD_KERNELS=reference` turns the native kernels off; `=native` makes their absence an error.
"""

import importlib
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from freehold import machine
from freehold.errors import BackendError, UsageError
from freehold.kernels import reference
from freehold.log import info_once, warn_once

CHOICES = ("auto", "native", "reference")
OPS = (
    "rms_norm", "rms_norm_backward", "linear", "linear_backward", "add_lora", "add_product", "rope", "kv_write",
    "attention", "route", "moe", "sample",
)  # fmt: skip

_NOT_BUILT = "the native kernels are not built: there was no C++ compiler, or no Python headers, at installation"
_REMEDY = "install g++ and python3-dev, then install Freehold again"


@cache
def native() -> ModuleType | None:
    """The native ops, or None where they are not built or turned off. Warns once if they are missing."""
    choice = os.environ.get("FREEHOLD_KERNELS", "auto")
    if choice not in CHOICES:
        raise UsageError(f"FREEHOLD_KERNELS is {choice!r}; choose one of {', '.join(CHOICES)}")
    if choice == "reference":
        info_once("reference ops run: FREEHOLD_KERNELS=reference")
        return None
    try:
        module = importlib.import_module("freehold.kernels.native")
    except ImportError as error:
        built = importlib.util.find_spec("freehold._native") is not None
        reason = f"the native kernels cannot be loaded: {error}" if built else _NOT_BUILT
        if choice == "native":
            raise BackendError(f"FREEHOLD_KERNELS=native, but {reason}; {_REMEDY}") from None
        warn_once(f"{reason}, so the slower reference ops run; {_REMEDY}")
        return None
    info_once(f"native CPU kernels run: {', '.join(native_ops(module))}; every other op is the reference")
    return module


def built() -> ModuleType:
    """The native ops, for those who know that they are there."""
    module = native()
    assert module is not None
    return module


@contextmanager
def reference_only() -> Iterator[None]:
    """Within the block, and on this thread, every op is the reference: for what is measured against it."""
    token = _reference_only.set(True)
    try:
        yield
    finally:
        _reference_only.reset(token)


_reference_only: ContextVar[bool] = ContextVar("reference_only", default=False)


def gradient_type() -> torch.dtype:
    """In which gradients meet packed weights: float32 unless `gradients_in` says otherwise."""
    return _gradient_type.get()


@contextmanager
def gradients_in(dtype: torch.dtype) -> Iterator[None]:
    """Ops that run forward within the block, on this thread, multiply their gradients in float32 or bfloat16."""
    token = _gradient_type.set(dtype)
    try:
        yield
    finally:
        _gradient_type.reset(token)


_gradient_type: ContextVar[torch.dtype] = ContextVar("gradient_type", default=torch.float32)


def quick_gradient_type() -> torch.dtype:
    """The one that this processor multiplies faster."""
    return torch.bfloat16 if {"amx_bf16", "avx512_bf16"} & set(machine.vector_features()) else torch.float32


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Within the block, torch's ops on this thread start no others.

    Those and the native kernels' threads get in each other's way: a small op takes milliseconds then.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def native_ops(module: ModuleType | None) -> list[str]:
    """The ops that a native module has."""
    return [op for op in OPS if hasattr(module, op)]


def for_op(op: str, x: Tensor, *others: Tensor | None, packed: bool = True) -> ModuleType:
    """The module whose `op` handles a tensor like `x`; where one of the arguments needs a gradient, the reference.

    The native kernels multiply float32 activations by packed weights; plain weights (`packed` False) stay with the
    reference. Where a gradient passes packed weights, `ops` asks freehold.kernels.autograd first. This runs before
    every op, hundreds of times a token: it is written to be quick.
    """
    if not packed or x.dtype is not torch.float32 or not x.is_cpu:
        return reference
    module = native()
    if module is None or op not in _native_names() or _reference_only.get():
        return reference
    return reference if needs_gradient(x, *others) else module


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether what is computed from these is to be differentiated."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


@cache
def _native_names() -> frozenset[str]:
    return frozenset(native_ops(native()))
