"""Reading GGUF files that the gguf package wrote, whole and damaged."""

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFWriter, dequantize, quantize

from freehold.errors import CheckpointError, FreeholdError, UnsupportedError
from freehold.weights.gguf import GgufFile

VALUES = np.random.default_rng(0).standard_normal((6, 64)).astype(np.float32)
KINDS = [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_uint32("llama.block_count", 3)
    writer.add_float32("llama.rope.freq_base", 1e5)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "–", "模"])
    for kind in KINDS:
        writer.add_tensor(kind.name, quantize(VALUES, kind), raw_dtype=kind)
    writer.add_tensor("vector", VALUES[0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_metadata(path: Path) -> None:
    file = GgufFile(path)
    assert file.value("general.architecture") == "llama"
    assert file.value("llama.block_count") == 3
    assert file.value("llama.rope.freq_base") == 1e5
    assert file.value("tokenizer.ggml.tokens") == ["a", "b", "–", "模"]
    assert file.tensor_names == {"vector", *(kind.name for kind in KINDS)}


@pytest.mark.parametrize("kind", KINDS)
def test_tensors(path: Path, kind: Kind) -> None:
    tensor = GgufFile(path).tensor(kind.name)
    assert tensor.dtype == torch.float32
    assert np.array_equal(tensor.numpy(), dequantize(quantize(VALUES, kind), kind))
    assert np.abs(tensor.numpy() - VALUES).max() < 0.35  # four bits


def test_a_vector_stays_one(path: Path) -> None:
    assert np.array_equal(GgufFile(path).tensor("vector").numpy(), VALUES[0])


def test_tensors_are_the_callers_own(path: Path) -> None:
    file = GgufFile(path)
    file.tensor("F32").zero_()
    assert np.array_equal(file.tensor("F32").numpy(), VALUES)


def test_what_is_not_there_is_named(path: Path) -> None:
    file = GgufFile(path)
    with pytest.raises(CheckpointError, match=r"model\.gguf has no metadata key llama\.context_length"):
        file.value("llama.context_length")
    with pytest.raises(CheckpointError, match=r"model\.gguf: tensor blk\.0 is missing"):
        file.tensor("blk.0")
    with pytest.raises(CheckpointError, match=r"nowhere\.gguf is missing"):
        GgufFile(path.with_name("nowhere.gguf"))


def test_types_that_cannot_be_expanded(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_tensor("ints", np.arange(4, dtype=np.int32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedError, match=r"tensor ints is stored as I32"):
        GgufFile(path).tensor("ints")


def read_all(path: Path) -> None:
    file = GgufFile(path)
    for name in file.tensor_names:
        file.tensor(name)


def refusal(path: Path) -> str:
    with pytest.raises(FreeholdError) as caught:
        read_all(path)
    message = str(caught.value)
    assert message.isprintable()
    assert str(path) in message
    return message


def test_truncation_anywhere_is_noticed(path: Path, tmp_path: Path) -> None:
    whole = path.read_bytes()
    cut = tmp_path / "cut.gguf"
    header = whole.index(b"vector")
    # The writer pads the end of the file, which nobody would miss.
    for length in [*range(0, header + 40, 3), *range(header + 40, len(whole) - 32, 97)]:
        cut.write_bytes(whole[:length])
        refusal(cut)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"\0" * 64, b"PK\x03\x04" * 20, b"GGUF\x63\0\0\0" + b"\0" * 64])
def test_files_of_another_kind(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    assert "truncated, corrupt or not a GGUF file" in refusal(path)
    with pytest.raises(CheckpointError):
        GgufFile(tmp_path)


def test_flipped_bytes_are_refused_or_harmless(path: Path, tmp_path: Path) -> None:
    whole = path.read_bytes()
    broken = tmp_path / "broken.gguf"
    generator = np.random.default_rng(0)
    for _ in range(300):
        content = bytearray(whole)
        content[generator.integers(whole.index(b"vector") + 40)] = generator.integers(256)
        broken.write_bytes(content)
        try:
            read_all(broken)
        except FreeholdError:
            refusal(broken)
