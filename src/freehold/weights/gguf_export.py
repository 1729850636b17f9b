"""A model as one GGUF file, as llama.cpp reads the architecture it calls "gpt-oss".

Streams: header first, then each tensor as it is made, holding one expert or one piece of a dense tensor in memory.
What is otherwise than in the published layouts: gate and up are stacks of their own; an MXFP4 block is 17 bytes, the
scale first, byte i holding columns i (low nibble) and i + 16; tied embeddings are stored twice; norms, biases, sinks
and the router are float32; shapes are listed innermost first.

Refuses models with other constants than those built into llama.cpp, which would give other text there: see
`architecture`. Knows nothing of tokenisers: their metadata comes from the caller.
"""

import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import BinaryIO

import torch
from torch import Tensor

from freehold.config import SWIGLU_LIMIT, DenseFormat, ExpertFormat, ModelConfig
from freehold.errors import CheckpointError, UnsupportedError, UsageError
from freehold.log import Progress, no_progress, warn_once
from freehold.weights import mxfp4
from freehold.weights.layouts import WeightSource, canonical_shapes, is_expert_matrix
from freehold.weights.mxfp4 import Mxfp4Tensor

MetadataValue = str | bool | int | float | Sequence[str] | Sequence[int]
Metadata = Mapping[str, MetadataValue]

ARCHITECTURE = "gpt-oss"
Q8_BLOCK = 32

_VERSION = 3
_ALIGNMENT = 32  # what readers assume where the file does not say
_PIECE_ELEMENTS = 1 << 22  # 16 MiB of float32, and a few times as much while it is quantised
_BLOCKS_AT_ONCE = 1 << 13  # 1 MiB of float32: the working set of a chunk stays in cache
# Built into llama.cpp's gpt-oss, whatever a file says; so are the clamps of the experts at SWIGLU_LIMIT.
_BETA_FAST, _BETA_SLOW = 32.0, 1.0


class TensorType(Enum):
    """How a tensor is stored: GGUF's number, values in a block, bytes of a block."""

    F32 = (0, 1, 4)
    Q8_0 = (8, Q8_BLOCK, 34)
    BF16 = (30, 1, 2)
    MXFP4 = (39, mxfp4.BLOCK, 17)

    @property
    def number(self) -> int:
        return self.value[0]

    def num_bytes(self, shape: Sequence[int]) -> int:
        _, values, num_bytes = self.value
        return math.prod(shape) // values * num_bytes


_TYPE_OF = {DenseFormat.Q8: TensorType.Q8_0, DenseFormat.BF16: TensorType.BF16, DenseFormat.F32: TensorType.F32}
# llama.cpp's name for the whole file, shown when it is loaded.
_FILE_TYPE = {TensorType.F32: 0, TensorType.Q8_0: 7, TensorType.BF16: 32, TensorType.MXFP4: 38}


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor as it will lie in the file, outermost dimension first. `produce` yields its bytes in order."""

    name: str
    type: TensorType
    shape: tuple[int, ...]
    produce: Callable[[], Iterator[Tensor]]

    @property
    def num_bytes(self) -> int:
        return self.type.num_bytes(self.shape)


# --- what the file says of the model ----------------------------------------------------------------------------


def architecture(config: ModelConfig, *, name: str, dense: DenseFormat, experts: ExpertFormat) -> Metadata:
    """The metadata that describe the model itself.

    Raises UnsupportedError for windows, clamps or RoPE that llama.cpp's gpt-oss does not have.
    """
    if config.swiglu_limit != SWIGLU_LIMIT:
        raise UnsupportedError(
            f"llama.cpp clamps the experts' activations at {SWIGLU_LIMIT:g}, this model at {config.swiglu_limit:g}: it "
            "would give other text there; run it with Freehold or transformers"
        )
    return {
        "general.architecture": ARCHITECTURE,
        "general.type": "model",
        "general.name": name,
        "general.file_type": _FILE_TYPE[_expert_type(dense, experts)],
        "general.quantization_version": 2,
        f"{ARCHITECTURE}.block_count": config.num_layers,
        f"{ARCHITECTURE}.context_length": config.max_context,
        f"{ARCHITECTURE}.embedding_length": config.hidden_size,
        f"{ARCHITECTURE}.feed_forward_length": config.expert_width,
        f"{ARCHITECTURE}.expert_feed_forward_length": config.expert_width,
        f"{ARCHITECTURE}.expert_count": config.num_experts,
        f"{ARCHITECTURE}.expert_used_count": config.num_active_experts,
        f"{ARCHITECTURE}.attention.head_count": config.num_heads,
        f"{ARCHITECTURE}.attention.head_count_kv": config.num_kv_heads,
        f"{ARCHITECTURE}.attention.key_length": config.head_dim,
        f"{ARCHITECTURE}.attention.value_length": config.head_dim,
        f"{ARCHITECTURE}.attention.layer_norm_rms_epsilon": config.norm_eps,
        f"{ARCHITECTURE}.attention.sliding_window": _window(config),
        f"{ARCHITECTURE}.rope.dimension_count": config.head_dim,
        f"{ARCHITECTURE}.rope.freq_base": config.rope.theta,
        **_rope_scaling(config),
    }


def _window(config: ModelConfig) -> int:
    """llama.cpp gives even layers the window and odd layers all keys; as long as the context, it hides nothing."""
    windows = [None if w is None or w >= config.max_context else w for w in config.windows]
    of_even_layers = set(windows[0::2])
    if any(windows[1::2]) or len(of_even_layers) > 1:
        raise UnsupportedError(
            "llama.cpp's gpt-oss has one attention window on layers 0, 2, 4, … and none on the others, this model has "
            f"windows {', '.join('none' if w is None else str(w) for w in windows)}: run it with Freehold"
        )
    return of_even_layers.pop() or config.max_context


def _rope_scaling(config: ModelConfig) -> Metadata:
    rope, prefix = config.rope, f"{ARCHITECTURE}.rope.scaling"
    if rope.factor == 1:
        return {f"{prefix}.type": "none"}
    if (rope.beta_fast, rope.beta_slow) != (_BETA_FAST, _BETA_SLOW):
        raise UnsupportedError(
            f"llama.cpp's gpt-oss has YaRN with beta_fast {_BETA_FAST:g} and beta_slow {_BETA_SLOW:g}, this model has "
            f"{rope.beta_fast:g} and {rope.beta_slow:g}: it would give other text there; run it with Freehold"
        )
    if not rope.truncate:
        warn_once(
            "llama.cpp rounds the range of dimensions that YaRN blends to whole ones, this model (as gpt-oss itself) "
            "does not: logits differ a little there, the more the longer the text"
        )
    return {
        f"{prefix}.type": "yarn",
        f"{prefix}.factor": rope.factor,
        f"{prefix}.original_context_length": rope.original_context,
        f"{prefix}.yarn_beta_fast": rope.beta_fast,
        f"{prefix}.yarn_beta_slow": rope.beta_slow,
    }


# --- tensors ----------------------------------------------------------------------------------------------------


def tensors_to_write(
    config: ModelConfig, source: WeightSource, *, dense: DenseFormat, experts: ExpertFormat
) -> Sequence[GgufTensor]:
    """Every tensor of the file. Experts that are not MXFP4 are stored as `dense` says.

    Raises UnsupportedError where a row cannot be cut into the blocks of its format.
    """
    shapes = canonical_shapes(config)
    tensors: list[GgufTensor] = []
    for name, canonical, part in _table(config):
        shape = shapes[canonical]
        if part is not _ALL:  # of gate_up (E, 2F, D) or its bias (E, 2F)
            shape = (shape[0], shape[1] // 2, *shape[2:])
        if is_expert_matrix(canonical):
            type_ = _expert_type(dense, experts)
            produce = _experts(source, canonical, part, type_)
        else:
            type_ = _TYPE_OF[dense] if _is_large(canonical) else TensorType.F32
            produce = _rows(source, canonical, part, type_)
        _check_blocks(name, type_, shape)
        tensors.append(GgufTensor(name, type_, shape, produce))
    return tensors


_ALL, _GATE, _UP = slice(None), slice(0, None, 2), slice(1, None, 2)

_OF_LAYER = {
    "attn_norm.weight": ("attn_norm", _ALL),
    "attn_q.weight": ("q.weight", _ALL),
    "attn_q.bias": ("q.bias", _ALL),
    "attn_k.weight": ("k.weight", _ALL),
    "attn_k.bias": ("k.bias", _ALL),
    "attn_v.weight": ("v.weight", _ALL),
    "attn_v.bias": ("v.bias", _ALL),
    "attn_output.weight": ("o.weight", _ALL),
    "attn_output.bias": ("o.bias", _ALL),
    "attn_sinks.weight": ("sinks", _ALL),
    "post_attention_norm.weight": ("mlp_norm", _ALL),
    "ffn_gate_inp.weight": ("router.weight", _ALL),
    "ffn_gate_inp.bias": ("router.bias", _ALL),
    "ffn_gate_exps.weight": ("gate_up", _GATE),
    "ffn_gate_exps.bias": ("gate_up.bias", _GATE),
    "ffn_up_exps.weight": ("gate_up", _UP),
    "ffn_up_exps.bias": ("gate_up.bias", _UP),
    "ffn_down_exps.weight": ("down", _ALL),
    "ffn_down_exps.bias": ("down.bias", _ALL),
}  # fmt: skip
"""llama.cpp's name of each tensor of a layer, the canonical tensor it comes from, and which of its rows."""


def parts_of(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """llama.cpp's names of what each canonical tensor is made of: one, or gate and up, whose rows alternate."""
    parts: dict[str, tuple[str, ...]] = {}
    for name, canonical, _ in _table(config):
        if canonical not in parts or name.startswith("blk."):  # tied embeddings are there twice
            parts[canonical] = (*parts.get(canonical, ()), name)
    return parts | ({"unembedding": ("output.weight",)} if config.tied_embeddings else {})


def _table(config: ModelConfig) -> Iterator[tuple[str, str, slice]]:
    yield "token_embd.weight", "embedding", _ALL
    for layer in range(config.num_layers):
        for name, (canonical, part) in _OF_LAYER.items():
            yield f"blk.{layer}.{name}", f"layers.{layer}.{canonical}", part
    yield "output_norm.weight", "final_norm", _ALL
    # llama.cpp asks for an output matrix of gpt-oss, be it the embedding once more.
    yield "output.weight", "embedding" if config.tied_embeddings else "unembedding", _ALL


def _is_large(canonical: str) -> bool:
    """Whether a dense tensor is stored as `dense` says. The router is small, and decides too much to be rounded."""
    return canonical.endswith((".weight", "embedding")) and not canonical.endswith("router.weight")


def _expert_type(dense: DenseFormat, experts: ExpertFormat) -> TensorType:
    return TensorType.MXFP4 if experts is ExpertFormat.MXFP4 else _TYPE_OF[dense]


def _check_blocks(name: str, type_: TensorType, shape: tuple[int, ...]) -> None:
    _, block, _ = type_.value
    if shape[-1] % block:
        raise UnsupportedError(
            f"{type_.name} needs rows of a multiple of {block} values, and those of {name} have {shape[-1]}; write "
            f"{'its experts as bf16' if type_ is TensorType.MXFP4 else 'its matrices as bf16 or f32'}"
        )


def _rows(source: WeightSource, name: str, part: slice, type_: TensorType) -> Callable[[], Iterator[Tensor]]:
    def produce() -> Iterator[Tensor]:
        for rows in source.rows(name):
            # A source may give a whole mapped embedding as one piece.
            step = max(1, _PIECE_ELEMENTS // max(1, math.prod(rows.shape[1:])))
            for piece in torch.split(rows, step):
                chosen = piece if part is _ALL else piece[:, part]
                yield _encoded(chosen, type_, f"{source.origin}: {name}")

    return produce


def _experts(source: WeightSource, name: str, part: slice, type_: TensorType) -> Callable[[], Iterator[Tensor]]:
    def produce() -> Iterator[Tensor]:
        for number, expert in enumerate(source.experts(name)):
            rows = _chosen_rows(expert, part)
            if isinstance(rows, Mxfp4Tensor) and type_ is not TensorType.MXFP4:
                rows = mxfp4.unpack(rows)
            yield _encoded(rows, type_, f"{source.origin}: {name} of expert {number}")

    return produce


def _chosen_rows(expert: Mxfp4Tensor | Tensor, part: slice) -> Mxfp4Tensor | Tensor:
    if isinstance(expert, Mxfp4Tensor):
        return Mxfp4Tensor(expert.blocks[part], expert.scales[part])
    return expert[part]


def _encoded(values: Mxfp4Tensor | Tensor, type_: TensorType, what: str) -> Tensor:
    """The bytes of a tensor; `what` names it in errors."""
    try:
        match type_:
            case TensorType.MXFP4:
                return pack_mxfp4(values if isinstance(values, Mxfp4Tensor) else mxfp4.pack(values))
            case TensorType.Q8_0:
                assert isinstance(values, Tensor)
                return pack_q8(values)
    except UsageError as error:
        raise CheckpointError(f"{what}: {error}; download the checkpoint again, or store it as bf16") from None
    assert isinstance(values, Tensor)
    dtype = torch.bfloat16 if type_ is TensorType.BF16 else torch.float32
    return values.to(dtype).contiguous().view(torch.uint8)


def unpack_mxfp4(stored: Tensor) -> Mxfp4Tensor:
    """What `pack_mxfp4` was given, from its bytes (…, R, C/32 · 17)."""
    blocks = stored.unflatten(-1, (-1, 17))
    odd, even = blocks[..., 1::2], blocks[..., 2::2]
    halves = (odd & 0x0F) | (even << 4), (odd >> 4) | (even & 0xF0)
    return Mxfp4Tensor(torch.cat(halves, dim=-1), blocks[..., 0].contiguous())


def pack_mxfp4(packed: Mxfp4Tensor) -> Tensor:
    """The same codes and scales in GGUF's blocks: uint8 (…, R, C/32 · 17)."""
    first, second = packed.blocks[..., :8], packed.blocks[..., 8:]  # columns 0 … 15 and 16 … 31, two a byte
    blocks = torch.empty((*packed.scales.shape, 17), dtype=torch.uint8, device=packed.blocks.device)
    blocks[..., 0] = packed.scales
    blocks[..., 1::2] = (first & 0x0F) | (second << 4)
    blocks[..., 2::2] = (first >> 4) | (second & 0xF0)
    return blocks.flatten(-2)


def pack_q8(values: Tensor) -> Tensor:
    """Q8_0: blocks of 32 int8 with one float16 scale in front; uint8 (…, C/32 · 34). Rounds as ggml does, to the bit.

    Raises UsageError for NaN, infinity and what a float16 scale cannot reach.
    """
    blocks = values.reshape(-1, Q8_BLOCK)
    out = torch.empty((len(blocks), 2 + Q8_BLOCK), dtype=torch.uint8, device=values.device)
    for start in range(0, len(blocks), _BLOCKS_AT_ONCE):
        chunk = blocks[start : start + _BLOCKS_AT_ONCE].float()
        scales = chunk.abs().amax(dim=-1, keepdim=True) / 127
        stored = scales.to(torch.float16)
        if not torch.isfinite(stored).all():
            raise UsageError("Q8_0 cannot hold NaN, infinity or values beyond 8 million; the values contain one")
        scaled = chunk * torch.where(scales == 0, 0.0, 1 / scales)
        rounded = scaled.trunc()
        rounded += ((scaled - rounded) * 2).trunc_()  # halves go away from zero
        out[start : start + _BLOCKS_AT_ONCE, :2] = stored.view(torch.uint8)
        out[start : start + _BLOCKS_AT_ONCE, 2:] = rounded.to(torch.int8).view(torch.uint8)
    return out.view(*values.shape[:-1], -1)


# --- the file ---------------------------------------------------------------------------------------------------


def num_bytes(metadata: Metadata, tensors: Iterable[GgufTensor]) -> int:
    """Size of the whole file."""
    tensors = list(tensors)
    return len(_header(metadata, tensors)) + sum(_aligned(tensor.num_bytes) for tensor in tensors)


def write(
    file: BinaryIO, metadata: Metadata, tensors: Sequence[GgufTensor], *, progress: Progress = no_progress
) -> None:
    """Write the file from its beginning, each tensor as it is produced."""
    file.write(_header(metadata, tensors))
    total = sum(tensor.num_bytes for tensor in tensors)
    done = 0
    for tensor in tensors:
        before = done
        for piece in tensor.produce():
            data = piece.contiguous().cpu().numpy()
            file.write(data.data)
            done += data.nbytes
            progress("writing tensors", done, total)
        assert done - before == tensor.num_bytes, f"{tensor.name}: {done - before} of {tensor.num_bytes} bytes"
        file.write(bytes(_aligned(tensor.num_bytes) - tensor.num_bytes))


def _aligned(size: int) -> int:
    return size + -size % _ALIGNMENT


def _header(metadata: Metadata, tensors: Sequence[GgufTensor]) -> bytes:
    """https://github.com/ggml-org/ggml/blob/master/docs/gguf.md"""
    out = bytearray(b"GGUF" + struct.pack("<IQQ", _VERSION, len(tensors), len(metadata)))
    for key, value in metadata.items():
        out += _string(key) + _value(value)
    at = 0
    for tensor in tensors:
        dimensions = tensor.shape[::-1]
        out += _string(tensor.name)
        out += struct.pack(f"<I{len(dimensions)}QIQ", len(dimensions), *dimensions, tensor.type.number, at)
        at += _aligned(tensor.num_bytes)
    return bytes(out).ljust(_aligned(len(out)), b"\0")


_UINT32, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9


def _value(value: MetadataValue) -> bytes:
    match value:
        case bool():
            return struct.pack("<I?", _BOOL, value)
        case int():
            return struct.pack("<II", _UINT32, value)
        case float():
            return struct.pack("<If", _FLOAT32, value)
        case str():
            return struct.pack("<I", _STRING) + _string(value)
    head = struct.pack("<I", _ARRAY)
    if all(isinstance(item, str) for item in value):
        return head + struct.pack("<IQ", _STRING, len(value)) + b"".join(_string(str(item)) for item in value)
    return head + struct.pack(f"<IQ{len(value)}i", _INT32, len(value), *value)


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data
