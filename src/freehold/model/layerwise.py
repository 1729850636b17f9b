"""A model one layer at a time, for whoever cannot hold it whole in the type in which it is to be computed.

`one_layer` is a transformer of a single layer of a larger model. Hidden states go through its `layer`, or `attention`,
with a batch of one layer and, where there is an adapter, with that adapter's share for this layer. It has no
vocabulary: embedding and output belong to the caller. Called by merging (hub) and its receipt (session).
"""

from collections.abc import Mapping
from dataclasses import replace

import torch

from freehold.config import ModelConfig
from freehold.kernels.ops import Weight
from freehold.model.lora import Adapter, AdapterSpec
from freehold.model.transformer import Transformer


def one_layer(config: ModelConfig, table: Mapping[str, Weight], number: int) -> Transformer:
    """Layer `number` of a model, as a model of its own on the CPU, in float32. The table needs this layer's weights."""
    weights: dict[str, Weight] = {
        "embedding": torch.zeros(1, config.hidden_size),
        "final_norm": torch.ones(config.hidden_size),
    }
    prefix = f"layers.{number}."
    for name in table:  # of which one may read each tensor when it is asked for
        if name.startswith(prefix):
            weights[f"layers.0.{name.removeprefix(prefix)}"] = table[name]
    return Transformer(_of_one_layer(config, number), weights, dtype=torch.float32, device=torch.device("cpu"))


def layer_adapter(adapter: Adapter, number: int) -> Adapter | None:
    """What an adapter adds to this one layer, for a model of `one_layer`. None where that is nothing."""
    names = {name: f"layers.0.{name.split('.')[2]}" for name in adapter.factors if name.split(".")[1] == str(number)}
    if not names:
        return None
    return Adapter(
        config=_of_one_layer(adapter.config, number),
        spec=AdapterSpec(
            targets={ours: adapter.spec.targets[name] for name, ours in names.items()}, rslora=adapter.spec.rslora
        ),
        factors={ours: adapter.factors[name] for name, ours in names.items()},
    )


def _of_one_layer(config: ModelConfig, number: int) -> ModelConfig:
    window = config.windows[number]
    return replace(config, num_layers=1, windows=(window,), vocab_size=1, tied_embeddings=True)
