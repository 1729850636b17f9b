"""The native kernels against the reference, over odd sizes, tails and misaligned memory."""

import pytest
import torch
from torch import Tensor

from freehold.kernels import reference

native = pytest.importorskip("freehold.kernels.native", reason="the native kernels are not built", exc_type=ImportError)

# Largest allowed difference relative to the largest value of the row: sums run in another order, outputs round once.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7}
SHAPES = [
    (1, 1),
    (1, 2),
    (3, 7),
    (2, 15),
    (2, 16),
    (5, 17),
    (1, 31),
    (4, 33),
    (7, 64),
    (3, 100),
    (2, 2880),
    (1, 4099),
    (0, 8),
]


def close(ours: Tensor, expected: Tensor) -> None:
    assert ours.dtype == expected.dtype
    assert ours.shape == expected.shape
    if expected.numel():
        scale = float(expected.float().abs().max())
        torch.testing.assert_close(ours.float(), expected.float(), atol=TOLERANCE[ours.dtype] * scale, rtol=0)


def draw(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [1.0, 1e-4, 1e6])
def test_rms_norm(shape: tuple[int, int], dtype: torch.dtype, size: float) -> None:
    x, weight = draw(*shape, dtype=dtype) * size, draw(shape[1], dtype=dtype, seed=1)
    close(native.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))


def views(T: int, D: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """(T, D) tensors with memory that a kernel could trip over."""
    return {
        "odd address": draw(T * D + 1, dtype=dtype)[1:].view(T, D),
        "sliced rows": draw(2 * T, D, dtype=dtype)[::2],
        "sliced columns": draw(T, D + 3, dtype=dtype)[:, 1:-2],
        "strided columns": draw(T, 2 * D, dtype=dtype)[:, ::2],
        "transposed": draw(D, T, dtype=dtype).T,
        "expanded": draw(1, D, dtype=dtype).expand(T, D),
    }


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("view", views(1, 1, torch.float32))
def test_rms_norm_of_awkward_memory(view: str, dtype: torch.dtype) -> None:
    x = views(5, 37, dtype)[view]
    before = x.clone()
    for weight in (draw(38, dtype=dtype, seed=1)[1:], draw(74, dtype=dtype, seed=1)[::2]):
        close(native.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_rms_norm_of_special_values(dtype: torch.dtype) -> None:
    weight = torch.ones(20, dtype=dtype)
    assert torch.equal(native.rms_norm(torch.zeros(2, 20, dtype=dtype), weight, 1e-5), torch.zeros(2, 20, dtype=dtype))
    x = draw(3, 20, dtype=dtype)
    x[1, 18] = torch.nan
    out = native.rms_norm(x, weight, 1e-5)
    assert out[1].isnan().all()
    assert out[[0, 2]].isfinite().all()


def test_bfloat16_rounds_to_nearest_even() -> None:
    # With one column and no epsilon the norm is ±1, so that what is rounded is the weight's product exactly.
    x = torch.tensor([[3.0, -3.0]], dtype=torch.bfloat16)
    weight = torch.tensor([1.0078125, 0.3], dtype=torch.bfloat16)
    assert torch.equal(native.rms_norm(x, weight, 0.0), torch.stack((weight[0], -weight[1])).unsqueeze(0))


@torch.inference_mode()
def test_tensors_made_without_autograd() -> None:
    x, weight = draw(3, 64, dtype=torch.bfloat16), draw(64, dtype=torch.bfloat16, seed=1)
    assert x.is_inference()
    close(native.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))


def test_tensors_that_need_gradients_are_detached_or_refused_by_the_caller() -> None:
    x = draw(3, 8, dtype=torch.float32).requires_grad_()
    with torch.no_grad():
        close(native.rms_norm(x, torch.ones(8), 1e-5), reference.rms_norm(x, torch.ones(8), 1e-5))
