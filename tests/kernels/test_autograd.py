"""Gradients through packed weights, natively on every instruction set of this machine and in the reference ops: against
float64 differences, against autograd of the reference over unpacked weights, and without a copy of the weights.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from freehold.errors import UsageError
from freehold.kernels import backends, ops, products, reference
from freehold.kernels.kv import KvType
from freehold.kernels.lora import ExpertLora, Lora
from freehold.kernels.ops import Norm, Routing
from freehold.weights import mxfp4
from freehold.weights.mxfp4 import Mxfp4Tensor
from freehold.weights.packed import FORMS, Form, PackedMatrix, pack, unpack

try:
    from freehold import _native
    from freehold.kernels import native
except ImportError:  # not built: what is left runs the reference
    SETS: list[str] = []
else:
    SETS = _native.instruction_sets()

# Of a product's gradient: nothing but float32 sums in some order.
EXACT = 1e-6
# Where the forward pass goes on from int8 activations, and so does what the backward pass computes again.
ROUNDED: dict[Form, float] = {"f32": 3e-6, "bf16": 3e-6, "q8": 3e-2, "mxfp4": 3e-2}
ALPHA, LIMIT, EPS = 1.702, 1.5, 1e-5

pytestmark = pytest.mark.usefixtures("native_settings")


@pytest.fixture(params=[*SETS, "reference"])
def kernels(request: pytest.FixtureRequest, native_settings: None) -> Iterator[str]:
    """Runs a test once with each set, and once with the reference."""
    name: str = request.param
    if name == "reference":
        with backends.reference_only():
            yield name
    else:
        assert _native.use_instruction_set(name)
        yield name


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def packed_and_plain(form: Form, *shape: int, seed: int = 1, paired: bool = False) -> tuple[PackedMatrix, Tensor]:
    """A matrix, or a stack, and the float32 values that it stands for."""
    drawn = draw(*shape, seed=seed)
    made = pack(mxfp4.pack(drawn) if form == "mxfp4" else drawn, form, paired=paired)
    values = unpack(made)
    return made, mxfp4.unpack(values) if isinstance(values, Mxfp4Tensor) else values.float()


def error(ours: Tensor | None, expected: Tensor | None) -> float:
    """Relative to the norm of the whole."""
    assert ours is not None and expected is not None
    assert ours.shape == expected.shape
    if not expected.numel():
        return 0.0
    return float((ours.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-300))


def furthest(ours: Tensor, a: Tensor, b: Tensor) -> float:
    """The largest error of a product, each beside the sum of magnitudes that it was made of."""
    assert ours.shape == (len(a), b.shape[1])
    if not ours.numel():
        return 0.0
    a, b = a.double(), b.double()
    return float(((ours.double() - a @ b).abs() / (a.abs() @ b.abs()).clamp(min=1e-300)).max())


def gradients(out: Tensor, of: list[Tensor], seed: int = 9) -> tuple[Tensor, ...]:
    """Of a random projection of `out`."""
    return torch.autograd.grad(out, of, draw(*out.shape, seed=seed).to(out.dtype))


def differences(function: Callable[..., Tensor], inputs: list[Tensor], which: int, seed: int = 9) -> Tensor:
    """The same gradient from float64 differences alone."""
    inputs = [tensor.detach().double() for tensor in inputs]
    out = function(*inputs)
    projection = draw(*out.shape, seed=seed).double()
    found = torch.zeros_like(inputs[which])
    values, step = inputs[which].view(-1), 1e-6
    for i in range(len(values)):
        before = float(values[i])
        sides = []
        for moved in (before + step, before - step):
            values[i] = moved
            sides.append(float((function(*inputs) * projection).sum()))
        values[i] = before
        found.view(-1)[i] = (sides[0] - sides[1]) / (2 * step)
    return found


# --- what surrounds products ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.skipif(not SETS, reason="the native kernels are not built")
def test_a_widened_matrix_is_what_it_stands_for(form: Form) -> None:
    for name in SETS:
        assert _native.use_instruction_set(name)
        for R, C in ((1, 32), (17, 96), (70, 160), (150, 64 if form == "mxfp4" else 67)):
            weight, plain = packed_and_plain(form, R, C)
            for dtype in (torch.float32, torch.bfloat16):
                out_CR = torch.full((C, len(weight.data) * 16), torch.nan, dtype=dtype)
                native.widen(weight, out_CR)
                assert torch.equal(out_CR.T[:R], plain.to(dtype)), (name, R, C, dtype)
                assert not out_CR.T[R:].any()


def test_norms_and_rotations_have_the_gradients_of_the_reference(kernels: str) -> None:
    for T, D in ((1, 7), (5, 64), (19, 100)):
        x, weight = draw(T, D).requires_grad_(), draw(D, seed=4).requires_grad_()
        found = gradients(ops.rms_norm(x, weight, eps=EPS), [x, weight])
        expected = gradients(reference.rms_norm(x, weight, EPS), [x, weight])
        assert max(map(error, found, expected)) < EXACT
        angles = draw(T, D // 2, seed=5)
        heads = draw(T, 3, D // 2 * 2).requires_grad_()
        (turned,) = gradients(ops.rope(heads, angles.cos(), angles.sin()), [heads])
        (plainly,) = gradients(reference.rope(heads, angles.cos(), angles.sin()), [heads])
        assert error(turned, plainly) < EXACT


@pytest.mark.parametrize(("counts", "window"), [((1,), None), ((70, 1, 33), None), ((70, 0, 200), 20), ((40, 17), 16)])
@pytest.mark.parametrize(("H", "kv_type"), [(6, "f32"), (64, "bf16"), (64, "q8")])
def test_attention_has_the_gradients_of_the_reference(
    counts: tuple[int, ...], window: int | None, H: int, kv_type: KvType, kernels: str
) -> None:
    T, N, K = sum(counts), 6, 2
    inputs = [draw(T, N, H).requires_grad_(), *(draw(T, K, H, seed=i).requires_grad_() for i in (1, 2))]
    inputs.append(draw(N, seed=3).requires_grad_())
    q, k, v, sinks = inputs
    ours = ops.self_attention(q, k, v, counts, sinks, scale=0.6, window=window, kv_type=kv_type)
    with backends.reference_only():
        theirs = ops.self_attention(q, k, v, counts, sinks, scale=0.6, window=window, kv_type=kv_type)
    assert error(ours.detach(), theirs.detach()) < 3e-6
    for name, one, other in zip("qkvs", gradients(ours, inputs), gradients(theirs, inputs), strict=True):
        assert error(one, other) < 3e-6, name


def test_a_router_has_the_gradient_of_the_reference(kernels: str) -> None:
    logits = draw(9, 7).requires_grad_()
    ours = ops.route(logits, 3)
    theirs = Routing(*reference.route(logits, 3))
    assert torch.equal(ours.experts_TA, theirs.experts_TA)
    assert error(*(gradients(routing.weights_TA, [logits])[0] for routing in (ours, theirs))) < EXACT


# --- linear -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_a_gradient_times_packed_weights_at_odd_sizes(form: Form, kernels: str) -> None:
    columns = (32, 64, 96, 160) if form == "mxfp4" else (1, 7, 31, 32, 33, 65, 100, 129)
    for C in columns:
        for R in (1, 15, 16, 17, 33, 129, 300):
            weight, plain = packed_and_plain(form, R, C)
            for T in (0, 1, 2, 15, 16, 17, 33, 50):
                x, gradient = draw(T, C).requires_grad_(), draw(T, R, seed=2)
                (ours,) = torch.autograd.grad(ops.linear(x, weight), x, gradient)
                assert furthest(ours, gradient, plain) < EXACT, (T, R, C)


@pytest.mark.parametrize("form", FORMS)
def test_more_tokens_and_rows_than_are_turned_at_once(form: Form) -> None:
    weight, plain = packed_and_plain(form, 8200, 96)
    x, gradient = draw(530, 96).requires_grad_(), draw(530, 8200, seed=2)
    (ours,) = torch.autograd.grad(ops.linear(x, weight), x, gradient)
    assert furthest(ours, gradient, plain) < EXACT


@pytest.mark.skipif(not SETS, reason="the native kernels are not built")
@pytest.mark.parametrize("form", FORMS)
def test_threads_neighbours_and_strides_leave_a_tokens_gradient_as_it_is(form: Form) -> None:
    weight, _ = packed_and_plain(form, 300, 160)
    wide = draw(40, 311, seed=2)
    gradient = wide[:, 4:304]
    for name in SETS:
        assert _native.use_instruction_set(name)
        native.set_threads(1)
        alone = torch.cat([native.linear_backward(gradient[t : t + 1], weight) for t in range(40)])
        for threads in (1, 2, 3):
            native.set_threads(threads)
            assert torch.equal(native.linear_backward(gradient, weight), alone), (name, threads)
            assert torch.equal(native.linear_backward(gradient.contiguous(), weight), alone)


@pytest.mark.parametrize("shape", [(1030, 40, 16), (40, 1030, 3), (3, 300, 70), (5, 0, 7), (0, 4, 4)])
def test_products_with_small_factors_add_up_however_those_lie(shape: tuple[int, int, int], kernels: str) -> None:
    M, K, N = shape
    wide, tall, before = draw(M, K + 5), draw(N, K, seed=2), draw(M, N, seed=3)
    for left in (wide[:, 2 : K + 2], wide[:, 2 : K + 2].T.contiguous().T):
        for right in (tall.T, tall.T.contiguous()):
            assert furthest(products.product(left, right), left, right) < EXACT
            to = before.clone()
            products.add_product(to, left, right)
            assert furthest(to, torch.cat((left, before), 1), torch.cat((right, torch.eye(N)))) < EXACT


@pytest.mark.parametrize(
    ("to", "left", "right"),
    [
        (torch.zeros(4, 4), torch.zeros(4, 8), torch.zeros(3, 4)),
        (torch.zeros(3, 4), torch.zeros(4, 8), torch.zeros(8, 4)),
        (torch.zeros(4), torch.zeros(4, 8), torch.zeros(8)),
        (torch.zeros(4, 8)[:, ::2], torch.zeros(4, 8), torch.zeros(8, 4)),
        (torch.zeros(4, 4), torch.zeros(4, 8, dtype=torch.bfloat16), torch.zeros(8, 4)),
        (torch.zeros(4, 4), torch.zeros(4, 8), torch.zeros(8, 4, dtype=torch.float64)),
    ],
)
def test_products_that_do_not_fit_are_refused(to: Tensor, left: Tensor, right: Tensor) -> None:
    with pytest.raises(UsageError, match=r"\[add_product\] expected"):
        products.add_product(to, left, right)


@pytest.mark.parametrize("form", FORMS)
def test_linear_with_norm_bias_and_residual_has_the_gradients_of_the_reference(form: Form, kernels: str) -> None:
    T, R, C = 19, 37, 96
    weight, plain = packed_and_plain(form, R, C)
    tensors = [draw(T, C), draw(R, seed=3), draw(C, seed=4), draw(T, R, seed=5)]
    ours, theirs = ([tensor.clone().requires_grad_() for tensor in tensors] for _ in range(2))
    x, bias, norm, residual = ours
    found = gradients(ops.linear(x, weight, bias, norm=Norm(norm, EPS), residual_TO=residual), ours)
    x, bias, norm, residual = theirs
    expected = gradients(reference.linear(x, plain, bias, norm, EPS, residual), theirs)
    for name, one, other in zip(("x", "bias", "norm", "residual"), found, expected, strict=True):
        assert error(one, other) < EXACT, name
    for only in range(4):  # each alone: what needs no gradient is not in the way of what does
        leaves = [tensor.clone().requires_grad_(i == only) for i, tensor in enumerate(tensors)]
        out = ops.linear(leaves[0], weight, leaves[1], norm=Norm(leaves[2], EPS), residual_TO=leaves[3])
        (alone,) = gradients(out, [leaves[only]])
        assert torch.equal(alone, found[only])


@pytest.mark.parametrize("form", FORMS)
def test_linear_against_float64_differences(form: Form, kernels: str) -> None:
    weight, plain = packed_and_plain(form, 5, 32)
    inputs = [draw(3, 32).requires_grad_(), draw(32, seed=4).requires_grad_()]
    found = gradients(ops.linear(inputs[0], weight, norm=Norm(inputs[1], EPS)), inputs)

    def twin(x: Tensor, norm: Tensor) -> Tensor:
        return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * norm) @ plain.double().T

    for which, one in enumerate(found):
        assert error(one, differences(twin, inputs, which)) < 3e-6


# --- moe --------------------------------------------------------------------------------------------------------------

PAIRS: list[tuple[Form, Form]] = [*((form, form) for form in FORMS), ("mxfp4", "q8"), ("bf16", "q8")]


def mixture(forms: tuple[Form, Form], T: int, E: int, A: int, D: int, F: int) -> Any:
    gate_up = packed_and_plain(forms[0], E, 2 * F, D, seed=1, paired=True)
    down = packed_and_plain(forms[1], E, D, F, seed=2)
    choice = torch.stack([torch.randperm(E, generator=torch.Generator().manual_seed(t))[:A] for t in range(T)])
    choice[choice == E - 1] = 0  # nobody visits the last expert, and some visit the first twice
    inputs = [
        draw(T, D) * 0.5,
        torch.softmax(draw(T, A, seed=3), dim=-1),
        draw(E, 2 * F, seed=4) * 0.3,
        draw(E, D, seed=5),
        draw(D, seed=6) * 0.3,
        draw(T, D, seed=7),
    ]
    return gate_up, down, choice, inputs


def mixed(
    op: Any, inputs: list[Tensor], choice: Tensor, gate_up: Any, down: Any, limit: float = LIMIT, **more: Any
) -> Tensor:
    x, weights, gate_up_bias, down_bias, norm, residual = inputs
    out: Tensor = op(
        x,
        Routing(weights, choice),
        gate_up,
        gate_up_bias,
        down,
        down_bias,
        alpha=ALPHA,
        limit=limit,
        norm=Norm(norm, EPS),
        residual_TD=residual,
        **more,
    )
    return out


@pytest.mark.parametrize("forms", PAIRS, ids="-".join)
@pytest.mark.parametrize(("T", "D", "F"), [(1, 32, 32), (21, 96, 96), (40, 64, 64)])
def test_moe_has_the_gradients_of_the_reference(forms: tuple[Form, Form], T: int, D: int, F: int, kernels: str) -> None:
    if "mxfp4" not in forms and T == 21:
        D, F = 75, 43
    gate_up, down, choice, tensors = mixture(forms, T, 5, 3, D, F)
    ours, theirs = ([tensor.clone().requires_grad_() for tensor in tensors] for _ in range(2))
    bound = ROUNDED["f32"] if kernels == "reference" else max(ROUNDED[form] for form in forms)
    # Rounding would take some values over the limit, where the gradient jumps.
    limit = LIMIT if bound < 1e-3 else 100.0
    found = gradients(mixed(ops.moe, ours, choice, gate_up[0], down[0], limit), ours)
    expected = gradients(mixed(ops.moe, theirs, choice, gate_up[1], down[1], limit), theirs)
    names = ("x", "weights", "gate_up bias", "down bias", "norm", "residual")
    for name, one, other in zip(names, found, expected, strict=True):
        assert error(one, other) < bound, name
    assert not found[2][-1].any()


@pytest.mark.parametrize("form", ["f32", "bf16"])
def test_moe_against_float64_differences(form: Form, kernels: str) -> None:
    gate_up, down, choice, tensors = mixture((form, form), 2, 3, 2, 7, 5)
    inputs = [tensor.requires_grad_() for tensor in tensors]
    found = gradients(mixed(ops.moe, inputs, choice, gate_up[0], down[0]), inputs)

    def twin(*values: Tensor) -> Tensor:
        x, weights, gate_up_bias, down_bias, norm, residual = values
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * norm
        out = []
        for t, row in enumerate(x):
            total = residual[t]
            for a, expert in enumerate(choice[t].tolist()):
                hidden = gate_up[1][expert].double() @ row + gate_up_bias[expert]
                gate, up = hidden[0::2].clamp(max=LIMIT), hidden[1::2].clamp(-LIMIT, LIMIT)
                hidden = gate / (1 + torch.exp(-ALPHA * gate)) * (up + 1)
                total = total + weights[t, a] * (down[1][expert].double() @ hidden + down_bias[expert])
            out.append(total)
        return torch.stack(out)

    for which, one in enumerate(found):
        assert error(one, differences(twin, inputs, which)) < 1e-5, which


def adapters(T: int, E: int, D: int, F: int) -> list[ExpertLora]:
    """One for all tokens' gate_up and down, one for some tokens' down alone."""

    def lora(outputs: int, inputs: int, rank: int, seed: int) -> Lora:
        a, b = draw(E, rank, inputs, seed=seed) * 0.2, draw(E, outputs, rank, seed=seed + 1) * 0.2
        return Lora(a.requires_grad_(), b.requires_grad_(), 0.7)

    some = torch.arange(T) % 3 == 1
    return [
        ExpertLora(lora(2 * F, D, 3, 20), lora(D, F, 2, 22)),
        ExpertLora(None, lora(D, F, 5, 24), some),
    ]


CHOICES: dict[str, Callable[[list[ExpertLora]], list[ExpertLora]]] = {
    "one": lambda loras: loras[:1],
    "one with dropout": lambda loras: [loras[0]._replace(dropout=0.3)],
    "one for down alone": lambda loras: [loras[1]._replace(tokens_T=None)],
    "two, one of them for some tokens": lambda loras: loras,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("form", "dense"), [("f32", False), ("f32", True), ("mxfp4", True)])
@pytest.mark.parametrize("chosen", CHOICES.values(), ids=CHOICES)
def test_adapters_have_the_gradients_of_the_reference(
    chosen: Callable[[list[ExpertLora]], list[ExpertLora]], form: Form, dense: bool, dtype: torch.dtype, kernels: str
) -> None:
    T, E, A, D, F = 37, 4, 4 if dense else 2, 96, 64 if form == "mxfp4" else 43
    gate_up, down, choice, tensors = mixture((form, form), T, E, A, D, F)
    if dense:
        choice = torch.arange(E).expand(T, E)
    sides = []
    for weights in (0, 1):
        inputs = [tensor.clone().requires_grad_() for tensor in tensors]
        loras = chosen(adapters(T, E, D, F))
        torch.manual_seed(1)
        with backends.gradients_in(dtype if weights == 0 else torch.float32):
            out = mixed(ops.moe, inputs, choice, gate_up[weights], down[weights], 100.0, loras=loras)
        factors = [factor for lora in loras for pair in (lora.gate_up, lora.down) if pair for factor in pair[:2]]
        sides.append((out.detach(), gradients(out, [*inputs, *factors])))
    (ours, found), (theirs, expected) = sides
    rounded = ROUNDED["f32"] if kernels == "reference" else ROUNDED[form]
    narrow = 1e-2 if dtype == torch.bfloat16 and kernels != "reference" else 0.0
    assert error(ours, theirs) < rounded
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert error(one, other) < max(rounded, narrow), number


class LargestResult(TorchDispatchMode):
    """How many numbers the largest float32 tensor has that torch makes anew."""

    largest = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        given = {tensor.untyped_storage().data_ptr() for tensor in args if isinstance(tensor, Tensor)}
        made = isinstance(out, Tensor) and out.untyped_storage().data_ptr() not in given  # else it is a view
        if made and out.dtype == torch.float32:
            self.largest = max(self.largest, out.numel())
        return out


@pytest.mark.parametrize("form", FORMS)
def test_no_matrix_is_ever_widened_as_a_whole(form: Form, kernels: str) -> None:
    """Neither for the forward pass nor for the backward pass, nor kept between the two."""
    weight, _ = packed_and_plain(form, 1024, 64)
    gate_up, down, choice, tensors = mixture((form, form), 2, 3, 2, 256, 288)
    x = draw(2, 64).requires_grad_()
    with LargestResult() as seen:  # type: ignore[no-untyped-call]
        gradients(ops.linear(x, weight), [x])
    assert 0 < seen.largest <= 1024 * 64 // 4
    inputs = [tensor.requires_grad_() for tensor in tensors]
    with LargestResult() as seen:  # type: ignore[no-untyped-call]
        gradients(mixed(ops.moe, inputs, choice, gate_up[0], down[0]), inputs)
    assert 0 < seen.largest <= 2 * 288 * 256 // 4


@pytest.mark.parametrize("form", FORMS)
def test_a_linear_layers_gradient_in_bfloat16_is_near(form: Form, kernels: str) -> None:
    weight, plain = packed_and_plain(form, 150, 96)
    x, gradient = draw(33, 96).requires_grad_(), draw(33, 150, seed=2)
    with backends.gradients_in(torch.bfloat16):
        out = ops.linear(x, weight)
    (ours,) = torch.autograd.grad(out, x, gradient)
    assert ours.dtype == torch.float32
    assert error(ours, gradient @ plain) < 5e-3


def test_second_derivatives_are_refused() -> None:
    weight, _ = packed_and_plain("f32", 4, 8)
    x = draw(2, 8).requires_grad_()
    (first,) = torch.autograd.grad(ops.linear(x, weight).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        torch.autograd.backward(first.sum())
