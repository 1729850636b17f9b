"""`freehold bench` and `freehold receipt`: that their figures are what they say, whatever those are."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

import freehold
import freehold.session.bench
from freehold.cli.main import app
from freehold.config import NAMED_CONFIGS
from freehold.errors import BackendError, DiskError, FreeholdError, UsageError
from freehold.kernels import backends
from freehold.session.receipt import text
from freehold.weights.layouts import open_checkpoint
from freehold.weights.synth import write_random_checkpoint

pytestmark = pytest.mark.skipif(backends.native() is None, reason="the native kernels are not built")


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


def bench(*arguments: object) -> dict[str, Any]:
    result = invoke("bench", "--synthetic", "tiny", "--generate", 4, "--rounds", 2, "--json", *arguments)
    facts: dict[str, Any] = json.loads(result.stdout)
    return facts


def test_bench_of_random_weights() -> None:
    facts = bench("--prompt", 16, "--prompt", 40, "--depth", 90, "--depth", 0)
    prefill = {(row["tokens"], row["depth"]): row for row in facts["prefill"]}
    decode = {row["depth"]: row for row in facts["decode"]}
    assert set(prefill) == {(16, 0), (40, 0), (16, 90), (40, 90)}
    assert set(decode) == {0, 90}
    assert facts["prefill_tok_s"] == prefill[40, 0]["prefill_tok_s"]
    assert facts["decode_tok_s"] == decode[0]["decode_tok_s"]
    for row in prefill.values():
        assert row["gmac_s"] * 1e9 == pytest.approx(row["prefill_tok_s"] * facts["macs_per_token"])
        assert 0 < row["share_of_peak"] < 1
    assert decode[0]["gb_s"] * 1e9 == pytest.approx(decode[0]["decode_tok_s"] * facts["bytes_per_token"])
    assert decode[90]["gb_s"] / decode[90]["decode_tok_s"] > decode[0]["gb_s"] / decode[0]["decode_tok_s"]
    assert decode[0]["share_of_least_depth"] == 1
    assert facts["peak_rss_bytes"] > 0
    assert facts["read_bandwidth"] > 1e8
    assert facts["load_seconds"] > 0


def test_bench_of_several_streams() -> None:
    rows = bench("--prompt", "16,20", "--concurrency", "1,3", "--concurrency", 5)["streams"]
    assert [(row["streams"], row["prompt"], row["tokens"]) for row in rows] == [(1, 16, 4), (3, 16, 4), (5, 16, 4)]
    for row in rows:
        assert row["generated_tok_s"] > 0
        assert 0 < row["seconds_per_token"] < row["first_token_seconds"] + 4 * row["seconds_per_token"]
        # As many streams as there are share the time that they all take.
        alone = row["first_token_seconds"] + 3 * row["seconds_per_token"]
        assert row["generated_tok_s"] <= row["streams"] * 4 / alone * 2


def test_bench_counts_what_a_token_costs(tmp_path: Path) -> None:
    """Every weight that a token meets, counted from the tensors of such a checkpoint."""
    config = NAMED_CONFIGS["tiny"]
    write_random_checkpoint(tmp_path / "tiny", config)
    share = config.num_active_experts / config.num_experts
    macs = 0.0
    for name, tensor in open_checkpoint(tmp_path / "tiny").table().items():
        if name.startswith("layers.") and len(tensor.shape) > 1 and not name.endswith(".bias"):
            macs += math.prod(tensor.shape) * (share if len(tensor.shape) == 3 else 1)
    assert bench("--prompt", 4)["macs_per_token"] == macs


def test_bench_of_a_model_as_text(default_folder: Path) -> None:
    result = invoke(
        "bench", default_folder, "--prompt", 8, "--generate", 2, "--rounds", 1, "--depth", "0,30", "--concurrency", 2
    )
    for words in (
        "prefill",
        "decode",
        "streams",
        "% of depth 0",
        "GB/s read",
        "peak resident memory",
        str(default_folder),
    ):
        assert words in result.stdout


def test_bench_draws_a_chart(tmp_path: Path) -> None:
    bench("--prompt", 4, "--png", tmp_path / "chart.png")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["--prompt", "0"], UsageError, "prompt must be 1 or more, got 0"),
        (["--depth", "-1"], UsageError, "depth must be 0 or more, got -1"),
        (["--prompt", "5,x"], UsageError, "--prompt takes whole numbers, with commas between several, got 5,x"),
        (["--concurrency", "2,0"], UsageError, "concurrency must be 1 or more, got 2, 0"),
        (["--rounds", "0"], UsageError, "rounds must be 1 or more, got 0"),
        (["--depth", "900000000"], UsageError, "context must be between 1 and"),
        (["--png", "/nowhere/chart.png"], DiskError, "no folder /nowhere"),
    ],
)
def test_bench_refuses_before_it_makes_a_model(
    arguments: list[str], error: type[FreeholdError], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(freehold.session.bench, "random_packed_table", None)
    with pytest.raises(error, match=message):
        invoke("bench", "--synthetic", "tiny", *arguments)


def test_bench_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(BackendError, match=r"pip install 'freehold\[bench\]'"):
        invoke("bench", "--synthetic", "tiny", "--png", tmp_path / "chart.png")


def test_bench_needs_native_kernels_for_random_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "native", lambda: None)
    with pytest.raises(BackendError, match="native CPU kernels"):
        invoke("bench", "--synthetic", "tiny")


def test_receipt(default_folder: Path) -> None:
    result = invoke("receipt", default_folder, "--tokens", 40, "--tokens", 130, "--json")
    receipts = {row["num_tokens"]: row for row in json.loads(result.stdout)["receipts"]}
    assert set(receipts) == {40, 130}
    for row in receipts.values():
        assert 1e-5 < row["mean_kl"] < 0.01
        assert row["mean_kl"] < row["largest_kl"]
        assert 0.9 < row["top1_agreement"] <= 1
        assert row["native_perplexity"] == pytest.approx(row["reference_perplexity"], rel=0.05)

    model = freehold.load(str(default_folder))
    assert model.tokenizer is not None
    tokens = model.tokenizer.encode(text())[:41]
    loss = torch.nn.functional.cross_entropy(model.logits(tokens[:-1]), torch.tensor(tokens[1:]))
    assert receipts[40]["native_perplexity"] == pytest.approx(math.exp(loss), rel=1e-3)


def test_receipt_as_text_and_of_too_little(default_folder: Path) -> None:
    assert "perplexity" in invoke("receipt", default_folder, "--tokens", 8).stdout
    with pytest.raises(UsageError, match="at least 2 tokens"):
        invoke("receipt", default_folder, "--tokens", 1)
