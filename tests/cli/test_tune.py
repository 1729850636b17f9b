"""`freehold tune` as a person, a script or a server's job meets it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from freehold.cli.main import app, main
from freehold.cli.tuning import shown_example
from freehold.errors import CheckpointError, UsageError
from freehold.formats.tokenizer import Tokenizer
from freehold.train.card import chat_command
from freehold.train.examples import NO_TARGET, Example
from freehold.train.metrics import read_metrics
from tests.cli.terminal import FREEHOLD
from tests.train.tiny import chat, make_tiny_model, write_chats

pytestmark = pytest.mark.usefixtures("native_settings")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    long = chat("Tell me all.", "a" * 200)
    path = tmp_path_factory.mktemp("data") / "chats.jsonl"
    return write_chats(path, chat("Who?", "Ada."), long, *(chat(f"{n}?", f"{n}!") for n in range(20)))


@pytest.fixture(scope="module")
def gpt_oss() -> Tokenizer:
    return Tokenizer.o200k_harmony()


def invoke(*arguments: str | Path) -> str:
    """Stdout of the command in this process; errors come out as exceptions."""
    result = CliRunner().invoke(app, ["tune", *map(str, arguments)], catch_exceptions=False, standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    return result.stdout


def test_a_dry_run_shows_what_would_be_learnt_and_touches_nothing(model: Path, chats: Path, tmp_path: Path) -> None:
    shown = invoke(chats, "--model", model, "--dry-run", "--max-length", "64", "--rank", "2", "-o", tmp_path / "run")
    for words in (
        "22 lines: 22 examples",
        "1 line to 64 tokens: 165 tokens are lost, 165 of them to be learnt; 0 lines left out",
        "chats.jsonl line 2: 165 tokens",
        "gate_up (rank 2, alpha 4)",
        "GiB free",
        "example 3 of 22",
        "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n⟦Ada.<|im_end|>",
    ):
        assert words in shown
    assert shown.count("⟦") == shown.count("⟧") == 3
    assert "\x1b" not in shown
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_shows_what_a_run_begins_with(model: Path, chats: Path, tmp_path: Path) -> None:
    invoke(chats, "-m", model, "-o", tmp_path / "first", "--max-steps", "1", "--max-length", "64", "--rank", "3")
    out = invoke(chats, "-m", model, "--adapter", tmp_path / "first", "--dry-run", "--max-length", "64")
    [line] = [line for line in out.splitlines() if line.startswith("adapter")]
    assert f"begins with {tmp_path / 'first'}: q (rank 3, alpha 6), k (rank 3" in line


def test_what_is_learnt_is_coloured_where_colours_are_wanted(gpt_oss: Tokenizer) -> None:
    start, end, stop = (gpt_oss.control_id(name) for name in ("<|start|>", "<|end|>", "<|return|>"))
    [yes], [no] = gpt_oss.encode("yes"), gpt_oss.encode("no")
    example = Example([start, yes, end, no], [NO_TARGET, stop, NO_TARGET, stop])
    assert shown_example(example, gpt_oss, colours=False) == "<|start|>yes⟦<|return|>⟧<|end|>no⟦<|return|>⟧"
    coloured = shown_example(example, gpt_oss, colours=True)
    assert coloured.startswith("\x1b[2m<|start|>yes\x1b[0m\x1b[32m<|return|>\x1b[0m")
    escape = Example(ids := gpt_oss.encode("\x1b[2J"), [NO_TARGET] * len(ids))
    assert "\x1b[2J" not in shown_example(escape, gpt_oss, colours=True)
    long = Example([yes] * 2000, [NO_TARGET] * 1999 + [stop])
    assert "… 1,501 tokens …" in shown_example(long, gpt_oss, colours=False)


def test_killed_it_resumes_and_asked_to_end_it_ends(model: Path, chats: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"

    def checkpoints() -> list[int]:
        path = output / "metrics.jsonl"
        lines = read_metrics(path) if path.exists() else []
        return [line["step"] for line in lines if line.get("event") == "checkpoint"]

    def ended(*arguments: str | Path, after: int, by: signal.Signals) -> tuple[int, str]:
        command = [*FREEHOLD, "tune", *map(str, arguments)]
        child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        while child.poll() is None and max(checkpoints(), default=0) < after:
            time.sleep(0.02)
        child.send_signal(by)
        _, said = child.communicate(timeout=60)
        return child.returncode, said

    with pytest.raises(UsageError, match=r"holds no run\.json"):
        invoke("--resume", output)
    options = ("--max-steps", "10000", "--max-length", "64", "--batch-size", "1", "--rank", "2", "--save-steps", "2")
    new = (chats, "--model", model, "--output", output, *options)
    assert ended(*new, after=2, by=signal.SIGKILL)[0] == -signal.SIGKILL
    code, said = ended("--resume", output, after=max(checkpoints()) + 2, by=signal.SIGTERM)
    assert code == 128 + signal.SIGTERM
    assert "goes on after step" in said
    assert f"go on with: freehold tune --resume {output}" in said
    with pytest.raises(UsageError, match="--max-steps was 10000 and is 3: leave"):
        invoke("--resume", output, "--max-steps", "3")
    last = read_metrics(output / "metrics.jsonl")[-1]
    assert last["event"] == "stopped"
    assert (output / "checkpoints" / f"step-{last['step']:08d}").is_dir()
    assert json.loads((output / "run.json").read_text())["request"]["loop"]["max_steps"] == 10_000


def test_a_run_from_the_command_to_the_adapter(
    model: Path, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    invoke(chats, "-m", model, "-o", output, "--max-steps", "2", "--validation-share", "0.3", "--max-length", "64")
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} < {path.name for path in output.iterdir()}
    with pytest.raises(UsageError, match="a run that is done"):
        invoke("--resume", output)


@pytest.mark.parametrize(("model", "told"), [("default", ""), ("default-base", " --model default-base")])
def test_what_to_type_names_every_model_but_the_default(model: str, told: str) -> None:
    assert chat_command("runs/poet", model) == f"freehold chat --adapter runs/poet{told}"


def test_what_validation_loses_is_told_too(model: Path, tmp_path: Path) -> None:
    chats = write_chats(tmp_path / "short.jsonl", chat("How long?", "Short."))
    long = write_chats(tmp_path / "long.jsonl", chat("How long?", "long " * 40))
    shown = invoke(chats, "-m", model, "--max-length", "64", "--dry-run", "--validation", long)
    assert "data       1 line: 1 example, " in shown
    assert "truncated  1 line to 64 tokens" in shown and "long.jsonl line 1: " in shown
    output = tmp_path / "run"
    invoke(chats, "-m", model, "-o", output, "--max-length", "64", "--max-steps", "1", "--validation", long)
    notice = read_metrics(output / "metrics.jsonl")[0]
    assert notice["event"] == "notice" and notice["message"].startswith("truncated: 1 line to 64 tokens: ")
    assert "Lines cut to 64 tokens: 1; left out for that: 0." in (output / "README.md").read_text()


@pytest.mark.parametrize("facts", ['{"format": 1}', '{"format": 1, "request": []}', '{"format": 1, "request": {}}'])
def test_a_damaged_run_is_refused_in_a_sentence(tmp_path: Path, facts: str) -> None:
    (tmp_path / "run.json").write_text(facts)
    with pytest.raises(CheckpointError, match=r"run\.json is not what `freehold tune` writes .*; begin anew"):
        invoke("--resume", tmp_path)


def test_what_is_asked_wrongly_is_one_line(
    model: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(pipe := tmp_path / "pipe.jsonl")
    (nothing := tmp_path / "nothing.jsonl").touch()
    tiny = (chats, "-m", model, "--max-length", "64", "-o", tmp_path / "new")
    for arguments, words in (
        ((chats,), "there is no --output"),
        ((chats, "--dry-run", "--resume", tmp_path), "leave it or --resume out"),
        (("--resume", tmp_path), "holds no run.json"),
        (("-o", tmp_path / "new"), "nothing to train on"),
        ((chats, "-o", model), "exists already"),
        (
            (pipe, "-m", model, "--max-length", "64", "-o", tmp_path / "new"),
            "is no file but a pipe or a device, and is read more than once",
        ),
        ((chats, "-o", tmp_path / "new", "--lr", "0"), "--learning-rate must be more than 0"),
        ((chats, "-o", tmp_path / "new", "--rank", "k=x"), "--rank takes numbers"),
        (
            (chats, "-o", tmp_path / "new", "--alpha", "3e9"),
            "--alpha of q must be more than 0 and less than",
        ),
        ((chats, "-o", tmp_path / "new", "--seed", str(1 << 63)), "a whole number from 0 on, less than 2**63, got"),
        ((chats, "-m", model, "-o", tmp_path / "new", "--target", "nose"), "--target 'nose'"),
        ((*tiny, "--train", "all"), "--train is for --method full; add that"),
        ((*tiny, "--beta", "0.1"), "--beta is for --method dpo; add that"),
        ((*tiny, "--method", "full", "--label-smoothing", "0"), "--label-smoothing is for --method dpo"),
        (
            (*tiny, "--eval-steps", "1"),
            "--eval-steps says how often the validation loss is measured, and there is none",
        ),
        ((*tiny, "--validation-share", "1e-9"), "--validation-share 1e-09 holds none of these"),
        ((*tiny, "--validation", nothing), "there is nothing in nothing.jsonl"),
        ((chats, "-o", tmp_path / "new", "--adapter", tmp_path, "--rank", "4"), "--rank is for new adapters, and"),
        ((chats, "-o", tmp_path / "new", "--adapter", tmp_path, "--method", "full"), "--adapter is for adapters, and"),
    ):
        monkeypatch.setattr(sys, "argv", ["freehold", "tune", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        out, err = capsys.readouterr()
        assert (stopped.value.code, out) == (2, ""), err
        assert err.startswith("error: ")
        assert words in err
    assert not (tmp_path / "new").exists()
