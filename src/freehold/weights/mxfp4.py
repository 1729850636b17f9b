"""MXFP4: blocks of 32 four-bit floats that share one power-of-two scale (OCP Microscaling Formats v1.0).

A packed matrix of R rows by C columns is two uint8 tensors, as published in the gpt-oss checkpoints:

    blocks (…, R, C/32, 16)   two E2M1 codes a byte: the low nibble is the even column, the high one the odd
    scales (…, R, C/32)       E8M0: the block's values are multiplied by 2^(scale − 127)

`unpack` gives exactly what transformers' own unpacking gives (but for scale 255, which stands for NaN and no writer
uses); `pack` is optimal: no other scale of a block would give a smaller squared error. Pure torch on any device; the
fast kernels read the packed bytes themselves.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from freehold.errors import UsageError

BLOCK = 32
SCALE_BIAS = 127

_E2M1_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_VALUES = _E2M1_MAGNITUDES + tuple(-value for value in _E2M1_MAGNITUDES)


@dataclass(frozen=True, slots=True)
class Mxfp4Tensor:
    """A packed tensor of logical shape (…, R, C); indexing the leading dimensions gives views."""

    blocks: Tensor
    scales: Tensor

    def __post_init__(self) -> None:
        blocks, scales = self.blocks, self.scales
        if blocks.dtype != torch.uint8 or scales.dtype != torch.uint8:
            raise UsageError(f"MXFP4 blocks and scales are uint8, got {blocks.dtype} and {scales.dtype}")
        if blocks.ndim < 3 or blocks.shape[-1] != BLOCK // 2 or blocks.shape[:-1] != scales.shape:
            raise UsageError(
                "MXFP4 needs blocks (…, R, C/32, 16) and scales (…, R, C/32), "
                f"got {tuple(blocks.shape)} and {tuple(scales.shape)}"
            )

    @property
    def shape(self) -> torch.Size:
        """The logical shape (…, R, C)."""
        return torch.Size((*self.scales.shape[:-1], self.scales.shape[-1] * BLOCK))

    @property
    def num_bytes(self) -> int:
        return self.blocks.numel() + self.scales.numel()

    def __getitem__(self, index: int) -> "Mxfp4Tensor":
        return Mxfp4Tensor(self.blocks[index], self.scales[index])

    def to(self, device: torch.device) -> "Mxfp4Tensor":
        return Mxfp4Tensor(self.blocks.to(device), self.scales.to(device))


@lru_cache(maxsize=8)
def _byte_pairs(dtype: torch.dtype, device: torch.device) -> Tensor:
    """(256, 2): the two values that a byte of `blocks` stands for."""
    values = torch.tensor(E2M1_VALUES, dtype=dtype, device=device)
    low, high = values.repeat(16), values.repeat_interleave(16)
    return torch.stack((low, high), dim=-1)


def _scale_values(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """2^(scale − 127), exact. The byte is the exponent field of a float; only 2^-127 has to be written as subnormal."""
    if dtype == torch.bfloat16:
        return (scales.to(torch.int16) << 7).clamp_(min=0x40).view(torch.bfloat16)
    return (scales.to(torch.int32) << 23).clamp_(min=0x400000).view(torch.float32).to(dtype)


def unpack(packed: Mxfp4Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values, shape (…, R, C), exact in float32 and bfloat16."""
    pairs = torch.nn.functional.embedding(packed.blocks.int(), _byte_pairs(dtype, packed.blocks.device))
    values = pairs.flatten(-2)  # (…, R, C/32, 32)
    values *= _scale_values(packed.scales, dtype).unsqueeze(-1)
    return values.flatten(-2)


def pack(values: Tensor) -> Mxfp4Tensor:
    """Quantise (…, R, C), C a multiple of 32, choosing each block's scale for the smallest squared error.

    With amax in [4, 8) · 2^e only the scales 2^(e−1), 2^e and 2^(e+1) can be best: a finer one clips the largest
    value by more than the other 31 can gain, and a coarser one has no point that 2^(e+1) lacks. Zero blocks get
    scale 2^0. Raises UsageError for NaN or infinity, which the format cannot hold.
    """
    if values.ndim < 2 or values.shape[-1] % BLOCK:
        raise UsageError(f"MXFP4 packs rows of a multiple of {BLOCK} values, got shape {tuple(values.shape)}")
    leading, num_blocks = values.shape[:-1], values.shape[-1] // BLOCK
    flat = values.detach().reshape(-1, BLOCK)
    blocks = torch.empty((len(flat), BLOCK // 2), dtype=torch.uint8, device=values.device)
    scales = torch.empty(len(flat), dtype=torch.uint8, device=values.device)
    for start in range(0, len(flat), _BLOCKS_AT_ONCE):
        chunk = slice(start, start + _BLOCKS_AT_ONCE)
        blocks[chunk], scales[chunk] = _pack_blocks(flat[chunk].to(torch.float32))
    return Mxfp4Tensor(blocks.view(*leading, num_blocks, BLOCK // 2), scales.view(*leading, num_blocks))


def pack_dithered(values: Tensor, base: Mxfp4Tensor, *, seed: int) -> Mxfp4Tensor:
    """Quantise (…, R, C), values a little away from those that `base` holds, so that on average nothing is lost.

    Each is rounded up or down with the odds of where it lies between the two, by thresholds that are a function of the
    seed and its place alone: what changes by a hundredth of a step moves a hundredth of the numbers by a whole one. The
    nearest number would nearly always be the old one. Blocks keep their scales while those are good for what is in them
    now, and get `pack`'s otherwise. What `base` holds exactly stays as it is.
    """
    if values.shape != base.shape:
        raise UsageError(f"values of shape {tuple(values.shape)} are not near a tensor of {tuple(base.shape)}")
    flat, scales = values.detach().reshape(-1, BLOCK), base.scales.flatten().clone()
    blocks = torch.empty((len(flat), BLOCK // 2), dtype=torch.uint8, device=values.device)
    for start in range(0, len(flat), _DITHERED_AT_ONCE):
        chunk = slice(start, start + _DITHERED_AT_ONCE)
        blocks[chunk] = _dithered(flat[chunk].to(torch.float32), scales[chunk], start, seed)
    return Mxfp4Tensor(blocks.view_as(base.blocks), scales.view_as(base.scales))


_DITHERED_AT_ONCE = 1 << 11  # 256 KiB of float32


def _dithered(blocks: Tensor, scales: Tensor, first: int, seed: int) -> Tensor:
    """Codes (B, 16) of float32 blocks (B, 32); scales (B,) that do not fit are replaced."""
    magnitudes = blocks.abs()
    amax = magnitudes.amax(dim=-1)
    ratio = amax * _scale_values(2 * SCALE_BIAS - scales.int(), torch.float32)
    # Beyond 7 steps a coarser scale is nearer on the whole, below 2 a finer one has all numbers that this one has.
    foreign = ~((ratio >= 2) & (ratio <= 7))
    if foreign.any():
        scales[foreign] = _pack_blocks(blocks[foreign])[1]
    magnitudes *= _scale_values(2 * SCALE_BIAS - scales.int(), torch.float32).unsqueeze(-1)
    # Two binades of the format lie above 2, in which steps are twice and four times as long; codes count steps.
    binade = (magnitudes >= 2).to(torch.float32).add_(magnitudes >= 4)
    magnitudes *= torch.exp2(1 - binade)
    magnitudes += _thresholds(len(blocks), first, seed, blocks.device)
    codes = magnitudes.floor_().add_(binade, alpha=2).clamp_(max=7).to(torch.uint8)
    codes |= torch.signbit(blocks).to(torch.uint8) << 3
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def _thresholds(count: int, first: int, seed: int, device: torch.device) -> Tensor:
    """(B, 32) numbers from 0 up to 1, of 20 bits: a hash of the place, the same on every machine."""
    start = (first * BLOCK * _ODD + seed) % (1 << 32)
    place = torch.arange(count * BLOCK, dtype=torch.int32, device=device)
    place.mul_(_ODD - (1 << 32)).add_(start - (start >> 31 << 32))
    for multiplier in (0x7FEB352D, 0x846CA68B - (1 << 32)):  # lowbias32 of https://github.com/skeeto/hash-prospector
        place.bitwise_xor_((place >> 15).bitwise_and_(0x1FFFF)).mul_(multiplier)
    return ((place >> 12).bitwise_and_(0xFFFFF).to(torch.float32) * 2.0**-20).view(count, BLOCK)


_ODD = 0x9E3779B1

_BLOCKS_AT_ONCE = 1 << 14  # 2 MiB of float32: the working set of a chunk stays in cache


def _pack_blocks(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (B, 16) and scales (B,) of float32 blocks (B, 32)."""
    magnitudes = blocks.abs()
    amax = magnitudes.amax(dim=-1)
    if not torch.isfinite(amax).all():
        raise UsageError("MXFP4 cannot hold NaN or infinity; the values to pack contain one")
    base = torch.frexp(amax).exponent - 3 + SCALE_BIAS  # frexp's fraction is in [0.5, 1): amax / 2^base in [4, 8)

    best_error = torch.full_like(amax, torch.inf)
    best_scale = torch.full_like(base, SCALE_BIAS)
    best_rounded = torch.zeros_like(blocks)
    for step in (0, 1, -1):
        scale = (base + step).clamp(0, 254)
        scaled = magnitudes * _scale_values(2 * SCALE_BIAS - scale, torch.float32).unsqueeze(-1)
        rounded = _round_magnitudes(scaled)
        # Compared in units of 2^base, where nothing overflows.
        error = (rounded - scaled).square().sum(-1) * torch.exp2(2.0 * (scale - base))
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
        best_rounded = torch.where(better.unsqueeze(-1), rounded, best_rounded)

    best_scale.masked_fill_(amax == 0, SCALE_BIAS)
    return _codes(best_rounded, torch.signbit(blocks)), best_scale.to(torch.uint8)


def _codes(magnitudes: Tensor, negative: Tensor) -> Tensor:
    """Two a byte, of magnitudes that are E2M1's own."""
    codes = _code_of_doubled(magnitudes.device)[(magnitudes * 2).int()]
    codes |= negative.to(torch.uint8) << 3
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def _round_magnitudes(magnitudes: Tensor) -> Tensor:
    """Nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6; a tie goes to the even code, as IEEE rounding has it."""
    spacing = _spacing(magnitudes)
    return ((magnitudes / spacing).round_() * spacing).clamp_(max=6.0)


def _spacing(magnitudes: Tensor) -> Tensor:
    """From each magnitude's lower neighbour to its upper one."""
    return 0.5 + 0.5 * (magnitudes >= 2) + (magnitudes >= 4)


@lru_cache(maxsize=8)
def _code_of_doubled(device: torch.device) -> Tensor:
    """(13,): the code of each magnitude, found at twice its value."""
    codes = torch.zeros(13, dtype=torch.uint8)
    for code, magnitude in enumerate(_E2M1_MAGNITUDES):
        codes[int(2 * magnitude)] = code
    return codes.to(device)
