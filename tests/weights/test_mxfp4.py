"""The MXFP4 codec: unpacking against transformers, packing against a search over every scale there is."""

import hashlib

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from freehold.errors import UsageError
from freehold.weights.mxfp4 import BLOCK, E2M1_VALUES, Mxfp4Tensor, pack, pack_dithered, unpack

GRID = torch.tensor(sorted(set(E2M1_VALUES)), dtype=torch.float64)
SCALES = 2.0 ** (torch.arange(255, dtype=torch.float64) - 127)


def bits(values: Tensor) -> Tensor:
    return values.view(torch.int32 if values.dtype == torch.float32 else torch.int16)


def test_code_values_are_those_of_e2m1() -> None:
    # OCP Microscaling Formats v1.0, section 5.3.3: sign, two exponent bits of bias 1, one mantissa bit.
    for code, value in enumerate(E2M1_VALUES):
        sign, exponent, mantissa = -1.0 if code & 8 else 1.0, code >> 1 & 3, code & 1
        assert value == sign * (2.0 ** (exponent - 1) * (1 + mantissa / 2) if exponent else mantissa / 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unpack_is_bit_equal_to_transformers(dtype: torch.dtype) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    # Every byte under every scale but 255, which is E8M0's NaN: no checkpoint holds it, and transformers itself
    # turns it into infinity or NaN depending on the type.
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 255, 16, 16).contiguous()
    scales = torch.arange(255, dtype=torch.uint8).view(1, 255, 1).expand(1, 255, 16).contiguous()
    theirs = convert_moe_packed_tensors(blocks, scales, dtype=dtype).transpose(1, 2)
    ours = unpack(Mxfp4Tensor(blocks, scales), dtype)
    assert ours.shape == (1, 255, 512)
    assert torch.equal(bits(ours), bits(theirs.contiguous()))


def test_the_low_nibble_is_the_even_column() -> None:
    packed = Mxfp4Tensor(torch.full((1, 1, 16), 0x72, dtype=torch.uint8), torch.full((1, 1), 128, dtype=torch.uint8))
    assert unpack(packed).flatten().tolist() == [2.0, 12.0] * 16


def squared_errors(block: Tensor) -> Tensor:
    """(255,): what each scale costs, in float64, each value going to its nearest neighbour by plain search."""
    scaled = block.double() / SCALES.unsqueeze(-1)
    nearest = (scaled.unsqueeze(-1) - GRID).abs().min(-1).values
    return (nearest * SCALES.unsqueeze(-1)).square().sum(-1)


@st.composite
def any_block(draw: st.DrawFn) -> Tensor:
    """32 values that stress the choice of scale: outliers, near ties, one magnitude, tiny and huge exponents."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    kind = draw(st.sampled_from(["normal", "heavy tail", "grid", "half grid", "clip one", "sparse", "flat"]))
    values = torch.randn(BLOCK, generator=generator, dtype=torch.float64)
    if kind == "heavy tail":
        values = values.pow(5)
    elif kind == "grid":
        values = GRID[torch.randint(len(GRID), (BLOCK,), generator=generator)]
    elif kind == "half grid":
        values = (values * 8).round() / 4
    elif kind == "clip one":  # many values that a finer scale would hold, at the price of the largest
        values = torch.randint(8, (BLOCK,), generator=generator).double() / 4 + 0.25
        values[0] = draw(st.floats(3.5, 5))
    elif kind == "sparse":
        values *= torch.rand(BLOCK, generator=generator) < 0.1
    elif kind == "flat":
        values = values.sign() * draw(st.floats(0.5, 8))
    return (values * 2.0 ** draw(st.integers(-150, 120))).float()


@pytest.mark.parametrize(
    ("block", "scale"),
    [
        ([6.0, 0.5] * 16, 127),
        ([4.0] + [0.25] * 31, 126),  # clipping the largest costs 1, rounding the others would cost 31 / 16
        ([7.5] * 16 + [4.0] * 16, 128),  # 8 is nearer than 6
    ],
)
def test_the_largest_value_does_not_decide_alone(block: list[float], scale: int) -> None:
    assert pack(torch.tensor([block])).scales.item() == scale
    assert int(squared_errors(torch.tensor(block)).argmin()) == scale


@settings(max_examples=150, deadline=None)
@given(any_block())
def test_no_other_scale_would_have_been_better(block: Tensor) -> None:
    assume(bool(block.isfinite().all()))
    packed = pack(block.unsqueeze(0))
    error = float((unpack(packed, torch.float64) - block.double()).square().sum())
    best = float(squared_errors(block).min())
    assert error <= best * (1 + 1e-5), f"scale {packed.scales.item()}: {error} where {best} is possible"


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    low=st.integers(0, 254),
    spread=st.integers(0, 4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_values_that_fit_survive_a_round_trip(seed: int, low: int, spread: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(256, (3, 2, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(low, min(low + spread, 254) + 1, (3, 2), dtype=torch.uint8, generator=generator)
    values = unpack(Mxfp4Tensor(blocks, scales), dtype)
    assume(bool(values.isfinite().all()))  # 6 · 2^127 is more than float32 can hold
    assert torch.equal(unpack(pack(values), dtype), values)


@pytest.mark.parametrize(
    ("tie", "even"), [(0.25, 0), (0.75, 1), (1.25, 1), (1.75, 2), (2.5, 2), (3.5, 4), (5.0, 4), (-2.5, -2)]
)
def test_ties_go_to_the_even_code(tie: float, even: float) -> None:
    block = torch.tensor([[tie] + [0.5, 6.0] * 15 + [6.0]])  # needs exactly scale 2^0
    packed = pack(block)
    assert packed.scales.item() == 127
    assert unpack(packed)[0, 0] == even


def test_zero_blocks_have_scale_one_and_do_not_touch_their_neighbours() -> None:
    values = torch.zeros(2, 64)
    values[0, :32] = 3.0
    packed = pack(values)
    assert packed.scales[1].tolist() == [127, 127]
    assert packed.scales[0, 1] == 127
    assert torch.equal(unpack(packed), values)


def test_signs_of_values_that_round_to_zero_cost_nothing() -> None:
    values = torch.full((1, 32), -1e-30)
    values[0, 0] = 1.0
    assert unpack(pack(values))[0].tolist() == [1.0] + [0.0] * 31


def test_packing_in_pieces_changes_nothing() -> None:
    # More blocks than are packed at once, compared with packing each row alone.
    values = torch.randn(3, 5, 32 * 1200, generator=torch.Generator().manual_seed(0))
    whole = pack(values)
    for i in range(3):
        alone = pack(values[i])
        assert torch.equal(whole[i].blocks, alone.blocks)
        assert torch.equal(whole[i].scales, alone.scales)


def test_non_contiguous_values() -> None:
    values = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    assert torch.equal(unpack(pack(values.T)), unpack(pack(values.T.contiguous())))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_values_that_the_format_cannot_hold_are_refused(bad: float) -> None:
    values = torch.zeros(4, 64)
    values[2, 40] = bad
    with pytest.raises(UsageError, match="NaN or infinity"):
        pack(values)


@pytest.mark.parametrize("shape", [(32,), (4, 31), (4, 33), (2, 4, 48)])
def test_shapes_that_are_not_whole_blocks_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="multiple of 32"):
        pack(torch.zeros(shape))


@pytest.mark.parametrize(
    ("blocks", "scales"),
    [
        (torch.zeros(4, 2, 15, dtype=torch.uint8), torch.zeros(4, 2, dtype=torch.uint8)),
        (torch.zeros(4, 2, 16, dtype=torch.uint8), torch.zeros(4, 3, dtype=torch.uint8)),
        (torch.zeros(2, 16, dtype=torch.uint8), torch.zeros(2, dtype=torch.uint8)),
        (torch.zeros(4, 2, 16), torch.zeros(4, 2, dtype=torch.uint8)),
        (torch.zeros(4, 2, 16, dtype=torch.uint8), torch.zeros(4, 2, dtype=torch.int8)),
    ],
)
def test_mismatched_parts_are_refused(blocks: Tensor, scales: Tensor) -> None:
    with pytest.raises(UsageError, match="MXFP4"):
        Mxfp4Tensor(blocks, scales)


def test_shape_size_and_indexing() -> None:
    packed = pack(torch.randn(3, 4, 64))
    assert packed.shape == (3, 4, 64)
    assert packed.num_bytes == 3 * 4 * 64 * 17 // 32
    assert packed[1].shape == (4, 64)
    assert packed[1].blocks.data_ptr() == packed.blocks[1].data_ptr()


# --- dithered -----------------------------------------------------------------------------------------------------


def near(rows: int = 64, columns: int = 256) -> tuple[Mxfp4Tensor, Tensor]:
    """A packed matrix, and a change of a hundredth of a step."""
    generator = torch.Generator().manual_seed(0)
    base = pack(torch.randn(rows, columns, generator=generator))
    return base, torch.randn(rows, columns, generator=generator) * 0.005


def test_dithering_leaves_alone_what_has_not_changed() -> None:
    base, _ = near()
    for seed in range(5):
        again = pack_dithered(unpack(base), base, seed=seed)
        assert torch.equal(again.blocks & 0x77, base.blocks & 0x77) and torch.equal(again.scales, base.scales)
        assert torch.equal(unpack(again), unpack(base))


def test_dithering_loses_nothing_on_average_where_the_nearest_number_loses_all() -> None:
    base, change = near()
    values = unpack(base) + change
    seeds = 200
    total = sum(unpack(pack_dithered(values, base, seed=seed * 7919)) for seed in range(seeds)) - seeds * unpack(base)
    kept = float((total * change).sum() / (seeds * change.square().sum()))
    lost = float(((unpack(pack(values)) - unpack(base)) * change).sum() / change.square().sum())
    assert 0.95 < kept < 1.03 and lost < 0.5
    for one in (pack_dithered(values, base, seed=3),):
        moved = (unpack(one) != unpack(base)).float().mean()
        assert 0 < moved < 0.1  # by a whole step each
        assert float((unpack(one) - values).abs().max()) < 2 * float(torch.exp2(base.scales.float() - 127).max())


def test_dithering_depends_on_the_seed_and_the_place_alone() -> None:
    base = pack(((torch.arange(64 * 256) * 37 % 101 - 50) / 16).view(64, 256))
    values = unpack(base) + 1 / 128
    whole = pack_dithered(values, base, seed=2**32 - 1)
    assert torch.equal(pack_dithered(values, base, seed=2**32 - 1).blocks, whole.blocks)
    assert not torch.equal(pack_dithered(values, base, seed=1).blocks, whole.blocks)
    top = pack_dithered(values[:40], Mxfp4Tensor(base.blocks[:40], base.scales[:40]), seed=2**32 - 1)
    assert torch.equal(top.blocks, whole.blocks[:40])
    digest = hashlib.sha256(whole.blocks.numpy().tobytes()).hexdigest()[:16]
    assert digest == "4da7f3f6748eff45"  # on every machine: merged checkpoints can be made again


def test_dithering_gives_blocks_that_have_outgrown_their_scale_another() -> None:
    base, _ = near()
    for factor in (0.01, 0.3, 2.0, 50.0):
        values = unpack(base) * factor
        again = pack_dithered(values, base, seed=1)
        assert float((unpack(again) - values).norm() / values.norm()) < 0.3
    zero = pack(torch.zeros(1, 32))
    small = torch.full((1, 32), 1e-6)
    assert float((unpack(pack_dithered(small, zero, seed=1)) - small).abs().max()) < 1e-6


def test_dithering_refuses_what_the_format_cannot_hold() -> None:
    base, change = near()
    with pytest.raises(UsageError, match="NaN or infinity"):
        pack_dithered(unpack(base) + torch.inf, base, seed=0)
    with pytest.raises(UsageError, match="not near"):
        pack_dithered(change[:3], base, seed=0)
