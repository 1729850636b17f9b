"""How a model is tuned. Values only, checked when made; a run's folder keeps them, and a resumed run has the same.

Names and defaults are those that people know from PEFT, TRL and torchtune, where they agree. Imports no torch: the
command line reads its defaults here.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from freehold.errors import UsageError

DEFAULT_TARGETS = ("q", "k", "v", "o", "gate_up", "down")
DEFAULT_RANK = 16
METHODS = ("lora", "dpo", "full")
GROUPS = ("attention", "router", "experts", "norms", "embedding")
MOST_ALPHA = 2**31  # what is read again
LEARNING_RATES = {"lora": 2e-4, "dpo": 5e-5, "full": 2e-5}


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopOptions:
    """Raises UsageError for values out of range.

    A step learns from `batch_size` rows of up to `max_length` tokens, computed one after another. `epochs` need not be
    whole; `max_steps` goes before them. The learning rate rises for `warmup_ratio` of the steps and falls along a
    cosine to `min_lr_ratio` of its height. Every `eval_steps` the validation loss is measured, every `save_steps` a
    checkpoint written: None is ten times in all. The `save_total_limit` newest are kept, the best, and the last one
    that is known to be good (loop.py). Training stops early when the validation loss has not fallen for `patience`
    measurements; None is never. `checkpointing` computes activations twice, to save memory: on, off, or auto, which is
    where they would not fit.
    """

    epochs: float = 1.0
    max_steps: int | None = None
    max_length: int = 2048
    batch_size: int = 8
    learning_rate: float = 2e-4
    warmup_ratio: float = 0.03
    min_lr_ratio: float = 0.1
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    max_grad_norm: float = 1.0
    eval_steps: int | None = None
    save_steps: int | None = None
    save_total_limit: int = 2
    patience: int | None = None
    checkpointing: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_steps", "eval_steps", "save_steps", "patience"):
            if getattr(self, name) is not None:
                _check_whole(name, getattr(self, name), 1)
        for name, least in (("max_length", 2), ("batch_size", 1), ("save_total_limit", 1), ("seed", 0)):
            _check_whole(name, getattr(self, name), least)
        for name in ("epochs", "learning_rate", "max_grad_norm"):
            _check_number(name, getattr(self, name), above=0)
        _check_number("weight_decay", self.weight_decay)
        for name in ("warmup_ratio", "min_lr_ratio"):
            _check_number(name, getattr(self, name), most=1)
        for name in ("adam_beta1", "adam_beta2"):
            _check_number(name, getattr(self, name), below=1)
        if self.checkpointing not in ("auto", "on", "off"):
            raise UsageError(f"--checkpointing is auto, on or off, got {self.checkpointing!r}")

    def num_rows(self, rows_per_epoch: int) -> int:
        """Of the whole run, counted through all epochs. Steps go across the ends of epochs, so that only the last one
        may have fewer rows."""
        if self.max_steps is not None:
            return self.max_steps * self.batch_size
        return max(1, math.ceil(round(self.epochs * rows_per_epoch, 6)))  # 2.2 × 25 is a little more than 55

    def num_steps(self, rows_per_epoch: int) -> int:
        return math.ceil(self.num_rows(rows_per_epoch) / self.batch_size)

    def learning_rate_at(self, step: int, num_steps: int) -> float:
        """Of step 1 … num_steps. The first one after the warm-up has it at its highest, and none has the lowest, which
        would be reached one step after the last: a rate of nothing learns nothing."""
        warmup = math.ceil(self.warmup_ratio * num_steps)
        if step <= warmup:
            return self.learning_rate * step / warmup
        done = (step - 1 - warmup) / (num_steps - warmup)
        floor = self.min_lr_ratio
        return self.learning_rate * (floor + (1 - floor) * (1 + math.cos(math.pi * done)) / 2)


class LoraTarget(NamedTuple):
    """One kind of weight, in every layer: q, k, v, o, router, gate_up or down."""

    kind: str
    rank: int
    alpha: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraOptions:
    """What an adapter changes; without targets it is one that is there already (run.TuneRequest.adapter), which has its
    own, and `rslora` with them. `balance` is the weight of the term that keeps experts evenly used. `qat`: the model
    computes with the adapter merged and rounded (qat.py), so that merging loses nothing."""

    targets: tuple[LoraTarget, ...]
    rslora: bool = False
    dropout: float = 0.0
    balance: float = 0.0
    qat: bool = False

    def __post_init__(self) -> None:
        kinds = [target.kind for target in self.targets]
        if twice := next((kind for kind in kinds if kinds.count(kind) > 1), None):
            raise UsageError(f"--target {twice!r} is given twice; name it once")
        for kind, rank, alpha in self.targets:
            _check_whole(f"rank of {kind}", rank, 1)
            _check_number(f"alpha of {kind}", alpha, above=0, below=MOST_ALPHA)
        _check_number("dropout", self.dropout, below=1)
        if self.qat and self.dropout:
            raise UsageError("--dropout leaves out what adapters read, and with --qat they are merged; leave one out")
        _check_number("balance", self.balance)


@dataclass(frozen=True, slots=True, kw_only=True)
class DpoOptions:
    """How preferences are learnt: `beta` is how dear it is to leave the model as it was, `label_smoothing` the share of
    pairs that are taken to be the wrong way round."""

    beta: float = 0.1
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        _check_number("beta", self.beta, above=0)
        _check_number("label_smoothing", self.label_smoothing, below=0.5)


@dataclass(frozen=True, slots=True, kw_only=True)
class FullOptions:
    """Which of GROUPS learn where there is no adapter, biases with their weights and sinks with attention. `balance` as
    in LoraOptions."""

    train: tuple[str, ...] = GROUPS
    balance: float = 0.0

    def __post_init__(self) -> None:
        for name in self.train:
            if name not in GROUPS:
                raise UsageError(f"--train {name!r}: there are {', '.join(GROUPS)}, and all")
        if not self.train:
            raise UsageError(f"there is nothing to train; name one or more of {', '.join(GROUPS)}")
        _check_number("balance", self.balance)


def trained_groups(given: Sequence[str]) -> tuple[str, ...]:
    """Of what is typed: `attention,experts`; `all`, or nothing, is all of them."""
    names = [name.strip() for words in given for name in words.split(",")]
    if "all" in names or not names:
        return GROUPS
    known = [name for name in GROUPS if name in names]
    return (*known, *(name for name in names if name not in GROUPS))


def lora_targets(
    kinds: Sequence[str], ranks: Sequence[str], alphas: Sequence[str], *, router: bool = False
) -> tuple[LoraTarget, ...]:
    """Of what is typed: `q,k,v`; `16` or `gate_up=8`; and the same for alpha, twice the rank where none is given."""
    names = [name.strip() for given in kinds or [",".join(DEFAULT_TARGETS)] for name in given.split(",")]
    if router and "router" not in names:
        names.append("router")
    rank_of = _by_kind("rank", ranks, names)
    alpha_of = _by_kind("alpha", alphas, names)
    targets = []
    for name in names:
        rank = rank_of.get(name, rank_of.get("", DEFAULT_RANK))
        if rank != int(rank):
            raise UsageError(f"--rank takes whole numbers, got {rank}")
        targets.append(LoraTarget(name, int(rank), float(alpha_of.get(name, alpha_of.get("", 2 * rank)))))
    return tuple(targets)


def _by_kind(option: str, given: Sequence[str], names: Sequence[str]) -> dict[str, float]:
    """By kind, or by "" for all others."""
    values: dict[str, float] = {}
    for word in (word.strip() for words in given for word in words.split(",")):
        kind, equals, number = word.rpartition("=")
        if equals and kind not in names:
            raise UsageError(f"--{option} {word}: {kind!r} is not trained; the targets are {', '.join(names)}")
        if kind in values:
            raise UsageError(f"--{option} {word}: it is given twice; give it once")
        try:
            values[kind] = float(number)
        except ValueError:
            raise UsageError(f"--{option} takes numbers, or KIND=NUMBER, got {word!r}") from None
        if not math.isfinite(values[kind]):
            raise UsageError(f"--{option} takes numbers, or KIND=NUMBER, got {word!r}")
    return values


def option_name(field: str) -> str:
    """As it is typed."""
    return "--" + field.replace("_", "-")


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What of two runs' options is not the same, for people."""
    return [
        f"{option_name(name)} was {before.get(name)!r} and is {now.get(name)!r}"
        for name in {**before, **now}
        if before.get(name) != now.get(name)
    ]


def _check_whole(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**63:
        most = ", less than 2**63" if isinstance(value, int) and value >= 2**63 else ""
        raise UsageError(f"{option_name(name)} must be a whole number from {least} on{most}, got {value!r}")


def _check_number(
    name: str, value: object, *, above: float | None = None, below: float = math.inf, most: float = math.inf
) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if number and isinstance(value, int | float):
        enough = value > above if above is not None else value >= 0
        if enough and value < below and value <= most:
            return
    bounds = [f"more than {above:g}" if above is not None else "0 or more"]
    bounds += [f"less than {below:g}"] if below < math.inf else []
    bounds += [f"{most:g} at most"] if most < math.inf else []
    bounds += ["finite"] if value == math.inf else []
    raise UsageError(f"{option_name(name)} must be {' and '.join(bounds)}, got {value!r}")
