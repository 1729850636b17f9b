"""The native kernels against the reference and against exact arithmetic, for every instruction set of this machine: odd
sizes, tails, awkward memory, any number of threads, and whoever else is in the batch.
"""

import ctypes
import mmap
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from freehold.errors import BackendError, UsageError
from freehold.kernels import reference
from freehold.kernels.kv import KV_TYPES, PAGE, SPLIT, KvPages, KvType
from freehold.weights import mxfp4
from freehold.weights.mxfp4 import Mxfp4Tensor
from freehold.weights.packed import FORMS, Form, PackedMatrix, pack, unpack
from tests.paged import Store, store

native = pytest.importorskip("freehold.kernels.native", reason="the native kernels are not built", exc_type=ImportError)
_native = pytest.importorskip("freehold._native")

SETS: list[str] = _native.instruction_sets()
COUNTS = (0, 1, 2, 31, 32, 33, 64, 70, 129)  # tokens: around whole tiles of 32
THREADS = (1, 2, 3, 4)

# Largest error of an output as a whole, relative to the norm of what is expected: sums run in another order, and in the
# quantised forms the activations are int8, which is a matter of taste and not of error.
TOLERANCE: dict[Form, float] = {"f32": 2e-6, "bf16": 2e-6, "q8": 1e-2, "mxfp4": 1e-2}
# The same against float64 arithmetic on the very int8 activations that the kernels use.
EXACT = 1e-6

pytestmark = pytest.mark.usefixtures("native_settings")


@pytest.fixture(params=SETS)
def instruction_set(request: pytest.FixtureRequest, native_settings: None) -> str:
    """Runs a test once with each set."""
    assert _native.use_instruction_set(request.param)
    name: str = request.param
    return name


def each_set() -> Iterator[str]:
    """The same within a test, where what is expected takes longer than what is tested."""
    for name in SETS:
        assert _native.use_instruction_set(name)
        yield name


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def error(ours: Tensor, expected: Tensor) -> float:
    """Relative to the norm of the whole."""
    assert ours.dtype == torch.float32
    assert ours.shape == expected.shape
    if not expected.numel():
        return 0.0
    return float((ours.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-300))


# --- awkward memory ---------------------------------------------------------------------------------------------


def shifted(tensor: Tensor) -> Tensor:
    """The same values one element further on: aligned to nothing but that."""
    room = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
    room[1:] = tensor.flatten()
    return room[1:].view(tensor.shape)


def at_the_edge(tensor: Tensor) -> Tensor:
    """The same values, right in front of a page that nobody may read."""
    page, size = mmap.PAGESIZE, tensor.nbytes
    pages = mmap.mmap(-1, (-(-size // page) + 1) * page)
    end = len(pages) - page
    address = ctypes.addressof(ctypes.c_char.from_buffer(pages)) + end
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address), page, 0) == 0
    edge = torch.frombuffer(pages, dtype=tensor.dtype, count=tensor.numel(), offset=end - size)
    return edge.copy_(tensor.flatten()).view(tensor.shape)


def strided(tensor: Tensor) -> Tensor:
    """The same values, every other element of a tensor twice as wide."""
    wide = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1]), torch.nan).to(tensor.dtype)
    wide[..., ::2] = tensor
    return wide[..., ::2]


def sliced(tensor: Tensor) -> Tensor:
    """The same values, between other columns."""
    wide = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 3), torch.nan).to(tensor.dtype)
    wide[..., 1:-2] = tensor
    return wide[..., 1:-2]


def spaced(tensor: Tensor) -> Tensor:
    """The same values, every other row of a tensor twice as long."""
    wide = torch.full((2 * tensor.shape[0], *tensor.shape[1:]), torch.nan).to(tensor.dtype)
    wide[::2] = tensor
    return wide[::2]


def turned(tensor: Tensor) -> Tensor:
    """The same values, the first dimension innermost."""
    return tensor.movedim(0, -1).contiguous().movedim(-1, 0)


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    view.__name__: view for view in (shifted, at_the_edge, strided, sliced, spaced, turned)
}
WHOLE_VIEWS = {name: VIEWS[name] for name in ("shifted", "at_the_edge")}  # of tensors that must be contiguous


def moved(packed: PackedMatrix, view: Callable[[Tensor], Tensor]) -> PackedMatrix:
    scales = None if packed.scales is None else view(packed.scales)
    return PackedMatrix(packed.form, packed.shape, view(packed.data), scales, packed.paired)


def moved_store(kept: Store, view: Callable[[Tensor], Tensor]) -> Store:
    return Store(KvPages(kept.pages.type, *(view(tensor) for tensor in kept.pages.tensors())), kept.table_BP)


# --- packed matrices, and what they stand for -------------------------------------------------------------------


def random_mxfp4(*shape: int, seed: int = 0) -> Mxfp4Tensor:
    """Any code, scales from 2^-7 to 2^-2."""
    generator = torch.Generator().manual_seed(seed)
    *rows, C = shape
    blocks = torch.randint(0, 256, (*rows, C // 32, 16), dtype=torch.uint8, generator=generator)
    return Mxfp4Tensor(blocks, torch.randint(120, 126, (*rows, C // 32), dtype=torch.uint8, generator=generator))


def random_matrix(form: Form, *shape: int, seed: int = 0, paired: bool = False) -> PackedMatrix:
    return pack(random_mxfp4(*shape, seed=seed) if form == "mxfp4" else draw(*shape, seed=seed), form, paired=paired)


def values(packed: PackedMatrix) -> Tensor:
    matrix = unpack(packed)
    return (mxfp4.unpack(matrix) if isinstance(matrix, Mxfp4Tensor) else matrix).double()


def is_quantised(packed: PackedMatrix) -> bool:
    return packed.form in ("mxfp4", "q8")


class Int8(NamedTuple):
    """What int8 makes of rows, in float64, and how far each value was from being rounded the other way (in steps)."""

    values: Tensor
    margins: Tensor


def as_int8(x: Tensor) -> Int8:
    """Blocks of 32 in steps of their largest magnitude / 127, rounded to nearest even: what meets quantised weights."""
    columns = x.shape[-1]
    blocks = F.pad(x.float(), (0, -columns % 32)).unflatten(-1, (-1, 32))
    peaks = blocks.abs().amax(-1, keepdim=True)
    # Tensor by tensor: a number divided by a tensor is, for torch, a product with its reciprocal.
    steps = blocks * (torch.full_like(peaks, 127.0) / peaks).masked_fill(peaks == 0, 0)
    margins = 0.5 - (steps - steps.round()).abs()
    rounded = steps.round().double() * (peaks / torch.full_like(peaks, 127.0)).double()
    return Int8(rounded.flatten(-2)[..., :columns], margins.flatten(-2)[..., :columns])


# --- linear -----------------------------------------------------------------------------------------------------

EPS = 1e-5
SHAPES: dict[str, list[tuple[int, int]]] = {  # rows and columns
    "mxfp4": [(1, 32), (15, 64), (16, 96), (17, 160), (50, 32), (100, 256)],
    "other": [(1, 1), (5, 7), (15, 31), (16, 32), (17, 33), (33, 100), (64, 65), (130, 256)],
}


def shapes(form: Form) -> list[tuple[int, int]]:
    return SHAPES.get(form, SHAPES["other"])


class LinearCase(NamedTuple):
    x: Tensor
    weight: PackedMatrix
    bias: Tensor | None
    norm: Tensor | None
    eps: float
    residual: Tensor | None


def linear_case(form: Form, T: int, R: int, C: int, *, extras: bool) -> LinearCase:
    x, weight = draw(T, C, seed=1), random_matrix(form, R, C, seed=2)
    if not extras:
        return LinearCase(x, weight, None, None, 0.0, None)
    return LinearCase(x, weight, draw(R, seed=3), 1 + draw(C, seed=4) / 10, EPS, draw(T, R, seed=5))


def exact_linear(case: LinearCase) -> Tensor:
    x = case.x if case.norm is None else native.rms_norm(case.x, case.norm, case.eps)
    out = (as_int8(x).values if is_quantised(case.weight) else x.double()) @ values(case.weight).T
    out = out if case.bias is None else out + case.bias
    return out if case.residual is None else out + case.residual


@pytest.mark.parametrize("T", COUNTS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.usefixtures("instruction_set")
def test_linear(form: Form, T: int) -> None:
    for R, C in shapes(form):
        for extras in (False, True):
            case = linear_case(form, T, R, C, extras=extras)
            ours = native.linear(*case)
            assert error(ours, exact_linear(case)) < EXACT, (R, C)
            if ours.numel() > 15:  # of a few values int8 can miss one badly
                assert error(ours, reference.linear(*case)) < TOLERANCE[form], (R, C)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.usefixtures("instruction_set")
def test_linear_of_a_model_s_size(form: Form) -> None:
    case = linear_case(form, 3, 200, 2880, extras=True)
    assert error(native.linear(*case), exact_linear(case)) < EXACT
    assert error(native.linear(*case), reference.linear(*case)) < TOLERANCE[form]


@pytest.mark.parametrize("left_out", ["bias", "norm", "residual"])
@pytest.mark.parametrize("form", FORMS)
def test_each_extra_of_linear_can_be_left_out(form: Form, left_out: str) -> None:
    every = linear_case(form, 5, 40, 64, extras=True)
    case = LinearCase(*(None if name == left_out else value for name, value in every._asdict().items()))  # type: ignore[arg-type]
    assert error(native.linear(*case), exact_linear(case)) < EXACT


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.usefixtures("instruction_set")
def test_linear_of_awkward_memory(form: Form, view: str) -> None:
    see = VIEWS[view]
    for R, C in shapes(form):
        for extras in (False, True):
            case = linear_case(form, 5, R, C, extras=extras)
            expected = native.linear(*case)
            awkward = LinearCase(
                see(case.x),
                moved(case.weight, WHOLE_VIEWS.get(view, shifted)),
                None if case.bias is None else see(case.bias),
                None if case.norm is None else see(case.norm),
                case.eps,
                None if case.residual is None else see(case.residual),
            )
            before = awkward.x.clone()
            assert torch.equal(native.linear(*awkward), expected), (R, C)
            assert torch.equal(awkward.x, before)


@pytest.mark.parametrize("form", FORMS)
def test_linear_of_the_same_row_many_times(form: Form) -> None:
    case = linear_case(form, 1, 40, 64, extras=False)
    (row,) = native.linear(*case)
    many = native.linear(*case._replace(x=case.x.expand(70, 64)))
    assert torch.equal(many, row.expand(70, 40))


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e12, 1e30])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.usefixtures("instruction_set")
def test_linear_of_large_and_small_values(form: Form, size: float) -> None:
    case = linear_case(form, 5, 40, 96, extras=False)
    case = case._replace(x=case.x * size)
    assert error(native.linear(*case), exact_linear(case)) < EXACT


@pytest.mark.parametrize("size", [1e-5, 1e-4, 1e4])
@pytest.mark.usefixtures("instruction_set")
def test_q8_weights_of_any_size(size: float) -> None:
    """Their steps are float16: below 6e-5 those are subnormal."""
    case = LinearCase(draw(5, 96), pack(draw(40, 96, seed=1) * size, "q8"), None, None, 0.0, None)
    assert error(native.linear(*case), exact_linear(case)) < EXACT


@pytest.mark.parametrize("form", ["mxfp4", "q8"])
@pytest.mark.usefixtures("instruction_set")
def test_the_largest_sums_do_not_overflow(form: Form) -> None:
    # All weights and activations at their largest: the int8 kernels add such products up in 16 bits.
    if form == "mxfp4":
        rows = [0x77, 0xFF, 0x7F, 0xF7]  # 6 and -6, and both in turn
        codes = torch.tensor(rows, dtype=torch.uint8).repeat(8).view(32, 1, 1).expand(32, 4, 16).contiguous()
        weight = pack(Mxfp4Tensor(codes, torch.full((32, 4), 127, dtype=torch.uint8)), "mxfp4")
    else:
        signs = torch.stack((torch.ones(128), -torch.ones(128), (-1.0) ** torch.arange(128)))
        weight = pack(signs.repeat(11, 1), "q8")
    x = torch.stack((torch.ones(128), -torch.ones(128), (-1.0) ** torch.arange(128), -((-1.0) ** torch.arange(128))))
    for tokens in (x, x[:1], x[:3], x.repeat(9, 1)):  # instruction sets may treat few tokens and many differently
        case = LinearCase(tokens, weight, None, None, 0.0, None)
        assert error(native.linear(*case), tokens.double() @ values(weight).T) < EXACT


@pytest.mark.usefixtures("instruction_set")
def test_every_mxfp4_code_and_scale() -> None:
    # One column at a time: nothing is summed, and the largest of a block is itself in int8.
    codes = torch.arange(256, dtype=torch.uint8).view(16, 1, 16).expand(16, 2, 16).contiguous()
    scales = torch.arange(2, 242, 7, dtype=torch.uint8)[:32].view(16, 2)  # up to 2^114; 0 and 1 are next to nothing
    weight = pack(Mxfp4Tensor(codes, scales), "mxfp4")
    x = torch.eye(64)
    assert torch.equal(native.linear(x, weight, None, None, 0.0, None).double(), values(weight).T)
    # Scales whose half is not a normal float
    faint = pack(Mxfp4Tensor(codes, torch.tensor([0, 1], dtype=torch.uint8).expand(16, 2).contiguous()), "mxfp4")
    assert native.linear(x, faint, None, None, 0.0, None).abs().max() <= 6 * 2.0**-126


# --- moe --------------------------------------------------------------------------------------------------------

ALPHA, LIMIT = 1.702, 7.0


class MoeCase(NamedTuple):
    x: Tensor
    weights: Tensor
    experts: Tensor
    gate_up: PackedMatrix
    gate_up_bias: Tensor
    down: PackedMatrix
    down_bias: Tensor
    norm: Tensor | None
    eps: float
    residual: Tensor | None


def moe_case(
    forms: tuple[Form, Form], T: int, *, E: int = 5, A: int = 3, D: int = 96, width: int = 64, extras: bool = True
) -> MoeCase:
    """Of forms for gate_up and down."""
    weights, experts = reference.route(draw(T, E, seed=1), A)
    return MoeCase(
        draw(T, D, seed=2) / 4,
        weights,
        experts,
        random_matrix(forms[0], E, 2 * width, D, seed=3, paired=True),
        draw(E, 2 * width, seed=4),
        random_matrix(forms[1], E, D, width, seed=5),
        draw(E, D, seed=6),
        0.25 + draw(D, seed=7) / 40 if extras else None,
        EPS if extras else 0.0,
        draw(T, D, seed=8) if extras else None,
    )


def run(module: Any, case: MoeCase, limit: float = LIMIT) -> Tensor:
    out: Tensor = module.moe(*case, alpha=ALPHA, limit=limit)
    return out


class Expected(NamedTuple):
    """Exact outputs, and the tokens none of whose hidden values float32 could round to either of two int8 steps."""

    out: Tensor
    certain: Tensor


def exact_moe(case: MoeCase, limit: float = LIMIT) -> Expected:
    gate_up, down = values(case.gate_up), values(case.down)
    x = case.x if case.norm is None else native.rms_norm(case.x, case.norm, case.eps)
    x = as_int8(x).values if is_quantised(case.gate_up) else x.double()
    out = torch.zeros_like(x) if case.residual is None else case.residual.double()
    certain = torch.ones(len(x), dtype=torch.bool)
    for weights_T, experts_T in zip(case.weights.T, case.experts.T, strict=True):
        hidden = torch.einsum("td,tfd->tf", x, gate_up[experts_T]) + case.gate_up_bias[experts_T]
        gate, up = hidden[:, 0::2].clamp(max=limit), hidden[:, 1::2].clamp(-limit, limit)
        hidden = gate * torch.sigmoid(ALPHA * gate) * (up + 1)
        if is_quantised(case.down):
            hidden, margins = as_int8(hidden)
            certain &= (margins > 3e-4).all(-1)
        out = out + weights_T.unsqueeze(-1) * (
            torch.einsum("tf,tdf->td", hidden, down[experts_T]) + case.down_bias[experts_T]
        )
    return Expected(out, certain)


def check_moe(case: MoeCase, limit: float = LIMIT) -> None:
    ours, (out, certain) = run(native, case, limit), exact_moe(case, limit)
    assert error(ours[certain], out[certain]) < EXACT
    form = case.down.form if is_quantised(case.down) else case.gate_up.form
    assert error(ours, run(reference, case, limit)) < 2 * TOLERANCE[form]  # two matrices, one after the other
    if len(ours) > 30:
        assert certain.float().mean() > 0.7


MOE_FORMS: list[tuple[Form, Form]] = [*((form, form) for form in FORMS), ("mxfp4", "f32"), ("bf16", "q8")]


@pytest.mark.parametrize("T", COUNTS)
@pytest.mark.parametrize("forms", MOE_FORMS)
@pytest.mark.usefixtures("instruction_set")
def test_moe(forms: tuple[Form, Form], T: int) -> None:
    for extras in (False, True):
        check_moe(moe_case(forms, T, extras=extras))


@pytest.mark.parametrize(("D", "width"), [(7, 1), (16, 5), (33, 13), (50, 41), (65, 31), (40, 64), (100, 130)])
@pytest.mark.parametrize("forms", [("q8", "q8"), ("bf16", "bf16"), ("f32", "f32"), ("f32", "q8")])
@pytest.mark.usefixtures("instruction_set")
def test_moe_of_sizes_that_are_no_whole_blocks(forms: tuple[Form, Form], D: int, width: int) -> None:
    for T in (1, 9):
        case = moe_case(forms, T, D=D, width=width)
        out, certain = exact_moe(case)
        assert error(run(native, case)[certain], out[certain]) < EXACT


@pytest.mark.parametrize("limit", [0.5, 1e4])
@pytest.mark.usefixtures("instruction_set")
def test_moe_clamps(limit: float) -> None:
    check_moe(moe_case(("f32", "f32"), 40), limit)
    check_moe(moe_case(("mxfp4", "mxfp4"), 40), limit)


@pytest.mark.parametrize(("E", "A"), [(1, 1), (2, 2), (6, 6), (40, 4), (128, 1)])
@pytest.mark.usefixtures("instruction_set")
def test_moe_of_few_and_many_experts(E: int, A: int) -> None:
    for T in (1, 35):
        check_moe(moe_case(("mxfp4", "mxfp4"), T, E=E, A=A, D=32, width=32))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.usefixtures("instruction_set")
def test_experts_of_everybody_and_of_nobody(form: Form) -> None:
    """Whole batches at one expert; what the others hold is not even looked at."""
    for T in (1, 33, 129):
        case = moe_case((form, form), T)
        case = case._replace(experts=torch.tensor([3, 0]).expand(T, 2), weights=case.weights[:, :2])
        expected = run(native, case)
        out, certain = exact_moe(case)
        assert error(expected[certain], out[certain]) < EXACT
        for packed in (case.gate_up, case.down):
            for unused in (1, 2, 4):
                packed.data[unused].view(torch.uint8).fill_(255)
                if packed.scales is not None:
                    packed.scales[unused].view(torch.uint8).fill_(255)
        assert torch.equal(run(native, case), expected)


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.usefixtures("instruction_set")
def test_moe_of_awkward_memory(form: Form, view: str) -> None:
    see, whole = VIEWS[view], WHOLE_VIEWS.get(view, shifted)
    sizes = [(96, 64)] if form == "mxfp4" else [(96, 64), (50, 13)]
    for T in (1, 5):
        for D, width in sizes:
            case = moe_case((form, form), T, D=D, width=width)
            awkward = MoeCase(
                see(case.x),
                see(case.weights),
                see(case.experts),
                moved(case.gate_up, whole),
                see(case.gate_up_bias),
                moved(case.down, whole),
                see(case.down_bias),
                None if case.norm is None else see(case.norm),
                case.eps,
                None if case.residual is None else see(case.residual),
            )
            assert torch.equal(run(native, awkward), run(native, case))


@pytest.mark.parametrize("left_out", ["norm", "residual"])
@pytest.mark.parametrize("form", FORMS)
def test_each_extra_of_moe_can_be_left_out(form: Form, left_out: str) -> None:
    for T in (1, 5):
        case = moe_case((form, form), T)
        check_moe(case._replace(norm=None, eps=0.0) if left_out == "norm" else case._replace(residual=None))


def test_a_residual_may_be_the_input_itself() -> None:
    case = moe_case(("mxfp4", "mxfp4"), 7)
    expected = run(native, case._replace(residual=case.x.clone()))
    assert torch.equal(run(native, case._replace(residual=case.x)), expected)


# --- attention and its cache ------------------------------------------------------------------------------------


class AttentionCase(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    sinks: Tensor


def attention_case(T: int, S: int, N: int, K: int, H: int) -> AttentionCase:
    """The last T of S positions ask."""
    return AttentionCase(draw(T, N, H, seed=1), draw(S, K, H, seed=2), draw(S, K, H, seed=3), draw(N, seed=4))


def filled(module: Any, type: KvType, case: AttentionCase) -> Store:
    """These keys and values; NaN in the rows behind, where the type has one."""
    S, K, H = case.k.shape
    kept = store(type, K, S, H)
    module.kv_write(kept.pages, kept.last(S, S), case.k, case.v, None, None)
    return kept


def attend(module: Any, case: AttentionCase, kept: Store, window: int | None) -> Tensor:
    (S, _, H), T = case.k.shape, len(case.q)
    sequences = kept.last(T, S)
    out: Tensor = module.attention(case.q, kept.pages, sequences, case.sinks, None, None, scale=H**-0.5, window=window)
    return out


HEADS = [(8, 1, 64), (6, 2, 32), (4, 4, 24), (3, 1, 7), (2, 2, 128)]  # N, K, H


def types(H: int) -> list[KvType]:
    return [type for type in KV_TYPES if H % {"f32": 1, "bf16": 2, "q8": 32}[type] == 0]


def check_attention(case: AttentionCase, windows: tuple[int | None, ...]) -> None:
    for type in types(case.k.shape[2]):
        kept = filled(native, type, case)
        for window in windows:
            expected = attend(reference, case, kept, window)
            for name in each_set():
                ours = attend(native, case, kept, window)
                assert error(ours, expected) < TOLERANCE["f32"], (len(case.k), type, window, name)


@pytest.mark.parametrize("T", COUNTS)
@pytest.mark.parametrize("heads", HEADS)
def test_attention(heads: tuple[int, int, int], T: int) -> None:
    for S in (T, T + 3, T + 130):
        if S:
            check_attention(attention_case(T, S, *heads), (None, 1, 16, 128))


def test_attention_of_more_heads_than_a_tile_has_rows() -> None:
    for T in (1, 5):
        check_attention(attention_case(T, T + 100, 70, 1, 16), (None, 16))


@pytest.mark.parametrize("threads", THREADS)
def test_attention_over_many_keys(threads: int) -> None:
    """Work is split by keys where there are many and few queries."""
    native.set_threads(threads)
    for T, S in ((1, 513), (1, 2100), (5, 1500), (40, 1100)):
        for heads in ((8, 1, 64), (6, 2, 32)):
            check_attention(attention_case(T, S, *heads), (None, 128, 700))


@pytest.mark.usefixtures("instruction_set")
def test_sinks_drain_and_scores_do_not_overflow() -> None:
    case = attention_case(5, 40, 4, 2, 32)
    kept = filled(native, "f32", case)
    for sink, size in ((1e4, 1.0), (-1e4, 1.0), (0.0, 1e3)):
        case = case._replace(sinks=torch.full((4,), sink), q=case.q * size)
        ours = attend(native, case, kept, None)
        torch.testing.assert_close(ours, attend(reference, case, kept, None), atol=1e-5, rtol=1e-5)
        assert (sink == 1e4) == bool(ours.abs().max() < 1e-30)


@pytest.mark.usefixtures("instruction_set")
def test_keys_out_of_sight_weigh_nothing_at_all() -> None:
    case = attention_case(1, 100, 4, 2, 32)
    for first, last, window in ((0, 84, 16), (0, 40, 60)):
        expected = attend(native, case, filled(native, "f32", case), window)
        loud = case._replace(v=case.v.index_fill(0, torch.arange(first, last), 3e38))
        assert torch.equal(attend(native, loud, filled(native, "f32", loud), window), expected)
    queries = attention_case(5, 100, 4, 2, 32)
    expected = attend(native, queries, filled(native, "f32", queries), None)
    loud = queries._replace(v=queries.v.index_fill(0, torch.tensor([98, 99]), 3e38))
    assert torch.equal(attend(native, loud, filled(native, "f32", loud), None)[:3], expected[:3])


@pytest.mark.parametrize("heads", [(1, 32), (2, 64), (3, 96)])
@pytest.mark.usefixtures("instruction_set")
def test_kv_write(heads: tuple[int, int]) -> None:
    for T in COUNTS:
        sizes = 10 ** torch.empty(T, 1, 1).uniform_(-5, 4, generator=torch.Generator().manual_seed(3))
        k, v = draw(T, *heads, seed=1) * sizes, draw(T, *heads, seed=2)
        for type in KV_TYPES:
            ours, expected = (store(type, heads[0], T + 70, heads[1]) for _ in range(2))
            for one, other in zip(ours.pages.tensors(), expected.pages.tensors(), strict=True):
                other.copy_(one.fill_(5))
            native.kv_write(ours.pages, ours.last(T, 50 + T), k, v, None, None)
            reference.kv_write(expected.pages, expected.last(T, 50 + T), k, v, None, None)
            for one, other in zip(ours.rows(), expected.rows(), strict=True):
                if one.dtype == torch.int8:  # halves may go either way
                    assert int((one.int() - other.int()).abs().max()) <= 1
                    assert (one != other).float().mean() < 0.01
                else:
                    assert torch.equal(one, other)
                assert (one[:, :50] == 5).all()
                assert (one[:, 50 + T :] == 5).all()


@pytest.mark.usefixtures("instruction_set")
def test_kv_write_of_special_values() -> None:
    k = torch.zeros(5, 1, 32)
    k[1] = 1e-9  # less than a float16 step
    k[2] = 8e6  # the largest that q8 holds
    k[3, 0, 7] = torch.inf
    k[4, 0, 9] = torch.nan
    for type in KV_TYPES:
        ours, expected = store(type, 1, 5, 32), store(type, 1, 5, 32)
        native.kv_write(ours.pages, ours.last(5, 5), k, k, None, None)
        reference.kv_write(expected.pages, expected.last(5, 5), k, k, None, None)
        rows = slice(0, 3 if type == "q8" else 5)
        for one, other in zip(ours.rows(), expected.rows(), strict=True):
            torch.testing.assert_close(one[:, rows], other[:, rows], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("heads", [(8, 1, 64), (4, 4, 24), (3, 1, 6), (2, 2, 96)])
@pytest.mark.usefixtures("instruction_set")
def test_heads_turned_along_the_way(heads: tuple[int, int, int]) -> None:
    """To the bit what `rope` makes of them first."""
    H = heads[2]
    for T, S in ((1, 1), (5, 5), (33, 70), (1, 600)):
        case = attention_case(T, S, *heads)
        cos, sin = draw(S, H // 2, seed=5), draw(S, H // 2, seed=6)
        turned_case = case._replace(q=native.rope(case.q, cos[S - T :], sin[S - T :]), k=native.rope(case.k, cos, sin))
        for type in types(H):
            expected = filled(native, type, turned_case)
            for see in (shifted, strided, at_the_edge):
                kept = store(type, heads[1], S, H)
                native.kv_write(kept.pages, kept.last(S, S), case.k, case.v, see(cos), see(sin))
                for one, other in zip(kept.rows(), expected.rows(), strict=True):
                    assert torch.equal(one[:, :S], other[:, :S])
                turn = see(cos[S - T :]), see(sin[S - T :])
                asked = case.q, kept.pages, kept.last(T, S), case.sinks
                ours = native.attention(*asked, *turn, scale=H**-0.5, window=50)
                assert torch.equal(ours, attend(native, turned_case, kept, 50))
            also = reference.attention(*asked, cos[S - T :], sin[S - T :], scale=H**-0.5, window=50)
            assert error(ours, also) < TOLERANCE["f32"]
            reference.kv_write(kept.pages, kept.last(S, S), case.k, case.v, cos, sin)
            also = attend(native, turned_case, kept, 50)
            assert error(ours, also) < (TOLERANCE["f32"] if type == "f32" else 1e-3)  # halves may go either way


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.usefixtures("instruction_set")
def test_attention_of_awkward_memory(view: str) -> None:
    see = VIEWS[view]
    for heads in HEADS:
        case = attention_case(5, 70, *heads)
        awkward = AttentionCase(*(see(tensor) for tensor in case))
        for type in types(heads[2]):
            plain = filled(native, type, case)
            moved = moved_store(store(type, heads[1], 70, heads[2]), WHOLE_VIEWS.get(view, shifted))
            native.kv_write(moved.pages, moved.last(70, 70), awkward.k, awkward.v, None, None)
            for one, other in zip(moved.rows(), plain.rows(), strict=True):
                assert torch.equal(one[:, :70], other[:, :70])
            assert torch.equal(attend(native, awkward, moved, 16), attend(native, case, plain, 16))


@pytest.mark.usefixtures("instruction_set")
def test_heads_between_other_heads() -> None:
    """As the model has them: queries, keys and values come side by side, and are not copied."""
    heads = draw(9, 4 + 2 + 2, 32)
    q, k, v = heads[:, :4], heads[:, 4:6], heads[:, 6:]
    cos, sin = draw(9, 16, seed=1), draw(9, 16, seed=2)
    assert torch.equal(native.rope(heads[:, :6], cos, sin), native.rope(heads[:, :6].contiguous(), cos, sin))
    case = AttentionCase(q, k, v, draw(4))
    apart = AttentionCase(q.contiguous(), k.contiguous(), v.contiguous(), case.sinks)
    ours = attend(native, case, filled(native, "f32", case), None)
    assert torch.equal(ours, attend(native, apart, filled(native, "f32", apart), None))


# --- the small ops ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("D", [1, 2, 7, 15, 16, 17, 31, 33, 64, 100, 2880, 4099])
@pytest.mark.usefixtures("instruction_set")
def test_rms_norm(D: int) -> None:
    weight = draw(D, seed=1)
    for T in (0, 1, 3, 33):
        for size in (1.0, 1e-4, 1e6):
            x = draw(T, D) * size
            assert error(native.rms_norm(x, weight, EPS), reference.rms_norm(x, weight, EPS)) < TOLERANCE["f32"]
    x = draw(5, D)
    for see in VIEWS.values():
        assert torch.equal(native.rms_norm(see(x), see(weight), EPS), native.rms_norm(x, weight, EPS))
    assert torch.equal(native.rms_norm(torch.zeros(2, D), weight, EPS), torch.zeros(2, D))


@pytest.mark.parametrize("H", [2, 6, 16, 24, 30, 32, 34, 64, 66, 128])
@pytest.mark.usefixtures("instruction_set")
def test_rope(H: int) -> None:
    for T in COUNTS:
        x, cos, sin = draw(T, 3, H), draw(T, H // 2, seed=1), draw(T, H // 2, seed=2)
        assert error(native.rope(x, cos, sin), reference.rope(x, cos, sin)) < TOLERANCE["f32"]
    for see in VIEWS.values():
        assert torch.equal(native.rope(see(x), see(cos), see(sin)), native.rope(x, cos, sin))


@pytest.mark.parametrize(("E", "A"), [(1, 1), (5, 5), (32, 4), (33, 7), (128, 4)])
def test_route(E: int, A: int) -> None:
    for T in COUNTS:
        logits = draw(T, E)
        ours, expected = native.route(logits, A), reference.route(logits, A)
        assert torch.equal(ours[1], expected[1])
        torch.testing.assert_close(ours[0], expected[0])
    for see in VIEWS.values():
        assert torch.equal(native.route(see(logits), A)[0], ours[0])


def test_route_of_ties() -> None:
    """Any of equals may be chosen, each once, and weights follow the values."""
    logits = torch.randint(0, 3, (200, 12), generator=torch.Generator().manual_seed(0)).float()
    weights, experts = native.route(logits, 5)
    expected, _ = reference.route(logits, 5)
    torch.testing.assert_close(weights, expected)
    assert torch.equal(logits.gather(1, experts), logits.topk(5).values)
    assert all(len(set(row)) == 5 for row in experts.tolist())


@pytest.mark.usefixtures("instruction_set")
def test_the_likeliest() -> None:
    def likeliest(logits: Tensor) -> int:
        token: int = native.sample(logits, 0.0, 0, 1.0, 0.0, 0.5)
        return token

    for count in (1, 2, 15, 16, 17, 100, 1000):
        logits = draw(count)
        assert likeliest(logits) == int(logits.argmax())
        for see in VIEWS.values():
            assert likeliest(see(logits)) == int(logits.argmax())
        for at in reversed(range(0, count, 7)):
            logits[at] = 100.0
            assert likeliest(logits) == at  # the first of equals
        logits.fill_(-torch.inf)
        assert likeliest(logits) == 0
        logits[-1] = -1e30
        assert likeliest(logits) == count - 1


FILTERS: list[tuple[float, int, float, float]] = [  # temperature, top-k, top-p, min-p
    (1.0, 0, 1.0, 0.0),
    (0.3, 0, 1.0, 0.0),
    (3.0, 0, 1.0, 0.0),
    (1e-50, 0, 1.0, 0.0),
    (1.0, 1, 1.0, 0.0),
    (1.0, 7, 1.0, 0.0),
    (1.0, 5000, 1.0, 0.0),
    (1.0, 0, 0.8, 0.0),
    (1.0, 0, 1e-9, 0.0),
    (1.0, 0, 1.0, 0.2),
    (1.0, 0, 1.0, 1.0),
    (0.8, 40, 0.95, 0.05),
]


@pytest.mark.parametrize("filters", FILTERS)
def test_sample(filters: tuple[float, int, float, float]) -> None:
    """The same token for the same number, but where that number falls on the edge between two."""
    uniforms = torch.rand(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist()
    for count in (1, 2, 17, 255, 257, 3001):
        logits = draw(count, seed=count) * 2
        logits[: count // 2 : 5] = -torch.inf
        for logits_V in (logits, logits.round().clamp(max=2)):  # ties too, also of the likeliest
            expected = [reference.sample(logits_V, *filters, uniform) for uniform in uniforms]
            views = shifted(logits_V), at_the_edge(logits_V)
            for name in each_set():
                for view in views:
                    ours = [native.sample(view, *filters, uniform) for uniform in uniforms]
                    assert sum(a != b for a, b in zip(ours, expected, strict=True)) <= 1, (count, name)


@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.usefixtures("instruction_set")
def test_masked_tokens_are_never_drawn(filters: tuple[float, int, float, float]) -> None:
    for count in (3, 16, 300, 1000):
        for alone in (0, count // 2, count - 1):
            logits = torch.full((count,), -torch.inf)
            logits[alone] = -1e4
            for uniform in (0.0, 0.5, 1 - 2**-53):
                assert native.sample(logits, *filters, uniform) == alone


# --- who computes does not show ---------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.usefixtures("instruction_set")
def test_matrices_do_not_depend_on_threads_or_company(form: Form) -> None:
    for T in (1, 33, 70):
        case = linear_case(form, T, 100, 96, extras=True)
        mixture = moe_case((form, form), T)
        results = []
        for threads in THREADS:
            native.set_threads(threads)
            results.append((native.linear(*case), run(native, mixture)))
        linear, moe = results[0]
        for others in results[1:]:
            assert torch.equal(others[0], linear)
            assert torch.equal(others[1], moe)
        for t in range(0, T, 3):
            row = slice(t, t + 1)
            assert case.residual is not None
            assert mixture.residual is not None
            alone = native.linear(*case._replace(x=case.x[row], residual=case.residual[row]))
            assert torch.equal(alone, linear[row])
            token = mixture._replace(
                x=mixture.x[row],
                weights=mixture.weights[row],
                experts=mixture.experts[row],
                residual=mixture.residual[row],
            )
            assert torch.equal(run(native, token), moe[row])


@pytest.mark.parametrize("heads", [(8, 1, 64), (6, 2, 32), (3, 1, 7)])
@pytest.mark.usefixtures("instruction_set")
def test_attention_does_not_depend_on_threads_or_how_it_is_fed(heads: tuple[int, int, int]) -> None:
    _, K, H = heads
    for T, S in ((33, 33), (20, 600), (70, 1700)):  # the last in four pieces, for few threads and for many
        case = attention_case(T, S, *heads)
        for type in types(H):
            kept = filled(native, type, case)
            for window in (None, 16, 600):
                results = []
                for threads in THREADS:
                    native.set_threads(threads)
                    results.append(attend(native, case, kept, window))
                assert all(torch.equal(result, results[0]) for result in results), (T, S, type, window)
            fed, out = store(type, K, S, H), []
            native.kv_write(fed.pages, fed.last(S - T, S - T), case.k[: S - T], case.v[: S - T], None, None)
            for t in range(T):
                at = S - T + t
                row = slice(at, at + 1)
                native.kv_write(fed.pages, fed.last(1, at + 1), case.k[row], case.v[row], None, None)
                query = case._replace(q=case.q[t : t + 1], k=case.k[: at + 1])
                out.append(attend(native, query, fed, 600))
            assert torch.equal(torch.cat(out), results[0]), (T, S, type)


def test_small_ops_do_not_depend_on_threads() -> None:
    x, weight = draw(70, 100), draw(100, seed=1)
    heads, cos, sin = draw(70, 3, 34), draw(70, 17, seed=1), draw(70, 17, seed=2)
    norms, turned_heads = [], []
    for threads in THREADS:
        native.set_threads(threads)
        norms.append(native.rms_norm(x, weight, EPS))
        turned_heads.append(native.rope(heads, cos, sin))
    assert all(torch.equal(norm, norms[0]) for norm in norms)
    assert all(torch.equal(each, turned_heads[0]) for each in turned_heads)
    assert torch.equal(native.rms_norm(x[40:41], weight, EPS), norms[0][40:41])


@pytest.mark.parametrize("form", FORMS)
def test_instruction_sets_agree(form: Form) -> None:
    case = linear_case(form, 33, 50, 96, extras=False)
    mixture = moe_case((form, form), 33)
    certain = exact_moe(mixture).certain
    attention = attention_case(33, 163, 8, 1, 64)
    results = []
    for name in SETS:
        assert _native.use_instruction_set(name)
        assert native.instruction_set() == name
        kept = filled(native, "q8", attention)
        results.append(
            (
                native.linear(*case),
                run(native, mixture)[certain],
                attend(native, attention, kept, 100),
                kept.rows()[0],
            )
        )
    for result in results[1:]:
        for ours, expected in zip(result[:3], results[0][:3], strict=True):
            assert error(ours, expected) < EXACT
        assert torch.equal(result[3], results[0][3])


def test_two_python_threads_at_once() -> None:
    cases = [linear_case("q8", T, R, 96, extras=True) for T, R in ((1, 300), (70, 40), (33, 100), (2, 17))]
    mixtures = [moe_case(("mxfp4", "mxfp4"), T) for T in (1, 40)]
    linears, moes = [native.linear(*case) for case in cases], [run(native, mixture) for mixture in mixtures]
    attention = attention_case(9, 700, 6, 2, 32)
    kept = filled(native, "bf16", attention)
    mixed = attend(native, attention, kept, None)

    def work(seed: int) -> bool:
        good = True
        for i in range(seed, seed + 40):
            case, mixture = i % len(cases), i % len(mixtures)
            good &= torch.equal(native.linear(*cases[case]), linears[case])
            good &= torch.equal(run(native, mixtures[mixture]), moes[mixture])
            good &= torch.equal(attend(native, attention, kept, None), mixed)
            if i % 10 == 0:
                native.set_threads(1 + i % 3)
        return good

    with ThreadPoolExecutor(2) as both:
        assert all(both.map(work, (0, 1)))


# --- what is not a number ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.usefixtures("instruction_set")
def test_bad_numbers_stay_in_their_row_and_are_seen_there(form: Form, bad: float) -> None:
    """Wherever in a block they are: who quantises must not make numbers of them again."""
    for T, column in ((2, 33), (35, 64), (2, 0), (2, 15), (2, 16), (2, 31), (1, 95)):
        t = min(1, T - 1)
        others = [i for i in range(T) if i != t]
        for extras in (False, True):
            case, mixture = linear_case(form, T, 40, 96, extras=extras), moe_case((form, form), T, extras=extras)
            linear, moe = native.linear(*case), run(native, mixture)
            case.x[t, column] = mixture.x[t, column] = bad
            ours, mixed = native.linear(*case), run(native, mixture)
            assert torch.equal(ours[others], linear[others])
            assert torch.equal(mixed[others], moe[others])
            assert not ours[t].isfinite().any()
            if bad != bad:  # gates may clamp an infinity
                assert not mixed[t].isfinite().any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("type", KV_TYPES)
@pytest.mark.usefixtures("instruction_set")
def test_bad_numbers_in_attention(type: KvType, bad: float) -> None:
    case = attention_case(5, 100, 6, 2, 32)
    good = attend(native, case, filled(native, type, case), 16)
    case.q[2, 1, 3] = bad
    case.k[97, 0, 3] = case.v[97, 0, 3] = bad  # of the first kv head, for the first three query heads
    ours = attend(native, case, filled(native, type, case), 16)
    assert torch.equal(ours[:, 3:], good[:, 3:])


def test_bad_logits() -> None:
    for bad in (torch.nan, torch.inf, -torch.inf):
        logits = draw(3, 8)
        logits[1] = bad
        weights, experts = native.route(logits, 4)
        assert len(set(experts[1].tolist())) == 4
        assert torch.equal(weights[[0, 2]], native.route(logits[[0, 2]], 4)[0])


# --- the pool, and the choice of instructions -------------------------------------------------------------------


def test_number_of_threads() -> None:
    for count in (1, 3, 40):
        native.set_threads(count)
        assert native.threads() == count
        case = linear_case("q8", 33, 100, 64, extras=True)
        assert error(native.linear(*case), exact_linear(case)) < EXACT
    for count in (0, -1, 1025):
        with pytest.raises(UsageError, match=f"threads must be between 1 and 1024, got {count}"):
            native.set_threads(count)
    assert native.threads() == 40


def test_unknown_instruction_sets_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_engine", None)
    monkeypatch.setenv("FREEHOLD_CPU", "sse9")
    with pytest.raises(BackendError, match=rf"FREEHOLD_CPU is 'sse9'.*choose one of {', '.join(SETS)}$"):
        native.rms_norm(draw(2, 4), draw(4), EPS)
    assert not _native.use_instruction_set("sse9")


@pytest.mark.parametrize("name", SETS)
def test_instruction_sets_on_request(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_engine", None)
    monkeypatch.setenv("FREEHOLD_CPU", name)
    native.set_threads(2)  # comes first when a model is loaded
    assert native.instruction_set() == name


def test_measures() -> None:
    assert native.read_bandwidth(torch.zeros(1 << 22)) > 1e8
    assert native.dot_rate(1 << 10) > 1e6
    native.linear(*linear_case("q8", 129, 17, 256, extras=True))
    assert native.scratch_bytes() >= 129 * 256


FORK = """
import os, torch
from freehold.kernels import native
from freehold.weights.packed import pack
native.set_threads(3)
x, weight = torch.randn(40, 64), pack(torch.randn(200, 64), "q8")
expected = native.linear(x, weight, None, None, 0.0, None)
child = os.fork()
assert torch.equal(native.linear(x, weight, None, None, 0.0, None), expected)
assert native.threads() == 3
if child:
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


def test_a_forked_child_makes_its_own_threads() -> None:
    """And both come to their end."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", FORK], capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


NO_ROOM = """
import resource, sys
from freehold import machine
from freehold.errors import BackendError
from freehold.kernels import native
native.threads()
limit = machine.process_status()["VmSize"] + (256 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    native.set_threads(1000)
except BackendError as error:
    print(error)
"""


def test_threads_that_the_system_does_not_give() -> None:
    done = subprocess.run([sys.executable, "-c", NO_ROOM], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.startswith("1000 threads cannot be started"), done.stderr
    assert done.stdout.endswith("use fewer (--threads)\n")


@torch.inference_mode()
def test_tensors_made_without_autograd() -> None:
    x, weight = draw(3, 64), draw(64, seed=1)
    assert x.is_inference()
    assert error(native.rms_norm(x, weight, EPS), reference.rms_norm(x, weight, EPS)) < TOLERANCE["f32"]


def test_pages_are_what_the_kernels_think_they_are() -> None:
    assert (_native.page, _native.split) == (PAGE, SPLIT)


def test_handles_belong_to_their_tensors() -> None:
    """A copy of pages with other tensors does not write into the first one's."""
    case = attention_case(5, 20, 2, 1, 32)
    first = filled(native, "f32", case)
    second = moved_store(first, Tensor.clone)
    before = first.pages.keys.clone()
    native.kv_write(second.pages, second.last(20, 20), -case.k, case.v, None, None)
    assert torch.equal(first.pages.keys.nan_to_num(), before.nan_to_num())
    assert torch.equal(second.rows()[0][0, :20], -case.k[:, 0])
