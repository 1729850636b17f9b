"""The quality receipt: what the number formats of the native kernels cost on a real text.

Both passes see the same tokens: the native kernels as the model is served, and the reference ops in float32 on the
checkpoint's own numbers. The text is the beginning of Alice's Adventures in Wonderland (Lewis Carroll, 1865, in the
public domain; Millennium Fulcrum Edition 2.9, line breaks removed), in `data/alice.txt`.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import resources

import torch
import torch.nn.functional as F
from torch import Tensor

from freehold.config import ExpertFormat
from freehold.errors import BackendError, CheckpointError, UsageError
from freehold.hub.folder import open_folder
from freehold.kernels import backends
from freehold.log import NOTICE, Progress, logger, no_progress
from freehold.model.transformer import Transformer
from freehold.session.memory import fitting_plan, free_memory, gib
from freehold.session.model import Model

LENGTHS = (256, 4096)
_CHUNK = 128  # tokens at once: the logits of a large vocabulary are the largest tensors here


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """Over the first `num_tokens` of the text. KL is from the reference to the native kernels, in nats, a mean over
    positions; agreement is how often both find the same token likeliest."""

    num_tokens: int
    mean_kl: float
    largest_kl: float
    top1_agreement: float
    reference_perplexity: float
    native_perplexity: float


def text() -> str:
    """The fixed text."""
    return (resources.files("freehold.session") / "data" / "alice.txt").read_text(encoding="utf-8")


def write_receipts(
    model: Model, lengths: Sequence[int] = LENGTHS, *, progress: Progress = no_progress
) -> list[Receipt]:
    """Compare a model loaded with native kernels with the reference ops. Lengths beyond the model's context are cut.

    Raises BackendError where the model does not run on native kernels, CheckpointError where it has no tokeniser,
    OutOfMemoryError where the reference does not fit beside it.
    """
    if not model.policy.native:
        raise BackendError("a receipt compares the native CPU kernels with the reference, and they do not run here")
    if model.tokenizer is None:
        raise CheckpointError(f"{model.path} has no tokenizer.json, so it cannot read the receipt's text")
    if not lengths or min(lengths) < 2:
        raise UsageError(f"a receipt needs texts of at least 2 tokens, got {list(lengths)}")
    token_ids = model.tokenizer.encode(text())
    longest = min(max(lengths), model.plan.context, len(token_ids) - 1)
    token_ids = token_ids[: longest + 1]  # the last one is only predicted
    ends = sorted({min(length, longest) for length in lengths})
    checkpoint = open_folder(model.path).checkpoint
    as_reference = replace(model.policy, dtype=torch.float32, kv="f32", dense=None)
    plan = fitting_plan(checkpoint.config, ExpertFormat(model.experts), as_reference, context=longest, max_num_seqs=1)
    logger.log(
        NOTICE, "memory of the reference beside it: %s of %s free", plan.describe(), gib(free_memory(as_reference))
    )
    if longest < max(lengths):
        logger.log(NOTICE, "the text or the context ends at %d tokens: longer lengths are cut to that", longest)
    reference = Transformer(
        checkpoint.config, checkpoint.table(), dtype=torch.float32, device=torch.device("cpu"), kv_type="f32"
    )
    sums = torch.zeros(4, dtype=torch.float64)
    largest, count = 0.0, 0
    receipts = []
    for chunk in _compared(reference, model.transformer, token_ids, ends, progress):
        sums += chunk.sums
        largest, count = max(largest, chunk.largest_kl), count + chunk.count
        if chunk.end in ends:
            kl, same, reference_loss, native_loss = (sums / count).tolist()
            receipts.append(
                Receipt(
                    num_tokens=chunk.end,
                    mean_kl=kl,
                    largest_kl=largest,
                    top1_agreement=same,
                    reference_perplexity=math.exp(reference_loss),
                    native_perplexity=math.exp(native_loss),
                )
            )
    return receipts


@dataclass(frozen=True, slots=True)
class _Chunk:
    end: int  # how many tokens of the text have been compared with this chunk
    count: int
    sums: Tensor  # of KL, of agreement, of the reference's and the native kernels' loss
    largest_kl: float


@torch.inference_mode()
def _compared(
    reference: Transformer, native: Transformer, token_ids: list[int], ends: list[int], progress: Progress
) -> Iterator[_Chunk]:
    tokens_T = torch.tensor(token_ids)
    caches = reference.new_cache(), native.new_cache()
    stops = sorted({*range(_CHUNK, ends[-1], _CHUNK), *ends})
    for start, stop in zip([0, *stops], stops, strict=False):
        piece, following = tokens_T[start:stop], tokens_T[start + 1 : stop + 1].unsqueeze(-1)
        with backends.reference_only():
            expected_TV = F.log_softmax(reference.unembed(reference.run(piece, caches[0])), dim=-1)
        got_TV = F.log_softmax(native.unembed(native.run(piece, caches[1])), dim=-1)
        kl_T = (expected_TV.exp() * (expected_TV - got_TV)).sum(-1).double()
        same_T = (expected_TV.argmax(-1) == got_TV.argmax(-1)).double()
        losses = [-values_TV.gather(-1, following).double().sum() for values_TV in (expected_TV, got_TV)]
        yield _Chunk(stop, stop - start, torch.stack([kl_T.sum(), same_T.sum(), *losses]), float(kl_T.max()))
        progress("comparing with the reference", stop, ends[-1])
