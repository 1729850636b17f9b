"""The engine: many requests, one model. `step` is three verbs: schedule, run, commit.

Not for several threads at once; freehold.engine.loop serves those. A request that cannot go on gets its error, and the
others do not notice.
"""

import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from freehold.engine import sampler
from freehold.engine.adapters import Adapters
from freehold.engine.kv_store import KvStore, group_windows, page_counts
from freehold.engine.lookup import Lookup
from freehold.engine.metrics import EngineStats
from freehold.engine.options import EngineOptions
from freehold.engine.pace import Pace
from freehold.engine.pages import Holding, Pages
from freehold.engine.prefix import Prefix, PrefixCache, PrefixDigest
from freehold.engine.prefix_files import PrefixFiles
from freehold.engine.request import FinishReason, Request, RequestStats, Step, check_adapter
from freehold.engine.runner import Result, Runner
from freehold.engine.sampler import Masks
from freehold.engine.scheduler import Plan, Scheduler, Work
from freehold.engine.sequence import Sequence as Sample
from freehold.engine.sequence import new_sequences, shared_salt
from freehold.errors import FreeholdError, OutOfMemoryError, RequestError, UsageError
from freehold.kernels.backends import one_torch_thread
from freehold.kernels.kv import PAGE
from freehold.log import logger
from freehold.model.transformer import Transformer
from freehold.weights.files import TensorSpec
from freehold.weights.packed import PackedMatrix

OUT_OF_MEMORY = (
    "out of memory; shorten the prompt, load with a smaller context or a smaller KV cache, or use a smaller model: "
    "`freehold inspect MODEL` says how much one needs"
)


class Output(NamedTuple):
    request_id: int
    step: Step


class Engine:
    """Runs requests on a transformer, with the KV cache that `options` allow.

    `adapters` are those that requests may name. `prefix_files` keeps what many requests begin with on disk. `clock`
    gives seconds.
    """

    def __init__(
        self,
        transformer: Transformer,
        options: EngineOptions,
        *,
        adapters: Adapters | None = None,
        prefix_files: PrefixFiles | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        config = transformer.config
        self._counts = page_counts(
            config, tokens=options.tokens, max_num_seqs=options.max_num_seqs, chunk=options.chunk
        )
        self.options = options
        self.config = config
        self._clock = clock
        self._is_packed = isinstance(transformer.unembedding_VD, PackedMatrix)
        self._pace = Pace(options.stretch, options.chunk)
        self._store = KvStore(config, self._counts, type=transformer.kv_type, device=transformer.device)
        self._adapters = Adapters(packed=self._is_packed) if adapters is None else adapters
        self._runner = Runner(transformer, self._store, self._adapters)
        self._masks = Masks(config.vocab_size)
        self._files = prefix_files
        self._requests: dict[int, list[Sample]] = {}  # those that have not ended
        self._num_requests = 0
        self._totals: Counter[str] = Counter()
        self._busy_seconds = 0.0
        self.reset()

    @property
    def has_work(self) -> bool:
        return bool(self._requests)

    @property
    def num_live(self) -> int:
        """Requests that have not ended."""
        return len(self._requests)

    def check(self, request: Request) -> None:
        """Raise UsageError for tokens and adapters that the model does not have, and for more than fits its context."""
        check_adapter(request.adapter, self._adapters)
        vocab, context = self.config.vocab_size, self.options.context
        if min(request.prompt) < 0 or max(request.prompt) >= vocab:  # a prompt may be long, and an event loop waits
            token = next(token for token in request.prompt if not 0 <= token < vocab)
            raise UsageError(f"token id {token} is outside this model's vocabulary of {vocab}")
        for name, ids in (("stop_ids", request.stop_ids), ("logit_bias", request.sampling.logit_bias)):
            for token in ids:
                if not 0 <= token < vocab:
                    raise UsageError(f"{name} has {token}, which is outside this model's vocabulary of {vocab}")
        if len(request.prompt) + request.max_tokens > context:
            raise UsageError(
                f"{len(request.prompt)} tokens of prompt and {request.max_tokens} new ones are more than the context "
                f"of {context}; shorten the prompt, lower max_tokens, or load with a larger context"
            )

    def submit(self, request: Request) -> int:
        """Queue a request; returns the number that its outputs carry.

        Raises what `check` does, and RequestError where the constraint cannot be made.
        """
        self.check(request)
        request_id = self._num_requests
        adapter = self._adapters.get(request.adapter)
        samples = new_sequences(request, request_id, self._clock(), "" if adapter is None else adapter.digest)
        guesses = self.options.lookup and request.constraint is None and request.max_tokens > 0
        for sample in samples:
            sample.adapter = adapter
            sample.lookup = Lookup() if guesses else None
        if request.constraint is not None:
            try:
                for sample in samples:
                    sample.constraint = request.constraint()
                    sampler.append_forced(sample, self.config.vocab_size)
            except BaseException as error:
                raise sampler.fault("the constraint could not be made", error) from error
        if self._files is not None and request.cache and request.prompt_logprobs is None:
            self._fetch_prefix(self._files, samples[0])
        self._num_requests += 1
        self._totals["prompt"] += len(request.prompt)
        self._scheduler.add(samples[0])
        self._requests[request_id] = samples
        return request_id

    def abort(self, request_id: int) -> list[Output]:
        """End a request now and free what it holds. One that has ended already is left alone."""
        return [self._end(sample, "abort") for sample in list(self._requests.get(request_id, ()))]

    def step(self) -> list[Output]:
        """Let everyone who can go on do so once. Never raises for a request's sake: its outputs say what went wrong.

        Ctrl-C and the like go to the caller. While the model ran, the next step takes the work up again; at another
        moment every request has ended, and `is_live` says so.
        """
        try:
            with one_torch_thread() if self._is_packed else nullcontext():
                return self._step()
        except _Interrupted as interrupted:
            raise interrupted.cause from None
        except BaseException:
            self.reset()
            raise

    def is_live(self, request_id: int) -> bool:
        """Whether a request has not ended."""
        return request_id in self._requests

    def _step(self) -> list[Output]:
        start = self._clock()
        outputs = self._ended_early(start)
        plan = self._scheduler.schedule()
        if not plan.works:
            return outputs
        for work in plan.works:
            if work.sequence.started is None:
                work.sequence.started = start
                self._totals["cached"] += work.sequence.num_cached
        self._masks.start([work.sequence for work in plan.works if work.draws])
        try:
            result = self._runner.run(plan)
        except Exception as error:  # noqa: BLE001 - whoever was part of this step gets it; the others go on
            return outputs + self._failed(plan, error)
        except BaseException as interruption:  # noqa: BLE001 - it goes on to the caller
            for work in plan.works:  # what was half written will be computed again
                self._scheduler.preempt(work.sequence)
            raise _Interrupted(interruption) from None
        outputs += self._commit(plan, result)
        seconds = self._clock() - start
        self._pace.observe(plan.num_decoding, plan.num_prefill, seconds)
        self._totals["steps"] += 1
        self._busy_seconds += seconds
        return outputs

    def stats(self) -> EngineStats:
        groups = self._pages.groups
        return EngineStats(
            running=len(self._scheduler.running),
            waiting=max(0, sum(map(len, self._requests.values())) - len(self._scheduler.running)),
            cached_prefixes=len(self._prefixes),
            pages_in_use=tuple(group.pool.count - group.pool.num_free for group in groups),
            pages_held=tuple(self._pages.num_held(self._scheduler.holdings())),
            pages=tuple(group.pool.count for group in groups),
            kv_bytes=self._store.num_bytes,
            requests=self._num_requests,
            prompt_tokens=self._totals["prompt"],
            cached_tokens=self._totals["cached"],
            generated_tokens=self._totals["generated"],
            guessed_tokens=self._totals["guessed"],
            right_guesses=self._totals["guessed right"],
            preemptions=self._totals["preemptions"],
            steps=self._totals["steps"],
            busy_seconds=self._busy_seconds,
        )

    def adopt(self, tokens: Sequence[int], fill: Callable[[TensorSpec], Tensor], *, adapter: str | None = None) -> bool:
        """Take keys and values from elsewhere as those of a prompt's beginning: what `fill` makes for each part.

        False where there is no room for them.
        """
        known = self._adapters.get(adapter)
        key = PrefixDigest(shared_salt("", "" if known is None else known.digest)).of(tokens, len(tokens))
        return self._adopt(key, len(tokens), lambda parts: ((part.name, fill(part)) for part in parts))

    def tend(self) -> bool:
        """For idle moments: look after the books, keep a prefix on disk. Whether there is more of that to do."""
        self.check_integrity()
        self._adapters.rest()
        if self._files is None:
            return False
        wanted = [prefix for prefix in self._prefixes if prefix.is_wanted_on_disk]
        if not wanted:
            return False
        prefix = wanted[-1]
        prefix.is_kept = True
        if prefix.key not in self._files:
            self._files.write(prefix.key, prefix.length, self._store.parts(prefix.snapshot))
        return len(wanted) > 1

    def clear_prefixes(self) -> None:
        """Forget every cached prefix."""
        self._prefixes.clear()

    def check_integrity(self) -> None:
        """Raise AssertionError unless every page is accounted for, and every sequence is where it belongs."""
        self._pages.check([*self._scheduler.holdings(), *(prefix.snapshot for prefix in self._prefixes)])
        live = {id(sample) for samples in self._requests.values() for sample in samples}
        held_back = {id(sibling) for samples in self._requests.values() for s in samples for sibling in s.siblings}
        queued = [*self._scheduler.running, *self._scheduler.waiting]
        assert len(queued) == len({id(sample) for sample in queued}), "a sequence is queued twice"
        assert {id(sample) for sample in queued} | held_back == live, "a live sequence is nowhere, or a dead one queued"
        assert all(sample.holding is not None for sample in self._scheduler.running), "one runs without pages"
        assert all(sample.holding is None for sample in self._scheduler.waiting), "one waits and keeps pages"

    def close(self) -> list[Output]:
        """End everything, keep on disk what is to be kept. The engine is of no use afterwards."""
        outputs = [output for request_id in list(self._requests) for output in self.abort(request_id)]
        self._masks.close()
        while self.tend():
            pass
        return outputs

    def reset(self) -> None:
        """Forget every request, without a word to anybody, and every prefix: what is left when the books are wrong."""
        self._pages = Pages(group_windows(self.config), self._counts, PAGE)
        self._prefixes = PrefixCache(self._pages)
        self._scheduler = Scheduler(self._pages, self._prefixes, self._pace, max_num_seqs=self.options.max_num_seqs)
        for samples in self._requests.values():
            self._totals["preemptions"] += sum(sample.num_preemptions for sample in samples)
        self._requests = {}
        self._store.forget_tables()

    def _fetch_prefix(self, files: PrefixFiles, sample: Sample) -> None:
        """Take from the disk what it has and memory has not."""
        most = len(sample.tokens) - 1
        cached = self._prefixes.find(sample.tokens, most, sample.salt)
        least = 1 if cached is None else cached.length + 1
        key = files.find(sample.tokens, most, sample.salt, least=least)
        if key is not None:
            self._adopt(key, files.length(key), lambda parts: files.read(key, parts))

    def _adopt(
        self, key: bytes, length: int, read: Callable[[Sequence[TensorSpec]], Iterable[tuple[str, Tensor]] | None]
    ) -> bool:
        if key in self._prefixes:
            return True
        holding = self._place(length)
        if holding is None:
            return False
        try:
            contents = read(self._store.parts(holding))
            if contents is not None:
                self._store.write(holding, contents)
        except BaseException:
            self._pages.release(holding)
            raise
        if contents is None:
            self._pages.release(holding)
            return False
        self._prefixes.put(Prefix(key, holding, is_kept=self._files is not None and key in self._files))
        return True

    def _place(self, length: int) -> Holding | None:
        """Pages for so many positions from elsewhere, at the cost of cached prefixes; None where even that is vain."""
        if not self._pages.could_place(length, self._scheduler.holdings()):
            return None
        while (holding := self._pages.place(length)) is None:
            if not self._prefixes.evict():
                return None
        return holding

    def _ended_early(self, now: float) -> list[Output]:
        """Those whose time is up, and those who were given all of their tokens."""
        ended = []
        for samples in list(self._requests.values()):
            for sample in list(samples):
                deadline = sample.request.deadline
                if sample.finish is not None:
                    ended.append(self._end(sample, sample.finish))
                elif deadline is not None and now - sample.submitted >= deadline:
                    ended.append(self._end(sample, "deadline"))
        return ended

    def _commit(self, plan: Plan, result: Result) -> list[Output]:
        outputs, row = [], 0
        failures: dict[int, FreeholdError] = {}
        for work, prompt_logprobs in zip(plan.works, result.prompt_logprobs, strict=True):
            sample, rows, row = work.sequence, row, row + work.num_rows
            if sample.prompt_logprobs is not None:
                sample.prompt_logprobs += prompt_logprobs
            if not work.num_rows:
                self._scheduler.commit(work)
                if not sample.pending:  # and nothing is to be drawn
                    self._release_siblings(sample)
                    outputs.append(self._end(sample, "length"))
                continue
            try:
                outputs.append(self._draw(work, result.logits_SV[rows:row]))
            except FreeholdError as error:
                failures.setdefault(sample.request_id, error)
        return outputs + [output for request_id in failures for output in self._fail(request_id, failures[request_id])]

    def _draw(self, work: Work, logits_RV: Tensor) -> Output:
        """Raises FreeholdError where the sample cannot go on; what it has is not sent yet."""
        sample, right_guesses = work.sequence, 0
        failure: FreeholdError | None = None
        try:
            for guess, logits_V in zip([*work.guesses, None], logits_RV, strict=True):
                drawn = sampler.draw(logits_V, sample, self._masks)
                sampler.append(sample, drawn, self.config.vocab_size)
                if drawn.token != guess or sample.finish is not None:
                    break
                right_guesses += 1
        except Exception as error:  # noqa: BLE001 - one sample's draw is nobody else's business
            failure = error if isinstance(error, FreeholdError) else RequestError(f"its next token failed: {error!r}")
        self._scheduler.commit(work, right_guesses=right_guesses)
        if sample.lookup is not None and work.guesses:
            sample.lookup.judge(len(work.guesses), right_guesses)
            self._totals["guessed"] += len(work.guesses)
            self._totals["guessed right"] += right_guesses
        if failure is not None:
            raise failure
        self._release_siblings(sample)
        if sample.first_token is None:
            sample.first_token = self._clock()
        if sample.finish is not None:
            return self._end(sample, sample.finish)
        return self._send(sample)

    def _release_siblings(self, sample: Sample) -> None:
        """The prompt that they waited for has been read."""
        for sibling in sample.siblings:
            self._scheduler.add(sibling)
        sample.siblings = []

    def _failed(self, plan: Plan, error: Exception) -> list[Output]:
        if is_out_of_memory(error):
            typed: FreeholdError = OutOfMemoryError(OUT_OF_MEMORY)
        elif isinstance(error, FreeholdError):
            typed = error
        else:
            logger.error("a step of the engine failed", exc_info=error)
            typed = RequestError(f"the model failed: {type(error).__name__}: {error}")
        request_ids = dict.fromkeys(work.sequence.request_id for work in plan.works)
        return [output for request_id in request_ids for output in self._fail(request_id, typed)]

    def _fail(self, request_id: int, error: FreeholdError) -> list[Output]:
        """End all samples of a request that have not ended, once their last tokens are on their way."""
        samples = list(self._requests.get(request_id, ()))
        last = [self._send(sample) for sample in samples if sample.num_sent < sample.num_generated]
        return last + [self._end(sample, "error", error=error) for sample in samples]

    def _end(self, sample: Sample, reason: FinishReason, *, error: FreeholdError | None = None) -> Output:
        """The sample's last output; nothing of it remains but what the prefix cache keeps."""
        sample.finish = reason
        if reason in ("stop", "length"):
            self._scheduler.finish(sample)
        else:
            self._scheduler.remove(sample)
        samples = self._requests[sample.request_id]
        samples.remove(sample)
        for other in samples:
            if sample in other.siblings:
                other.siblings.remove(sample)
        if sample.siblings:  # they waited for its prompt: now the first of them computes it
            sample.siblings[0].siblings = sample.siblings[1:]
            self._scheduler.add(sample.siblings[0])
            sample.siblings = []
        if not samples:
            del self._requests[sample.request_id]
            self._store.forget_tables()
        self._totals["preemptions"] += sample.num_preemptions
        return self._send(sample, finish=reason, stats=sample.stats(self._clock()), error=error)

    def _send(
        self,
        sample: Sample,
        *,
        finish: FinishReason | None = None,
        stats: RequestStats | None = None,
        error: FreeholdError | None = None,
    ) -> Output:
        """What the caller does not have yet."""
        tokens = tuple(sample.tokens[len(sample.request.prompt) + sample.num_sent :])
        sample.num_sent += len(tokens)
        self._totals["generated"] += len(tokens)
        logprobs, sample.unsent_logprobs = tuple(sample.unsent_logprobs), []
        of_prompt = None
        if sample.prompt_logprobs is not None and len(sample.prompt_logprobs) == len(sample.request.prompt):
            of_prompt, sample.prompt_logprobs = tuple(sample.prompt_logprobs), None
        step = Step(
            index=sample.index,
            tokens=tokens,
            logprobs=logprobs or None,
            prompt_logprobs=of_prompt,
            num_cached_tokens=sample.num_cached,
            finish=finish,
            stats=stats,
            error=error,
        )
        return Output(sample.request_id, step)


class _Interrupted(BaseException):
    """The model was stopped, and everything is in order again."""

    def __init__(self, cause: BaseException) -> None:
        self.cause = cause


def is_out_of_memory(error: BaseException) -> bool:
    """torch reports failed allocations as RuntimeErrors, in words that differ by device."""
    if isinstance(error, RuntimeError):
        return re.search(r"out of memory|can't allocate memory", str(error)) is not None
    return isinstance(error, MemoryError | torch.OutOfMemoryError)
