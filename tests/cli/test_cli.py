"""The commands as a person or a script meets them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from freehold import __version__
from freehold.cli.main import app, main
from freehold.cli.reference import render
from freehold.errors import FreeholdError, UsageError
from freehold.model.lora import EXPERT_KINDS
from freehold.weights.layouts import open_checkpoint
from tests.checkpoints import write_adapter
from tests.cli.terminal import FREEHOLD, Terminal

ROOT = Path(__file__).parents[2]


def _run(*arguments: str | Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """The command in a process of its own: stdout and stderr apart, errors as the entry point shows them."""
    command = [*FREEHOLD, *map(str, arguments)]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=120, check=False)


MEMORY = r"freehold: memory: \S+ MiB weights \+ .* = .* of .* free\n"  # what a model takes is said as it is loaded


def _invoke(*arguments: str | Path) -> Result:
    """The command in this process; errors come out as exceptions."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    result = _invoke("synth", "tiny", folder)
    assert result.exit_code == 0, result.output
    return folder


def test_reference_page_is_up_to_date() -> None:
    assert (ROOT / "docs" / "cli.md").read_text() == render()


def test_help_imports_nothing_heavy() -> None:
    code = "import sys; from freehold.cli.main import app; print(sorted({'torch', 'numpy', 'rich'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_version() -> None:
    assert _invoke("--version").output == f"freehold {__version__}\n"


# --- chat and generate ------------------------------------------------------------------------------------------


def test_chat_answers_on_stdout_alone(default_folder: Path) -> None:
    done = _run("chat", "What is the capital of France?")
    assert done.returncode == 0
    assert "Paris" in done.stdout
    assert done.stdout.endswith("\n")
    plan, _, reasoning = done.stderr.partition("\n")
    assert re.fullmatch(MEMORY, plan + "\n")
    assert reasoning.strip()


def test_question_from_a_pipe(base_folder: Path) -> None:
    done = _run(
        "--verbose", "chat", "--model", "default-base", "--max-tokens", "5", stdin="What is the capital of France?\n"
    )
    assert done.returncode == 0
    assert len(done.stdout.split()) in range(1, 6)
    assert "5 new tokens" in done.stderr


def test_a_pipe_goes_in_front_of_the_question(default_folder: Path) -> None:
    piped = _run("--verbose", "chat", "--max-tokens", "1", "What is this?", stdin="one two three four five six\n")
    alone = _run("--verbose", "chat", "--max-tokens", "1", "What is this?")
    counts = [int(re.findall(r"(\d+) prompt tokens", done.stderr)[0]) for done in (piped, alone)]
    assert counts[0] > counts[1] + 5


def test_pipes_that_are_not_text() -> None:
    for command in ("chat", "generate"):
        done = subprocess.run([*FREEHOLD, command], input=b"caf\xe9", capture_output=True, timeout=60, check=False)
        assert done.returncode == 2
        assert done.stderr.startswith(b"error: the text from the pipe is not UTF-8")


def test_empty_questions(default_folder: Path) -> None:
    for arguments in (("chat",), ("chat", " \n")):
        done = _run(*arguments)
        assert done.returncode == 2
        assert done.stdout == ""
        assert "the question is empty" in done.stderr


def test_generate_is_reproducible(default_folder: Path) -> None:
    arguments = ("generate", "Once upon a time", "--max-tokens", "8", "--temperature", "1", "--seed")
    first, again, other = (_invoke(*arguments, seed).stdout for seed in ("1", "1", "2"))
    assert first == again != other


def test_an_adapter_has_its_say(default_folder: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", open_checkpoint(default_folder).config, EXPERT_KINDS, std=0.05)
    for command in (("generate", "Once upon a time"), ("chat", "Say something.")):
        asked = (*command, "--max-tokens", "48", "--temperature", "0")
        bare, tuned = _invoke(*asked), _invoke(*asked, "--adapter", adapter)
        assert (bare.exit_code, tuned.exit_code) == (0, 0)
        assert bare.stdout != tuned.stdout != ""
    missing = _invoke("generate", "Hello", "--adapter", tmp_path).exception
    assert isinstance(missing, FreeholdError)
    assert "name the folder of an adapter" in str(missing)
    assert isinstance(_invoke("chat", "Hi", "--script", "turns.jsonl", "--adapter", adapter).exception, UsageError)


def test_closed_pipe_is_no_crash(default_folder: Path) -> None:
    command = (
        f"{sys.executable} -c 'from freehold.cli.main import main; main()' generate Hello --max-tokens 30 | head -c 3"
    )
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=120, check=False)
    assert "Traceback" not in done.stderr


def test_errors_are_one_line(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, code, words in (
        (("chat", "-m", tmp_path / "nothing", "hi"), 1, "there is no model"),
        (("chat", "-m", tiny, "hi"), 1, "tokenizer.json"),
        (("chat", "-m", tiny, "--temperature", "-1", "hi"), 1, "tokenizer.json"),
        (("generate", "-m", tiny, "hi"), 1, "tokenizer.json"),
        (("inspect", tmp_path), 1, "config.json"),
        (("inspect", tiny, "--context", "0"), 2, "context must be between 1 and 2048"),
        (("synth", "huge", tmp_path / "x"), 2, "'huge'"),
        (("synth", "tiny", tiny), 2, "exists already"),
        (("convert", tiny, tiny), 2, "exists already"),
        (("convert", tmp_path / "nothing", tiny), 2, "exists already"),  # before anything is fetched
        (("merge", tmp_path / "nothing", tiny, tiny), 2, "exists already"),
        (("convert", tiny, tmp_path / "x.gguf"), 1, "holds no tokenizer.json"),
        (("convert", tiny, tmp_path / "x.gguf", "--layout", "hf"), 2, "--layout is for folders"),
        (("convert", tiny, tmp_path / "x", "--dense", "q8"), 2, "--dense is for .gguf files"),
    ):
        monkeypatch.setattr(sys, "argv", ["freehold", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        out, err = capsys.readouterr()
        assert stopped.value.code == code, err
        assert out == ""
        assert re.fullmatch(r"(freehold: .+\n)*error: .+\n", err), err
        assert words in err


def test_a_conversation_at_the_terminal(default_folder: Path) -> None:
    terminal = Terminal("chat")
    terminal.wait_for(r"/quit.*> $")
    terminal.type("What is the capital of France?\n")
    assert "Paris" in terminal.wait_for(r"Paris[^>]*> $")

    terminal.type('"""Count from one\nto a thousand in words."""\n')
    terminal.wait_for(r"words\.\"\"\"\s+\S+ \S+ ")  # it has begun to answer
    terminal.interrupt()
    terminal.wait_for(r"> $")  # the answer stopped, the program did not

    terminal.interrupt_until(r"leaves\s+> $")
    terminal.type("/system You are a pirate.\n")
    terminal.wait_for(r"instructions set.*\s+> $")
    terminal.type("/reset\n")
    terminal.wait_for(r"starts anew\s+> $")
    terminal.type("/nonsense\n")
    terminal.wait_for(r"there is no command /nonsense.*\s+> $")
    terminal.type("/quit\n")
    assert terminal.exit_code() == 0


# --- inspect, synth, convert, doctor ----------------------------------------------------------------------------


def test_inspect(tiny: Path) -> None:
    facts = json.loads(_invoke("inspect", tiny, "--json", "--context", "100").stdout)
    assert facts["architecture"]["experts"] == 8
    assert facts["parameters"]["total"] == 749_184
    assert facts["bytes_on_disk"] == sum(tensor["bytes"] for tensor in facts["tensors"])
    assert facts["memory"]["context"] == 100
    memory = facts["memory"]
    parts = sum(memory[f"{part}_bytes"] for part in ("dense", "experts", "kv_cache", "scratch"))
    assert memory["total_bytes"] == parts
    # layers, pages of 64 positions and one more for each of 32 sequences, 2 × 2 heads of 16 in bfloat16
    assert memory["kv_cache_bytes"] == 4 * (2 + 32) * 64 * 2 * 2 * 16 * 2
    assert facts["runs"]["device"] == "cpu"
    router = {"name": "model.layers.3.mlp.router.weight", "dtype": "BF16", "shape": [8, 64], "bytes": 1024}
    assert router in facts["tensors"]
    text = _invoke("inspect", tiny).stdout
    for words in ("8 of width 96, 4 active", "749,184", "experts in mxfp4", "8 × 64 × 3 × 16", "2048 tokens"):
        assert words in text, text


def test_inspect_plans_what_is_asked_for(tiny: Path) -> None:
    def memory(*options: str) -> dict[str, int]:
        facts = json.loads(_invoke("inspect", tiny, "--json", *options).stdout)
        sizes: dict[str, int] = facts["memory"]
        return sizes

    usual = memory()
    assert usual["context"] == 2048
    assert memory("--kv-dtype", "f32")["kv_cache_bytes"] == 2 * usual["kv_cache_bytes"]
    assert memory("--dense", "f32")["dense_bytes"] > 2 * usual["dense_bytes"]
    assert memory("--threads", "64")["scratch_bytes"] > memory("--threads", "1")["scratch_bytes"]
    assert json.loads(_invoke("inspect", tiny, "--json", "--dense", "bf16").stdout)["runs"]["dense"] == "bf16"
    assert isinstance(_invoke("inspect", tiny, "--dense", "int4").exception, UsageError)


@pytest.mark.usefixtures("native_settings")
def test_options_reach_the_model(tiny: Path, default_folder: Path) -> None:
    """Each is honoured, or refused by the one who would have to honour it."""
    for options, words in (
        (("--dense", "int4"), "dense must be one of"),
        (("--kv-dtype", "fp8"), "the KV cache's type must be one of"),
        (("--threads", "0"), "threads must be between"),
        (("--context", "0"), "context must be between 1 and 2048"),
        (("--dtype", "float16"), "dtype must be"),
        (("--device", "nonsense"), "device 'nonsense'"),
    ):
        for command in ("chat", "generate"):
            error = _invoke(command, "-m", tiny, *options, "hi").exception
            assert isinstance(error, FreeholdError)
            assert words in str(error)
    prompt = "one two three four five six seven eight"
    short = _invoke("generate", prompt, "--context", "9", "--temperature", "0", "--dense", "f32", "--threads", "1")
    assert short.exit_code == 0
    assert len(short.stdout.split()) <= 9
    assert isinstance(_invoke("generate", prompt, "--context", "3").exception, UsageError)


def test_inspect_counts_what_is_on_disk(tiny: Path) -> None:
    facts = json.loads(_invoke("inspect", tiny, "--json").stdout)
    on_disk = (tiny / "model.safetensors").stat().st_size
    assert facts["bytes_on_disk"] < on_disk < facts["bytes_on_disk"] + 20_000  # the header


def test_synth_from_a_config_file(tiny: Path, tmp_path: Path) -> None:
    result = _invoke("synth", tiny / "config.json", tmp_path / "again", "--layout", "original", "--seed", "5")
    assert result.exit_code == 0
    assert json.loads(_invoke("inspect", tmp_path / "again", "--json").stdout)["layout"] == "original"


def test_convert(tiny: Path, tmp_path: Path) -> None:
    assert _invoke("convert", tiny, tmp_path / "bf16", "--experts", "bf16").exit_code == 0
    facts = json.loads(_invoke("inspect", tmp_path / "bf16", "--json").stdout)
    assert (facts["layout"], facts["experts"]) == ("hf", "bf16")


def test_convert_to_gguf(default_folder: Path, tmp_path: Path) -> None:
    done = _run("convert", "default", tmp_path / "model.gguf", "--dense", "bf16")
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == f"{tmp_path / 'model.gguf'} is complete\n"
    # 134.5 million parameters: 106 million in experts at 4.25 bits, the embedding twice at 16
    assert 200e6 < (tmp_path / "model.gguf").stat().st_size < 215e6


def test_doctor(default_folder: Path) -> None:
    facts = json.loads(_invoke("doctor", "--json").stdout)
    assert facts["freehold"] == __version__
    assert facts["libraries"]["torch"].startswith("2.13.0")
    assert facts["default_model"]["path"] == str(default_folder)
    assert facts["default_model"]["ready"] is facts["works_offline"] is True
    assert set(facts["ops"]) >= {"rms_norm", "kv_write", "attention", "moe"}
    text = _invoke("doctor").stdout
    for words in (facts["cpu"]["name"], "native ops", facts["cache"], "default model is in the cache"):
        assert words in text


def test_doctor_proves_the_air_gap(default_folder: Path) -> None:
    gap = json.loads(_invoke("doctor", "--offline", "--json").stdout)["air_gap"]
    assert gap["holds"] is (gap["trouble"] is None)
    assert len(gap["attempts"]) > 10 or gap["trouble"]
    assert any("pip fetches one wheel" in reason for reason in gap["connections_ever_opened_for"])
    text = _invoke("doctor", "--offline").stdout
    assert ("TCP by a child process: refused" in text) is gap["holds"]
    assert "pip fetches one wheel" in text


def test_doctor_names_trouble(default_folder: Path) -> None:
    environment = dict(os.environ, FREEHOLD_CPU="sse9")
    done = subprocess.run([*FREEHOLD, "doctor", "--json"], capture_output=True, text=True, env=environment, check=True)
    facts = json.loads(done.stdout)
    assert facts["instruction_set"] == "none"
    assert "'sse9'" in facts["kernels_trouble"]
    assert set(facts["ops"].values()) == {"reference"}


def test_doctor_before_the_first_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FREEHOLD_CACHE", str(tmp_path))
    assert json.loads(_invoke("doctor", "--json").stdout)["works_offline"] is False
    assert "unless its wheel is put at" in _invoke("doctor").stdout
    assert not list(tmp_path.iterdir())


def test_serve_refuses_a_models_options_beside_a_script(tmp_path: Path) -> None:
    script = tmp_path / "turns.jsonl"
    script.write_text('{"answer": "Hi."}\n')
    for option in (("--model", "gpt-oss-20b"), ("--threads", "2"), ("--no-harmony",)):
        done = _run("serve", "--script", script, *option, "--host", "nowhere.invalid")  # never listens, come what may
        assert done.returncode == 2 and "--script" in done.stderr and done.stdout == ""
