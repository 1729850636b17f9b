"""What a packed row teaches: the log-probabilities that inference gives, no cross-talk between examples, and gradients
against float64 differences and against transformers' and PEFT's autograd."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from freehold.config import ModelConfig
from freehold.engine.adapters import Adapters
from freehold.engine.core import Engine
from freehold.engine.options import EngineOptions
from freehold.engine.request import Request
from freehold.kernels import backends, ops
from freehold.kernels.kv import KV_TYPES, KvType
from freehold.kernels.ops import Rotation, Routing
from freehold.model.lora import KINDS, Adapter, AdapterSpec, Target, new_adapter
from freehold.model.peft_files import read_peft, write_peft
from freehold.model.transformer import Transformer
from freehold.train.examples import NO_TARGET
from freehold.train.forward import balance_term, taught
from freehold.train.packing import PackedRow
from freehold.weights.layouts import WeightTable
from tests.checkpoints import CPU, for_kernels, logits, oracle, packed, random_table, small_config, tokens_of
from tests.engine.test_engine import run

CONFIG = small_config(num_layers=3)
SPEC = AdapterSpec.of_kinds(CONFIG, {kind: Target(rank=2 + i % 2, alpha=3) for i, kind in enumerate(KINDS)})
COUNTS = (20, 1, 33, 9)


def trained(spec: AdapterSpec = SPEC, seed: int = 1, config: ModelConfig = CONFIG) -> Adapter:
    adapter = new_adapter(config, spec, seed=seed)
    with torch.no_grad():
        for _, b in adapter.factors.values():
            b.normal_(std=0.1, generator=torch.Generator().manual_seed(seed))
    return adapter


def row_of(*counts: int) -> PackedRow:
    """Every second token is followed by a target."""
    tokens = tokens_of(CONFIG, sum(counts)).tolist()
    targets = tokens_of(CONFIG, sum(counts), seed=1).tolist()
    return PackedRow(tokens, [t if i % 2 else NO_TARGET for i, t in enumerate(targets)], list(counts))


def model_of(table: WeightTable, config: ModelConfig = CONFIG) -> Transformer:
    return Transformer(config, table, dtype=torch.float32, device=CPU)


MODELS = {
    "plain": lambda: model_of(random_table(CONFIG)),
    "as published": lambda: model_of(packed(random_table(CONFIG))),
    "packed for the kernels": lambda: Transformer(
        CONFIG, for_kernels(CONFIG, packed(random_table(CONFIG)), "q8"), dtype=torch.float32, device=CPU
    ),
}


def gradients(model: Transformer, row: PackedRow, adapter: Adapter, **options: bool | float) -> list[Tensor]:
    said = taught(model, row, adapter=adapter, **options)  # type: ignore[arg-type]
    return list(torch.autograd.grad(-said.log_probs_S.mean() + 0.1 * said.balance, adapter.parameters))


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_log_probabilities_are_those_of_inference_and_examples_do_not_see_each_other(make: object) -> None:
    assert callable(make)
    model, row = make(), row_of(*COUNTS)
    expected = []
    for tokens, targets in zip(
        torch.tensor(row.tokens).split(COUNTS), torch.tensor(row.targets).split(COUNTS), strict=True
    ):
        every = torch.log_softmax(logits(model, tokens), dim=-1)
        expected.append(every[targets != NO_TARGET].gather(1, targets[targets != NO_TARGET].unsqueeze(-1)))
    for adapter in (None, new_adapter(CONFIG, SPEC, seed=0)):  # a new one adds nothing
        found = taught(model, row, adapter=adapter).log_probs_S
        torch.testing.assert_close(found, torch.cat(expected).squeeze(-1), atol=2e-3, rtol=0)
        assert (found - torch.cat(expected).squeeze(-1)).abs().mean() < 1e-4


@pytest.mark.skipif(backends.native() is None, reason="the native kernels are not built")
@pytest.mark.usefixtures("native_settings")
@pytest.mark.parametrize("kv_type", KV_TYPES)
def test_the_kernels_give_in_training_what_they_give_in_inference_to_the_last_bit(kv_type: KvType) -> None:
    from freehold import _native

    config = small_config(num_layers=3, head_dim=32)
    table = for_kernels(config, packed(random_table(config)), "q8")
    model = Transformer(config, table, dtype=torch.float32, device=CPU, kv_type=kv_type)
    adapter = trained(SPEC, config=config)
    adapters = Adapters(packed=True)
    adapters.add("it", adapter)
    texts = [tokens_of(config, count, seed=count).tolist() for count in (100, 2, 31)]
    row = PackedRow(
        [token for text in texts for token in text[:-1]],
        [token for text in texts for token in text[1:]],
        [len(text) - 1 for text in texts],
    )
    engine = Engine(model, EngineOptions(context=128, kv_tokens=512, chunk=48), adapters=adapters)
    for instruction_set in _native.instruction_sets():
        assert _native.use_instruction_set(instruction_set)
        for name, its in ((None, None), ("it", adapter)):
            served = [
                entry.logprob
                for (sample,) in run(
                    engine,
                    *(Request(prompt=t, max_tokens=0, prompt_logprobs=0, adapter=name, cache=False) for t in texts),
                )
                for entry in sample.prompt_logprobs or ()
                if entry is not None
            ]
            whole = []
            for text in texts:
                batch = replace(
                    model.new_cache().extend(len(text)), adapters=adapters.of_tokens([(name, len(text))], CPU)
                )
                with torch.no_grad():
                    every = model.unembed(model.forward(torch.tensor(text), batch)).log_softmax(-1)
                whole.append(every[:-1].gather(1, torch.tensor(text[1:]).unsqueeze(-1)).squeeze(-1))
            for with_gradient, checkpointing in ((False, False), (True, False), (True, True)):
                with torch.set_grad_enabled(with_gradient):
                    said = taught(model, row, adapter=its, checkpointing=checkpointing).log_probs_S
                assert torch.equal(said, torch.cat(whole)), (instruction_set, name, with_gradient)
            # The engine's sums of a softmax are its own; its logits are those of training, too.
            torch.testing.assert_close(said.detach(), torch.tensor(served), atol=2e-6, rtol=0)
    engine.close()


def test_an_adapter_in_training_says_what_the_folded_weights_say() -> None:
    adapter, row, table = trained(), row_of(*COUNTS), random_table(CONFIG)
    for name in adapter.factors:
        weight = name if name in table else f"{name}.weight"
        table[weight] = table[weight] + adapter.weight_delta(name).detach()  # type: ignore[operator]
    with torch.no_grad():
        ours = taught(model_of(random_table(CONFIG)), row, adapter=adapter).log_probs_S
        torch.testing.assert_close(ours, taught(model_of(table), row).log_probs_S, atol=2e-5, rtol=0)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_gradients_are_those_of_transformers_and_peft(tmp_path: Path) -> None:
    import peft

    # A router that is an adapted parameter cannot be combined with adapted experts there: it has its own test here.
    spec = AdapterSpec.of_kinds(CONFIG, {kind: Target(rank=2, alpha=3) for kind in KINDS if kind != "router"})
    adapter, table = trained(spec), random_table(CONFIG)
    row = row_of(40)
    write_peft(tmp_path / "adapter", adapter)
    theirs = peft.PeftModel.from_pretrained(oracle(CONFIG, table), tmp_path / "adapter", is_trainable=True)
    out = theirs(torch.tensor([row.tokens]), use_cache=False).logits[0].float()
    torch.nn.functional.cross_entropy(out, torch.tensor(row.targets)).backward()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None
                parameter.copy_(parameter.grad)
    theirs.save_pretrained(tmp_path / "gradients")
    expected = read_peft(tmp_path / "gradients", CONFIG)
    said = taught(model_of(table), row, adapter=adapter)
    (-said.log_probs_S.mean()).backward()
    for name, pair in adapter.factors.items():
        for ours, other in zip(pair, expected.factors[name], strict=True):
            assert ours.grad is not None and ours.grad.abs().max() > 1e-5
            torch.testing.assert_close(ours.grad, other, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_what_is_computed_again_instead_of_kept_gives_the_same_gradients(make: object) -> None:
    assert callable(make)
    model, row, adapter = make(), row_of(*COUNTS), trained()
    for dropout in (0.0, 0.3):
        found = []
        for checkpointing in (False, True, True):
            torch.manual_seed(4)
            options = {"checkpointing": checkpointing, "dropout": dropout, "balance": True}
            found.append(gradients(model, row, adapter, **options))
        for other in found[1:]:
            assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


def test_the_native_kernels_gradients_are_near_those_of_the_reference() -> None:
    row, adapter = row_of(*COUNTS), trained()
    published, for_cpu = (MODELS[name]() for name in ("as published", "packed for the kernels"))
    for ours, exact in zip(gradients(for_cpu, row, adapter), gradients(published, row, adapter), strict=True):
        assert (ours - exact).norm() < 0.2 * exact.norm() + 1e-6  # activations are int8 there


def test_frozen_weights_get_no_gradient_and_trained_ones_do() -> None:
    table = random_table(CONFIG)
    wanted = [tensor.requires_grad_() for tensor in table.values() if isinstance(tensor, Tensor)]
    found = torch.autograd.grad(taught(model_of(table), row_of(40)).log_probs_S.sum(), wanted)
    assert all(gradient.abs().max() > 0 for gradient in found)
    exact = torch.autograd.grad(
        torch.log_softmax(model_of(table).unembed(_hidden(model_of(table), row_of(40))), -1)
        .gather(1, torch.tensor(row_of(40).targets).clamp(min=0).unsqueeze(-1))
        .squeeze(-1)[torch.tensor(row_of(40).targets) != NO_TARGET]
        .sum(),
        wanted,
    )
    for ours, expected in zip(found, exact, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


def _hidden(model: Transformer, row: PackedRow) -> Tensor:
    from freehold.model.batch import Batch

    batch = Batch.whole(row.counts, num_layers=len(model.layers), device=CPU)
    return model.forward(torch.tensor(row.tokens), batch)


def test_nothing_to_be_learnt_gives_no_log_probabilities() -> None:
    row = PackedRow([1, 2, 3], [NO_TARGET] * 3, [3])
    assert taught(model_of(random_table(CONFIG)), row, adapter=trained()).log_probs_S.shape == (0,)


# --- ops --------------------------------------------------------------------------------------------------------------


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("window", [None, 1, 3, 8])
@pytest.mark.parametrize("counts", [(7,), (1, 5, 0, 3)], ids=str)
def test_self_attention_has_the_gradient_of_finite_differences(counts: tuple[int, ...], window: int | None) -> None:
    total = sum(counts)
    tensors = [draw(total, heads, 4, seed=i).requires_grad_() for i, heads in enumerate((4, 2, 2))]
    sinks = draw(4, seed=3).requires_grad_()

    def attend(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
        return ops.self_attention(q, k, v, counts, sinks, scale=0.5, window=window)

    assert torch.autograd.gradcheck(attend, (*tensors, sinks), fast_mode=False)


def test_self_attention_of_long_rows_is_that_of_pages() -> None:
    """More than the queries that are scored at once, rotated, with a window and without: as the cache has it."""
    for windows in ((8, 8, 8), (None, None, None)):
        config = small_config(num_layers=3, windows=windows, max_context=1024)
        model, tokens = model_of(random_table(config), config), tokens_of(config, 600)
        row = PackedRow(tokens.tolist(), tokens.tolist(), [600])
        expected = torch.log_softmax(logits(model, tokens), dim=-1).gather(1, tokens.unsqueeze(-1)).squeeze(-1)
        torch.testing.assert_close(taught(model, row).log_probs_S, expected, atol=1e-4, rtol=0)


def test_self_attention_says_what_does_not_fit() -> None:
    q, k = torch.zeros(5, 4, 8), torch.zeros(5, 2, 8)
    for counts, message in (((4,), "sum up to 5"), ((6, -1), "sum up to 5")):
        with pytest.raises(ValueError, match=message):
            ops.self_attention(q, k, k, counts, torch.zeros(4), scale=1.0)
    rotation = Rotation(torch.zeros(5, 4), torch.zeros(5, 3))
    with pytest.raises(ValueError, match="sin"):
        ops.self_attention(q, k, k, (5,), torch.zeros(4), scale=1.0, rotation=rotation)
    with pytest.raises(ValueError, match="multiple of K"):
        ops.self_attention(q[:, :3], k, k, (5,), torch.zeros(3), scale=1.0)


def test_the_balance_term_is_that_of_transformers_and_has_its_gradient() -> None:
    from transformers.models.gpt_oss.modeling_gpt_oss import load_balancing_loss_func

    logits_TE = draw(30, 8).requires_grad_()
    routing = Routing(*ops.route(logits_TE.detach(), 2))
    ours = balance_term(logits_TE, routing)
    theirs = load_balancing_loss_func((logits_TE.float(),), 8, 2)
    assert isinstance(theirs, Tensor)
    torch.testing.assert_close(ours * 2, theirs, check_dtype=False)  # theirs counts each of the A choices as a whole
    (found,) = torch.autograd.grad(ours, logits_TE)
    assert found.abs().max() > 0
    even = torch.zeros(8, 8)
    assert balance_term(even, Routing(torch.ones(8, 1), torch.arange(8).unsqueeze(-1))) == pytest.approx(1)


class LargestMade(TorchDispatchMode):
    """Of the floating-point tensors that operations make: the most numbers that one has. Views are not made."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        known = {
            tensor.untyped_storage().data_ptr() for tensor in tree_leaves((args, kwargs)) if torch.is_tensor(tensor)
        }
        for made in tree_leaves(out):
            if torch.is_tensor(made) and made.is_floating_point() and made.untyped_storage().data_ptr() not in known:
                self.numel = max(self.numel, made.untyped_storage().nbytes() // made.element_size())
        return out


@pytest.mark.parametrize("gradient_type", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", ["packed", "published", "published, in bfloat16"])
def test_no_frozen_stack_of_experts_is_ever_widened_as_a_whole(form: str, gradient_type: torch.dtype) -> None:
    """More than one expert's matrix is never there in floating point, whichever kernels run and in whatever type."""
    if form == "packed" and backends.native() is None:
        pytest.skip("the native kernels are not built")
    config = small_config(num_layers=2, hidden_size=128, expert_width=128, num_experts=8)
    table = packed(random_table(config))
    if form == "packed":
        table = for_kernels(config, table, "q8")  # type: ignore[assignment]
    dtype = torch.bfloat16 if form == "published, in bfloat16" else torch.float32
    model = Transformer(config, table, dtype=dtype, device=CPU)
    spec = AdapterSpec.of_kinds(config, {kind: Target(rank=2, alpha=3) for kind in KINDS})
    one_matrix = 2 * config.expert_width * config.hidden_size
    adapter = trained(spec, config=config)
    row = PackedRow(tokens_of(config, 40).tolist(), tokens_of(config, 40, seed=1).tolist(), [40])
    for checkpointing in (False, True):
        with LargestMade() as made:
            said = taught(model, row, adapter=adapter, checkpointing=checkpointing, gradient_type=gradient_type)
            torch.autograd.grad(-said.log_probs_S.mean(), adapter.parameters)
        assert made.numel <= one_matrix
