"""What adapters add natively, held against plain torch: odd sizes, ranks that fill no panel, several at once."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from freehold.errors import UsageError
from freehold.kernels import backends, ops
from freehold.kernels.ops import Norm, Routing
from freehold.kernels.packed_lora import LoraParts, PackedExpertLora, PackedLora, PackedLoras
from freehold.weights import mxfp4
from freehold.weights.packed import Form, PackedMatrix, pack

pytestmark = pytest.mark.skipif(backends.native() is None, reason="the native kernels are not built")

GENERATOR = torch.Generator().manual_seed(0)


def normal(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=GENERATOR) * scale


def lora_of(rank: int, inputs: int, outputs: int, *, stack: tuple[int, ...] = (), paired: bool = False) -> PackedLora:
    a, b = normal(*stack, rank, inputs, scale=inputs**-0.5), normal(*stack, outputs, rank, scale=rank**-0.5)
    return PackedLora(pack(a, "f32"), pack(b, "f32", paired=paired), 3.0)


@pytest.mark.parametrize(("T", "ranks"), [(1, (1,)), (3, (16, 5)), (70, (17, 64, 3))])
def test_add_lora(T: int, ranks: Sequence[int]) -> None:
    """Two targets side by side for the first adapter, one for each other."""
    C, R = 45, 100
    rows_T = torch.arange(T) % (len(ranks) + 1) - 1 if T > 1 else torch.zeros(1, dtype=torch.int64)
    loras = [lora_of(ranks[0], C, 37), lora_of(ranks[0], C, 20), *(lora_of(rank, C, R) for rank in ranks[1:])]
    parts = LoraParts(loras, [0, 0, *range(1, len(ranks))], [3, 40, *(0 for _ in ranks[1:])], rows_T)
    x_TC, out_TR, norm = normal(T, C), normal(T, R), Norm(normal(C), 1e-5)
    for given in (None, norm):
        with backends.reference_only():
            wanted = ops.add_lora(out_TR.clone(), x_TC, parts, norm=given)
        found = ops.add_lora(out_TR.clone(), x_TC, parts, norm=given)
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-5)
        assert not torch.equal(found, out_TR)
        torch.testing.assert_close(found[rows_T == -1], out_TR[rows_T == -1], atol=0, rtol=0)


class Mixture:
    """Weights of E experts in some form, and adapters for them: of all, of gate_up, of down, of nothing."""

    def __init__(self, form: Form, *, E: int = 5, D: int = 96, F: int = 64) -> None:
        gate_up, down = normal(E, 2 * F, D), normal(E, D, F)
        if form == "mxfp4":
            self.gate_up, self.down = pack(mxfp4.pack(gate_up), form, paired=True), pack(mxfp4.pack(down), form)
        else:
            self.gate_up, self.down = pack(gate_up, form, paired=True), pack(down, form)
        self.gate_up_bias, self.down_bias = normal(E, 2 * F), normal(E, D)
        self.norm = Norm(normal(D), 1e-5)

        def of_gate_up(rank: int) -> PackedLora:
            return lora_of(rank, D, 2 * F, stack=(E,), paired=True)

        def of_down(rank: int) -> PackedLora:
            return lora_of(rank, F, D, stack=(E,))

        self.loras = [
            PackedExpertLora(of_gate_up(16), of_down(5)),
            PackedExpertLora(of_gate_up(20), None),
            PackedExpertLora(None, of_down(33)),
            PackedExpertLora(None, None),
        ]

    def __call__(self, x_TD: Tensor, routing: Routing, rows_T: Tensor | None = None) -> Tensor:
        return ops.moe(
            x_TD, routing, self.gate_up, self.gate_up_bias, self.down, self.down_bias, alpha=1.702, limit=7.0,
            norm=self.norm, residual_TD=x_TD, loras=() if rows_T is None else PackedLoras(self.loras, rows_T),
        )  # fmt: skip


def routed(T: int, E: int, A: int) -> Routing:
    return Routing(*ops.route(normal(T, E), A))


@pytest.mark.parametrize(("form", "D", "F"), [("mxfp4", 96, 64), ("q8", 70, 45), ("bf16", 70, 45), ("f32", 96, 64)])
@pytest.mark.parametrize(("T", "A"), [(1, 5), (1, 2), (9, 2), (150, 3)])
def test_experts_with_adapters(form: Form, D: int, F: int, T: int, A: int) -> None:
    mixture, x_TD, routing = Mixture(form, D=D, F=F), normal(T, D), routed(T, 5, A)
    rows_T = torch.arange(T) % 5 - 1 if T > 1 else torch.zeros(1, dtype=torch.int64)
    with backends.reference_only():
        wanted = mixture(x_TD, routing, rows_T)
    found = mixture(x_TD, routing, rows_T)
    tolerance = 3e-2 if form in ("mxfp4", "q8") else 1e-5  # where activations meet the weights in int8
    assert (found - wanted).norm() < tolerance * wanted.norm()
    bare = mixture(x_TD, routing)
    untouched = (rows_T == -1) | (rows_T == 3)
    assert torch.equal(found[untouched], bare[untouched])
    assert T == 1 or (found != bare).any(1)[~untouched].all()


@pytest.mark.parametrize("form", ["q8", "f32"])
def test_a_token_s_numbers_depend_on_no_other(form: Form) -> None:
    mixture, T = Mixture(form), 40
    x_TD, routing = normal(T, 96), routed(T, 5, 3)
    rows_T = torch.arange(T) % 4 - 1
    together = mixture(x_TD, routing, rows_T)
    for t in range(T):
        one = slice(t, t + 1)
        alone = mixture(x_TD[one], Routing(routing.weights_TA[one], routing.experts_TA[one]), rows_T[one])
        assert torch.equal(alone[0], together[t])


def test_what_does_not_fit_is_refused() -> None:
    mixture, x_TD, routing = Mixture("f32"), normal(3, 96), routed(3, 5, 2)
    with pytest.raises(IndexError, match="below the number of adapters"):
        mixture(x_TD, routing, torch.tensor([0, 4, -1]))
    with pytest.raises(UsageError, match="int64"):
        mixture(x_TD, routing, torch.zeros(3, dtype=torch.int32))
    with pytest.raises(UsageError, match="not packed where a gradient"):
        mixture(x_TD.requires_grad_(), routing, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(UsageError, match="not of one rank"):
        PackedLora(pack(normal(4, 8), "f32"), pack(normal(9, 5), "f32"), 1.0)
    with pytest.raises(UsageError, match="packed in f32"):
        PackedLora(pack(normal(4, 8), "bf16"), pack(normal(9, 4), "f32"), 1.0)
    parts = LoraParts([lora_of(4, 8, 9)], [0], [2], torch.zeros(3, dtype=torch.int64))
    with pytest.raises(UsageError, match="B of up to 8 rows"):
        ops.add_lora(normal(3, 10), normal(3, 8), parts)
    assert isinstance(mixture.gate_up, PackedMatrix)
