"""Prefixes on disk: what they save, and that nothing that happens to them changes a token."""

import asyncio
import stat
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from freehold.engine.core import Engine
from freehold.engine.loop import AsyncEngine
from freehold.engine.options import EngineOptions
from freehold.engine.prefix_files import PrefixFiles
from freehold.engine.request import Request
from freehold.errors import DiskError
from freehold.kernels import backends
from freehold.model.transformer import Transformer
from freehold.sampling import Sampling
from freehold.weights.files import TensorSpec
from tests.engine.conftest import CONTEXT
from tests.engine.test_engine import expected, run

pytestmark = pytest.mark.skipif(backends.native() is None, reason="the native kernels are not built")

SYSTEM = [7, 8, 9] * 40


def engine_of(
    transformer: Transformer, folder: Path, *, identity: str = "this model", max_bytes: int = 1 << 30
) -> Engine:
    files = PrefixFiles(folder, identity, max_bytes=max_bytes)
    return Engine(transformer, EngineOptions(context=CONTEXT, chunk=64), prefix_files=files)


def ask(
    engine: Engine, question: Sequence[int], transformer: Transformer, *, salt: str = "", volatile: bool = False
) -> int:
    """The same tokens as ever; returns how many of the prompt's were cached."""
    prompt = [*SYSTEM, *question]
    request = Request(
        prompt=prompt,
        max_tokens=8,
        sampling=Sampling(temperature=0),
        boundaries=[len(SYSTEM)],
        cache_salt=salt,
        volatile=volatile,
    )
    ((completion,),) = run(engine, request)
    assert completion.tokens == expected(transformer, prompt, 8)
    assert completion.stats is not None
    return completion.stats.num_cached_tokens


def files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_what_only_volatile_requests_said_is_on_no_disk(transformer: Transformer, tmp_path: Path) -> None:
    engine = engine_of(transformer, tmp_path)
    for _ in range(3):
        ask(engine, [1, 2], transformer, volatile=True)
    while engine.tend():
        pass
    assert files_in(tmp_path) == []
    assert ask(engine, [3, 4], transformer) == len(SYSTEM)  # in memory it serves everybody
    engine.close()
    assert len(files_in(tmp_path)) == 1  # what all of them begin with, and nothing else
    again = engine_of(transformer, tmp_path)
    assert ask(again, [1, 2], transformer) == len(SYSTEM)


def test_a_system_prompt_survives_a_restart(transformer: Transformer, tmp_path: Path) -> None:
    engine = engine_of(transformer, tmp_path)
    assert ask(engine, [1, 2], transformer) == 0
    engine.close()
    (path,) = files_in(tmp_path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    again = engine_of(transformer, tmp_path)
    assert ask(again, [3, 4, 5], transformer) == len(SYSTEM)
    assert ask(again, [6, 7], transformer) == len(SYSTEM)
    again.check_integrity()
    again.close()
    assert files_in(tmp_path) == [path]


def test_it_is_written_when_idle_and_not_only_at_the_end(transformer: Transformer, tmp_path: Path) -> None:
    engine = engine_of(transformer, tmp_path)
    ask(engine, [1, 2], transformer)
    while engine.tend():
        pass
    assert len(files_in(tmp_path)) == 1


def test_the_engine_s_thread_writes_when_it_is_idle(transformer: Transformer, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with AsyncEngine(engine_of(transformer, tmp_path)) as running:
            request = Request(prompt=[*SYSTEM, 1], max_tokens=2, boundaries=[len(SYSTEM)])
            assert [step async for step in running.submit(request)]
            while not files_in(tmp_path):
                await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(scenario(), 30))


def test_what_several_went_on_from_is_kept_too(transformer: Transformer, tmp_path: Path) -> None:
    engine = engine_of(transformer, tmp_path)
    shared = [1] * 70
    for last in (2, 3, 4):
        request = Request(prompt=SYSTEM + shared + [last], max_tokens=1, boundaries=[len(SYSTEM), len(SYSTEM + shared)])
        run(engine, request)
    engine.close()
    assert len(files_in(tmp_path)) == 2
    again = engine_of(transformer, tmp_path)
    assert ask(again, [*shared, 9], transformer) == len(SYSTEM + shared)


def test_other_models_and_salts_share_nothing(transformer: Transformer, tmp_path: Path) -> None:
    engine = engine_of(transformer, tmp_path)
    ask(engine, [1, 2], transformer, salt="mine")
    engine.close()
    assert ask(engine_of(transformer, tmp_path, identity="another"), [1, 2], transformer, salt="mine") == 0
    assert ask(engine_of(transformer, tmp_path), [1, 2], transformer, salt="yours") == 0
    assert ask(engine_of(transformer, tmp_path), [1, 2], transformer, salt="mine") == len(SYSTEM)


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "gone", "foreign"])
def test_damaged_files_are_removed_and_computed_again(transformer: Transformer, tmp_path: Path, damage: str) -> None:
    engine = engine_of(transformer, tmp_path)
    ask(engine, [1, 2], transformer)
    engine.close()
    (path,) = files_in(tmp_path)
    again = engine_of(transformer, tmp_path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes({"flip": bytes(data), "cut": bytes(data[:-9]), "empty": b"", "foreign": b"{}" * 99}[damage])
    assert ask(again, [1, 2], transformer) == 0
    assert files_in(tmp_path) == []
    again.close()
    assert files_in(tmp_path) == [path]
    assert ask(engine_of(transformer, tmp_path), [1, 2], transformer) == len(SYSTEM)


def test_the_least_recently_used_make_room(transformer: Transformer, tmp_path: Path) -> None:
    engine = engine_of(transformer, tmp_path)
    ask(engine, [1, 2], transformer)
    engine.close()
    size = files_in(tmp_path)[0].stat().st_size
    for salt in "abcd":
        one = engine_of(transformer, tmp_path, max_bytes=2 * size + size // 2)
        ask(one, [1, 2], transformer, salt=salt)
        one.close()
    assert len(files_in(tmp_path)) == 2
    cached = [ask(engine_of(transformer, tmp_path), [1, 2], transformer, salt=salt) for salt in "abcd"]
    assert cached == [0, 0, len(SYSTEM), len(SYSTEM)]


def test_a_full_disk_costs_nothing_but_time(
    transformer: Transformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Full:
        free = 10

    monkeypatch.setattr("shutil.disk_usage", lambda path: Full)
    engine = engine_of(transformer, tmp_path)
    ask(engine, [1, 2], transformer)
    engine.close()
    assert files_in(tmp_path) == []
    assert "a prefix is not kept on disk" in caplog.text


def test_a_folder_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="cannot be used for cached prefixes"):
        PrefixFiles(tmp_path / "file", "this model")


def test_adopted_pages(transformer: Transformer, tmp_path: Path) -> None:
    engine = engine_of(transformer, tmp_path)

    def zeros(spec: TensorSpec) -> torch.Tensor:
        return torch.zeros(spec.shape, dtype=spec.dtype)

    assert engine.adopt(range(100), zeros)
    assert engine.adopt(range(100), zeros)  # and once is enough
    assert engine.stats().cached_prefixes == 1
    too_many = engine.stats().pages[1] * 64 + 1
    assert not engine.adopt(range(too_many), zeros)
    assert engine.stats().cached_prefixes == 1  # nothing was given up for it
    engine.check_integrity()


def test_what_is_private_is_not_written(transformer: Transformer, tmp_path: Path) -> None:
    engine = engine_of(transformer, tmp_path)
    run(engine, Request(prompt=SYSTEM, max_tokens=2, n=4, cache=False))
    run(engine, Request(prompt=SYSTEM[1:], max_tokens=2, n=4))  # its own samples are no other requests
    engine.close()
    assert files_in(tmp_path) == []


def test_reading_and_writing_hold_one_tensor_at_a_time(transformer: Transformer, tmp_path: Path) -> None:
    engine = engine_of(transformer, tmp_path)
    ask(engine, [1, 2], transformer)
    tracemalloc.start()
    engine.close()
    ask(engine_of(transformer, tmp_path), [1, 2], transformer)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2 << 20  # whatever the prefix: pieces of a megabyte, and one layer's pages
