"""The two published layouts of a gpt-oss checkpoint, and Freehold's own names between them.

One table per layout says how each stored tensor is made from canonical ones; reading, writing, synthesis and
`freehold inspect` all walk that table. Canonical names and shapes (see the shape legend in CONTRIBUTING.md):

    embedding (V, D) · unembedding (V, D), absent if tied · final_norm (D,)
    layers.N.attn_norm (D,) · layers.N.{q,k,v,o}.{weight,bias} · layers.N.sinks (N,)
    layers.N.mlp_norm (D,) · layers.N.router.{weight,bias} (E, D), (E,)
    layers.N.gate_up (E, 2F, D), gate and up rows interleaved · layers.N.gate_up.bias (E, 2F)
    layers.N.down (E, D, F) · layers.N.down.bias (E, D)

`gate_up` and `down` are Mxfp4Tensor or plain tensors; everything else is plain.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import chain
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from freehold import config as configs
from freehold.config import ExpertFormat, Layout, ModelConfig
from freehold.disk import write_text
from freehold.errors import CheckpointError, ModelNotFoundError, UnsupportedError, UsageError
from freehold.log import Progress, no_progress
from freehold.weights import mxfp4
from freehold.weights.files import TensorFiles, TensorInfo, TensorToWrite, read_json, write_shards
from freehold.weights.mxfp4 import Mxfp4Tensor

SHARD_BYTES = 5 * 10**9

WeightTable = dict[str, Tensor | Mxfp4Tensor]


class Form(Enum):
    """How a stored tensor is made from the canonical ones it names."""

    ROWS = "rows"  # the canonical tensors, one after the other along dimension 0
    TRANSPOSED = "transposed"  # (E, R, C) stored as (E, C, R)
    BLOCKS = "blocks"
    SCALES = "scales"


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of a checkpoint and the canonical tensors it holds."""

    name: str
    parts: tuple[str, ...]
    form: Form = Form.ROWS


def canonical_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every canonical tensor, in file order."""
    D, F, E, V = config.hidden_size, config.expert_width, config.num_experts, config.vocab_size
    N, K, H = config.num_heads, config.num_kv_heads, config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"embedding": (V, D)}
    for layer in range(config.num_layers):
        of_layer: dict[str, tuple[int, ...]] = {
            "attn_norm": (D,),
            "q.weight": (N * H, D),
            "q.bias": (N * H,),
            "k.weight": (K * H, D),
            "k.bias": (K * H,),
            "v.weight": (K * H, D),
            "v.bias": (K * H,),
            "sinks": (N,),
            "o.weight": (D, N * H),
            "o.bias": (D,),
            "mlp_norm": (D,),
            "router.weight": (E, D),
            "router.bias": (E,),
            "gate_up": (E, 2 * F, D),
            "gate_up.bias": (E, 2 * F),
            "down": (E, D, F),
            "down.bias": (E, D),
        }
        shapes |= {f"layers.{layer}.{name}": shape for name, shape in of_layer.items()}
    shapes["final_norm"] = (D,)
    if not config.tied_embeddings:
        shapes["unembedding"] = (V, D)
    return shapes


def is_expert_matrix(name: str) -> bool:
    """Whether a canonical tensor is one of those that MXFP4 packs."""
    return name.endswith((".gate_up", ".down"))


def stored_tensors(config: ModelConfig, layout: Layout, experts: ExpertFormat) -> list[Stored]:
    """The table of a layout: every tensor that a checkpoint of this model holds."""
    table = _hf_table if layout is Layout.HF else _original_table
    return list(table(config, experts is ExpertFormat.MXFP4))


def _hf_table(config: ModelConfig, packed: bool) -> Iterator[Stored]:
    yield Stored("model.embed_tokens.weight", ("embedding",))
    for layer in range(config.num_layers):
        ours, theirs = f"layers.{layer}", f"model.layers.{layer}"
        yield Stored(f"{theirs}.input_layernorm.weight", (f"{ours}.attn_norm",))
        for name in "qkvo":
            yield Stored(f"{theirs}.self_attn.{name}_proj.weight", (f"{ours}.{name}.weight",))
            yield Stored(f"{theirs}.self_attn.{name}_proj.bias", (f"{ours}.{name}.bias",))
        yield Stored(f"{theirs}.self_attn.sinks", (f"{ours}.sinks",))
        yield Stored(f"{theirs}.post_attention_layernorm.weight", (f"{ours}.mlp_norm",))
        yield Stored(f"{theirs}.mlp.router.weight", (f"{ours}.router.weight",))
        yield Stored(f"{theirs}.mlp.router.bias", (f"{ours}.router.bias",))
        for name in ("gate_up", "down"):
            stem = f"{theirs}.mlp.experts.{name}_proj"
            if packed:
                yield Stored(f"{stem}_blocks", (f"{ours}.{name}",), Form.BLOCKS)
                yield Stored(f"{stem}_scales", (f"{ours}.{name}",), Form.SCALES)
            else:
                yield Stored(stem, (f"{ours}.{name}",), Form.TRANSPOSED)
            yield Stored(f"{stem}_bias", (f"{ours}.{name}.bias",))
    yield Stored("model.norm.weight", ("final_norm",))
    if not config.tied_embeddings:
        yield Stored("lm_head.weight", ("unembedding",))


def _original_table(config: ModelConfig, packed: bool) -> Iterator[Stored]:
    yield Stored("embedding.weight", ("embedding",))
    for layer in range(config.num_layers):
        ours, theirs = f"layers.{layer}", f"block.{layer}"
        yield Stored(f"{theirs}.attn.norm.scale", (f"{ours}.attn_norm",))
        yield Stored(f"{theirs}.attn.qkv.weight", tuple(f"{ours}.{name}.weight" for name in "qkv"))
        yield Stored(f"{theirs}.attn.qkv.bias", tuple(f"{ours}.{name}.bias" for name in "qkv"))
        yield Stored(f"{theirs}.attn.sinks", (f"{ours}.sinks",))
        yield Stored(f"{theirs}.attn.out.weight", (f"{ours}.o.weight",))
        yield Stored(f"{theirs}.attn.out.bias", (f"{ours}.o.bias",))
        yield Stored(f"{theirs}.mlp.norm.scale", (f"{ours}.mlp_norm",))
        yield Stored(f"{theirs}.mlp.gate.weight", (f"{ours}.router.weight",))
        yield Stored(f"{theirs}.mlp.gate.bias", (f"{ours}.router.bias",))
        for number, name in ((1, "gate_up"), (2, "down")):
            stem = f"{theirs}.mlp.mlp{number}"
            if packed:
                yield Stored(f"{stem}_weight.blocks", (f"{ours}.{name}",), Form.BLOCKS)
                yield Stored(f"{stem}_weight.scales", (f"{ours}.{name}",), Form.SCALES)
            else:
                yield Stored(f"{stem}_weight", (f"{ours}.{name}",))
            yield Stored(f"{stem}_bias", (f"{ours}.{name}.bias",))
    yield Stored("norm.scale", ("final_norm",))
    # This layout has no word for tied embeddings: it stores the table twice.
    yield Stored("unembedding.weight", ("embedding" if config.tied_embeddings else "unembedding",))


def stored_shape(stored: Stored, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """The shape that a stored tensor has in its file."""
    first = shapes[stored.parts[0]]
    match stored.form:
        case Form.ROWS:
            return (sum(shapes[part][0] for part in stored.parts), *first[1:])
        case Form.TRANSPOSED:
            return (*first[:-2], first[-1], first[-2])
        case Form.BLOCKS:
            return (*first[:-1], first[-1] // mxfp4.BLOCK, mxfp4.BLOCK // 2)
        case Form.SCALES:
            return (*first[:-1], first[-1] // mxfp4.BLOCK)


# --- reading ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An opened and fully checked model folder. No tensor data has been read yet."""

    folder: Path
    config: ModelConfig
    layout: Layout
    experts: ExpertFormat
    files: TensorFiles

    def table(self) -> WeightTable:
        """Every canonical tensor as a view of the mapped files: nothing is copied."""
        shapes = canonical_shapes(self.config)
        table: WeightTable = {}
        scales: dict[str, Tensor] = {}
        blocks: dict[str, Tensor] = {}
        for stored in stored_tensors(self.config, self.layout, self.experts):
            tensor = self.files.tensor(stored.name)
            match stored.form:
                case Form.ROWS:
                    row_counts = [shapes[part][0] for part in stored.parts]
                    table |= dict(zip(stored.parts, torch.split(tensor, row_counts), strict=True))
                case Form.TRANSPOSED:
                    table[stored.parts[0]] = tensor.transpose(-1, -2)
                case Form.BLOCKS:
                    blocks[stored.parts[0]] = tensor
                case Form.SCALES:
                    scales[stored.parts[0]] = tensor
        table |= {name: Mxfp4Tensor(blocks[name], scales[name]) for name in blocks}
        return table


def open_checkpoint(folder: Path) -> Checkpoint:
    """Recognise the layout of a folder and check names, shapes and types of all its tensors.

    Raises ModelNotFoundError if there is no model, CheckpointError for a damaged or foreign one.
    """
    config_path = folder / "config.json"
    try:
        if not folder.is_dir():
            raise ModelNotFoundError(f"{folder} is not a folder; name a folder with config.json and .safetensors files")
        if not config_path.is_file():
            raise ModelNotFoundError(f"{folder} holds no config.json; name the folder of a gpt-oss checkpoint")
    except OSError as error:
        raise ModelNotFoundError(f"{folder} cannot be opened ({error.strerror}); name a folder you can read") from None
    layout, config = read_config(config_path)
    files = TensorFiles(folder)
    experts = _expert_format(files, config, layout)
    _check_tensors(files, config, layout, experts)
    return Checkpoint(folder, config, layout, experts, files)


def read_config(path: Path) -> tuple[Layout, ModelConfig]:
    """A config.json of either layout, and which of the two it is."""
    raw = read_json(path)
    if "model_type" not in raw and "num_experts" in raw:
        return Layout.ORIGINAL, configs.from_original(raw, str(path))
    config = configs.from_hf(raw, str(path))
    quantised = raw.get("quantization_config") or {"quant_method": "mxfp4"}
    method = quantised.get("quant_method") if isinstance(quantised, dict) else None
    if method != "mxfp4":
        raise UnsupportedError(f"{path}: experts quantised as {method!r}; Freehold reads mxfp4 and bf16")
    return Layout.HF, config


def _expert_format(files: TensorFiles, config: ModelConfig, layout: Layout) -> ExpertFormat:
    packed_names = [s.name for s in stored_tensors(config, layout, ExpertFormat.MXFP4) if s.form is Form.BLOCKS]
    if not any(name in files.infos for name in packed_names):
        return ExpertFormat.BF16
    if not config.supports_mxfp4:
        raise CheckpointError(
            f"{files.folder}: MXFP4 experts need sizes divisible by {mxfp4.BLOCK}, config.json says hidden size "
            f"{config.hidden_size} and expert width {config.expert_width}; config and tensors do not belong together"
        )
    return ExpertFormat.MXFP4


def _check_tensors(files: TensorFiles, config: ModelConfig, layout: Layout, experts: ExpertFormat) -> None:
    shapes = canonical_shapes(config)
    expected = stored_tensors(config, layout, experts)
    for stored in expected:
        info = files.infos.get(stored.name)
        if info is None:
            raise CheckpointError(
                f"{files.folder}: tensor {stored.name} is missing; the download is incomplete or this is not a gpt-oss "
                f"checkpoint in the {layout.value} layout: download it again"
            )
        _check_tensor(info, stored, stored_shape(stored, shapes))
    # A head that repeats tied embeddings is written by some tools; anything else unknown is a foreign file.
    repeated = {"lm_head.weight"} if layout is Layout.HF and config.tied_embeddings else set()
    unknown = files.infos.keys() - {stored.name for stored in expected} - repeated
    if unknown:
        name = min(unknown)
        raise CheckpointError(
            f"{files.infos[name].file}: tensor {name} has no place in a gpt-oss model of {config.num_layers} layers; "
            "config.json and tensors do not fit together: download both again"
        )


def _check_tensor(info: TensorInfo, stored: Stored, shape: tuple[int, ...]) -> None:
    if info.shape != shape:
        raise CheckpointError(
            f"{info.file}: tensor {stored.name} has shape {info.shape}, config.json asks for {shape}; "
            "the two do not belong together: download both again"
        )
    packed = stored.form in (Form.BLOCKS, Form.SCALES)
    sound = info.dtype == torch.uint8 if packed else info.dtype is not None and info.dtype.is_floating_point
    if not sound:
        raise CheckpointError(
            f"{info.file}: tensor {stored.name} is stored as {info.dtype_name}, expected "
            f"{'U8' if packed else 'BF16, F16 or F32'}; the checkpoint is in a format Freehold does not read"
        )


# --- writing ----------------------------------------------------------------------------------------------------


class WeightSource(Protocol):
    """Where the canonical tensors to write come from: a loaded table, or a generator. `origin` is for errors."""

    @property
    def origin(self) -> str: ...

    def dtype(self, name: str) -> torch.dtype:
        """The type in which a dense tensor will be stored."""

    def rows(self, name: str) -> Iterator[Tensor]:
        """A dense tensor in pieces along dimension 0."""

    def experts(self, name: str) -> Iterator[Mxfp4Tensor | Tensor]:
        """One (R, C) matrix per expert, in order."""


class TableSource:
    """A loaded table as a source: its tensors may be views of mapped files, so they are read as they are written."""

    def __init__(self, table: WeightTable, origin: str) -> None:
        self._table = table
        self.origin = origin

    def dtype(self, name: str) -> torch.dtype:
        return self._dense(name).dtype

    def rows(self, name: str) -> Iterator[Tensor]:
        yield self._dense(name)

    def experts(self, name: str) -> Iterator[Mxfp4Tensor | Tensor]:
        stack = self._table[name]
        return (stack[expert] for expert in range(stack.shape[0]))

    def _dense(self, name: str) -> Tensor:
        tensor = self._table[name]
        assert isinstance(tensor, Tensor), f"{name} is packed"
        return tensor


def write_checkpoint(
    folder: Path,
    config: ModelConfig,
    source: WeightSource,
    *,
    layout: Layout,
    experts: ExpertFormat,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress = no_progress,
) -> None:
    """Write config.json and all tensors into an existing folder, holding one expert or piece in memory at a time.

    Dense tensors keep the source's type. Raises UnsupportedError where the layout cannot express the config.
    """
    raw = config_json(config, layout, experts)
    tensors = tensors_to_write(config, source, layout, experts)
    write_text(folder / "config.json", json.dumps(raw, indent=2) + "\n")
    separator = "-" if layout is Layout.HF else "--"  # as the published shards are named
    shard_name = f"model{separator}{{number:05d}}-of-{{count:05d}}.safetensors"
    write_shards(folder, tensors, shard_bytes=shard_bytes, shard_name=shard_name, progress=progress)


def config_json(config: ModelConfig, layout: Layout, experts: ExpertFormat) -> dict[str, object]:
    """The layout's config.json. Raises UnsupportedError for what it, or MXFP4, cannot express."""
    if experts is ExpertFormat.MXFP4 and not config.supports_mxfp4:
        raise UnsupportedError(
            f"MXFP4 needs sizes divisible by {mxfp4.BLOCK}; this model has hidden size {config.hidden_size} and expert "
            f"width {config.expert_width}: write its experts as bf16"
        )
    if layout is Layout.HF:
        return configs.to_hf(config, quantised=experts is ExpertFormat.MXFP4)
    return configs.to_original(config)


def tensors_to_write(
    config: ModelConfig, source: WeightSource, layout: Layout, experts: ExpertFormat
) -> Sequence[TensorToWrite]:
    """Each stored tensor with its type, its shape and a producer of its bytes."""
    shapes = canonical_shapes(config)
    tensors: list[TensorToWrite] = []
    for stored in stored_tensors(config, layout, experts):
        name = stored.parts[0]
        is_matrix = is_expert_matrix(name)
        dtype = torch.bfloat16 if is_matrix else source.dtype(name)
        match stored.form:
            case Form.BLOCKS:
                # Packing may cost minutes: the scales that come with the blocks are kept for the tensor that follows.
                waiting_scales: list[Tensor] = []
                dtype, produce = torch.uint8, _packed_blocks(source, name, waiting_scales)
            case Form.SCALES:
                dtype, produce = torch.uint8, _take_all(waiting_scales)
            case Form.ROWS if is_matrix:
                produce = _bf16_experts(source, name, transposed=False)
            case Form.TRANSPOSED:
                produce = _bf16_experts(source, name, transposed=True)
            case Form.ROWS:
                produce = _dense_rows(source, stored.parts)
        tensors.append(TensorToWrite(stored.name, dtype, stored_shape(stored, shapes), produce))
    return tensors


def _dense_rows(source: WeightSource, names: tuple[str, ...]) -> Callable[[], Iterator[Tensor]]:
    return lambda: chain.from_iterable(source.rows(name) for name in names)


def _packed_blocks(source: WeightSource, name: str, scales: list[Tensor]) -> Callable[[], Iterator[Tensor]]:
    def produce() -> Iterator[Tensor]:
        for number, expert in enumerate(source.experts(name)):
            try:
                packed = expert if isinstance(expert, Mxfp4Tensor) else mxfp4.pack(expert)
            except UsageError as error:
                raise CheckpointError(
                    f"{source.origin}: {name} of expert {number}: {error}; download the checkpoint again, or keep bf16"
                ) from None
            scales.append(packed.scales)
            yield packed.blocks

    return produce


def _take_all(waiting: list[Tensor]) -> Callable[[], Iterator[Tensor]]:
    def produce() -> Iterator[Tensor]:
        yield from waiting
        waiting.clear()

    return produce


def _bf16_experts(source: WeightSource, name: str, *, transposed: bool) -> Callable[[], Iterator[Tensor]]:
    def produce() -> Iterator[Tensor]:
        for expert in source.experts(name):
            if isinstance(expert, Mxfp4Tensor):
                expert = mxfp4.unpack(expert, torch.bfloat16)
            values = expert.to(torch.bfloat16)
            yield values.T if transposed else values

    return produce
