"""Several adapters in one engine: each request gets what it gets alone, and no cached prefix of another adapter."""

import gc
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from freehold.engine.adapters import Adapters
from freehold.engine.core import Engine
from freehold.engine.options import EngineOptions
from freehold.engine.prefix_files import PrefixFiles
from freehold.engine.request import Request
from freehold.errors import UsageError
from freehold.kernels import backends
from freehold.model.lora import EXPERT_KINDS, KINDS, Adapter, AdapterSpec, Target, new_adapter
from freehold.model.packed_lora import PackedAdapter
from freehold.model.transformer import Transformer
from freehold.sampling import Sampling
from tests.engine.conftest import CONTEXT
from tests.engine.test_engine import prompts, run

needs_native = pytest.mark.skipif(backends.native() is None, reason="the native kernels are not built")

GREEDY = Sampling(temperature=0.0)
NAMES = (None, "all", "attention", "experts")


def trained(transformer: Transformer, kinds: Sequence[str], seed: int) -> Adapter:
    """An adapter that changes what a random model says."""
    target = Target(rank=3 + seed, alpha=8)
    adapter = new_adapter(
        transformer.config, AdapterSpec.of_kinds(transformer.config, dict.fromkeys(kinds, target)), seed=seed
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for pair in adapter.factors.values():
            pair.b.normal_(std=0.4, generator=generator)
    return adapter


@pytest.fixture(scope="module")
def adapters(transformer: Transformer) -> Adapters:
    made = Adapters(packed=backends.native() is not None)
    for seed, (name, kinds) in enumerate((("all", KINDS), ("attention", "qkvo"), ("experts", EXPERT_KINDS))):
        made.add(name, trained(transformer, kinds, seed))
    return made


@torch.inference_mode()
def alone(
    transformer: Transformer, adapters: Adapters, name: str | None, prompt: Sequence[int], max_tokens: int
) -> list[int]:
    """The likeliest tokens, by a plain loop over a cache of its own."""
    cache, said, read = transformer.new_cache(CONTEXT), list[int](), list(prompt)
    for _ in range(max_tokens):
        batch = replace(cache.extend(len(read)), adapters=adapters.of_tokens([(name, len(read))], transformer.device))
        hidden_TD = transformer.forward(torch.tensor(read), batch)
        read = [int(transformer.unembed(hidden_TD[-1:])[0].argmax())]
        said += read
    return said


def engine_of(transformer: Transformer, adapters: Adapters, files: PrefixFiles | None = None, **options: Any) -> Engine:
    given = EngineOptions(**{"context": CONTEXT, "kv_tokens": 4 * CONTEXT, "chunk": 64, "max_num_seqs": 12} | options)
    return Engine(transformer, given, adapters=adapters, prefix_files=files)


@needs_native
def test_in_one_batch_each_request_gets_what_it_gets_alone(transformer: Transformer, adapters: Adapters) -> None:
    texts = prompts(3, seed=4)
    asked = [(name, text) for text in texts for name in NAMES]
    random.Random(0).shuffle(asked)
    want = [alone(transformer, adapters, name, text, 12) for name, text in asked]
    assert len({tuple(tokens) for tokens in want}) >= 9  # adapters have voices of their own
    requests = [Request(prompt=text, max_tokens=12, sampling=GREEDY, adapter=name) for name, text in asked]
    together = run(engine_of(transformer, adapters), *requests)
    assert [samples[0].tokens for samples in together] == want
    bare = run(engine_of(transformer, Adapters(packed=True)), *(replace(r, adapter=None) for r in requests))
    for (name, _), samples, tokens in zip(asked, bare, want, strict=True):
        assert name is not None or samples[0].tokens == tokens


@needs_native
@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(NAMES), st.integers(0, 2), st.integers(0, 3), st.booleans()), min_size=2, max_size=6
    )
)
def test_no_prefix_is_another_adapter_s(
    transformer: Transformer, adapters: Adapters, asked: list[tuple[str | None, int, int, bool]]
) -> None:
    """Prompts that begin alike, with adapters in any order, some together and some one after the other."""
    engine = engine_of(transformer, adapters, kv_tokens=CONTEXT)
    texts = [[7, 8, 9] * 30 + [i] * 20 for i in range(3)]
    batch: list[Request] = []
    seen: set[str | None] = set()
    for name, which, more, waits in asked:
        prompt = texts[which] + [50 + more]
        batch.append(Request(prompt=prompt, max_tokens=3, sampling=GREEDY, boundaries=[90, 110], adapter=name))
        if waits:
            continue
        for request, samples in zip(batch, run(engine, *batch), strict=True):
            want = WANTED.setdefault(
                (request.adapter, tuple(request.prompt)),
                alone(transformer, adapters, request.adapter, request.prompt, 3),
            )
            assert samples[0].tokens == want
            assert samples[0].stats is not None
            if len(batch) == 1:
                assert (samples[0].stats.num_cached_tokens > 0) == (name in seen)
        seen |= {request.adapter for request in batch}
        batch = []
    engine.check_integrity()


WANTED: dict[tuple[str | None, tuple[int, ...]], list[int]] = {}


@needs_native
def test_prefixes_on_disk_know_their_adapter_by_what_it_computes(
    transformer: Transformer, adapters: Adapters, tmp_path: Path
) -> None:
    """By its numbers, not by its name: another training run's adapter may be called the same."""
    system = [7, 8, 9] * 40

    def cached(known: Adapters, name: str | None) -> int:
        engine = engine_of(transformer, known, PrefixFiles(tmp_path, "this model"))
        prompt = [*system, 1, 2]
        request = Request(prompt=prompt, max_tokens=4, sampling=GREEDY, boundaries=[len(system)], adapter=name)
        ((completion,),) = run(engine, request)
        assert completion.tokens == alone(transformer, known, name, prompt, 4)
        engine.close()
        assert completion.stats is not None
        return completion.stats.num_cached_tokens

    assert [cached(adapters, name) for name in NAMES] == [0, 0, 0, 0]
    assert [cached(adapters, name) for name in NAMES] == [len(system)] * 4
    renamed = Adapters(packed=True)
    renamed.add("experts", trained(transformer, KINDS, 0))  # the numbers of "all"
    renamed.add("all", trained(transformer, KINDS, 5))
    assert [cached(renamed, name) for name in ("experts", "all", None)] == [len(system), 0, len(system)]


@needs_native
def test_logprobs_guesses_and_samples_work_with_an_adapter(transformer: Transformer, adapters: Adapters) -> None:
    prompt = [5, 6, 7, 8] * 12  # so that there is something to guess by
    engine = engine_of(transformer, adapters)
    request = Request(
        prompt=prompt, max_tokens=10, n=2, sampling=replace(GREEDY, logprobs=1), prompt_logprobs=0, adapter="all"
    )
    (samples,) = run(engine, request)
    want = alone(transformer, adapters, "all", prompt, 10)
    assert [sample.tokens for sample in samples] == [want, want]
    with torch.inference_mode():
        read = prompt + want[:-1]
        batch = transformer.new_cache(CONTEXT).extend(len(read))
        of_all = adapters.of_tokens([("all", len(read))], transformer.device)
        logits = transformer.unembed(transformer.forward(torch.tensor(read), replace(batch, adapters=of_all)))
    logprobs = logits.log_softmax(-1)
    of_prompt = [float(logprobs[i, token]) for i, token in enumerate(prompt[1:])]
    assert samples[0].prompt_logprobs is not None
    assert [entry.logprob for entry in samples[0].prompt_logprobs if entry] == pytest.approx(of_prompt, abs=1e-4)
    first = len(prompt) - 1
    drawn = [float(logprobs[first + i, token]) for i, token in enumerate(want)]
    assert [entry.logprob for entry in samples[0].logprobs or []] == pytest.approx(drawn, abs=1e-4)


def test_where_factors_are_not_packed_results_agree_within_rounding(
    transformer: Transformer, adapters: Adapters
) -> None:
    plain = Adapters(packed=False)
    for seed, (name, kinds) in enumerate((("all", KINDS), ("attention", "qkvo"), ("experts", EXPERT_KINDS))):
        plain.add(name, trained(transformer, kinds, seed))
    text = prompts(1, 90, seed=9)[0]
    tokens = torch.tensor(text * len(NAMES))
    wanted = [(name, len(text)) for name in NAMES]

    def logits(known: Adapters, asked: Sequence[tuple[str | None, int]], given: torch.Tensor) -> torch.Tensor:
        """All of them as one sequence: what matters is that the same tokens have the same adapters."""
        with torch.inference_mode(), backends.reference_only():
            batch = transformer.new_cache(len(given)).extend(len(given))
            batch = replace(batch, adapters=known.of_tokens(asked, transformer.device))
            return transformer.unembed(transformer.forward(given, batch))

    torch.testing.assert_close(logits(plain, wanted, tokens), logits(adapters, wanted, tokens), atol=1e-3, rtol=1e-3)


def _num_packed() -> int:
    gc.collect()
    return sum(type(each) is PackedAdapter for each in gc.get_objects())


@needs_native
def test_a_removed_adapter_is_kept_by_the_requests_that_have_it_and_by_nothing_else(
    transformer: Transformer, adapters: Adapters
) -> None:
    known, text = Adapters(packed=True), prompts(1, seed=5)[0]
    known.add("poet", trained(transformer, KINDS, 0))
    engine = engine_of(transformer, known)
    request = Request(prompt=text, max_tokens=8, sampling=GREEDY, adapter="poet")
    there = _num_packed()
    request_id = engine.submit(request)
    said = [token for _ in range(3) for output in engine.step() for token in output.step.tokens]
    known.remove("poet")
    with pytest.raises(UsageError, match="there is no adapter 'poet'; none was loaded"):
        engine.submit(request)
    known.add("poet", trained(transformer, "q", 1))  # another one, of the same name
    while engine.is_live(request_id):
        said += [token for output in engine.step() for token in output.step.tokens]
    assert said == alone(transformer, adapters, "all", text, 8)
    assert _num_packed() == there + 1
    engine.tend()
    assert _num_packed() == there
    ((completion,),) = run(engine, request)
    assert completion.tokens == alone(transformer, known, "poet", text, 8)
    with pytest.raises(UsageError, match="there is no adapter 'prose'"):
        known.remove("prose")


def test_names(transformer: Transformer, adapters: Adapters) -> None:
    assert list(adapters) == ["all", "attention", "experts"]
    engine = engine_of(transformer, adapters)
    with pytest.raises(UsageError, match="there is no adapter 'poet'; there are all, attention, experts"):
        engine.submit(Request(prompt=[1], max_tokens=1, adapter="poet"))
    for name, what in (("", "cannot be called"), ("a:b", "cannot be called"), ("all", "already")):
        with pytest.raises(UsageError, match=what):
            adapters.add(name, trained(transformer, "q", 0))
    late = Adapters(packed=backends.native() is not None)
    running = engine_of(transformer, late)
    late.add("late", trained(transformer, "q", 0))  # while the engine is there
    ((completion,),) = run(running, Request(prompt=[1, 2], max_tokens=2, adapter="late"))
    assert len(completion.tokens) == 2
