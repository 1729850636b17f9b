"""What an op's wrapper asks of tensors before a kernel takes them for granted. Each raises UsageError, with the op, the
argument, and what was expected of it. For this package."""

from torch import Tensor

from freehold.errors import UsageError
from freehold.weights.mxfp4 import Mxfp4Tensor
from freehold.weights.packed import PackedMatrix


def rank(op: str, name: str, tensor: Tensor | Mxfp4Tensor | PackedMatrix, dimensions: int) -> None:
    if len(tensor.shape) != dimensions:
        raise UsageError(f"[{op}] expected {name} with {dimensions} dimensions, got {tuple(tensor.shape)}")


def shape(op: str, name: str, tensor: Tensor | Mxfp4Tensor | PackedMatrix, expected: tuple[int, ...]) -> None:
    if tensor.shape != expected:
        raise UsageError(f"[{op}] expected {name} {expected}, got {tuple(tensor.shape)}")


def alike(op: str, a: Tensor, b: Tensor) -> None:
    if a.dtype is not b.dtype or a.device != b.device:
        raise UsageError(
            f"[{op}] expected one type and device, got {a.dtype} on {a.device} and {b.dtype} on {b.device}"
        )


def contiguous(op: str, name: str, tensor: Tensor) -> None:
    if not tensor.is_contiguous():
        raise UsageError(
            f"[{op}] expected a contiguous {name}, got {tuple(tensor.shape)} with strides {tensor.stride()}"
        )
