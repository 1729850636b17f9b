"""Safetensors folders: what is written is what others read, what is read is not copied, damage is refused."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from freehold.errors import CheckpointError, FreeholdError, ModelNotFoundError
from freehold.weights.files import TensorFiles, TensorToWrite, read_header, read_json, write_shards

TENSORS = {
    "a": torch.arange(7, dtype=torch.uint8),  # odd sizes first: alignment has to be made, not found
    "b": torch.randn(3, 5),
    "c": torch.randn(2, 3, 4).to(torch.bfloat16),
    "d": torch.arange(9, dtype=torch.int64),
    "e": torch.randn(1, 1).double(),
    "f": torch.randn(11).half(),
}


def to_write(tensors: dict[str, Tensor]) -> list[TensorToWrite]:
    def in_two_pieces(tensor: Tensor) -> Callable[[], Iterator[Tensor]]:
        return lambda: iter(tensor.chunk(2))

    return [TensorToWrite(name, t.dtype, tuple(t.shape), in_two_pieces(t)) for name, t in tensors.items()]


def write(folder: Path, shard_bytes: int = 1 << 30) -> Path:
    folder.mkdir(exist_ok=True)
    write_shards(folder, to_write(TENSORS), shard_bytes=shard_bytes)
    return folder


def header_of(path: Path) -> dict[str, object]:
    data = path.read_bytes()
    header: dict[str, object] = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return header


# --- writing and reading back -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shard_bytes", [1, 40, 1 << 30])
def test_everyone_reads_the_same_bytes(tmp_path: Path, shard_bytes: int) -> None:
    write(tmp_path, shard_bytes)
    files = TensorFiles(tmp_path)
    assert files.infos.keys() == TENSORS.keys()
    assert files.num_bytes == sum(tensor.nbytes for tensor in TENSORS.values())
    theirs: dict[str, Tensor] = {}
    for path in tmp_path.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
            theirs |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    for name, tensor in TENSORS.items():
        assert torch.equal(files.tensor(name), tensor)
        assert torch.equal(theirs[name], tensor)
        assert files.infos[name].shape == tensor.shape
        assert files.infos[name].dtype == tensor.dtype


def test_tensors_are_aligned_to_their_element_size(tmp_path: Path) -> None:
    files = TensorFiles(write(tmp_path))
    for name, tensor in TENSORS.items():
        assert files.tensor(name).data_ptr() % tensor.element_size() == 0


def test_one_shard_has_the_plain_name_and_no_index(tmp_path: Path) -> None:
    write(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_several_shards_have_numbers_and_an_index(tmp_path: Path) -> None:
    write(tmp_path, shard_bytes=80)
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(shards) >= 3
    assert shards == [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in TENSORS.values())
    held = {name: shard for shard in shards for name in header_of(tmp_path / shard) if name != "__metadata__"}
    assert index["weight_map"] == held
    for shard in shards:
        inside = [TENSORS[name].nbytes for name, where in held.items() if where == shard]
        assert len(inside) == 1 or sum(inside) <= 80


def test_reading_a_file_written_by_safetensors(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt", "by": "someone"})
    files = TensorFiles(tmp_path)
    assert all(torch.equal(files.tensor(name), tensor) for name, tensor in TENSORS.items())


def test_progress_counts_up_to_all_bytes(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    write_shards(
        tmp_path, to_write(TENSORS), shard_bytes=80, progress=lambda label, done, total: seen.append((done, total))
    )
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (TensorFiles(tmp_path).num_bytes,) * 2


# --- mapping ----------------------------------------------------------------------------------------------------


def anonymous_bytes() -> int:
    """Private memory of this process that no file backs."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no Anonymous line")


def test_tensors_are_mapped_not_copied(tmp_path: Path) -> None:
    size = 64 << 20
    big = TensorToWrite("big", torch.uint8, (size,), lambda: iter([torch.ones(size, dtype=torch.uint8)]))
    write_shards(tmp_path, [big], shard_bytes=1 << 40)
    before = anonymous_bytes()
    tensor = TensorFiles(tmp_path).tensor("big")
    assert int(tensor[:: 1 << 12].sum()) == size >> 12  # every page has been looked at
    assert anonymous_bytes() - before < size // 8


def test_the_file_is_never_written_to(tmp_path: Path) -> None:
    path = write(tmp_path) / "model.safetensors"
    bytes_before = path.read_bytes()
    TensorFiles(tmp_path).tensor("b").fill_(7)
    assert path.read_bytes() == bytes_before
    assert torch.equal(TensorFiles(tmp_path).tensor("b"), TENSORS["b"])


# --- damaged files ----------------------------------------------------------------------------------------------


def refusal(folder: Path) -> str:
    """The one line with which a folder is refused."""
    with pytest.raises(FreeholdError) as caught:
        files = TensorFiles(folder)
        for name in files.infos:
            files.tensor(name)
    message = str(caught.value)
    assert isinstance(caught.value, CheckpointError | ModelNotFoundError)
    assert message.isprintable(), "one line, no control characters"
    return message


def forge(path: Path, header: object, data: bytes = b"") -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def entry(dtype: str = "U8", shape: object = (4,), offsets: object = (0, 4)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_truncation_anywhere_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path) / "model.safetensors"
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert f"{path} is {'truncated' if length >= 8 else 'not a safetensors file'}" in refusal(tmp_path)
    path.write_bytes(whole + b"\0")
    assert "follow its last tensor" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("header", "data", "said"),
    [
        (b"{}", b"1", "1 bytes follow its last tensor"),
        (b"[]", b"", "not a JSON object"),
        (b"{" * 50, b"", "not JSON"),
        (b"[" * 200_000, b"", "not JSON"),  # deeper than Python's own recursion
        (b'{"a": "\xff"}', b"", "not JSON"),
        ({"a": 5}, b"", "tensor a has a malformed header entry"),
        ({"a": {"dtype": "U8"}}, b"", "tensor a has a malformed header entry"),
        ({"a": entry(shape=4)}, b"1234", "tensor a has a malformed header entry"),
        ({"a": entry(shape=[-4])}, b"1234", "tensor a has a malformed header entry"),
        ({"a": entry(shape=[4.0])}, b"1234", "tensor a has a malformed header entry"),
        ({"a": entry(dtype=[])}, b"1234", "tensor a has a malformed header entry"),  # type: ignore[arg-type]
        ({"a": entry(offsets=[4, 0])}, b"1234", "tensor a has a malformed header entry"),
        ({"a": entry(offsets=[0, 4, 8])}, b"1234", "tensor a has a malformed header entry"),
        ({"a": entry(shape=[5])}, b"1234", "tensor a of shape (5,) in U8 cannot be 4 bytes"),
        ({"a": entry(shape=[2**62, 2**62])}, b"1234", "cannot be 4 bytes"),
        ({"a": entry(shape=[2**70])}, b"1234", "tensor a has a malformed header entry"),
        ({"a": entry(offsets=[2, 6])}, b"123456", "tensor a starts at byte 2, not at 0"),
        ({"a": entry(), "b": entry()}, b"1234", "tensor b starts at byte 0, not at 4"),
        ({"a": entry(), "b": entry(offsets=[4, 8])}, b"123456", "truncated: tensor b ends at byte"),
        ({"a\nb\x1b[31m": entry(shape=[5])}, b"1234", r"tensor a\nb\x1b[31m of shape"),
    ],
)
def test_headers_that_lie(tmp_path: Path, header: object, data: bytes, said: str) -> None:
    path = tmp_path / "model.safetensors"
    forge(path, header, data)
    message = refusal(tmp_path)
    assert str(path) in message
    assert said in message


@pytest.mark.parametrize("content", [b"", b"\0" * 8, b"\xff" * 100, b"PK\x03\x04 a zip file, as pytorch_model.bin is"])
def test_files_of_another_kind(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    assert f"{path} is" in refusal(tmp_path)


def test_unknown_types_are_listed_but_have_no_dtype(tmp_path: Path) -> None:
    forge(tmp_path / "model.safetensors", {"a": entry("F8_E4M3")}, b"1234")
    info = TensorFiles(tmp_path).infos["a"]
    assert (info.dtype, info.dtype_name, info.num_bytes) == (None, "F8_E4M3", 4)


def test_the_same_tensor_twice(tmp_path: Path) -> None:
    for name in ("one.safetensors", "two.safetensors"):
        forge(tmp_path / name, {"a": entry()}, b"1234")
    message = refusal(tmp_path)
    assert "one.safetensors" in message
    assert "two.safetensors" in message
    assert "both hold tensor a" in message


def test_a_folder_without_tensors(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"holds no \.safetensors file"):
        TensorFiles(tmp_path)


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ({}, "has no weight_map"),
        ({"weight_map": []}, "has no weight_map"),
        ({"weight_map": {"a": 1}}, "has no weight_map"),
        ({"weight_map": {"a": "../model.safetensors"}}, "points outside its folder"),
        ({"weight_map": {"a": "/etc/passwd"}}, "points outside its folder"),
        ({"weight_map": {"a": "sub/model.safetensors"}}, "points outside its folder"),
        ({"weight_map": {"a": ""}}, "points outside its folder"),
        ({"weight_map": {"a": ".."}}, "is missing"),
        ({"weight_map": {"a": "x\0y"}}, "is missing"),
        ({"weight_map": {"a": "x\ny.safetensors"}}, "is missing"),
        ({"weight_map": {"a": "x" * 300}}, "x" * 300),
        ({"weight_map": {"a": "model-00001-of-00002.safetensors"}}, "is missing"),
        ({"weight_map": {"a": "model.safetensors", "zzz": "model.safetensors"}}, "tensor zzz is promised"),
        ([], "not an object"),
    ],
)
def test_indexes_that_lie(tmp_path: Path, index: object, said: str) -> None:
    write(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    message = refusal(tmp_path)
    assert said in message
    assert "model.safetensors.index.json" in message or "model" in message


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 200_000, b'{"a": ' + b"9" * 5000 + b"}", b"null"])
def test_json_that_cannot_be_read(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_json(path)
    assert str(path) in str(caught.value)
    assert str(caught.value).isprintable()


def test_missing_json_and_headers_are_checkpoint_errors(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere\.json is missing"):
        read_json(tmp_path / "nowhere.json")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_header(tmp_path / "nowhere.safetensors")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_header(tmp_path)


def test_a_producer_that_breaks_its_word_is_a_bug_of_ours(tmp_path: Path) -> None:
    def produce() -> Iterator[Tensor]:
        yield torch.zeros(3, dtype=torch.uint8)

    with pytest.raises(AssertionError, match="wrote 3 of 4 bytes"):
        write_shards(tmp_path, [TensorToWrite("a", torch.uint8, (4,), produce)], shard_bytes=100)
