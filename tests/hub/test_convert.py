"""Conversions between layouts and expert formats, byte for byte where nothing is lost."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import freehold
from freehold.config import NAMED_CONFIGS, ExpertFormat, Layout
from freehold.errors import CheckpointError, UnsupportedError, UsageError
from freehold.hub.convert import SIDE_FILES, convert
from freehold.weights.files import TensorFiles
from freehold.weights.layouts import open_checkpoint
from freehold.weights.synth import write_random_checkpoint

MXFP4, BF16 = ExpertFormat.MXFP4, ExpertFormat.BF16


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    write_random_checkpoint(folder, NAMED_CONFIGS["tiny"])
    return folder


def _bytes(folder: Path) -> Iterator[tuple[str, bytes]]:
    files = TensorFiles(folder)
    return ((name, files.tensor(name).contiguous().view(torch.uint8).numpy().tobytes()) for name in sorted(files.infos))


def test_there_and_back(tiny: Path, tmp_path: Path) -> None:
    convert(tiny, tmp_path / "original", layout=Layout.ORIGINAL)
    convert(tmp_path / "original", tmp_path / "back", layout=Layout.HF)
    assert dict(_bytes(tmp_path / "back")) == dict(_bytes(tiny))
    assert open_checkpoint(tmp_path / "back").config == open_checkpoint(tiny).config


@pytest.mark.usefixtures("reference_ops")
@pytest.mark.parametrize("layout", Layout)
def test_expanded_experts_give_the_same_logits(tiny: Path, tmp_path: Path, layout: Layout) -> None:
    convert(tiny, tmp_path / "bf16", layout=layout, experts=BF16)
    assert open_checkpoint(tmp_path / "bf16").experts is BF16
    tokens = list(range(40))
    expected = freehold.load(tiny, dtype="float32", device="cpu").logits(tokens)
    expanded = freehold.load(tmp_path / "bf16", dtype="float32", device="cpu")
    torch.testing.assert_close(expanded.logits(tokens), expected, atol=1e-5, rtol=0)
    convert(tmp_path / "bf16", tmp_path / "packed", layout=Layout.HF, experts=MXFP4)
    repacked = freehold.load(tmp_path / "packed", dtype="float32", device="cpu")
    assert torch.equal(repacked.logits(tokens), expected)  # values on the grid stay where they are


def test_default_model_to_original_and_back(default_folder: Path, tmp_path: Path) -> None:
    """Its tied embeddings are stored twice there: the original layout has no word for tying."""
    convert(default_folder, tmp_path / "original", layout=Layout.ORIGINAL)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    model = freehold.load(tmp_path / "original", device="cpu", dtype="float32")
    assert "Paris" in model.chat(question, max_tokens=80)
    carried = {name for name in SIDE_FILES if (default_folder / name).is_file()}
    assert carried >= {"tokenizer.json", "generation_config.json", "chat_template.jinja", "README.md", "LICENSE"}
    for name in carried:
        assert (tmp_path / "original" / name).read_bytes() == (default_folder / name).read_bytes()


def test_failures_leave_nothing(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(UsageError, match="exists already"):
        convert(tiny, tmp_path / "there", layout=Layout.HF)
    config = tiny / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-05', '"rms_norm_eps": 1e-06'))
    with pytest.raises(UnsupportedError, match="1e-06"):
        convert(tiny, tmp_path / "original", layout=Layout.ORIGINAL)
    shard = tiny / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="truncated"):
        convert(tiny, tmp_path / "copy", layout=Layout.HF)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there", "tiny"]
