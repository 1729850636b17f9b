"""What a merge kept of what an adapter had learnt, measured on a text: losses, and KL from the adapted model.

Four models see the same tokens: the base, the base with the adapter beside it, the sum with experts in bfloat16 (of an
adapter that was trained with --qat: rounded as in its training, for there is no other sum), and what was written, as it
lies on the disk: a checkpoint, or a GGUF file with all that its own formats cost. All are computed by the reference ops
in float32, so that what differs is the weights alone; layer by layer, so that one layer at a time is in memory. What
the kernels' own number formats cost on top, llama.cpp's too, is not told here; of ours `freehold receipt` does.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from freehold.config import ModelConfig
from freehold.errors import UsageError
from freehold.hub.merged import MergedSource
from freehold.kernels import backends
from freehold.kernels.ops import Weight
from freehold.log import Progress, no_progress
from freehold.model.batch import Batch
from freehold.model.layerwise import layer_adapter, one_layer
from freehold.model.lora import Adapter, TokenAdapters
from freehold.model.peft_files import read_peft
from freehold.weights import mxfp4
from freehold.weights.gguf import GgufWeights
from freehold.weights.layouts import WeightTable, is_expert_matrix, open_checkpoint
from freehold.weights.mxfp4 import Mxfp4Tensor

Example = tuple[list[int], list[int]]
"""Token ids, and at each the token that is to follow; below 0 where that does not count."""

_TARGETS_AT_ONCE = 64  # their logits are the largest tensors here
_STEPS = ("base", "adapter", "merged", "stored")


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeReceipt:
    """Over `num_targets` tokens, in nats, means. KL is from the adapted model to the one in question. `tokens_sha256`
    is of the tokens and targets that all of them saw: receipts with the same one can be compared."""

    num_targets: int
    tokens_sha256: str
    base_loss: float
    adapter_loss: float
    merged_loss: float
    stored_loss: float
    merged_kl: float
    stored_kl: float

    @property
    def merged_share(self) -> float | None:
        """Of the adapter's loss reduction, what is there after the merge, before experts are quantised again
        (but see above for --qat)."""
        return self._share(self.merged_loss)

    @property
    def stored_share(self) -> float | None:
        """The same in the checkpoint as it was written. None where the adapter lowers no loss here."""
        return self._share(self.stored_loss)

    def to_json(self) -> dict[str, float | str | None]:
        return asdict(self) | {"merged_share": self.merged_share, "stored_share": self.stored_share}

    def _share(self, loss: float) -> float | None:
        gained = self.base_loss - self.adapter_loss
        return (self.base_loss - loss) / gained if gained > 0 else None


def measure_merge(
    source: Path, adapter: Path, stored: Path, examples: Sequence[Example], *, progress: Progress = no_progress
) -> MergeReceipt:
    """Compare the model in `source`, the adapter, and what was made of both: the folder `stored`, or the file *.gguf.

    Raises UsageError where the examples have no target, CheckpointError where `stored` is not of this model's sizes.
    """
    checkpoint = open_checkpoint(source)
    config = checkpoint.config
    is_gguf = stored.suffix.lower() == ".gguf"
    written = GgufWeights(stored, config) if is_gguf else open_checkpoint(stored).table()
    factors = read_peft(adapter, config)
    tokens_T = torch.tensor([token for tokens, _ in examples for token in tokens])
    targets_T = torch.tensor([target for _, targets in examples for target in targets])
    if not bool((targets_T >= 0).any()):
        raise UsageError("there is no token to measure a loss at in this text; give another with --measure")
    run = _Run(config, checkpoint.table(), written, factors, [len(tokens) for tokens, _ in examples])
    with torch.inference_mode(), backends.reference_only():
        return run.receipt(tokens_T, targets_T, progress)


def _sha256(tokens_T: Tensor, targets_T: Tensor, counts: Sequence[int]) -> str:
    digest = hashlib.sha256(repr([*counts]).encode())
    for values in (tokens_T, targets_T):
        digest.update(values.numpy().astype("<i8").tobytes())
    return digest.hexdigest()


class _Head:
    """Of a model's last states, how likely each next token is."""

    def __init__(self, config: ModelConfig, table: Mapping[str, Tensor | Mxfp4Tensor]) -> None:
        final_norm, unembedding = table["final_norm"], table["unembedding" if "unembedding" in table else "embedding"]
        assert isinstance(final_norm, Tensor) and isinstance(unembedding, Tensor)
        self._eps = config.norm_eps
        self._final_norm_D, self._unembedding_VD = final_norm.float(), unembedding.float()

    def log_probs(self, x_SD: Tensor) -> Tensor:
        normed_SD = F.rms_norm(x_SD, self._final_norm_D.shape, self._final_norm_D, self._eps)
        return F.log_softmax(F.linear(normed_SD, self._unembedding_VD), dim=-1)


class _Run:
    def __init__(
        self,
        config: ModelConfig,
        base: WeightTable,
        stored: Mapping[str, Tensor | Mxfp4Tensor],
        adapter: Adapter,
        counts: Sequence[int],
    ) -> None:
        self._config = config
        self._counts = counts
        self._base, self._stored = base, stored
        self._adapter = adapter
        self._merged = MergedSource(base, adapter, origin="")
        self._batch = Batch.whole(counts, num_layers=1, device=torch.device("cpu"))

    def receipt(self, tokens_T: Tensor, targets_T: Tensor, progress: Progress) -> MergeReceipt:
        states = dict.fromkeys(_STEPS, _embedded(self._base, tokens_T)) | {"stored": _embedded(self._stored, tokens_T)}
        total = self._config.num_layers * len(_STEPS)
        for number in range(self._config.num_layers):
            for at, step in enumerate(_STEPS):
                progress("measuring", number * len(_STEPS) + at, total)
                states[step] = self._layer(step, number, states[step])
        progress("measuring", total, total)
        places = torch.where(targets_T >= 0)[0]
        # An adapter leaves norm and output alone, but a GGUF file may round them.
        head = _Head(self._config, self._base)
        heads = dict.fromkeys(_STEPS, head)
        if isinstance(self._stored, GgufWeights):
            heads["stored"] = _Head(self._config, self._stored)
        losses, divergences = dict.fromkeys(_STEPS, 0.0), dict.fromkeys(_STEPS, 0.0)
        for chosen in torch.split(places, _TARGETS_AT_ONCE):
            log_probs = {step: heads[step].log_probs(state_TD[chosen]) for step, state_TD in states.items()}
            adapted = log_probs["adapter"]
            for step, values in log_probs.items():
                losses[step] -= float(values.gather(-1, targets_T[chosen, None]).double().sum())
                divergences[step] += float((adapted.exp() * (adapted - values)).double().sum())
        count = len(places)
        return MergeReceipt(
            num_targets=count,
            tokens_sha256=_sha256(tokens_T, targets_T, self._counts),
            base_loss=losses["base"] / count,
            adapter_loss=losses["adapter"] / count,
            merged_loss=losses["merged"] / count,
            stored_loss=losses["stored"] / count,
            merged_kl=divergences["merged"] / count,
            stored_kl=divergences["stored"] / count,
        )

    def _layer(self, step: str, number: int, x_TD: Tensor) -> Tensor:
        table = self._merged_layer(number) if step == "merged" else self._stored if step == "stored" else self._base
        transformer = one_layer(self._config, table, number)
        batch = self._batch
        adapter = layer_adapter(self._adapter, number) if step == "adapter" else None
        if adapter is not None:
            rows_T = torch.zeros(len(x_TD), dtype=torch.int64)
            batch = replace(batch, adapters=TokenAdapters([adapter], rows_T))
        return transformer.layer(x_TD, 0, batch, transformer.rotation(batch))

    def _merged_layer(self, number: int) -> dict[str, Weight]:
        layer: dict[str, Weight] = dict(self._merged.layer(number))
        for name in filter(is_expert_matrix, layer):
            layer[name] = torch.stack([_in_bfloat16(matrix) for matrix in self._merged.experts(name)])
        return layer


def _embedded(table: Mapping[str, Tensor | Mxfp4Tensor], tokens_T: Tensor) -> Tensor:
    embedding = table["embedding"]
    assert isinstance(embedding, Tensor)
    return F.embedding(tokens_T, embedding).float()


def _in_bfloat16(matrix: Mxfp4Tensor | Tensor) -> Tensor:
    return mxfp4.unpack(matrix, torch.bfloat16) if isinstance(matrix, Mxfp4Tensor) else matrix.to(torch.bfloat16)
