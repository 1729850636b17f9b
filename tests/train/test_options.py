"""Options are checked when they are made, and what is typed for adapters is read as it is meant."""

from typing import Any

import pytest

from freehold.errors import UsageError
from freehold.train.options import LoopOptions, LoraOptions, LoraTarget, lora_targets


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"epochs": 0}, "--epochs must be more than 0, got 0"),
        ({"epochs": float("nan")}, "--epochs must be more than 0, got nan"),
        ({"max_steps": 0}, "--max-steps must be a whole number from 1 on, got 0"),
        ({"max_length": 1}, "--max-length must be a whole number from 2 on, got 1"),
        ({"batch_size": True}, "--batch-size must be a whole number from 1 on, got True"),
        ({"learning_rate": float("inf")}, "--learning-rate must be more than 0 and finite, got inf"),
        ({"warmup_ratio": 1.5}, "--warmup-ratio must be 0 or more and 1 at most, got 1.5"),
        ({"adam_beta2": 1}, "--adam-beta2 must be 0 or more and less than 1, got 1"),
        ({"weight_decay": -1}, "--weight-decay must be 0 or more, got -1"),
        ({"seed": -1}, "--seed must be a whole number from 0 on, got -1"),
        ({"patience": "2"}, "--patience must be a whole number from 1 on, got '2'"),
        ({"checkpointing": "maybe"}, "--checkpointing is auto, on or off, got 'maybe'"),
    ],
)
def test_values_out_of_range(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=f"^{words}$"):
        LoopOptions(**changes)


def test_targets_ranks_and_alphas_as_they_are_typed() -> None:
    assert lora_targets((), (), ()) == tuple(
        LoraTarget(kind, 16, 32.0) for kind in ("q", "k", "v", "o", "gate_up", "down")
    )
    assert lora_targets(("q, down", "o"), ("8", "down=2"), ("q=3", "1.5"), router=True) == (
        LoraTarget("q", 8, 3.0), LoraTarget("down", 2, 1.5), LoraTarget("o", 8, 1.5), LoraTarget("router", 8, 1.5),
    )  # fmt: skip
    assert lora_targets(("q,k",), ("k=4",), ()) == (LoraTarget("q", 16, 32.0), LoraTarget("k", 4, 8.0))


@pytest.mark.parametrize(
    ("kinds", "ranks", "alphas", "words"),
    [
        (("q",), ("k=8",), (), "--rank k=8: 'k' is not trained; the targets are q"),
        (("q",), ("eight",), (), "--rank takes numbers, or KIND=NUMBER, got 'eight'"),
        (("q",), ("8", "9"), (), "--rank 9: it is given twice"),
        (("q",), ("1.5",), (), "--rank takes whole numbers, got 1.5"),
        (("q",), ("0",), (), "--rank of q must be a whole number from 1 on, got 0"),
        (("q",), (), ("-1",), "--alpha of q must be more than 0 and less than .*, got -1.0"),
        (("q", "q"), (), (), "--target 'q' is given twice"),
    ],
)
def test_adapters_that_cannot_be(
    kinds: tuple[str, ...], ranks: tuple[str, ...], alphas: tuple[str, ...], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        LoraOptions(targets=lora_targets(kinds, ranks, alphas))
