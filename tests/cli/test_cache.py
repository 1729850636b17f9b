"""`freehold pack` and `freehold cache`, in a cache directory of their own."""

import json
import os
import re
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from freehold.cli.main import app, main
from freehold.errors import CheckpointError, DiskError, UsageError


def _invoke(*arguments: str | Path) -> Result:
    """The command in this process; errors come out as exceptions."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FREEHOLD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def tiny(tmp_path: Path, cache: Path) -> Path:
    assert _invoke("synth", "tiny", tmp_path / "tiny").exit_code == 0
    return tmp_path / "tiny"


@pytest.fixture
def full(cache: Path, tiny: Path) -> Path:
    """A cache with something of each kind."""
    assert _invoke("synth", "tiny", cache / "models" / "mine").exit_code == 0
    (cache / "downloads").mkdir()
    (cache / "downloads" / "a.whl").write_bytes(bytes(1000))
    for model, dense in ((tiny, "q8"), (tiny, "bf16"), ("mine", "q8")):
        assert _invoke("pack", model, "--dense", dense).exit_code == 0
    return cache


def _listed() -> dict[tuple[str, str], dict[str, object]]:
    facts = json.loads(_invoke("cache", "list", "--json").stdout)
    assert facts["total_bytes"] == sum(entry["bytes"] for entry in facts["entries"])
    return {(entry["kind"], entry["name"].partition("-")[0]): entry for entry in facts["entries"]}


# --- pack -------------------------------------------------------------------------------------------------------


def test_pack_prints_where(tiny: Path, cache: Path) -> None:
    first = _invoke("pack", tiny)
    path = Path(first.stdout.strip())
    assert path.parent == cache / "packed"
    assert path.name.endswith("-q8.safetensors")
    assert re.fullmatch(r"[\d.]+ MiB of weights packed in [\d.]+ s\n", first.stderr)
    written = path.stat()
    again = _invoke("pack", tiny, "--verify")
    assert again.stdout == first.stdout
    assert "packed already, and every byte is as it was written" in again.stderr
    assert path.stat() == written


def test_pack_verify_mends(tiny: Path) -> None:
    path = Path(_invoke("pack", tiny).stdout.strip())
    good = path.read_bytes()
    path.write_bytes(good[:-1] + b"\1")
    assert "packed already" in _invoke("pack", tiny).stderr
    mended = _invoke("pack", tiny, "--verify")
    assert f"{path} is damaged; packing it again" in mended.stderr
    assert path.read_bytes() == good


def test_pack_says_what_is_wrong(tiny: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = _invoke("pack", tiny, "--dense", "mxfp4")
    assert isinstance(refused.exception, UsageError)
    (tiny / "model.safetensors").write_bytes(b"")
    assert isinstance(_invoke("pack", tiny).exception, CheckpointError)
    assert not (cache / "packed").exists()


def test_pack_fails_where_nothing_can_be_written(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FREEHOLD_CACHE", "/proc/nowhere")
    refused = _invoke("pack", tiny)
    assert isinstance(refused.exception, DiskError)
    assert "/proc/nowhere/packed" in str(refused.exception)


# --- cache list -------------------------------------------------------------------------------------------------


def test_an_empty_cache(cache: Path) -> None:
    assert json.loads(_invoke("cache", "list", "--json").stdout) == {
        "cache": str(cache),
        "entries": [],
        "total_bytes": 0,
    }
    assert _invoke("cache", "list").stdout.splitlines()[0] == str(cache)
    assert _invoke("cache", "clear").stdout == "0.0 MiB freed\n"
    assert not cache.exists()


def test_everything_is_listed(full: Path, tiny: Path) -> None:
    (full / "packed" / ".half.safetensors.partial-0123abcd").write_bytes(bytes(10))
    (full / "packed" / ".half.safetensors.lock").write_bytes(b"")
    (full / "notes.txt").write_text("not ours")
    entries = _listed()
    assert sorted(entries) == [
        ("downloads", "a.whl"), ("models", "mine"), ("packed", ".half.safetensors.partial"), ("packed", "mine"),
        ("packed", "tiny"),
    ]  # fmt: skip
    model = entries["models", "mine"]
    assert model["bytes"] == sum(path.stat().st_size for path in (full / "models" / "mine").iterdir())
    assert model["state"] == "complete"
    packed = entries["packed", "tiny"]
    assert (packed["state"], packed["model"], packed["dense"]) == ("current", str(tiny), "q8")
    assert packed["bytes"] == Path(str(packed["path"])).stat().st_size
    assert entries["packed", ".half.safetensors.partial"]["state"] == "unfinished"
    text = _invoke("cache", "list").stdout
    for words in ("models     mine", "a.whl", f"current, of {tiny}", "unfinished", "total"):
        assert words in text, text


# --- cache clear ------------------------------------------------------------------------------------------------


def test_clear_removes_packed_weights_alone(full: Path) -> None:
    size = sum(path.stat().st_size for path in (full / "packed").iterdir())
    assert _invoke("cache", "clear").stdout == f"{size / 2**20:.1f} MiB freed\n"
    assert sorted(_listed()) == [("downloads", "a.whl"), ("models", "mine")]


def test_clear_stale(full: Path, tiny: Path) -> None:
    os.utime(full / "models" / "mine" / "model.safetensors", (1, 1))
    left = full / "packed" / ".half.safetensors.partial-0123abcd"
    left.write_bytes(bytes(10))
    os.utime(left, (1, 1))
    assert _invoke("cache", "clear", "--stale").exit_code == 0
    assert [entry["model"] for (kind, _), entry in _listed().items() if kind == "packed"] == [str(tiny)]
    assert len(list((full / "packed").iterdir())) == 2
    refused = _invoke("cache", "clear", "--stale", "downloads")
    assert isinstance(refused.exception, UsageError)
    assert "--stale is about packed weights" in str(refused.exception)


def test_clear_by_name(full: Path) -> None:
    assert _invoke("cache", "clear", "downloads").exit_code == 0
    assert sorted(_listed()) == [("models", "mine"), ("packed", "mine"), ("packed", "tiny")]
    name = str(_listed()["packed", "mine"]["name"])
    assert _invoke("cache", "clear", name).exit_code == 0
    assert sorted(_listed()) == [("models", "mine"), ("packed", "tiny")]
    refused = _invoke("cache", "clear", "mine", "yours")
    assert isinstance(refused.exception, UsageError)
    assert "nothing in the cache is called 'yours'" in str(refused.exception)
    assert ("models", "mine") in _listed()


@pytest.mark.parametrize("name", ["mine", "models"])
def test_models_are_not_removed_by_a_slip(full: Path, name: str) -> None:
    refused = _invoke("cache", "clear", name)
    assert isinstance(refused.exception, UsageError)
    assert "confirm with --yes" in str(refused.exception)
    assert ("models", "mine") in _listed()
    assert _invoke("cache", "clear", name, "--yes").exit_code == 0
    assert ("models", "mine") not in _listed()
    assert "model gone" in _invoke("cache", "list").stdout


def test_a_link_in_the_cache_is_removed_as_a_link(full: Path, tiny: Path) -> None:
    (full / "models" / "linked").symlink_to(tiny)
    assert _invoke("cache", "clear", "models", "--yes").exit_code == 0
    assert (tiny / "config.json").is_file()
    assert list((full / "models").iterdir()) == []


def test_errors_are_one_line(cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["freehold", "cache", "clear", "nothing"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert re.fullmatch(r"error: .*see `freehold cache list`\n", capsys.readouterr().err)
