"""Keys and values in memory: pages of one layer, and which sequences' positions lie in which.

A page holds PAGE positions of one sequence, one head after the other, so that attention reads each as one stretch.
Values lie by position and keys by dimension, as the native kernels multiply by them, so that nothing has to be turned
round. In q8 every 32 numbers of a head share a float16 scale. Who owns which page is the business of others
(model.kv_cache, the engine); ops go where a table sends them.
"""

import contextlib
import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from freehold.errors import UsageError

KvType = Literal["f32", "bf16", "q8"]
KV_TYPES: tuple[KvType, ...] = get_args(KvType)
KV_BLOCK = 32
PAGE = 64
"""Positions of a page."""
SPLIT = 512
"""Attention sums up runs of so many positions of a sequence, and then their sums."""

_LARGE = 1 << 20  # bytes: with less, most of a large page of memory (2 MiB) might never be used; neighbours share one

_DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "q8": torch.int8}
_DIMS_TOGETHER = {"f32": 1, "bf16": 2, "q8": 1}  # of a key: two bfloat16 are widened at once


class Rows(NamedTuple):
    """Views of all keys or all values, (P, K, PAGE, H / V, V), and of their scales in q8, (P, K, PAGE, H / 32)."""

    numbers: Tensor
    scales: Tensor | None


@dataclass(slots=True, eq=False)
class KvPages:
    """Keys (P, K, H / V, PAGE, V) and values (P, K, PAGE, H) of one layer, V numbers of a key side by side; in q8 with
    scales (P, K, H / 32, PAGE) and (P, K, PAGE, H / 32). csrc/kernels/kernels.h has the same layout."""

    type: KvType
    keys: Tensor
    values: Tensor
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None
    native_handle: object | None = field(default=None, repr=False)  # made by the native kernels on first use

    def __len__(self) -> int:
        return len(self.values)

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors())

    def by_position(self) -> tuple[Rows, Rows]:
        """Keys and values, for whoever does not care how they lie."""
        keys, together = self.keys.transpose(2, 3), self.keys.shape[-1]
        key_scales = None if self.key_scales is None else self.key_scales.transpose(2, 3)
        return Rows(keys, key_scales), Rows(self.values.unflatten(-1, (-1, together)), self.value_scales)

    def tensors(self) -> list[Tensor]:
        return [t for t in (self.keys, self.values, self.key_scales, self.value_scales) if t is not None]


class Places(NamedTuple):
    """Where each token's key and value are kept."""

    pages_T: Tensor
    rows_T: Tensor


class PagedSequences:
    """Whose tokens a batch holds, and where their positions are kept.

    Sequence b has the batch's tokens starts[b] … starts[b + 1] − 1, which are the last of its lengths[b] positions.
    Position p of it is row p % PAGE of page table_BP[b, p // PAGE]. Pages that no token writes or sees may be named
    anything. The same object serves every layer whose pages are named alike.
    """

    __slots__ = ("lengths", "lengths_B", "native_handle", "starts", "starts_B1", "table_BP")

    def __init__(self, counts: Sequence[int], lengths: Sequence[int], table_BP: Tensor) -> None:
        """`counts` are the tokens of each sequence, `table_BP` is int32. Raises UsageError for what does not fit."""
        starts = [0]
        for count in counts:
            starts.append(starts[-1] + count)
        if len(counts) != len(lengths) or any(not 0 <= n <= m for n, m in zip(counts, lengths, strict=False)):
            raise UsageError(f"expected as many lengths as counts, and none smaller, got {counts} and {lengths}")
        if table_BP.dtype != torch.int32 or table_BP.dim() != 2 or len(table_BP) != len(lengths):
            raise UsageError(f"expected an int32 table of {len(lengths)} rows, got {table_BP.dtype} {table_BP.shape}")
        if max(lengths, default=0) > table_BP.shape[1] * PAGE:
            raise UsageError(f"{max(lengths)} positions do not fit a table of {table_BP.shape[1]} pages")
        self.starts, self.lengths = tuple(starts), tuple(lengths)
        self.table_BP = table_BP.contiguous()
        self.starts_B1, self.lengths_B = torch.tensor(starts), torch.tensor(lengths, dtype=torch.int64)
        self.native_handle: object | None = None

    @property
    def num_tokens(self) -> int:
        return self.starts[-1]

    def positions(self) -> list[int]:
        """Of every token in its sequence."""
        pairs = zip(self.starts, self.starts[1:], self.lengths, strict=False)
        return [p for start, stop, length in pairs for p in range(length - (stop - start), length)]

    def places(self, device: torch.device) -> "Places":
        owner = torch.repeat_interleave(torch.diff(self.starts_B1)).to(device)
        position = torch.tensor(self.positions(), dtype=torch.int64, device=device)
        return Places(self.table_BP.to(device)[owner, position // PAGE].long(), position % PAGE)


def whole_sequences(counts: Sequence[int]) -> PagedSequences:
    """Sequences of which the batch holds every token, each in pages of its own, numbered from 0 on."""
    pages = [num_pages(count) for count in counts]
    table_BP = torch.zeros((len(pages), max(pages, default=0)), dtype=torch.int32)
    first = 0
    for row_P, count in zip(table_BP, pages, strict=True):
        row_P[:count] = torch.arange(first, first + count)
        first += count
    return PagedSequences(counts, counts, table_BP)


def num_pages(positions: int) -> int:
    """That so many positions of a sequence take."""
    return -(-positions // PAGE)


def kv_type(name: str, head_dim: int) -> KvType:
    """A type by its name. Raises UsageError for any other, and where it cannot hold heads of this size."""
    if name not in KV_TYPES:
        raise UsageError(f"the KV cache's type must be one of {', '.join(KV_TYPES)}, got {name!r}")
    if name == "q8" and head_dim % KV_BLOCK:
        raise UsageError(
            f"a q8 KV cache needs heads of a multiple of {KV_BLOCK}, this model's have {head_dim}; use bf16"
        )
    if head_dim % _DIMS_TOGETHER[name]:
        raise UsageError(f"a bf16 KV cache needs heads of an even size, this model's have {head_dim}; use f32")
    return name


def new_pages(type: KvType, count: int, num_heads: int, head_dim: int, device: torch.device) -> KvPages:
    """So many empty pages. Raises UsageError where the type cannot hold heads of this size."""
    type = kv_type(type, head_dim)
    together = _DIMS_TOGETHER[type]
    keys = _room((count, num_heads, head_dim // together, PAGE, together), _DTYPES[type], device)
    values = _room((count, num_heads, PAGE, head_dim), _DTYPES[type], device)
    if type != "q8":
        return KvPages(type, keys, values)
    blocks = head_dim // KV_BLOCK
    key_scales = _room((count, num_heads, blocks, PAGE), torch.float16, device)
    value_scales = _room((count, num_heads, PAGE, blocks), torch.float16, device)
    return KvPages(type, keys, values, key_scales, value_scales)


def tokens_of(stored: Rows, places: Places) -> Tensor:
    """What is kept for tokens, (T, K, H): float32 where it is quantised, else as it is stored."""
    numbers = stored.numbers[places.pages_T, :, places.rows_T].flatten(2)
    if stored.scales is None:
        return numbers
    steps = stored.scales[places.pages_T, :, places.rows_T].float()
    return (torch.unflatten(numbers.float(), -1, (-1, KV_BLOCK)) * steps.unsqueeze(-1)).flatten(-2)


def _room(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """What torch.empty gives, but in large pages of memory where the system has them and enough is wanted: attention
    reads all of it for every token, and in small ones spends a part of its time on looking up addresses."""
    num_bytes = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or num_bytes < _LARGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device=device)
    try:
        memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"{num_bytes} bytes for keys and values: {error.strerror}") from None
    with contextlib.suppress(OSError):  # a system may know none
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)  # which keeps the mapping alive


def kv_bytes_per_token(type: KvType, num_heads: int, head_dim: int) -> int:
    """Of one layer, keys and values together."""
    numbers = 2 * num_heads * head_dim
    return numbers * _DTYPES[type].itemsize + (numbers // KV_BLOCK * 2 if type == "q8" else 0)
