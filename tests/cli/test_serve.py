"""`freehold serve` as who starts it meets it: what cannot be is said at once, before any model is looked at."""

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from freehold.cli.main import app
from freehold.errors import UsageError
from freehold.serve.tuning.trainer import Trainer
from freehold.train.options import LEARNING_RATES


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--cors-origin", "foo"], "an origin is wanted"),
        (["--allowed-host", "a b"], "a host's name is wanted"),
        (["--max-concurrency", "0"], "--max-concurrency must be 1 or more"),
        (["--send-timeout", "inf"], "--send-timeout must be more than 0 and at most"),
        (["--request-timeout", "nan"], "--request-timeout must be more than 0 and at most"),
        (["--served-model-name", ""], "give --served-model-name one that clients can send"),
        (["--tls-key", "key.pem"], "give its certificate with --tls-cert"),
        (["--script", "turns.jsonl", "--model", "m", "--threads", "2"], "leave --model, --threads out"),
        (["--script", "turns.jsonl", "--no-harmony"], "leave --harmony out"),
        (["--tokens-per-second", "5"], "is for a --script"),
        (["--script", "turns.jsonl", "--adapter", "poet=runs/poet"], "leave --adapter out"),
        (["--adapter", "runs/poet"], "--adapter takes NAME=DIR"),
        (["--adapter", "poet="], "--adapter takes NAME=DIR"),
        (["--adapter", "=runs/poet"], "--adapter takes NAME=DIR"),
        (["--adapter", "a:b=runs/poet"], "no colon can be in --adapter's name"),
        (["--adapter", "a=x", "--adapter", "a=y"], "--adapter a is given twice"),
    ],
)
def test_what_cannot_be_is_refused_before_a_model_is_loaded(options: list[str], says: str) -> None:
    asked = ["serve", "--port", "0", *options]
    if "--script" not in options:
        asked += ["--model", "/no/such/folder"]  # whoever looks there says so instead
    result = CliRunner().invoke(app, asked)
    assert isinstance(result.exception, UsageError)
    assert says in str(result.exception)


@pytest.mark.parametrize(
    ("options", "harmony"), [([], None), (["--tools", "my.py"], True), (["--tools", "my.py", "--no-harmony"], False)]
)
def test_a_model_speaks_harmony_where_there_are_tools_for_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, options: list[str], harmony: bool | None
) -> None:
    monkeypatch.chdir(tmp_path)
    spoken: list[Any] = []
    monkeypatch.setattr("freehold.session.model.load", lambda *_, **__: None)
    monkeypatch.setattr("freehold.session.served.serve_model", lambda *_, harmony, **__: spoken.append(harmony))
    monkeypatch.setattr("freehold.serve.start.start", lambda load, *_, **__: load() or 0)
    assert CliRunner().invoke(app, ["serve", *options]).exit_code == 0
    assert spoken == [harmony]


def test_jobs_learn_as_fast_as_the_same_method_does_on_the_command_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    trainers: list[Trainer] = []

    def start(*_: Any, trainer: Trainer, **__: Any) -> int:
        trainers.append(trainer)
        return 0

    monkeypatch.setattr("freehold.serve.start.start", start)
    assert CliRunner().invoke(app, ["serve", "--tuning", str(tmp_path)]).exit_code == 0
    (trainer,) = trainers
    for kind, method in (("supervised", "lora"), ("dpo", "dpo")):
        asked = {"type": kind, kind: {"hyperparameters": {"learning_rate_multiplier": 1}}}
        command = trainer.arguments(asked, training=Path("a"), validation=None, output=Path("o"), seed=0, resume=False)
        assert float(command[command.index("--learning-rate") + 1]) == LEARNING_RATES[method]
