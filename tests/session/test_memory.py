"""The memory contract: the plan against sizes that are known otherwise and against what a process really takes, and
what happens where memory is short.
"""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import freehold
from freehold import machine
from freehold.config import NAMED_CONFIGS, ExpertFormat, ModelConfig, RopeConfig, alternating_windows
from freehold.engine.options import EngineOptions
from freehold.errors import OutOfMemoryError, UsageError
from freehold.kernels import backends
from freehold.log import NOTICE
from freehold.session.memory import MemoryPlan, fitting_plan, plan_memory
from freehold.session.policy import Policy, decide
from freehold.weights.layouts import open_checkpoint
from freehold.weights.pack_file import ensure_packed
from freehold.weights.packed import Form
from freehold.weights.synth import write_random_checkpoint
from tests.checkpoints import CPU

BIG = NAMED_CONFIGS["gpt-oss-20b"]
MXFP4, BF16 = ExpertFormat.MXFP4, ExpertFormat.BF16
MIB = 1 << 20

needs_native = pytest.mark.skipif(backends.native() is None, reason="the native kernels are not built")
pytestmark = pytest.mark.usefixtures("native_settings")

NATIVE = Policy(device=CPU, dtype=torch.float32, kv="bf16", dense="q8", threads=2)
REFERENCE = Policy(device=CPU, dtype=torch.bfloat16, kv="bf16", dense=None, threads=2)


def plan_of(config: ModelConfig, policy: Policy, context: int, experts: ExpertFormat = MXFP4) -> MemoryPlan:
    return plan_memory(config, experts, policy, EngineOptions(context=context))


def available(monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    monkeypatch.setattr(machine, "available_memory", lambda: num_bytes)


# --- the numbers ------------------------------------------------------------------------------------------------


def test_weights_of_gpt_oss_20b_are_its_checkpoint() -> None:
    plan = plan_of(BIG, REFERENCE, 4096)
    assert round((plan.dense + plan.experts) / 2**30, 1) == 12.8
    # 12 full layers of 4,096 positions and a page for each of 32 sequences; 12 windowed ones could do with more than
    # that for all that is in sight, and so have as many. Each position takes 2 · 8 heads · 64 · 2 bytes.
    assert plan.kv_cache == 24 * (4096 + 32 * 64) * 2 * 8 * 64 * 2
    # In a long context windows need next to nothing: 3 pages for each sequence and for each of 64 cached prefixes, and
    # 11 for one that reads 512 tokens of its prompt.
    assert plan_of(BIG, REFERENCE, 131_072).kv_cache == 12 * (131_072 + 32 * 64 + (96 * 3 + 11) * 64) * 2 * 8 * 64 * 2
    assert plan.needed == plan.dense + plan.experts + plan.kv_cache + plan.scratch
    assert plan.total == plan.needed + plan.program
    assert plan.program == pytest.approx(machine.process_status()["VmRSS"], rel=0.1)


def test_native_plans_know_the_packed_forms() -> None:
    reference, native = plan_of(BIG, REFERENCE, 4096), plan_of(BIG, NATIVE, 4096)
    assert native.experts == reference.experts  # MXFP4 either way, of sizes that fill whole panels
    # Of the embedding only what 4,096 tokens can touch; the rest in 8.5, 16 and 32 bits.
    assert native.dense < 0.6 * reference.dense
    f32, bf16 = (plan_of(BIG, replace(NATIVE, dense=form), 4096) for form in ("f32", "bf16"))
    assert f32.dense - bf16.dense == pytest.approx((bf16.dense - native.dense) * (32 - 16) / (16 - 8.5), rel=0.01)
    q8 = plan_of(BIG, replace(NATIVE, kv="q8"), 4096)
    assert q8.kv_cache == native.kv_cache * 34 // 64
    assert plan_of(BIG, NATIVE, 4096, BF16).experts == pytest.approx(2 * native.experts, rel=0.01)


def test_plans_grow_with_the_context() -> None:
    for policy in (NATIVE, REFERENCE):
        needed = [plan_of(BIG, policy, context).needed for context in (1, 100, 1024, 10_000, 131_072)]
        assert needed == sorted(needed)
        assert needed[0] < needed[-1]


def test_what_it_says() -> None:
    options = EngineOptions(context=8192)
    plan = MemoryPlan(options=options, dense=90 * MIB, experts=7 * MIB, kv_cache=2 << 30, scratch=MIB, program=5)
    assert plan.describe() == "97 MiB weights + 2.00 GiB KV cache for 8192 tokens + 1 MiB scratch = 2.10 GiB"


# --- where memory is short --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "context", "remedies"),
    [
        (NATIVE, 65_536, ["a smaller context (--context 16384)", "a smaller KV cache (--kv-dtype q8)"]),
        (replace(NATIVE, kv="q8"), 131_072, ["a smaller context (--context 32768)"]),
        (replace(NATIVE, dense="f32"), 100, ["smaller dense weights (--dense q8)"]),
        (replace(REFERENCE, dtype=torch.float32), 100, ["bfloat16 (--dtype bfloat16)"]),
        (NATIVE, 100, []),
    ],
)
def test_refused_with_numbers_and_remedies(
    policy: Policy, context: int, remedies: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    available(monkeypatch, 3 << 30)
    with pytest.raises(OutOfMemoryError) as caught:
        fitting_plan(BIG, MXFP4, policy, context=context)
    said = str(caught.value)
    plan = plan_of(BIG, policy, context)
    assert said.startswith(f"{plan.describe()} are needed, and 3.00 GiB are free; use ")
    assert "\n" not in said
    everything = [*remedies, "a smaller model, or more memory: close other programs"]
    assert said.partition("; use ")[2] == ", ".join(everything[:-1]) + (", or " if remedies else "") + everything[-1]


def test_remedies_help(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever follows the advice gets a smaller plan."""
    available(monkeypatch, 1)
    for policy, context in ((replace(NATIVE, dense="bf16"), 131_072), (REFERENCE, 4096)):
        with pytest.raises(OutOfMemoryError) as caught:
            fitting_plan(BIG, MXFP4, policy, context=context)
        before = plan_of(BIG, policy, context).needed
        if found := re.search(r"--context (\d+)", str(caught.value)):
            assert plan_of(BIG, policy, int(found[1])).needed < before
        if "--kv-dtype q8" in str(caught.value):
            assert plan_of(BIG, replace(policy, kv="q8"), context).needed < before
        if "--dense q8" in str(caught.value):
            assert plan_of(BIG, replace(policy, dense="q8"), context).needed < before


@pytest.mark.parametrize("policy", [NATIVE, REFERENCE])
@pytest.mark.parametrize("wanted", [2048, 2049, 10_000, 131_000])
def test_the_default_context_is_what_fits(policy: Policy, wanted: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Plans have steps, in which more tokens cost nothing: what comes out is the end of such a step.
    free = plan_of(BIG, policy, wanted).needed
    available(monkeypatch, free)
    plan = fitting_plan(BIG, MXFP4, policy, context=None)
    assert plan.context >= wanted
    assert plan.needed <= free < plan_of(BIG, policy, plan.context + 1).needed
    with pytest.raises(OutOfMemoryError, match=f"for {plan.context + 1} tokens"):
        fitting_plan(BIG, MXFP4, policy, context=plan.context + 1)


def test_the_default_context_is_the_model_s_where_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    available(monkeypatch, plan_of(BIG, NATIVE, BIG.max_context).needed)
    assert fitting_plan(BIG, MXFP4, NATIVE, context=None).context == 131_072


def test_a_default_context_of_next_to_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    available(monkeypatch, plan_of(BIG, NATIVE, 2047).needed)
    with pytest.raises(OutOfMemoryError, match="for 2048 tokens"):
        fitting_plan(BIG, MXFP4, NATIVE, context=None)
    assert fitting_plan(BIG, MXFP4, NATIVE, context=2000).context == 2000  # but not if that is what was asked for


@pytest.mark.parametrize("context", [0, -1, 131_073, 1.5, True, "4096"])
def test_impossible_contexts(context: int) -> None:
    with pytest.raises(UsageError) as caught:
        fitting_plan(BIG, MXFP4, NATIVE, context=context)
    assert str(caught.value) == f"context must be between 1 and 131072 for this model, got {context!r}"


# --- what a model really takes ----------------------------------------------------------------------------------


def model_config(num_layers: int = 4, **changes: object) -> ModelConfig:
    fields: dict[str, object] = {
        "num_layers": num_layers,
        "hidden_size": 64,
        "expert_width": 64,
        "num_experts": 4,
        "num_active_experts": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 32,
        "vocab_size": 512,
        "windows": alternating_windows(num_layers, 128),
        "max_context": 131_072,
        "rope": RopeConfig(),
    }
    return ModelConfig(**fields | changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "long"
    write_random_checkpoint(path, model_config())
    return path


def test_load_refuses_before_anything_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*arguments: object, **more: object) -> None:
        pytest.fail("weights were read")

    monkeypatch.setattr("freehold.session.model.load_packed", never)
    monkeypatch.setattr("freehold.weights.layouts.Checkpoint.table", never)
    available(monkeypatch, MIB)
    for context in (None, 2048):
        with pytest.raises(
            OutOfMemoryError,
            match=r"^\d+ MiB weights \+ \d+ MiB KV cache for 2048 tokens \+ \d+ MiB scratch = \d+ MiB are needed, and "
            r"1 MiB are free; use .*a smaller model, or more memory: close other programs$",
        ):
            freehold.load(folder, device="cpu", context=context)


@needs_native
def test_load_takes_the_context_that_fits(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    free = plan_of(model_config(), decide(model_config(), device="cpu"), 5000).needed
    available(monkeypatch, free)
    with caplog.at_level(NOTICE, "freehold"):
        model = freehold.load(folder, device="cpu")
    assert 5000 <= model.plan.context < 5200
    assert model.plan.needed <= free
    assert f"memory: {model.plan.describe()} of {free / MIB:.0f} MiB free" in caplog.messages
    with pytest.raises(UsageError, match=rf"5300 tokens and it was loaded with a context of {model.plan.context}"):
        model.generate([1] * 5300)


@pytest.mark.parametrize("kv_dtype", ["f32", "bf16", "q8"])
def test_the_cache_is_as_large_as_planned(folder: Path, kv_dtype: str) -> None:
    for context, kv_tokens, max_num_seqs in ((30, None, 1), (1500, None, 32), (1500, 9000, 7)):
        model = freehold.load(
            folder, device="cpu", kv_dtype=kv_dtype, context=context, kv_tokens=kv_tokens, max_num_seqs=max_num_seqs
        )
        assert model.plan.kv_cache == model.engine.stats().kv_bytes
        assert model.plan.options.tokens == kv_tokens or context
        list(model.generate([i % 500 for i in range(context - 5)], temperature=0))
        model.engine.check_integrity()


TAKES = """
import json, sys, freehold
from freehold import machine
model = freehold.load(sys.argv[1], device="cpu", dense=sys.argv[2], kv_dtype=sys.argv[3], context=2300)
list(model.generate([i * 7 % 20000 for i in range(2260)], max_tokens=30, temperature=1.0))
status = machine.process_status()
print(json.dumps({"total": model.plan.total, "program": model.plan.program, "peak": status["VmHWM"]}))
"""


@needs_native
@pytest.mark.parametrize(
    ("dense", "kv_dtype", "experts", "already_packed"), [("q8", "f32", MXFP4, False), ("bf16", "q8", BF16, True)]
)
def test_a_process_stays_within_its_plan(
    dense: Form,
    kv_dtype: str,
    experts: ExpertFormat,
    already_packed: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A long prompt and its answer, in a model large enough to be seen beside torch itself."""
    config = model_config(
        hidden_size=768, expert_width=768, num_experts=16 if experts is MXFP4 else 6, num_heads=12, num_kv_heads=4,
        head_dim=64, vocab_size=20_000,
    )  # fmt: skip
    write_random_checkpoint(tmp_path / "model", config, experts=experts)
    monkeypatch.setenv("FREEHOLD_CACHE", str(tmp_path / "cache"))
    if already_packed:
        ensure_packed(open_checkpoint(tmp_path / "model"), dense)
    done = subprocess.run(
        [sys.executable, "-c", TAKES, str(tmp_path / "model"), dense, kv_dtype],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    took = json.loads(done.stdout)
    used, planned = took["peak"] - took["program"], took["total"] - took["program"]
    assert used <= planned
    assert used > planned / 2, "the plan asks for far more than is used"
