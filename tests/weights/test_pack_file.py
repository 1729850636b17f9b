"""The packed cache: what is mapped is what was packed, and whatever happens to the file, the next load works."""

import hashlib
import inspect
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from freehold import log, paths
from freehold.config import ExpertFormat, Layout, ModelConfig
from freehold.errors import CheckpointError, DiskError, DiskSpaceError, UsageError
from freehold.log import no_progress
from freehold.weights import pack_file
from freehold.weights.layouts import Checkpoint, open_checkpoint
from freehold.weights.mxfp4 import Mxfp4Tensor
from freehold.weights.pack_file import (
    DENSE_FORMS,
    PackedState,
    PackedTable,
    clear_packed,
    ensure_packed,
    list_packed,
    load_packed,
    packed_path,
    packed_table_bytes,
)
from freehold.weights.packed import Form, PackedMatrix, pack, unpack
from freehold.weights.synth import write_random_checkpoint
from tests.checkpoints import packed as with_packed_experts
from tests.checkpoints import random_table, save, small_config

FORMATS = list(ExpertFormat)
# Sizes at which nothing is even: padding in every panel and every block, odd numbers of rows.
ODD: dict[str, Any] = {"hidden_size": 96, "expert_width": 160, "num_heads": 5, "num_kv_heads": 1, "vocab_size": 99}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache directory, and warnings that have not been given yet."""
    monkeypatch.setenv("FREEHOLD_CACHE", str(tmp_path / "cache"))
    log.warn_once.cache_clear()
    yield tmp_path / "cache"
    log.warn_once.cache_clear()


def make(
    folder: Path,
    *,
    layout: Layout = Layout.HF,
    experts: ExpertFormat = ExpertFormat.MXFP4,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    **changes: Any,
) -> Checkpoint:
    config = small_config(**changes)
    table = random_table(config, seed, dtype)
    save(folder, config, with_packed_experts(table) if experts is ExpertFormat.MXFP4 else table, layout, experts)
    return open_checkpoint(folder)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return make(tmp_path / "model")


def files() -> list[str]:
    """Everything in the packed cache, hidden files too."""
    return sorted(path.name for path in paths.packed_dir().iterdir()) if paths.packed_dir().exists() else []


def assert_same(ours: PackedTable, expected: PackedTable) -> None:
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        other = ours[name]
        if isinstance(value, PackedMatrix):
            assert isinstance(other, PackedMatrix)
            assert (other.form, other.shape, other.paired) == (value.form, value.shape, value.paired), name
            assert torch.equal(other.data.view(torch.uint8), value.data.view(torch.uint8)), name
            assert (other.scales is None) == (value.scales is None)
            if value.scales is not None and other.scales is not None:
                assert torch.equal(other.scales, value.scales), name
        else:
            assert isinstance(other, Tensor)
            assert other.dtype == value.dtype, name
            assert torch.equal(other, value), name


def expected_table(checkpoint: Checkpoint, dense: Form) -> PackedTable:
    """Each entry made from the checkpoint's tensors by `pack` alone, as a whole."""
    table = checkpoint.table()

    def plain(name: str) -> Tensor:
        tensor = table[name]
        assert isinstance(tensor, Tensor)
        return tensor.contiguous()

    def matrix(name: str, paired: bool = False) -> PackedMatrix:
        tensor = table[name]
        if isinstance(tensor, Mxfp4Tensor):
            return pack(tensor, "mxfp4", paired=paired)
        return pack(tensor.contiguous(), dense, paired=paired)

    expected: PackedTable = {"final_norm": plain("final_norm").float()}
    if checkpoint.config.tied_embeddings:
        expected["embedding"] = matrix("embedding")
    else:
        expected |= {"embedding": plain("embedding"), "unembedding": matrix("unembedding")}
    for layer in range(checkpoint.config.num_layers):
        of = f"layers.{layer}"
        expected[f"{of}.qkv.weight"] = pack(torch.cat([plain(f"{of}.{n}.weight") for n in "qkv"]), dense)
        expected[f"{of}.qkv.bias"] = torch.cat([plain(f"{of}.{n}.bias").float() for n in "qkv"])
        expected[f"{of}.o.weight"] = matrix(f"{of}.o.weight")
        router = plain(f"{of}.router.weight")
        expected[f"{of}.router.weight"] = pack(router, "bf16" if router.dtype == torch.bfloat16 else "f32")
        expected[f"{of}.gate_up"] = matrix(f"{of}.gate_up", paired=True)
        expected[f"{of}.down"] = matrix(f"{of}.down")
        for name in ("attn_norm", "mlp_norm", "sinks", "o.bias", "router.bias", "gate_up.bias", "down.bias"):
            expected[f"{of}.{name}"] = plain(f"{of}.{name}").float()
    return expected


def all_tensors(table: PackedTable) -> dict[str, Tensor]:
    """Data, scales and plain tensors of a table."""
    tensors: dict[str, Tensor] = {}
    for name, value in table.items():
        if isinstance(value, Tensor):
            tensors[name] = value
        else:
            tensors[f"{name}.data"] = value.data
            if value.scales is not None:
                tensors[f"{name}.scales"] = value.scales
    return tensors


def mapped_ranges(path: Path) -> list[range]:
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(path))]
    return [range(*(int(address, 16) for address in line.split()[0].split("-"))) for line in lines]


# --- what is packed is what is loaded ---------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("experts", FORMATS)
@pytest.mark.parametrize("layout", list(Layout))
@pytest.mark.parametrize("dense", DENSE_FORMS)
def test_packed_then_mapped(
    tmp_path: Path, layout: Layout, experts: ExpertFormat, tied: bool, dense: Form, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pack_file, "_VALUES_READ_AT_ONCE", 1)  # as few rows at a time as can be
    monkeypatch.setattr(pack_file, "_VALUES_PACKED_AT_ONCE", 1)
    monkeypatch.setattr(pack_file, "_RESIDENT_BYTES", 1)
    checkpoint = make(tmp_path / "model", layout=layout, experts=experts, tied_embeddings=tied, **ODD)
    expected = expected_table(checkpoint, dense)
    assert_same(load_packed(checkpoint, dense), expected)
    [name] = files()
    path = paths.packed_dir() / name
    assert path == packed_path(checkpoint, dense)
    written = path.stat()

    table = load_packed(open_checkpoint(tmp_path / "model"), dense)
    assert_same(table, expected)
    assert path.stat() == written
    packed_ranges, source_ranges = mapped_ranges(path), mapped_ranges(tmp_path / "model" / "model.safetensors")
    for name, tensor in all_tensors(table).items():
        from_source = name == "embedding" and not checkpoint.config.tied_embeddings
        assert any(tensor.data_ptr() in r for r in (source_ranges if from_source else packed_ranges)), name
        assert from_source or tensor.data_ptr() % 64 == 0, name

    experts_again = {name: unpack(value) for name, value in table.items() if isinstance(value, PackedMatrix)}
    for name in ("layers.0.gate_up", "layers.1.down"):
        original, again = checkpoint.table()[name], experts_again[name]
        if isinstance(original, Mxfp4Tensor):
            assert isinstance(again, Mxfp4Tensor)
            assert torch.equal(again.blocks, original.blocks)
            assert torch.equal(again.scales, original.scales)
        elif dense != "q8":
            assert isinstance(again, Tensor)
            assert torch.equal(again, original.to(again.dtype))


@settings(max_examples=8, deadline=None)
@given(
    hidden=st.integers(1, 4).map(lambda n: 32 * n),
    width=st.integers(1, 4).map(lambda n: 32 * n),
    num_experts=st.integers(2, 3),
    heads=st.integers(1, 5),
    vocab=st.integers(1, 200),
    dense=st.sampled_from(DENSE_FORMS),
)
def test_any_shape(
    tmp_path_factory: pytest.TempPathFactory,
    hidden: int,
    width: int,
    num_experts: int,
    heads: int,
    vocab: int,
    dense: Form,
) -> None:
    sizes: dict[str, Any] = {
        "hidden_size": hidden,
        "expert_width": width,
        "num_experts": num_experts,
        "vocab_size": vocab,
    }
    checkpoint = make(tmp_path_factory.mktemp("model"), num_layers=1, num_heads=heads, num_kv_heads=1, **sizes)
    expected = expected_table(checkpoint, dense)
    for _ in range(2):
        assert_same(load_packed(checkpoint, dense), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_float32_checkpoints(tmp_path: Path, dtype: torch.dtype) -> None:
    checkpoint = make(tmp_path / "model", dtype=dtype)
    table = load_packed(checkpoint, "q8")
    assert_same(table, expected_table(checkpoint, "q8"))
    router, embedding = table["layers.0.router.weight"], table["embedding"]
    assert isinstance(router, PackedMatrix)
    assert isinstance(embedding, Tensor)
    assert (router.form, embedding.dtype) == ("f32", dtype)


def test_the_file_is_plain_safetensors(checkpoint: Checkpoint) -> None:
    table = load_packed(checkpoint, "q8")
    path = packed_path(checkpoint, "q8")
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    for name, tensor in all_tensors(table).items():
        if name != "embedding":
            flat = stored[name].flatten()
            assert torch.equal(flat[: tensor.numel()], tensor.flatten())
            assert not flat[tensor.numel() :].any()
            assert stored[name].nbytes % 64 == 0
    assert metadata["source"] == str(checkpoint.folder)
    assert metadata["dense"] == "q8"
    assert json.loads(metadata["matrices"])["layers.1.gate_up"] == {
        "form": "mxfp4",
        "shape": [4, 64, 64],
        "paired": True,
    }
    content = path.read_bytes()
    assert (8 + int.from_bytes(content[:8], "little")) % 64 == 0
    without_digest = content.replace(metadata["sha256"].encode(), b"0" * 64)
    assert hashlib.sha256(without_digest).hexdigest() == metadata["sha256"]


def test_each_form_has_its_file(checkpoint: Checkpoint) -> None:
    for dense in DENSE_FORMS:
        load_packed(checkpoint, dense)
    assert len(files()) == 3
    for dense in DENSE_FORMS:
        assert_same(load_packed(checkpoint, dense), expected_table(checkpoint, dense))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("experts", FORMATS)
@pytest.mark.parametrize("dense", DENSE_FORMS)
def test_predicted_bytes_are_the_bytes(tmp_path: Path, experts: ExpertFormat, tied: bool, dense: Form) -> None:
    checkpoint = make(tmp_path / "model", experts=experts, tied_embeddings=tied, **ODD)
    tensors = all_tensors(load_packed(checkpoint, dense))
    predicted = packed_table_bytes(checkpoint.config, experts, dense)
    of_experts = sum(t.nbytes for name, t in tensors.items() if name.endswith(("up.data", "up.scales", "down.data")))
    of_experts += sum(t.nbytes for name, t in tensors.items() if name.endswith("down.scales"))
    assert predicted.experts == of_experts
    assert predicted.embedding == (0 if tied else tensors["embedding"].nbytes)
    assert sum(predicted) == sum(tensor.nbytes for tensor in tensors.values())


def test_dense_weights_are_never_mxfp4(checkpoint: Checkpoint) -> None:
    with pytest.raises(UsageError, match="dense must be one of q8, bf16, f32, got 'mxfp4'"):
        load_packed(checkpoint, "mxfp4")
    with pytest.raises(UsageError):
        packed_table_bytes(checkpoint.config, ExpertFormat.MXFP4, "mxfp4")


def test_weights_that_q8_cannot_hold_are_named(tmp_path: Path) -> None:
    config = small_config()
    table = random_table(config, dtype=torch.bfloat16)
    damaged = table["layers.1.k.weight"]
    assert isinstance(damaged, Tensor)
    damaged[3, 5] = float("nan")
    checkpoint = open_checkpoint(save(tmp_path / "model", config, with_packed_experts(table)))
    with pytest.raises(CheckpointError, match=r"model: layers\.1\.qkv\.weight: q8 cannot hold NaN"):
        load_packed(checkpoint, "q8")
    assert files() == []
    load_packed(checkpoint, "bf16")


def test_progress_counts_up_to_all_bytes(checkpoint: Checkpoint) -> None:
    seen: list[tuple[str, int, int]] = []
    load_packed(checkpoint, "q8", progress=lambda *step: seen.append(step))
    assert {label for label, _, _ in seen} == {"packing weights"}
    done = [step[1] for step in seen]
    assert done == sorted(done)
    assert done[-1] == seen[0][2]
    seen.clear()
    load_packed(checkpoint, "q8", progress=lambda *step: seen.append(step))
    assert seen == []


def test_threads_of_torch_are_as_before(checkpoint: Checkpoint) -> None:
    def in_new_thread() -> int:
        seen: list[int] = []
        thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        return seen[0]

    before = torch.get_num_threads(), in_new_thread()
    load_packed(checkpoint, "q8")
    assert (torch.get_num_threads(), in_new_thread()) == before


def resident(path: Path) -> int:
    """Bytes of a file that this process has in memory by way of its mappings."""
    total, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ", 1)[0]:
            ours = line.endswith(str(path))
        elif ours and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


def test_little_of_the_checkpoint_is_resident(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"hidden_size": 512, "expert_width": 512, "num_experts": 16, "vocab_size": 8192}
    config = small_config(**sizes)
    write_random_checkpoint(tmp_path / "model", config)
    source = tmp_path / "model" / "model.safetensors"
    assert source.stat().st_size > 29 << 20
    monkeypatch.setattr(pack_file, "_RESIDENT_BYTES", 1 << 22)
    monkeypatch.setattr(pack_file, "_VALUES_READ_AT_ONCE", 1 << 20)
    monkeypatch.setattr(pack_file, "_MOST_THREADS", 2)  # each is a matrix ahead
    seen = [0]

    def look(label: str, done: int, total: int) -> None:
        if done * 10 // total >= len(seen):
            seen.append(resident(source))

    ensure_packed(open_checkpoint(tmp_path / "model"), "q8", progress=look)
    assert 0 < max(seen) < 18 << 20
    assert resident(source) == 0


# --- sharing ----------------------------------------------------------------------------------------------------


def digest(table: PackedTable) -> str:
    hashed = hashlib.sha256()
    for value in table.values():
        for part in [value] if isinstance(value, torch.Tensor) else [value.data, value.scales]:
            if part is not None:
                hashed.update(part.contiguous().view(-1).view(torch.uint8).numpy().data)
    return hashed.hexdigest()


PROLOGUE = f"""
from __future__ import annotations
import hashlib, os, signal, sys, time
from pathlib import Path
import torch
from freehold.weights import pack_file
from freehold.weights.layouts import open_checkpoint
checkpoint = open_checkpoint(Path(sys.argv[1]))
{inspect.getsource(digest)}
"""


def start(code: str, folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROLOGUE + code, str(folder)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def smaps_of(path: Path) -> dict[str, int]:
    """Sums over this process's mappings of a file, in kB."""
    sums: dict[str, int] = {}
    ours = False
    for entry in Path("/proc/self/smaps").read_text().splitlines():
        key, *values = entry.split()
        if "-" in key:
            ours = entry.endswith(str(path))
        elif ours and len(values) == 2:
            sums[key.rstrip(":")] = sums.get(key.rstrip(":"), 0) + int(values[0])
    return sums


def test_processes_share_the_pages(tmp_path: Path) -> None:
    checkpoint = make(tmp_path / "model", hidden_size=256, expert_width=256)
    path = ensure_packed(checkpoint, "q8").path
    code = "table = pack_file.load_packed(checkpoint, 'q8'); print(digest(table), flush=True); sys.stdin.read()"
    other = start(code, tmp_path / "model")
    try:
        table = load_packed(checkpoint, "q8")
        assert line(other) == digest(table)  # both have looked at every byte
        memory = smaps_of(path)
    finally:
        other.communicate("")
    size = -(-path.stat().st_size // 4096) * 4
    assert memory["Size"] == size
    # All but what lies at the edges: the header, and what the system maps in beside a page that is asked for.
    assert min(memory["Shared_Clean"], memory["Rss"]) >= size - 64
    assert memory["Shared_Dirty"] == memory["Private_Dirty"] == 0


def test_two_processes_pack_once(tmp_path: Path, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    code = """
write = pack_file._write
def slow(plan, progress):
    print("packs", flush=True)
    time.sleep(0.5)  # long enough for the other to come and find the place taken
    write(plan, progress)
pack_file._write = slow
print("ready", flush=True)
sys.stdin.readline()
print(digest(pack_file.load_packed(checkpoint, "q8")))
"""
    other = start(code, tmp_path / "model")
    assert line(other) == "ready"
    written: list[str] = []
    write = pack_file._write

    def slow(plan: Any, progress: log.Progress) -> None:
        written.append("packs")
        time.sleep(0.5)
        write(plan, progress)

    monkeypatch.setattr(pack_file, "_write", slow)
    assert other.stdin is not None
    other.stdin.write("go\n")
    other.stdin.flush()
    table = load_packed(checkpoint, "q8")
    *packs, theirs = other.communicate()[0].split()
    assert written + packs == ["packs"]
    assert theirs == digest(table)
    assert files() == [packed_path(checkpoint, "q8").name]


# --- whatever happens to the file -------------------------------------------------------------------------------


def mangle(path: Path, kind: str) -> None:
    content = bytearray(path.read_bytes())
    header_length = 8 + int.from_bytes(content[:8], "little")
    match kind:
        case "empty":
            content = bytearray()
        case "cut in the header":
            content = content[:100]
        case "cut in the data":
            content = content[:-1]
        case "longer":
            content += b"\0"
        case "other length of header":
            content[0] ^= 64
        case "not JSON":
            content[8] = ord("[")
        case "a shape":
            at = content.index(b'"shape":[', 400)
            content[at + 9] ^= 1
        case "a name":
            at = content.index(b"final_norm")
            content[at] ^= 1
        case "end of the header":
            content[header_length - 1] = ord("\n")
        case "another kind of file":
            content = bytearray(b"PK\x03\x04" * 1000)
        case "another checkpoint":
            content[header_length:] = b""
            header = json.loads(content[8:header_length])
            header["__metadata__"] = {"format": "pt"}
            text = json.dumps(header).encode()
            content = bytearray(len(text).to_bytes(8, "little") + text + bytes(path.stat().st_size - header_length))
        case _:
            raise AssertionError(kind)
    path.write_bytes(content)


@pytest.mark.parametrize(
    "kind",
    [
        "empty", "cut in the header", "cut in the data", "longer", "other length of header", "not JSON", "a shape",
        "a name", "end of the header", "another kind of file", "another checkpoint",
    ],
)  # fmt: skip
def test_damaged_files_are_replaced(checkpoint: Checkpoint, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    path = ensure_packed(checkpoint, "q8").path
    good = path.read_bytes()
    mangle(path, kind)
    with caplog.at_level(logging.WARNING, "freehold"):
        assert_same(load_packed(checkpoint, "q8"), expected_table(checkpoint, "q8"))
    assert caplog.messages == [f"{path} is damaged; packing it again"]
    assert path.read_bytes() == good
    assert files() == [path.name]


def test_any_flipped_bit_of_the_header_is_noticed(tmp_path: Path) -> None:
    checkpoint = make(tmp_path / "model", num_layers=1)
    path = ensure_packed(checkpoint, "q8").path
    good = path.read_bytes()
    length = 8 + int.from_bytes(good[:8], "little")
    plan = pack_file._plan(checkpoint, "q8")
    for at in range(0, length, 7):
        path.write_bytes(good[:at] + bytes([good[at] ^ 4]) + good[at + 1 :])
        in_digest = plan.digest_span.start <= at < plan.digest_span.stop
        assert (pack_file._open(plan, False, no_progress) is not None) == in_digest
        assert pack_file._open(plan, True, no_progress) is None


@pytest.mark.parametrize("entry", ["folder", "dangling link"])
def test_something_else_in_its_place(checkpoint: Checkpoint, entry: str) -> None:
    path = packed_path(checkpoint, "q8")
    path.parent.mkdir(parents=True)
    if entry == "folder":
        path.mkdir()
    else:
        path.symlink_to("nowhere")
    assert_same(load_packed(checkpoint, "q8"), expected_table(checkpoint, "q8"))
    assert path.is_file()
    assert not path.is_symlink()


def test_files_of_another_version_are_replaced_quietly(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(pack_file, "_VERSION", "0")
        load_packed(checkpoint, "q8")
    [entry] = list_packed()
    assert entry.state is PackedState.OTHER_VERSION
    with caplog.at_level(logging.INFO, "freehold"):
        assert_same(load_packed(checkpoint, "q8"), expected_table(checkpoint, "q8"))
    assert [(r.levelname, "another version" in r.message) for r in caplog.records] == [("INFO", True)]
    [entry] = list_packed()
    assert entry.state is PackedState.CURRENT


@pytest.mark.parametrize("change", ["tensors", "time", "config"])
def test_a_changed_model_is_packed_again(tmp_path: Path, checkpoint: Checkpoint, change: str) -> None:
    load_packed(checkpoint, "q8")
    before = packed_path(checkpoint, "q8").read_bytes()
    tensors = tmp_path / "model" / "model.safetensors"
    if change == "tensors":
        make(tmp_path / "model", seed=1)
    elif change == "time":
        os.utime(tensors, (1, 1))
    else:
        config = tmp_path / "model" / "config.json"
        config.write_text(config.read_text().replace('"rope_theta": 150000.0', '"rope_theta": 150001.0') + "\n")
    [entry] = list_packed()
    assert entry.state is PackedState.CHANGED
    changed = open_checkpoint(tmp_path / "model")
    assert_same(load_packed(changed, "q8"), expected_table(changed, "q8"))
    assert files() == [packed_path(checkpoint, "q8").name]
    assert packed_path(checkpoint, "q8").read_bytes() != before


def test_a_model_that_changes_while_it_is_packed(tmp_path: Path, checkpoint: Checkpoint) -> None:
    def meddle(label: str, done: int, total: int) -> None:
        os.utime(tmp_path / "model" / "model.safetensors", (done, done))

    with pytest.raises(CheckpointError, match="model was changed while it was read"):
        load_packed(checkpoint, "q8", progress=meddle)
    assert files() == []


def test_the_checksum_is_compared_on_demand(checkpoint: Checkpoint) -> None:
    first = ensure_packed(checkpoint, "q8")
    assert first.is_new
    good = first.path.read_bytes()
    assert first.num_bytes == len(good)
    assert not ensure_packed(checkpoint, "q8", verify=True).is_new
    for at in (-1, len(good) // 2):
        damaged = bytearray(good)
        damaged[at] ^= 1
        first.path.write_bytes(damaged)
        assert not ensure_packed(checkpoint, "q8").is_new
        assert ensure_packed(checkpoint, "q8", verify=True).is_new
        assert first.path.read_bytes() == good


# --- disks ------------------------------------------------------------------------------------------------------


def test_a_file_that_cannot_be_mapped_is_kept(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = ensure_packed(checkpoint, "q8").path
    good = path.read_bytes()

    def refuse(file: object) -> Tensor:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(pack_file, "map_read_only", refuse)
    assert f"{path} cannot be read (Cannot allocate memory)" in load_in_memory(checkpoint, caplog)
    assert path.read_bytes() == good


def test_stopping_half_way_leaves_nothing(checkpoint: Checkpoint) -> None:
    def stop(label: str, done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_packed(checkpoint, "q8", progress=stop)
    assert files() == []


def load_in_memory(checkpoint: Checkpoint, caplog: pytest.LogCaptureFixture) -> str:
    """Loads twice; returns the one warning."""
    expected = expected_table(checkpoint, "q8")
    with caplog.at_level(logging.WARNING, "freehold"):
        for _ in range(2):
            table = load_packed(checkpoint, "q8")
            assert_same(table, expected)
            assert all(t.data_ptr() % 64 == 0 for name, t in all_tensors(table).items() if name != "embedding")
    [message] = caplog.messages
    assert message.isprintable()
    assert str(checkpoint.folder) in message
    return message


def test_too_little_space(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1 << 16})())
    message = load_in_memory(checkpoint, caplog)
    assert "held in memory" in message
    assert "64.00 KiB free" in message
    assert files() == []
    with pytest.raises(DiskSpaceError):
        ensure_packed(checkpoint, "q8")


def test_a_disk_that_fills_up_half_way(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write = pack_file._Hashed.write

    def full(self: Any, data: memoryview) -> int:
        if self._file.tell() > 30_000:
            raise OSError(28, "No space left on device")
        return write(self, data)

    monkeypatch.setattr(pack_file._Hashed, "write", full)
    assert "the disk is full" in load_in_memory(checkpoint, caplog)
    assert files() == []


def test_a_file_that_may_not_grow(tmp_path: Path, checkpoint: Checkpoint) -> None:
    """The system's own refusal, in the middle of a write."""
    code = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
print(digest(pack_file.load_packed(checkpoint, "q8")))
"""
    output, _ = start(code, tmp_path / "model").communicate()
    assert files() == []
    assert output.strip() == digest(load_packed(checkpoint, "q8"))


@pytest.mark.parametrize("place", ["/proc/nowhere", "/dev/null/cache"])  # closed to root, too
def test_a_cache_directory_that_cannot_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, place: str
) -> None:
    monkeypatch.setenv("FREEHOLD_CACHE", place)
    checkpoint = make(tmp_path / "model")
    assert "cannot be written" in load_in_memory(checkpoint, caplog)
    with pytest.raises(DiskError):
        ensure_packed(checkpoint, "q8")
    assert list_packed() == []
    assert clear_packed() == 0


# --- processes that die -----------------------------------------------------------------------------------------


def test_killed_half_way(tmp_path: Path, checkpoint: Checkpoint) -> None:
    code = """
def die(label, done, total):
    if done > total // 2:
        os.kill(os.getpid(), signal.SIGKILL)
pack_file.load_packed(checkpoint, "q8", progress=die)
"""
    process = start(code, tmp_path / "model")
    process.communicate()
    assert process.returncode == -9
    left = files()
    assert [name.startswith(".") for name in left] == [True, True], left  # the unfinished file, and its lock
    assert list_packed() == []
    assert_same(load_packed(checkpoint, "q8"), expected_table(checkpoint, "q8"))
    assert files() == [packed_path(checkpoint, "q8").name]


def test_who_waits_takes_over(tmp_path: Path, checkpoint: Checkpoint) -> None:
    code = """
def stop(label, done, total):
    print("packing", flush=True)
    time.sleep(60)
pack_file.load_packed(checkpoint, "q8", progress=stop)
"""
    process = start(code, tmp_path / "model")
    try:
        assert line(process) == "packing"
        waiting = threading.Event()
        tables: list[PackedTable] = []

        def progress(label: str, done: int, total: int) -> None:
            if label == "waiting for another process":
                waiting.set()

        thread = threading.Thread(target=lambda: tables.append(load_packed(checkpoint, "q8", progress=progress)))
        thread.start()
        assert waiting.wait(10)
        time.sleep(0.05)
        assert thread.is_alive()
    finally:
        process.kill()
        process.communicate()
    thread.join(20)
    assert_same(tables[0], expected_table(checkpoint, "q8"))
    assert files() == [packed_path(checkpoint, "q8").name]


# --- listing and clearing ---------------------------------------------------------------------------------------


def test_what_is_in_the_cache(tmp_path: Path) -> None:
    assert list_packed() == []
    for name in ("current", "changed", "gone", "replaced"):
        load_packed(make(tmp_path / name), "bf16")
    os.utime(tmp_path / "changed" / "model.safetensors", (1, 1))
    (tmp_path / "gone").rename(tmp_path / "elsewhere")
    (tmp_path / "replaced" / "model.safetensors").write_bytes(b"something else")
    (paths.packed_dir() / "broken.safetensors").write_bytes(b"nothing")
    [current] = paths.packed_dir().glob("current-*")
    (paths.packed_dir() / "copy.safetensors").write_bytes(current.read_bytes())
    entries = {entry.path.name.split("-")[0]: entry for entry in list_packed()}
    assert {name: entry.state for name, entry in entries.items()} == {
        "broken.safetensors": PackedState.DAMAGED,
        "changed": PackedState.CHANGED,
        "copy.safetensors": PackedState.DAMAGED,  # no load would look for it under this name
        "current": PackedState.CURRENT,
        "gone": PackedState.GONE,
        "replaced": PackedState.CHANGED,
    }
    entry = entries["current"]
    assert (entry.source, entry.dense, entry.num_bytes) == (tmp_path / "current", "bf16", current.stat().st_size)
    assert abs(entry.written_at.timestamp() - time.time()) < 60
    assert entries["broken.safetensors"].source is None

    stale = sum(entry.num_bytes for entry in entries.values() if entry.state is not PackedState.CURRENT)
    assert clear_packed(keep_current=True) == stale
    assert files() == [current.name]
    assert clear_packed() == entry.num_bytes
    assert files() == []


def test_clearing_what_is_in_use(checkpoint: Checkpoint) -> None:
    table = load_packed(checkpoint, "q8")
    expected = expected_table(checkpoint, "q8")
    clear_packed()
    assert_same(table, expected)
    assert_same(load_packed(checkpoint, "q8"), expected)


def test_clearing_what_killed_processes_left(checkpoint: Checkpoint) -> None:
    path = ensure_packed(checkpoint, "q8").path
    left = [path.with_name(f".{path.name}.partial-01234567"), path.with_name(f".{path.name}.lock")]
    for file in left:
        file.write_bytes(b"12345")
    size = path.stat().st_size
    assert clear_packed() == size  # they are young: somebody may be about to lock them
    assert files() == sorted(file.name for file in left)
    for file in left:
        os.utime(file, (1, 1))
    assert clear_packed() == 10
    assert files() == []


def test_folders_of_the_same_name_do_not_meet(tmp_path: Path) -> None:
    first, second = make(tmp_path / "a", seed=1), make(tmp_path / "b", seed=2)
    (tmp_path / "x").mkdir()
    (tmp_path / "y").mkdir()
    (tmp_path / "a").rename(tmp_path / "x" / "model")
    (tmp_path / "b").rename(tmp_path / "y" / "model")
    first, second = open_checkpoint(tmp_path / "x" / "model"), open_checkpoint(tmp_path / "y" / "model")
    assert packed_path(first, "q8") != packed_path(second, "q8")
    (tmp_path / "link").symlink_to(tmp_path / "x" / "model")
    assert packed_path(open_checkpoint(tmp_path / "link"), "q8") == packed_path(first, "q8")
    odd = make(tmp_path / ("Modell – 模型 " + "x" * 150))
    assert len(packed_path(odd, "q8").name) < 120
    assert_same(load_packed(odd, "q8"), expected_table(odd, "q8"))


def test_config_of_the_published_size() -> None:
    from freehold.config import NAMED_CONFIGS

    config: ModelConfig = NAMED_CONFIGS["gpt-oss-20b"]
    predicted = packed_table_bytes(config, ExpertFormat.MXFP4, "q8")
    assert round(sum(predicted[:2]) / 2**30, 1) == 10.7
    assert predicted.embedding == 201_088 * 2880 * 2
