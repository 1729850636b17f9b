"""`freehold merge`, from an adapter that `freehold tune` has made to models that need none."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from freehold.cli.main import app
from freehold.errors import CheckpointError, FreeholdError, TrainingDataError, UsageError
from freehold.weights import mxfp4
from freehold.weights.gguf import GgufFile
from freehold.weights.layouts import open_checkpoint
from freehold.weights.mxfp4 import Mxfp4Tensor
from tests.train.tiny import chat, make_tiny_model, write_chats

pytestmark = pytest.mark.usefixtures("native_settings")


def invoke(*arguments: str | Path) -> str:
    """Stdout of the command in this process; errors come out as exceptions."""
    result = CliRunner().invoke(app, [*map(str, arguments)], catch_exceptions=False, standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    return result.stdout


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chats(tmp_path_factory.mktemp("data") / "chats.jsonl", *(chat(f"{n}?", f"{n}!") for n in range(20)))


@pytest.fixture(scope="module")
def run(model: Path, chats: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that held something out."""
    output = tmp_path_factory.mktemp("runs") / "counts"
    invoke(
        "tune", chats, "--model", model, "--output", output, "--max-length", "64", "--max-steps", "20", "--lr", "0.02",
        "--validation-share", "0.3", "--rank", "4",
    )  # fmt: skip
    return output


def receipt(path: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads(path.read_text())
    return facts


def test_an_adapter_becomes_a_model_and_a_receipt_says_what_that_kept(model: Path, run: Path, tmp_path: Path) -> None:
    shown = invoke("merge", model, run, tmp_path / "merged")
    facts = receipt(tmp_path / "merged" / "merge_receipt.json")
    assert facts["touched"] == {"dense": 8, "matrices": 16, "of_matrices": 16}
    measured = facts["measured"]
    assert measured["adapter_loss"] < measured["base_loss"]
    assert measured["stored_share"] > 0.9
    assert f"{measured['stored_share']:.1%}" in shown


def test_what_a_second_run_held_out_is_measured_though_the_adapter_it_began_with_is_gone(
    model: Path, run: Path, chats: Path, tmp_path: Path
) -> None:
    shutil.copytree(run, tmp_path / "first")
    invoke(
        "tune", chats, "--model", model, "--adapter", tmp_path / "first", "--output", tmp_path / "second",
        "--max-length", "64", "--max-steps", "2", "--validation-share", "0.3",
    )  # fmt: skip
    shutil.rmtree(tmp_path / "first")
    invoke("merge", model, tmp_path / "second", tmp_path / "merged")
    measured = receipt(tmp_path / "merged" / "merge_receipt.json")["measured"]
    assert measured["adapter_loss"] < measured["base_loss"]


def test_the_receipt_says_by_hashes_what_was_measured_on(model: Path, run: Path, chats: Path, tmp_path: Path) -> None:
    def measured(name: str, *options: str | Path) -> dict[str, Any]:
        invoke("merge", model, run, tmp_path / name, *options)
        found: dict[str, Any] = receipt(tmp_path / name / "merge_receipt.json")["measured"]
        return found

    digest = hashlib.sha256(chats.read_bytes()).hexdigest()
    file = {"name": "chats.jsonl", "bytes": chats.stat().st_size, "sha256": digest}
    held_out, given = measured("held-out"), measured("given", "--measure", chats)
    assert held_out["text"] == {"files": [file], "held_out": True}
    assert given["text"] == {"files": [file], "held_out": False}
    assert measured("again")["tokens_sha256"] == held_out["tokens_sha256"] != given["tokens_sha256"]
    other = write_chats(tmp_path / "other.jsonl", *(chat(f"{n}?", f"{n}.") for n in range(20)))
    other_measured = measured("other", "--measure", other)
    assert other_measured["tokens_sha256"] != given["tokens_sha256"]
    assert other_measured["text"]["files"][0]["sha256"] == hashlib.sha256(other.read_bytes()).hexdigest()


def test_what_a_run_held_out_is_not_measured_on_once_its_file_has_changed(
    model: Path, run: Path, chats: Path, tmp_path: Path
) -> None:
    before = chats.read_bytes()
    try:
        write_chats(chats, *(chat(f"{n}?", f"{n}.") for n in range(20)))  # as many lines, of other words
        with pytest.raises(UsageError, match=r"chats.jsonl is not what it was when .* name a file with --measure"):
            invoke("merge", model, run, tmp_path / "merged")
        assert not [*tmp_path.iterdir()]
        invoke("merge", model, run, tmp_path / "merged", "--measure", chats)  # which says what it is
    finally:
        chats.write_bytes(before)


def test_a_run_from_another_machine_is_measured_here(model: Path, run: Path, chats: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(run, elsewhere)
    facts = json.loads((run / "run.json").read_text())
    facts["request"] |= {"device": "cuda:0", "dtype": "bfloat16", "dense": None, "threads": 64}
    (elsewhere / "run.json").write_text(json.dumps(facts))
    invoke("merge", model, elsewhere, tmp_path / "merged")
    assert receipt(tmp_path / "merged" / "merge_receipt.json")["measured"]["text"]["held_out"]
    facts["request"]["files"] = [str(tmp_path / "gone.jsonl")]
    (elsewhere / "run.json").write_text(json.dumps(facts))
    with pytest.raises(UsageError, match=r"gone.jsonl, on which .* --measure, or measure nothing"):
        invoke("merge", model, elsewhere, tmp_path / "again")


def test_what_a_foreign_folder_says_of_its_run_is_not_trusted(
    model: Path, run: Path, chats: Path, tmp_path: Path
) -> None:
    foreign = tmp_path / "foreign"
    shutil.copytree(run, foreign)
    facts = json.loads((run / "run.json").read_text())
    for damaged in (
        {"format": 1},
        {"format": 1, "request": []},
        {**facts, "request": {**facts["request"], "files": 7}},
        {**facts, "request": {**facts["request"], "loop": {"no_such_option": 1}}},
        {**facts, "data": None},
        {**facts, "data": {**facts["data"], "files": []}},
    ):
        (foreign / "run.json").write_text(json.dumps(damaged))
        with pytest.raises(CheckpointError, match=r"run.json is not what `freehold tune` writes"):
            invoke("merge", model, foreign, tmp_path / "merged")
        assert [path.name for path in tmp_path.iterdir()] == ["foreign"]


def test_of_a_gguf_file_what_is_in_it_is_measured(model: Path, run: Path, chats: Path, tmp_path: Path) -> None:
    def measured(name: str, *options: str) -> dict[str, Any]:
        invoke("merge", model, run, tmp_path / name, "--measure", chats, *options)
        path = tmp_path / name
        path = path.with_name(f"{name}.merge_receipt.json") if path.suffix else path / "merge_receipt.json"
        found: dict[str, Any] = receipt(path)["measured"]
        return found

    folder, exact = measured("merged"), measured("exact.gguf", "--dense", "f32")
    assert exact == folder  # nothing was rounded on the way
    assert measured("plain.gguf", "--dense", "bf16", "--experts", "bf16")["stored_loss"] != folder["stored_loss"]
    rounded = measured("rounded.gguf", "--dense", "q8")
    assert rounded["stored_loss"] != folder["stored_loss"] and rounded["stored_kl"] != folder["stored_kl"]
    alike = ("tokens_sha256", "num_targets", "base_loss", "adapter_loss", "merged_loss", "merged_kl", "text")
    assert {name: rounded[name] for name in alike} == {name: folder[name] for name in alike}


def test_a_gguf_file_has_its_receipt_beside_it(model: Path, run: Path, chats: Path, tmp_path: Path) -> None:
    shown = invoke("merge", model, run, tmp_path / "merged.gguf", "--dense", "bf16", "--measure", chats, "--json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged.gguf", "merged.gguf.merge_receipt.json"]
    (tmp_path / "merged.gguf").rename(tmp_path / "kept.gguf")
    with pytest.raises(UsageError, match=r"merged\.gguf\.merge_receipt\.json exists already"):
        invoke("merge", model, run, tmp_path / "merged.gguf")
    (tmp_path / "kept.gguf").rename(tmp_path / "merged.gguf")
    invoke("merge", model, run, tmp_path / "LOUD.GGUF", "--measure", chats)
    assert receipt(tmp_path / "LOUD.GGUF.merge_receipt.json")["measured"]["num_targets"]
    assert json.loads(shown) == receipt(tmp_path / "merged.gguf.merge_receipt.json")
    file = GgufFile(tmp_path / "merged.gguf")
    assert file.value("general.name") == "merged"
    invoke("merge", model, run, tmp_path / "merged", "--measure-tokens", "0")
    experts = open_checkpoint(tmp_path / "merged").table()["layers.1.down"]
    assert isinstance(experts, Mxfp4Tensor)
    assert torch.equal(file.tensor("blk.1.ffn_down_exps.weight"), mxfp4.unpack(experts))


def test_adapters_from_elsewhere_are_measured_on_what_is_given(
    model: Path, run: Path, chats: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (bare / name).write_bytes((run / name).read_bytes())
    invoke("merge", model, bare, tmp_path / "unmeasured")
    assert receipt(tmp_path / "unmeasured" / "merge_receipt.json")["measured"] is None
    invoke("merge", model, bare, tmp_path / "measured", "--measure", chats, "--measure-tokens", "50")
    assert 0 < receipt(tmp_path / "measured" / "merge_receipt.json")["measured"]["num_targets"] < 50


def test_what_cannot_be_is_refused_before_anything_is_written(
    model: Path, run: Path, chats: Path, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text("{}\n")
    cases: list[tuple[list[str | Path], type[FreeholdError], str]] = [
        ([model, run, tmp_path / "out", "--dense", "q8"], UsageError, "--dense is for .gguf files"),
        ([model, run, tmp_path / "out.gguf", "--layout", "hf"], UsageError, "--layout is for folders"),
        ([model, run, tmp_path / "out", "--measure-tokens", "-1"], UsageError, "--measure-tokens must be"),
        ([model, run, tmp_path / "out", "--measure-tokens", "1"], UsageError, "raise --measure-tokens"),
        ([model, run, tmp_path / "out", "--measure", bad], TrainingDataError, "bad.jsonl line 1"),
        ([make_tiny_model(tmp_path / "other"), run, tmp_path / "out"], UsageError, "--any-base"),
    ]
    for arguments, error, words in cases:
        with pytest.raises(error, match=words):
            invoke("merge", *arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.jsonl", "other"]
    invoke("merge", tmp_path / "other", run, tmp_path / "out", "--any-base", "--measure-tokens", "0")
    assert receipt(tmp_path / "out" / "merge_receipt.json")["measured"] is None
