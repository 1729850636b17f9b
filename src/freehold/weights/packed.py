"""Weights in the layout that the CPU kernels stream: repacked once, unpacked to the checkpoint's bytes at any time.

A matrix of R rows by C columns is cut into *panels* of 16 rows (P of them, the last one padded with zero rows) and, in
the quantised forms, into *blocks* of 32 columns (B of them, padded likewise). Within a panel the rows lie side by
side, so that one vector load brings the same columns of all 16:

    mxfp4   data (…, P, B, 4, 16, 4) uint8    [chunk j, row, i]: column 8j+i in the low nibble, 8j+4+i in the high
            scales (…, P, B, 16) uint8         E8M0, as published
    q8      data (…, P, B, 8, 16, 4) int8      [group g, row, i]: column 4g+i
            scales (…, P, B, 16) float16       value = data · scale
    bf16    data (…, P, C, 16) bfloat16
    f32     data (…, P, C, 16) float32

Gate and up rows, interleaved in checkpoints, are *paired* for the experts' first matrix: 16 gates, their 16 ups, and so
on, so that the activation needs no shuffling and 64 rows give one block of the second matrix's input.

`unpack` undoes everything: MXFP4 and plain values come back bit for bit, q8 as the values it stands for. Plain torch on
the CPU; which form a tensor takes is decided by `freehold.weights.pack_file`.
"""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from freehold.errors import UsageError
from freehold.weights.mxfp4 import BLOCK, Mxfp4Tensor

PANEL = 16

Form = Literal["mxfp4", "q8", "bf16", "f32"]
FORMS: tuple[Form, ...] = get_args(Form)

DATA_DTYPES = {"mxfp4": torch.uint8, "q8": torch.int8, "bf16": torch.bfloat16, "f32": torch.float32}
SCALES_DTYPES = {"mxfp4": torch.uint8, "q8": torch.float16}
_PLAIN: dict[torch.dtype, Form] = {torch.bfloat16: "bf16", torch.float32: "f32"}


class Address(NamedTuple):
    """What a kernel needs to know of a matrix: the form's number in FORMS, pointers, rows and columns."""

    form: int
    data: int
    scales: int
    num_rows: int
    num_columns: int


@dataclass(slots=True, eq=False)
class PackedMatrix:
    """A matrix, or a stack of E of them, of logical shape (R, C) or (E, R, C). Not to be changed once made."""

    form: Form
    shape: torch.Size
    data: Tensor
    scales: Tensor | None = None
    paired: bool = False
    native_handle: object | None = field(default=None, init=False, repr=False)  # made by the kernels on first use

    def __post_init__(self) -> None:
        expected_data, expected_scales = packed_shapes(self.form, self.shape, paired=self.paired)
        got_scales = None if self.scales is None else tuple(self.scales.shape)
        if tuple(self.data.shape) != expected_data or got_scales != expected_scales:
            raise UsageError(
                f"a {self.form} matrix of shape {tuple(self.shape)} packs into {expected_data} and {expected_scales}, "
                f"got {tuple(self.data.shape)} and {got_scales}"
            )
        for name, tensor, dtype in (
            ("data", self.data, DATA_DTYPES[self.form]),
            ("scales", self.scales, SCALES_DTYPES.get(self.form)),
        ):
            if tensor is not None and (tensor.dtype != dtype or tensor.device.type != "cpu"):
                raise UsageError(f"packed {self.form} {name} is {dtype} on the CPU, got {tensor.dtype}")
            if tensor is not None and not tensor.is_contiguous():
                raise UsageError(f"packed {self.form} {name} must be contiguous")

    @property
    def num_bytes(self) -> int:
        return self.data.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def address(self) -> Address:
        """Pointers stay good for as long as this object is alive."""
        scales = 0 if self.scales is None else self.scales.data_ptr()
        return Address(FORMS.index(self.form), self.data.data_ptr(), scales, self.shape[-2], self.shape[-1])

    def panels(self, first: int, count: int) -> "PackedMatrix":
        """A view of some panels of a matrix, as an unpaired one with the rows in the order in which they lie."""
        assert len(self.shape) == 2
        num_rows = len(self.data) * PANEL if self.paired else self.shape[0]
        within = slice(first, first + count)
        shape = torch.Size((min(num_rows, (first + count) * PANEL) - first * PANEL, self.shape[1]))
        return PackedMatrix(self.form, shape, self.data[within], None if self.scales is None else self.scales[within])

    def __getitem__(self, index: int) -> "PackedMatrix":
        """A view of one matrix of a stack."""
        assert len(self.shape) == 3
        scales = None if self.scales is None else self.scales[index]
        return PackedMatrix(self.form, torch.Size(self.shape[1:]), self.data[index], scales, self.paired)

    def rows(self, indices_T: Tensor) -> Tensor:
        """Some rows of a matrix in float32, (T, C): what an embedding look-up reads."""
        assert len(self.shape) == 2 and not self.paired and self.form != "mxfp4"
        panels, lanes = indices_T // PANEL, indices_T % PANEL
        if self.scales is None:
            return self.data[panels, :, lanes].float()
        data = self.data[panels, :, :, lanes].flatten(-2)  # (T, B, 32)
        values = data.float() * self.scales[panels, :, lanes].float().unsqueeze(-1)
        return values.flatten(-2)[:, : self.shape[1]]


def packed_shapes(
    form: Form, shape: tuple[int, ...] | torch.Size, *, paired: bool = False
) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """The shapes of `data` and `scales` that hold a matrix of this logical shape."""
    *leading, R, C = shape
    rows = 2 * _ceil(R // 2, 2 * PANEL) if paired else R
    P, B = _ceil(rows, PANEL) // PANEL, _ceil(C, BLOCK) // BLOCK
    match form:
        case "mxfp4":
            return (*leading, P, B, 4, PANEL, 4), (*leading, P, B, PANEL)
        case "q8":
            return (*leading, P, B, 8, PANEL, 4), (*leading, P, B, PANEL)
        case _:
            return (*leading, P, C, PANEL), None


def packed_bytes(form: Form, shape: tuple[int, ...] | torch.Size, *, paired: bool = False) -> int:
    """How much memory a matrix of this logical shape takes."""
    data, scales = packed_shapes(form, shape, paired=paired)
    count = torch.Size(data).numel() * DATA_DTYPES[form].itemsize
    return count + (0 if scales is None else torch.Size(scales).numel() * SCALES_DTYPES[form].itemsize)


def pack(matrix: Tensor | Mxfp4Tensor, form: Form, *, paired: bool = False) -> PackedMatrix:
    """Lay out a matrix, or a stack of them. `form` mxfp4 takes packed MXFP4 alone, the others plain tensors.

    `paired` sorts interleaved gate and up rows. Plain values are converted to the form's type: exact from bfloat16 to
    f32, rounded to bf16, quantised to q8. Raises UsageError where q8 would have to hold NaN or infinity.
    """
    shape = matrix.shape
    if (form == "mxfp4") != isinstance(matrix, Mxfp4Tensor):
        raise UsageError(f"form {form} cannot be made from a {type(matrix).__name__}")
    data_shape, scales_shape = packed_shapes(form, shape, paired=paired)
    data = torch.empty(data_shape, dtype=DATA_DTYPES[form])
    scales = None if scales_shape is None else torch.empty(scales_shape, dtype=SCALES_DTYPES[form])
    if len(shape) == 2:
        pack_into(data, scales, matrix, form, paired=paired)
    else:
        for number in range(shape[0]):  # one at a time: the working copies stay small
            pack_into(data[number], None if scales is None else scales[number], matrix[number], form, paired=paired)
    return PackedMatrix(form, shape, data, scales, paired)


def pack_into(
    data: Tensor, scales: Tensor | None, matrix: Tensor | Mxfp4Tensor, form: Form, *, paired: bool = False
) -> None:
    """Lay out one matrix (R, C) in tensors of the packed shapes."""
    if isinstance(matrix, Mxfp4Tensor):
        assert scales is not None
        words = _panels(matrix.blocks.view(torch.int32), paired)  # (P, 16, B, 4): a word holds eight columns
        data.view(torch.int32).squeeze(-1).copy_(_exchanged(words).permute(0, 2, 3, 1))
        scales.copy_(_panels(matrix.scales, paired).transpose(1, 2))
    elif form == "q8":
        assert scales is not None
        columns = F.pad(matrix.float(), (0, -matrix.shape[1] % BLOCK)).contiguous()
        values = torch.unflatten(_panels(columns, paired), -1, (-1, BLOCK))
        steps = _q8_scales(values)  # (P, 16, B)
        words = _quantised(values, steps).view(torch.int32)  # (P, 16, B, 8)
        data.view(torch.int32).squeeze(-1).copy_(words.permute(0, 2, 3, 1))
        scales.copy_(steps.transpose(1, 2))
    else:
        data.copy_(_panels(matrix, paired).transpose(1, 2))


def unpack(packed: PackedMatrix) -> Tensor | Mxfp4Tensor:
    """The matrix again: an Mxfp4Tensor with the published bytes, or plain values (float32 for q8)."""
    if len(packed.shape) == 2:
        return _unpack_one(packed.data, packed.scales, packed)
    parts = [
        _unpack_one(packed.data[number], None if packed.scales is None else packed.scales[number], packed)
        for number in range(packed.shape[0])
    ]
    if packed.form == "mxfp4":
        stack = [part for part in parts if isinstance(part, Mxfp4Tensor)]
        return Mxfp4Tensor(torch.stack([part.blocks for part in stack]), torch.stack([part.scales for part in stack]))
    return torch.stack([part for part in parts if isinstance(part, Tensor)])


def _unpack_one(data: Tensor, scales: Tensor | None, packed: PackedMatrix) -> Tensor | Mxfp4Tensor:
    R, C = packed.shape[-2:]
    if packed.form == "mxfp4":
        assert scales is not None
        words = _exchanged_back(data.view(torch.int32).squeeze(-1).permute(0, 3, 1, 2).contiguous())  # (P, 16, B, 4)
        blocks = _rows(words, R, packed.paired).contiguous().view(torch.uint8)
        return Mxfp4Tensor(blocks, _rows(scales.transpose(1, 2), R, packed.paired).contiguous())
    if packed.form == "q8":
        assert scales is not None
        values = data.permute(0, 3, 1, 2, 4).flatten(-2).float()  # (P, 16, B, 32)
        values = values * scales.transpose(1, 2).float().unsqueeze(-1)
        return _rows(values.flatten(-2)[..., :C], R, packed.paired).contiguous()
    return _rows(data.transpose(1, 2), R, packed.paired).contiguous()


def plain_form(dtype: torch.dtype) -> Form:
    """The form that holds plain values of this type as they are."""
    return _PLAIN.get(dtype, "f32")


def _ceil(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _panels(matrix: Tensor, paired: bool) -> Tensor:
    """(R, …) as panels of rows (P, 16, …), padded with zeros."""
    if paired:
        gates, ups = (_padded(matrix[i::2], 2 * PANEL) for i in range(2))
        pairs = torch.stack([torch.unflatten(rows, 0, (-1, PANEL)) for rows in (gates, ups)], dim=1)
        return pairs.flatten(0, 1)
    return torch.unflatten(_padded(matrix, PANEL), 0, (-1, PANEL))


def _rows(panels: Tensor, num_rows: int, paired: bool) -> Tensor:
    """The inverse of `_panels`."""
    if paired:
        gates, ups = panels[0::2].flatten(0, 1), panels[1::2].flatten(0, 1)
        return torch.stack((gates, ups), dim=1).flatten(0, 1)[:num_rows]
    return panels.flatten(0, 1)[:num_rows]


def _padded(matrix: Tensor, multiple: int) -> Tensor:
    missing = -matrix.shape[0] % multiple
    return torch.cat((matrix, matrix.new_zeros((missing, *matrix.shape[1:])))) if missing else matrix


def _exchanged(words: Tensor) -> Tensor:
    """Eight nibbles n0 … n7 of each int32, reordered to n0 n4 n1 n5 n2 n6 n3 n7."""
    words = _swap_bits(words, 0x0000FF00, 8)
    return _swap_bits(words, 0x00F000F0, 4)


def _exchanged_back(words: Tensor) -> Tensor:
    words = _swap_bits(words, 0x00F000F0, 4)
    return _swap_bits(words, 0x0000FF00, 8)


def _swap_bits(words: Tensor, mask: int, distance: int) -> Tensor:
    """Exchange the bits under `mask` with those `distance` above them (Hacker's Delight, 7-1)."""
    difference = (words >> distance).bitwise_xor_(words).bitwise_and_(mask)
    return difference.mul_((1 << distance) + 1).bitwise_xor_(words)


def _q8_scales(values: Tensor) -> Tensor:
    """(…,) float16 steps of blocks (…, 32). Where a block is too small for float16's range its step is 0."""
    largest = values.abs().amax(dim=-1)
    if not torch.isfinite(largest).all():
        raise UsageError("q8 cannot hold NaN or infinity, and these weights contain one; use bf16 or f32")
    steps = (largest / 127).half()
    if not torch.isfinite(steps).all():
        raise UsageError(f"q8 holds magnitudes up to 8e6, these weights reach {largest.max():.3g}; use bf16 or f32")
    return steps


def _quantised(values: Tensor, steps: Tensor) -> Tensor:
    divisors = steps.float().masked_fill(steps == 0, torch.inf).unsqueeze(-1)
    return (values / divisors).round_().clamp_(-127, 127).to(torch.int8)
