"""What training takes: known sizes, the budget that gpt-oss-20b has to keep, and what happens where memory is short."""

import pytest
import torch

from freehold import machine
from freehold.config import NAMED_CONFIGS, ExpertFormat
from freehold.errors import OutOfMemoryError
from freehold.model.lora import AdapterSpec
from freehold.session.policy import Policy
from freehold.train.adapting import adapter_spec
from freehold.train.options import LoraOptions, lora_targets
from freehold.train.plan import RowShape, TrainingPlan, fitting_lora_plan, plan_lora
from tests.checkpoints import CPU

BIG = NAMED_CONFIGS["gpt-oss-20b"]
NATIVE = Policy(device=CPU, dtype=torch.float32, kv="bf16", dense="q8", threads=2)
GIB = 1 << 30


def spec_of(rank: int = 16) -> AdapterSpec:
    return adapter_spec(BIG, LoraOptions(targets=lora_targets((), (str(rank),), ())))


def plan_of(tokens: int, *, rank: int = 16, checkpointing: bool = False) -> TrainingPlan:
    row = RowShape(tokens=tokens, example=tokens)
    return plan_lora(BIG, ExpertFormat.MXFP4, NATIVE, spec_of(rank), row, checkpointing=checkpointing)


def test_factors_gradients_and_moments_are_counted_from_their_shapes() -> None:
    plan = plan_of(512)
    attention = 16 * (2880 + 4096) + 2 * 16 * (2880 + 512) + 16 * (4096 + 2880)
    experts = 32 * 16 * (2880 + 5760 + 2880 + 2880)
    assert plan.factors == 4 * 24 * (attention + experts)
    assert plan.optimizer == 2 * plan.factors
    assert plan.gradients == plan.factors + 4 * experts
    assert 10.5 < plan.weights / GIB < 11.5


def test_a_step_of_gpt_oss_20b_at_512_tokens_is_planned_within_16_gib() -> None:
    plan = plan_of(512, checkpointing=True)
    assert plan.needed + 512 * (1 << 20) < 16 * GIB
    assert plan_of(512).needed > plan.needed


def test_activations_are_computed_twice_where_they_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    row = RowShape(tokens=2048, example=2048)

    def fitting(free: int, checkpointing: str = "auto") -> TrainingPlan:
        monkeypatch.setattr(machine, "available_memory", lambda: free)
        return fitting_lora_plan(
            BIG, ExpertFormat.MXFP4, NATIVE, spec_of(), row, dropout=False, qat=False, checkpointing=checkpointing
        )

    kept, twice = plan_of(2048).needed, plan_of(2048, checkpointing=True).needed
    assert not fitting(kept).checkpointing
    assert fitting(kept, "on").checkpointing
    assert fitting(kept - 1).checkpointing
    assert fitting(twice).checkpointing
    with pytest.raises(OutOfMemoryError, match=r"are needed, and .* are free; use .*--checkpointing auto.*max-length"):
        fitting(kept - 1, "off")
    with pytest.raises(OutOfMemoryError, match=r"computed twice .* are needed, .*--max-length 1024\), a lower --rank"):
        fitting(twice - 1)
