"""What a packed row teaches: the log-probabilities of its targets, by inference's own forward pass.

The model, its weights and its kernels are the ones that serve; only attention goes over whole sequences instead of a
cache. What a backward pass needs is kept, or with `checkpointing` computed again layer by layer. Logits exist for a few
targets at a time. Knows one row and one adapter: steps, optimisers and files are the loop's, which calls this.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from freehold.kernels import backends
from freehold.kernels.ops import Routing
from freehold.model.batch import Batch
from freehold.model.lora import Adapter, TokenAdapters
from freehold.model.transformer import Transformer
from freehold.train.examples import NO_TARGET
from freehold.train.packing import PackedRow
from freehold.weights.packed import PackedMatrix

_LOGITS_AT_ONCE = 1 << 24  # numbers, of which there are two such pieces at a time


class Taught(NamedTuple):
    """Of a row's targets, in their order: log-probabilities, natural, and the router's load-balance term, a mean over
    layers that is 1 where all experts are used alike; 0 where it was not asked for."""

    log_probs_S: Tensor
    balance: Tensor


def taught(
    transformer: Transformer,
    row: PackedRow,
    *,
    adapter: Adapter | None = None,
    folded: bool = False,
    dropout: float = 0.0,
    checkpointing: bool = False,
    balance: bool = False,
    gradient_type: torch.dtype | None = None,
) -> Taught:
    """Differentiable in the adapter's factors, and in weights of the model that want a gradient.

    `folded`: the transformer's weights have the adapter in them already (qat.py). `dropout` draws from torch's own
    generator. Where weights are packed, `gradient_type` is the type in which gradients are multiplied, sums aside:
    float32, bfloat16, or None for what is faster on this processor. The row's targets may be none: then so are the
    log-probabilities.
    """
    device, gradient_type = transformer.device, gradient_type or _quick_gradient_type(transformer)
    tokens_T = torch.tensor(row.tokens, device=device)
    adapters = None
    if adapter is not None:
        adapters = TokenAdapters([adapter], torch.zeros_like(tokens_T), dropout=dropout, folded=folded)
    batch = Batch.whole(
        row.counts,
        num_layers=len(transformer.layers),
        device=device,
        kv_type=transformer.kv_type,
        adapters=adapters,
    )
    x_TD, rotation = transformer.embed(tokens_T), transformer.rotation(batch)
    balances = [torch.zeros((), device=device)]
    for index in range(len(transformer.layers)):

        def layer(x_TD: Tensor, index: int = index) -> tuple[Tensor, Tensor]:
            with backends.gradients_in(gradient_type):
                return _watched_layer(transformer, x_TD, index, batch, rotation, balance)

        if checkpointing and torch.is_grad_enabled():
            x_TD, of_layer = checkpoint(layer, x_TD, use_reentrant=False)
        else:
            x_TD, of_layer = layer(x_TD)
        balances.append(of_layer)
    targets_T = torch.tensor(row.targets, device=device)
    places = torch.where(targets_T != NO_TARGET)[0]
    with backends.gradients_in(gradient_type):
        log_probs_S = log_probs(transformer, x_TD[places], targets_T[places])
    return Taught(log_probs_S, torch.stack(balances).sum() / len(transformer.layers))


def log_probs(transformer: Transformer, hidden_SD: Tensor, targets_S: Tensor) -> Tensor:
    """Of one token after each hidden state, (S,) float32."""
    if torch.is_grad_enabled() and any(w.requires_grad for w in _unembedding(transformer)):
        pieces = _pieces(transformer, len(targets_S))
        return torch.cat(
            [
                checkpoint(_plain_log_probs, transformer.unembed, hidden_SD[p], targets_S[p], use_reentrant=False)
                for p in pieces
            ]
        )
    out: Tensor = _LogProbs.apply(hidden_SD, targets_S, transformer)  # type: ignore[no-untyped-call]
    return out


def balance_term(logits_TE: Tensor, routing: Routing) -> Tensor:
    """E · sum over experts of the share of tokens sent there times its mean probability: 1 where all are used alike, up
    to E / A where the same A are always taken (Switch Transformers, https://arxiv.org/abs/2101.03961, equation 4)."""
    num_experts = logits_TE.shape[1]
    share_E = torch.bincount(routing.experts_TA.flatten(), minlength=num_experts) / routing.experts_TA.numel()
    return num_experts * (share_E * torch.softmax(logits_TE.float(), dim=-1).mean(0)).sum()


def _quick_gradient_type(transformer: Transformer) -> torch.dtype:
    packed = any(isinstance(layer.experts.gate_up, PackedMatrix) for layer in transformer.layers)
    return backends.quick_gradient_type() if packed else torch.float32


def _watched_layer(
    transformer: Transformer, x_TD: Tensor, index: int, batch: Batch, rotation: Any, balance: bool
) -> tuple[Tensor, Tensor]:
    terms: list[Tensor] = []
    if balance:
        batch = replace(batch, watch=lambda _, logits_TE, routing: terms.append(balance_term(logits_TE, routing)))
    x_TD = transformer.layer(x_TD, index, batch, rotation)
    return x_TD, terms[0] if terms else x_TD.new_zeros((), dtype=torch.float32)


def _unembedding(transformer: Transformer) -> list[Tensor]:
    weights = (transformer.unembedding_VD, transformer.final_norm.weight_D)
    return [weight for weight in weights if isinstance(weight, Tensor)]


def _pieces(transformer: Transformer, count: int) -> list[slice]:
    rows = max(1, _LOGITS_AT_ONCE // transformer.config.vocab_size)
    return [slice(start, start + rows) for start in range(0, count, rows)] or [slice(0, 0)]


def _plain_log_probs(unembed: Callable[[Tensor], Tensor], hidden_SD: Tensor, targets_S: Tensor) -> Tensor:
    return -F.cross_entropy(unembed(hidden_SD), targets_S, reduction="none")


class _LogProbs(torch.autograd.Function):
    """Through a frozen unembedding: each row's gradient is computed while its logits are there, and only that is kept.
    A row of logits is a hundred times what a row of hidden states is."""

    @staticmethod
    def forward(ctx: Any, hidden_SD: Tensor, targets_S: Tensor, transformer: Transformer) -> Tensor:
        wanted = hidden_SD.requires_grad
        out_S = torch.empty(len(targets_S), device=hidden_SD.device)
        gradient_SD = torch.empty_like(hidden_SD) if wanted else None
        for piece in _pieces(transformer, len(targets_S)):
            with torch.set_grad_enabled(wanted):
                hidden = hidden_SD[piece].detach().requires_grad_(wanted)
                logits = transformer.unembed(hidden)
            numbers, targets = torch.log_softmax(logits.detach(), dim=-1), targets_S[piece].unsqueeze(-1)
            chosen_S1 = numbers.gather(1, targets)
            out_S[piece] = chosen_S1.squeeze(-1)
            if gradient_SD is not None:
                of_logits = numbers.exp_().neg_()
                of_logits.scatter_add_(1, targets, torch.ones_like(chosen_S1))
                (gradient_SD[piece],) = torch.autograd.grad(logits, hidden, of_logits)
        ctx.save_for_backward(gradient_SD)
        return out_S

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_out_S: Tensor) -> tuple[Tensor, None, None]:
        (gradient_SD,) = ctx.saved_tensors
        return (gradient_SD * of_out_S.unsqueeze(-1)).to(gradient_SD.dtype), None, None
