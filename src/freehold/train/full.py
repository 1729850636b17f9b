"""Full fine-tuning on the numbers that are served: all weights learn, and every row is computed with them rounded.

Masters are float32. What is computed with is what would be stored: experts in MXFP4, everything else in the type that
the checkpoint has it in. Gradients go straight through the rounding (https://arxiv.org/abs/1308.3432) and nothing is
clamped: what a block's scale cannot hold gets a coarser scale. Experts that were MXFP4 are rounded by
`mxfp4.pack_dithered`, since steps of an optimizer are far smaller than steps of the format; others to the nearest.

Plain torch computes the gradients, in the type of the policy, on any device; weights take 20 bytes a parameter. The
result is a checkpoint like the one it came from. An objective of loop.py.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from freehold.config import ExpertFormat, Layout
from freehold.disk import new_file
from freehold.errors import CheckpointError, TrainingError, UsageError
from freehold.hub.convert import side_files, write_folder
from freehold.hub.merged import dither_seed
from freehold.kernels.ops import Weight
from freehold.model.transformer import Transformer
from freehold.train.data import TrainingData
from freehold.train.forward import taught
from freehold.train.objective import RowLoss, RowSize
from freehold.train.options import FullOptions
from freehold.train.packing import PackedRow
from freehold.train.sft import PackedRows, packed_rows
from freehold.weights import mxfp4
from freehold.weights.files import TensorToWrite, header_bytes, write_data
from freehold.weights.layouts import Checkpoint, canonical_shapes, is_expert_matrix
from freehold.weights.mxfp4 import Mxfp4Tensor

MASTERS_FILE = "masters.safetensors"


def trained_names(checkpoint: Checkpoint, options: FullOptions) -> list[str]:
    """The canonical tensors that learn, in the order of the model."""
    return [name for name in canonical_shapes(checkpoint.config) if _group(name) in options.train]


def _group(name: str) -> str:
    """One of options.GROUPS."""
    if "embedding" in name:
        return "embedding"
    if name.endswith("norm"):
        return "norms"
    kind = name.split(".")[2]
    return {"router": "router", "gate_up": "experts", "down": "experts"}.get(kind, "attention")


class FullTuning:
    """A model whose weights learn, and the examples that they learn from."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        options: FullOptions,
        data: TrainingData,
        *,
        dtype: torch.dtype,
        device: torch.device,
        max_length: int,
        seed: int,
        checkpointing: bool = False,
    ) -> None:
        self.config = checkpoint.config
        self._checkpoint = checkpoint
        self._options = options
        self._data = data
        self._dtype = dtype
        self._device = device
        self._max_length = max_length
        self._seed = seed
        self._checkpointing = checkpointing
        self._stored = checkpoint.table()
        self._frozen: dict[str, Weight] = dict(self._stored)
        self._masters: dict[str, Tensor] = {}
        self._rounded: dict[str, Tensor] = {}
        for name in trained_names(checkpoint, options):
            del self._frozen[name]
            stored = self._stored[name]
            values = mxfp4.unpack(stored) if isinstance(stored, Mxfp4Tensor) else stored.float()
            self._masters[name] = values.to(device, copy=True).contiguous().requires_grad_()
            self._rounded[name] = torch.empty_like(self._masters[name], requires_grad=False)
        self._parameters = list(self._masters.values())
        self._versions: list[int] = []
        self._rows_per_epoch = len(self.rows(0))

    @property
    def parameters(self) -> Sequence[Tensor]:
        return self._parameters

    @property
    def rows_per_epoch(self) -> int:
        return self._rows_per_epoch

    def rows(self, epoch: int) -> PackedRows:
        return packed_rows(self._data.training, self._max_length, f"{self._seed} {epoch}")

    def validation_rows(self) -> PackedRows:
        return packed_rows(self._data.validation, self._max_length, f"{self._seed} validation")

    def size(self, row: PackedRow) -> RowSize:
        return RowSize(row.num_targets, len(row.tokens))

    def loss(self, row: PackedRow, *, training: bool) -> RowLoss:
        balance = self._options.balance if training else 0.0
        said = taught(self.transformer(), row, checkpointing=self._checkpointing and training, balance=balance > 0)
        total = -said.log_probs_S.sum()
        if not balance:
            return RowLoss(total)
        return RowLoss(total, said.balance * balance, {"balance": float(said.balance.detach()) * row.num_targets})

    def transformer(self) -> Transformer:
        """With the weights that there are now, rounded; their gradients reach the masters."""
        # Counted by torch at every change in place: the optimizer's, or of `restore`.
        versions = [master._version for master in self._parameters]
        if versions != self._versions:
            with torch.no_grad():
                for name, rounded in self._rounded.items():
                    self._round(name, rounded)
            self._versions = versions
        table = self._frozen | {
            name: _Straight.apply(master, self._rounded[name])  # type: ignore[no-untyped-call]
            for name, master in self._masters.items()
        }
        return Transformer(self._checkpoint.config, table, dtype=self._dtype, device=self._device)

    # --- as it is stored ----------------------------------------------------------------------------------------

    def dtype(self, name: str) -> torch.dtype:
        return cast(Tensor, self._stored[name]).dtype

    def rows_of(self, name: str) -> Tensor:
        """A dense tensor in its type."""
        master = self._masters.get(name)
        stored = cast(Tensor, self._stored[name])
        return stored if master is None else master.detach().to(stored.dtype)

    def expert(self, name: str, expert: int) -> Mxfp4Tensor | Tensor:
        """One expert's matrix: in MXFP4 where the model's sizes allow it."""
        stored = self._stored[name][expert]
        if name not in self._masters:
            return stored
        master = self._masters[name].detach()[expert]
        try:
            if isinstance(stored, Mxfp4Tensor):
                return mxfp4.pack_dithered(master, stored.to(master.device), seed=dither_seed(name, expert))
            return mxfp4.pack(master) if self._checkpoint.config.supports_mxfp4 else master.to(torch.bfloat16)
        except UsageError:
            raise TrainingError(f"{name} of expert {expert} is no longer a number") from None

    def _round(self, name: str, out: Tensor) -> None:
        if not is_expert_matrix(name):
            out.copy_(self.rows_of(name))
            return
        for expert in range(len(out)):
            matrix = self.expert(name, expert)
            out[expert] = mxfp4.unpack(matrix) if isinstance(matrix, Mxfp4Tensor) else matrix

    def export(self, source: Path, destination: Path, *, harmony: bool | None = None) -> None:
        """Write the model as a new folder that loads and serves, in Hugging Face's layout; `source` is the folder that
        it was tuned from, whose tokeniser, template and licence go along; with `harmony`, Harmony's template."""
        write_folder(
            self._checkpoint,
            _Source(self),
            destination,
            layout=Layout.HF,
            experts=ExpertFormat.MXFP4 if self._checkpoint.config.supports_mxfp4 else ExpertFormat.BF16,
            side_files=side_files(source, harmony=harmony),
        )

    # --- checkpoints of the run ---------------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        def to_write(name: str, master: Tensor) -> TensorToWrite:
            return TensorToWrite(name, master.dtype, tuple(master.shape), lambda: iter([master.detach().cpu()]))

        specs = [to_write(name, master) for name, master in self._masters.items()]
        with new_file(folder / MASTERS_FILE) as file:
            file.write(header_bytes(specs, {"format": "pt"}))
            for _ in write_data(file, specs):
                pass

    def restore(self, folder: Path) -> None:
        path = folder / MASTERS_FILE
        try:
            with safe_open(path, framework="pt") as file, torch.no_grad():
                if set(file.keys()) != self._masters.keys():
                    raise CheckpointError(f"{path} holds other tensors than this run trains; remove it")
                for name, master in self._masters.items():
                    master.copy_(file.get_tensor(name))
        except (SafetensorError, OSError, RuntimeError) as error:
            raise CheckpointError(f"{path} cannot be read ({error}); resume from the checkpoint before it") from None

    @property
    def save_bytes(self) -> int:
        return sum(parameter.nbytes for parameter in self._parameters)


class _Source:
    """See weights.layouts.WeightSource."""

    def __init__(self, tuning: FullTuning) -> None:
        self._tuning = tuning
        self.origin = "the tuned model"

    def dtype(self, name: str) -> torch.dtype:
        return self._tuning.dtype(name)

    def rows(self, name: str) -> Iterator[Tensor]:
        yield self._tuning.rows_of(name).cpu()

    def experts(self, name: str) -> Iterator[Mxfp4Tensor | Tensor]:
        cpu = torch.device("cpu")
        shape = canonical_shapes(self._tuning.config)[name]
        return (self._tuning.expert(name, expert).to(cpu) for expert in range(shape[0]))


class _Straight(torch.autograd.Function):
    """The rounded numbers, whose gradient is the master's."""

    @staticmethod
    def forward(ctx: Any, master: Tensor, rounded: Tensor) -> Tensor:
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None
