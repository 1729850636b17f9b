"""What --model may name, and what is said when it names nothing."""

from pathlib import Path

import huggingface_hub.constants
import pytest

from freehold.errors import ModelNotFoundError
from freehold.hub.find import find_model


def test_a_folder_wins(tmp_path: Path) -> None:
    assert find_model(str(tmp_path)) == tmp_path


def test_default_needs_no_network_once_made(default_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert find_model("default") == default_folder


def test_names_in_our_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FREEHOLD_CACHE", str(tmp_path))
    (tmp_path / "models" / "mine").mkdir(parents=True)
    assert find_model("mine") == tmp_path / "models" / "mine"


def test_names_in_hugging_faces_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--openai--gpt-oss-20b"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    assert find_model("openai/gpt-oss-20b") == snapshot


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("gpt-oss-20b", "hf download openai/gpt-oss-20b"),
        ("openai/gpt-oss-20b", "hf download openai/gpt-oss-20b"),
        ("./nowhere", "name one that holds a gpt-oss checkpoint"),
        ("a b c", "name one that holds a gpt-oss checkpoint"),
        ("../../etc/nothing", "name one that holds a gpt-oss checkpoint"),
        ("~nobody-of-that-name/x", "check the path"),
        ("x" * 300, "check the path"),
    ],
)
def test_advice(name: str, advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelNotFoundError) as caught:
        find_model(name)
    assert repr(name) in str(caught.value)
    assert advice in str(caught.value)
