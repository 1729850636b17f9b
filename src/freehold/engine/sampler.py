"""From logits to tokens, each row as its request asks. Rows do not know of each other: one that cannot be drawn from is
that request's error alone."""

import operator
from collections.abc import Sequence as Rows
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from freehold.engine.request import TokenConstraint, TokenLogprobs
from freehold.engine.sequence import Sequence
from freehold.errors import FreeholdError, RequestError, UsageError
from freehold.kernels import ops

_WORD_BITS = 32
_MASK_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Drawn:
    token: int
    logprobs: TokenLogprobs | None


class Masks:
    """Rows of allowed tokens, filled by the requests' constraints on a thread of their own while the model runs."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._thread: ThreadPoolExecutor | None = None
        self._rows: dict[Sequence, Future[npt.NDArray[np.bool_]]] = {}
        self._stuck: set[Sequence] = set()

    def start(self, sequences: Rows[Sequence]) -> None:
        """Begin to fill the rows of those among them that have a constraint."""
        self._rows, self._stuck = {}, set()
        for sequence in sequences:
            if sequence.constraint is not None:
                if self._thread is None:
                    self._thread = ThreadPoolExecutor(1, thread_name_prefix="freehold-masks")
                self._rows[sequence] = self._thread.submit(self._forbidden, sequence)

    def row(self, sequence: Sequence) -> Tensor | None:
        """Which tokens are not allowed, (V,) bool, when that is known; None where all are. Raises RequestError."""
        if sequence not in self._rows:
            return None
        while not wait([self._rows[sequence]], 0 if sequence in self._stuck else _MASK_SECONDS).done:
            self._leave_thread()
            if sequence in self._stuck:
                raise RequestError(f"the constraint took more than {_MASK_SECONDS} s for one token; the others go on")
        try:
            return torch.from_numpy(self._rows.pop(sequence).result())
        except BaseException as error:
            raise fault("the constraint could not say what may come next", error) from error

    def _leave_thread(self) -> None:
        """To whatever holds it up; what waits behind that is done on another one."""
        assert self._thread is not None
        self._thread.shutdown(wait=False)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="freehold-masks")
        for sequence, future in self._rows.items():
            if future.cancel():
                self._rows[sequence] = self._thread.submit(self._forbidden, sequence)
            elif not future.done():
                self._stuck.add(sequence)

    def close(self) -> None:
        if self._thread is not None:
            self._thread.shutdown(wait=True)
            self._thread = None

    def _forbidden(self, sequence: Sequence) -> npt.NDArray[np.bool_]:
        assert sequence.constraint is not None
        return forbidden_tokens(sequence.constraint, self._vocab_size)


def forbidden_tokens(constraint: TokenConstraint, vocab_size: int) -> npt.NDArray[np.bool_]:
    """Which tokens a constraint does not allow next, (V,)."""
    row = np.zeros(-(-vocab_size // _WORD_BITS), dtype=np.int32)
    words = row.shape
    constraint.fill_mask(row)
    if row.shape != words:
        raise ValueError(f"a mask of {row.shape} words came back")
    return np.unpackbits((~row).view(np.uint8), count=vocab_size, bitorder="little").view(np.bool_)


@torch.inference_mode()
def draw(logits_V: Tensor, sequence: Sequence, masks: Masks) -> Drawn:
    """The next token. The logits are the model's own, float32 on the CPU, and may be overwritten.

    Raises FreeholdError where nothing can be drawn.
    """
    sampling = sequence.request.sampling
    raw_V = logits_V.clone() if sampling.logprobs is not None else logits_V
    if sampling.changes_logits:
        _penalise(logits_V, sequence)
    forbidden_V = masks.row(sequence)
    if forbidden_V is not None:
        logits_V.masked_fill_(forbidden_V, -torch.inf)
    if sequence.num_generated < sequence.request.min_tokens and sequence.request.stop_ids:
        _hold_back(logits_V, list(sequence.request.stop_ids), may_end=forbidden_V is not None)
    try:
        token = ops.sample(
            logits_V,
            uniform=sequence.random.random() if sampling.temperature else 0.0,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
        )
    except UsageError:
        if (forbidden_V is not None or sequence.request.min_tokens) and _is_empty(logits_V):
            raise RequestError("no token may come next: the constraint or min_tokens leave none") from None
        raise
    return Drawn(token, None if sampling.logprobs is None else _logprobs(raw_V, token, sampling.logprobs))


@torch.inference_mode()
def score(logits_RV: Tensor, tokens: Rows[int], count: int) -> list[TokenLogprobs]:
    """Of one given token for each row, and of the `count` likeliest. The logits are overwritten, and not copied: there
    may be many."""
    largest_R1 = logits_RV.amax(-1, keepdim=True)
    chosen_R1 = logits_RV.gather(1, torch.tensor(tokens, device=logits_RV.device)[:, None])
    top_RC, ids_RC = torch.topk(logits_RV, min(count, logits_RV.shape[1]))
    total_R1 = logits_RV.sub_(largest_R1).exp_().sum(-1, keepdim=True).log_().add_(largest_R1)
    rows = zip((chosen_R1 - total_R1).tolist(), ids_RC.tolist(), (top_RC - total_R1).tolist(), strict=True)
    return [TokenLogprobs(chosen, tuple(zip(ids, top, strict=True))) for (chosen,), ids, top in rows]


def append(sequence: Sequence, drawn: Drawn, vocab_size: int) -> None:
    """Give the sequence its token, and those that are then forced. Raises RequestError where its constraint fails."""
    try:
        sequence.append(drawn.token, drawn.logprobs)
    except BaseException as error:
        raise fault(f"the constraint failed on token {drawn.token}", error) from error
    append_forced(sequence, vocab_size)


def append_forced(sequence: Sequence, vocab_size: int) -> None:
    """Append the tokens that the constraint leaves no choice about; they will be read in one go.

    Where logprobs are wanted none are: each token's come from the step that would have drawn it, and the prompt's from
    one that would not be, were all that follows forced. Raises RequestError.
    """
    asked = sequence.request.sampling.logprobs, sequence.request.prompt_logprobs
    if sequence.constraint is None or asked != (None, None):
        return
    try:
        while sequence.finish is None and (forced := list(sequence.constraint.forced())):
            for token in map(operator.index, forced):
                if not 0 <= token < vocab_size:
                    raise ValueError(f"it forces token {token}, and the vocabulary has {vocab_size}")
                sequence.append(token)
                if sequence.finish is not None:
                    break
    except BaseException as error:
        raise fault("the constraint failed", error) from error


def fault(what: str, error: BaseException) -> BaseException:
    """What a caller's code raised, as its request's error. Some libraries' panics are no Exceptions; Ctrl-C is none of
    them."""
    if isinstance(error, FreeholdError | KeyboardInterrupt | SystemExit | GeneratorExit):
        return error
    return RequestError(f"{what}: {type(error).__name__}: {error}" if str(error) else f"{what}: {type(error).__name__}")


def _hold_back(logits_V: Tensor, stops: list[int], *, may_end: bool) -> None:
    """No stop token yet; but where a constraint leaves nothing else, its end is the end."""
    kept = logits_V[stops]
    logits_V[stops] = -torch.inf
    if may_end and _is_empty(logits_V):
        logits_V[stops] = kept


def _is_empty(logits_V: Tensor) -> bool:
    """Whether every token is forbidden. By numpy: for a large vocabulary torch takes as long over it as over a draw."""
    return bool(logits_V.numpy().max() == -np.inf)


def _penalise(logits_V: Tensor, sequence: Sequence) -> None:
    sampling = sequence.request.sampling
    if sampling.repetition_penalty != 1.0:
        if sequence.seen is None:
            sequence.seen = {*sequence.request.prompt, *sequence.counts}
        seen = torch.tensor(list(sequence.seen))
        values = logits_V[seen]
        penalty = sampling.repetition_penalty
        logits_V[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if sequence.counts and (sampling.presence_penalty or sampling.frequency_penalty):
        generated = torch.tensor(list(sequence.counts))
        counts = torch.tensor(list(sequence.counts.values()), dtype=torch.float32)
        logits_V[generated] -= sampling.presence_penalty + sampling.frequency_penalty * counts
    if sampling.logit_bias:
        logits_V[torch.tensor(list(sampling.logit_bias))] += torch.tensor(
            [float(bias) for bias in sampling.logit_bias.values()]
        )


def _logprobs(logits_V: Tensor, token: int, count: int) -> TokenLogprobs:
    logprobs_V = torch.log_softmax(logits_V.float(), dim=-1)
    top, ids = torch.topk(logprobs_V, min(count, len(logprobs_V)))
    return TokenLogprobs(float(logprobs_V[token]), tuple(zip(ids.tolist(), top.tolist(), strict=True)))
