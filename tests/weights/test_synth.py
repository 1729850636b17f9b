"""Random checkpoints: reproducible to the byte, sane to run, and made in bounded memory."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from freehold.config import NAMED_CONFIGS, ExpertFormat, Layout
from freehold.errors import DiskSpaceError, UnsupportedError, UsageError
from freehold.weights.layouts import open_checkpoint
from freehold.weights.synth import write_random_checkpoint
from tests.checkpoints import load, logits, plain, small_config, tokens_of

TINY = NAMED_CONFIGS["tiny"]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("experts", list(ExpertFormat))
@pytest.mark.parametrize("layout", list(Layout))
def test_the_seed_decides_every_byte(tmp_path: Path, layout: Layout, experts: ExpertFormat) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_random_checkpoint(tmp_path / name, TINY, seed=seed, layout=layout, experts=experts)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert files(tmp_path / "a")["model.safetensors"] != files(tmp_path / "c")["model.safetensors"]
    checkpoint = open_checkpoint(tmp_path / "a")
    assert (checkpoint.config, checkpoint.layout, checkpoint.experts) == (TINY, layout, experts)


def test_every_layout_and_format_holds_the_same_model(tmp_path: Path) -> None:
    tables = []
    for layout in Layout:
        for experts in ExpertFormat:
            folder = tmp_path / f"{layout.value}-{experts.value}"
            write_random_checkpoint(folder, TINY, layout=layout, experts=experts, shard_bytes=10**5)
            tables.append(plain(open_checkpoint(folder).table()))
    for table in tables[1:]:
        assert all(torch.equal(table[name].float(), tensor.float()) for name, tensor in tables[0].items())


def test_tensors_differ_from_each_other(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path / "model", TINY)
    table = plain(open_checkpoint(tmp_path / "model").table())
    assert not torch.equal(table["layers.0.gate_up"], table["layers.1.gate_up"])
    assert not torch.equal(table["layers.0.gate_up"][0], table["layers.0.gate_up"][1])
    assert not torch.equal(table["embedding"], table["unembedding"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_finite_and_not_all_alike(tmp_path: Path, dtype: torch.dtype) -> None:
    config = small_config(num_layers=8, hidden_size=256, vocab_size=300)
    write_random_checkpoint(tmp_path / "model", config)
    out = logits(load(tmp_path / "model", dtype), tokens_of(config, 20))
    assert out.isfinite().all()
    assert 0.01 < out.std() < 100
    assert len(set(out.argmax(-1).tolist())) > 5


def test_sizes_that_mxfp4_cannot_hold(tmp_path: Path) -> None:
    config = small_config(expert_width=20)
    with pytest.raises(UnsupportedError, match="divisible by 32"):
        write_random_checkpoint(tmp_path / "model", config)
    assert list(tmp_path.iterdir()) == []
    write_random_checkpoint(tmp_path / "model", config, experts=ExpertFormat.BF16)
    assert open_checkpoint(tmp_path / "model").config == config


def test_it_is_all_or_nothing(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(UsageError, match="exists already"):
        write_random_checkpoint(tmp_path / "taken", TINY)
    huge = small_config(vocab_size=10**12)
    with pytest.raises(DiskSpaceError, match="GiB"):
        write_random_checkpoint(tmp_path / "huge", huge)

    def interrupt(label: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_random_checkpoint(tmp_path / "stopped", TINY, progress=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_memory_does_not_grow_with_the_checkpoint(tmp_path: Path) -> None:
    """520 MB are written; what is held at once is one expert or one piece."""
    script = f"""
import resource
from pathlib import Path
from freehold.weights.synth import write_random_checkpoint
from tests.checkpoints import small_config
config = small_config(num_layers=4, hidden_size=512, expert_width=512, num_experts=128, vocab_size=150_000)
write_random_checkpoint(Path({str(tmp_path)!r}, "warm"), small_config())
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
write_random_checkpoint(Path({str(tmp_path)!r}, "model"), config, shard_bytes=100_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    written = sum(path.stat().st_size for path in (tmp_path / "model").iterdir())
    assert written > 500e6
    assert int(done.stdout) * 1024 < written / 3
