"""`freehold serve` as who starts it meets it: what cannot be is said at once, before any model is looked at."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from freehold.cli.main import app
from freehold.errors import UsageError
from tests.serve.process import Process


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
    ],
)
def test_what_cannot_be_is_refused_before_a_model_is_loaded(options: list[str], says: str) -> None:
    asked = ["serve", "--port", "0", *options]
    if "--script" not in options:
        asked += ["--model", "/no/such/folder"]  # whoever looks there says so instead
    result = CliRunner().invoke(app, asked)
    assert isinstance(result.exception, UsageError)
    assert says in str(result.exception)


def test_a_log_in_json_has_nothing_else_in_it(tmp_path: Path) -> None:
    script = tmp_path / "turns.jsonl"
    script.write_text('{"answer": "Yes."}\n')
    with Process(tmp_path, script, "--log-json") as server:
        assert server.request("GET", "/health")[0] == 200
        assert server.terminate() == 0
        said = [json.loads(line)["message"] for line in server.log.splitlines()]
        assert said == [f"serving on http://127.0.0.1:{server.address[1]}", "request"]
