"""One step's forward pass: from a plan to the logits of those who draw. Knows tensors, decides nothing."""

import torch
from torch import Tensor

from freehold.engine.kv_store import KvStore
from freehold.engine.scheduler import Plan
from freehold.model.transformer import Transformer


class Runner:
    def __init__(self, transformer: Transformer, store: KvStore) -> None:
        self._transformer = transformer
        self._store = store

    @torch.inference_mode()
    def run(self, plan: Plan) -> Tensor:
        """Logits (S, V) in float32 on the CPU, the rows of each work of the plan in their order."""
        self._store.copy(plan.copies)
        tokens: list[int] = []
        rows: list[int] = []
        for work in plan.works:
            tokens += work.tokens
            rows += range(len(tokens) - work.num_rows, len(tokens))
        device = self._transformer.device
        hidden_TD = self._transformer.forward(torch.tensor(tokens, device=device), self._store.batch(plan.works))
        if not rows:
            return torch.empty((0, self._transformer.config.vocab_size))
        if len(rows) < len(tokens):
            hidden_TD = hidden_TD[torch.tensor(rows, device=device)]
        return self._transformer.unembed(hidden_TD).cpu()
