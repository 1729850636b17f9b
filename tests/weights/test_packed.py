"""The kernels' layout: every number at its documented place, zeros where nothing is, and all of it back again."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from freehold.errors import UsageError
from freehold.weights import mxfp4
from freehold.weights.mxfp4 import Mxfp4Tensor
from freehold.weights.packed import (
    FORMS,
    PANEL,
    Form,
    PackedMatrix,
    pack,
    packed_bytes,
    packed_shapes,
    plain_form,
    unpack,
)

PLAIN: list[Form] = ["q8", "bf16", "f32"]
SIZES = st.integers(1, 100)
STACKS = st.one_of(st.just(()), st.tuples(st.integers(1, 3)))


def random_mxfp4(shape: tuple[int, ...], seed: int = 0) -> Mxfp4Tensor:
    generator = torch.Generator().manual_seed(seed)
    *rows, columns = shape
    blocks = torch.randint(256, (*rows, columns // 32, 16), dtype=torch.uint8, generator=generator)
    return Mxfp4Tensor(blocks, torch.randint(256, blocks.shape[:-1], dtype=torch.uint8, generator=generator))


def random_values(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_same_mxfp4(ours: Tensor | Mxfp4Tensor, expected: Mxfp4Tensor) -> None:
    assert isinstance(ours, Mxfp4Tensor)
    assert torch.equal(ours.blocks, expected.blocks)
    assert torch.equal(ours.scales, expected.scales)


def row_order(num_rows: int, paired: bool) -> list[int | None]:
    """Which row lies where, in panels of 16; None for padding."""
    if not paired:
        return [row if row < num_rows else None for row in range(-(-num_rows // PANEL) * PANEL)]
    order: list[int | None] = []
    for first in range(0, -(-num_rows // 64) * 32, PANEL):
        for half in (0, 1):
            rows = [2 * pair + half for pair in range(first, first + PANEL)]
            order += [row if row < num_rows else None for row in rows]
    return order


# --- round trips ------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(stack=STACKS, rows=SIZES, blocks=st.integers(1, 4), paired=st.booleans(), seed=st.integers(0, 99))
def test_mxfp4_comes_back_bit_for_bit(stack: tuple[int, ...], rows: int, blocks: int, paired: bool, seed: int) -> None:
    rows += rows % 2 if paired else 0
    matrix = random_mxfp4((*stack, rows, 32 * blocks), seed)
    packed = pack(matrix, "mxfp4", paired=paired)
    assert packed.shape == matrix.shape
    assert_same_mxfp4(unpack(packed), matrix)


@settings(max_examples=60, deadline=None)
@given(stack=STACKS, rows=SIZES, columns=SIZES, paired=st.booleans(), form=st.sampled_from(["bf16", "f32"]))
def test_plain_values_come_back_bit_for_bit(
    stack: tuple[int, ...], rows: int, columns: int, paired: bool, form: Form
) -> None:
    rows += rows % 2 if paired else 0
    matrix = random_values((*stack, rows, columns), {"bf16": torch.bfloat16, "f32": torch.float32}[form])
    back = unpack(pack(matrix, form, paired=paired))
    assert isinstance(back, Tensor)
    assert back.dtype == matrix.dtype
    assert torch.equal(back, matrix)


@settings(max_examples=60, deadline=None)
@given(stack=STACKS, rows=SIZES, columns=SIZES, paired=st.booleans(), scale=st.sampled_from([1e-3, 1.0, 1e4]))
def test_q8_is_off_by_half_a_step_at_most(
    stack: tuple[int, ...], rows: int, columns: int, paired: bool, scale: float
) -> None:
    rows += rows % 2 if paired else 0
    matrix = random_values((*stack, rows, columns), torch.float32) * scale
    packed = pack(matrix, "q8", paired=paired)
    back = unpack(packed)
    assert isinstance(back, Tensor)
    assert back.shape == matrix.shape
    # Half a step, and what float16 (subnormal below 2^-14) takes from 127 of them.
    padded = torch.nn.functional.pad(matrix, (0, -columns % 32)).unflatten(-1, (-1, 32))
    step = (padded.abs().amax(-1, keepdim=True) / 127).expand_as(padded).flatten(-2)[..., :columns]
    assert ((back - matrix).abs() <= step / 2 + 128 * torch.clamp(step * 2**-11, min=2**-25)).all()


def test_float16_is_exact_in_f32_and_is_the_plain_form() -> None:
    matrix = random_values((5, 7), torch.float16)
    assert [plain_form(dtype) for dtype in (torch.bfloat16, torch.float32, torch.float16)] == ["bf16", "f32", "f32"]
    back = unpack(pack(matrix, "f32"))
    assert isinstance(back, Tensor)
    assert torch.equal(back, matrix.float())


@pytest.mark.parametrize("form", ["bf16", "f32"])
def test_a_transposed_stack(form: Form) -> None:
    # As bfloat16 experts lie in the Hugging Face layout.
    matrix = random_values((2, 40, 66), torch.bfloat16).transpose(-1, -2)
    back = unpack(pack(matrix, form, paired=True))
    assert isinstance(back, Tensor)
    assert torch.equal(back, matrix.to(back.dtype))


# --- where each number lies -------------------------------------------------------------------------------------


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("rows", [2, 30, 34, 96])
def test_mxfp4_lies_as_documented(rows: int, paired: bool) -> None:
    matrix = random_mxfp4((rows, 64))
    packed = pack(matrix, "mxfp4", paired=paired)
    assert packed.scales is not None
    low, high = matrix.blocks & 15, matrix.blocks >> 4
    codes = torch.stack((low, high), dim=-1).view(rows, 64)  # E2M1 code of each column
    for place, row in enumerate(row_order(rows, paired)):
        panel, lane = divmod(place, PANEL)
        for block in range(2):
            data = packed.data[panel, block, :, lane]  # (4, 4)
            if row is None:
                assert not data.any()
                assert packed.scales[panel, block, lane] == 0
                continue
            assert packed.scales[panel, block, lane] == matrix.scales[row, block]
            for j in range(4):
                for i in range(4):
                    assert data[j, i] & 15 == codes[row, 32 * block + 8 * j + i]
                    assert data[j, i] >> 4 == codes[row, 32 * block + 8 * j + 4 + i]


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("rows", [2, 30, 34, 96])
def test_q8_lies_as_documented(rows: int, paired: bool) -> None:
    matrix = random_values((rows, 45), torch.float32)
    packed = pack(matrix, "q8", paired=paired)
    assert packed.scales is not None
    for place, row in enumerate(row_order(rows, paired)):
        panel, lane = divmod(place, PANEL)
        for block, first in enumerate((0, 32)):
            data, scale = packed.data[panel, block, :, lane].flatten(), packed.scales[panel, block, lane]
            expected = torch.zeros(32)
            if row is not None:
                values = matrix[row, first : first + 32]
                assert scale == (values.abs().max() / 127).half()
                expected[: len(values)] = (values / scale.float()).round().clamp(-127, 127)
            assert torch.equal(data.float(), expected)


@pytest.mark.parametrize("form", ["bf16", "f32"])
@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("rows", [2, 30, 34, 96])
def test_plain_values_lie_as_documented(rows: int, paired: bool, form: Form) -> None:
    matrix = random_values((rows, 7), torch.bfloat16)
    packed = pack(matrix, form, paired=paired)
    assert packed.scales is None
    for place, row in enumerate(row_order(rows, paired)):
        panel, lane = divmod(place, PANEL)
        expected = torch.zeros(7) if row is None else matrix[row].float()
        assert torch.equal(packed.data[panel, :, lane].float(), expected)


@pytest.mark.parametrize("form", PLAIN)
def test_rows_are_those_of_the_whole(form: Form) -> None:
    matrix = random_values((37, 70), torch.float32)
    packed = pack(matrix, form)
    whole = unpack(packed)
    assert isinstance(whole, Tensor)
    tokens = torch.tensor([36, 0, 16, 16, 15])
    assert torch.equal(packed.rows(tokens), whole[tokens].float())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(1, 32), (50, 96), (3, 64, 32)])
def test_sizes_are_those_of_the_tensors(form: Form, shape: tuple[int, ...]) -> None:
    matrix = random_mxfp4(shape) if form == "mxfp4" else random_values(shape, torch.float32)
    for paired in (False, True):
        if paired and shape[-2] % 2:
            continue
        packed = pack(matrix, form, paired=paired)
        data, scales = packed_shapes(form, shape, paired=paired)
        assert tuple(packed.data.shape) == data
        assert (None if packed.scales is None else tuple(packed.scales.shape)) == scales
        assert packed.num_bytes == packed_bytes(form, shape, paired=paired)
        address = packed.address()
        assert FORMS[address.form] == form
        assert (address.data, address.num_rows, address.num_columns) == (packed.data.data_ptr(), *shape[-2:])
        assert address.scales == (0 if packed.scales is None else packed.scales.data_ptr())


# --- what is refused --------------------------------------------------------------------------------------------


def test_forms_and_values_do_not_mix() -> None:
    with pytest.raises(UsageError, match="mxfp4 cannot be made from a Tensor"):
        pack(torch.zeros(2, 32), "mxfp4")
    with pytest.raises(UsageError, match="q8 cannot be made from a Mxfp4Tensor"):
        pack(mxfp4.pack(torch.zeros(2, 32)), "q8")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e9])
def test_q8_refuses_what_it_cannot_hold(value: float) -> None:
    matrix = torch.zeros(20, 40)
    matrix[17, 33] = value
    with pytest.raises(UsageError, match="use bf16 or f32"):
        pack(matrix, "q8")
    back = unpack(pack(matrix, "f32"))
    assert isinstance(back, Tensor)
    assert torch.equal(back.nan_to_num(), matrix.nan_to_num())


def test_parts_that_do_not_fit_together() -> None:
    data, scales = torch.zeros(1, 1, 8, 16, 4, dtype=torch.int8), torch.zeros(1, 1, 16, dtype=torch.float16)
    shape = torch.Size((16, 32))
    PackedMatrix("q8", shape, data, scales)
    for wrong in (
        (torch.Size((17, 32)), data, scales),
        (shape, data, None),
        (shape, data.to(torch.uint8), scales),
        (shape, data, scales.float()),
        (shape, data.transpose(-1, -2).contiguous().transpose(-1, -2), scales),
    ):
        with pytest.raises(UsageError, match=r"packs into|packed q8"):
            PackedMatrix("q8", *wrong)
