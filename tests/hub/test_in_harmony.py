"""What a model's files tell other programs once it has learnt Harmony."""

import json
from pathlib import Path

import pytest

from freehold.config import DenseFormat
from freehold.errors import CheckpointError
from freehold.formats.templates import CHATML
from freehold.hub import gguf
from freehold.hub.convert import side_files
from freehold.hub.folder import open_folder
from freehold.weights.gguf import GgufFile
from tests.train.tiny import make_tiny_model

HARMONY = "{{ '<|start|>user<|message|>' }}"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_tiny_model(tmp_path / "model", harmony=True)


def with_files(model: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (model / name).write_bytes(content)
    return model


@pytest.mark.parametrize("where", ["file", "config", "named"])
def test_another_template_becomes_harmonys_wherever_it_stands(model: Path, where: str) -> None:
    if where != "file":
        (model / "chat_template.jinja").unlink()
        template = CHATML if where == "config" else [{"name": "default", "template": CHATML}]
        about = {"chat_template": template, "eos_token": "<|im_end|>", "model_max_length": 5}
        (model / "tokenizer_config.json").write_text(json.dumps(about))
    before = side_files(model)
    after = side_files(model, harmony=True)
    assert b"<|start|>assistant" in after["chat_template.jinja"]
    about = json.loads(after["tokenizer_config.json"])
    assert about == ({} if where == "file" else {"model_max_length": 5}) | {"eos_token": "<|return|>"}
    assert after["tokenizer.json"] == before["tokenizer.json"]


def test_a_gguf_file_of_it_has_the_template_and_the_end(model: Path, tmp_path: Path) -> None:
    with_files(model, side_files(model, harmony=True))
    folder = open_folder(model)
    assert folder.tokenizer is not None
    ends = [folder.tokenizer.control_id(name) for name in ("<|return|>", "<|call|>", "<|im_end|>")]
    assert json.loads((model / "generation_config.json").read_text()) == {"eos_token_id": ends}
    gguf.export(model, tmp_path / "model.gguf", dense=DenseFormat.BF16)
    file = GgufFile(tmp_path / "model.gguf")
    assert file.value("tokenizer.ggml.eos_token_id") == file.value("tokenizer.ggml.eot_token_id") == ends[0]
    assert file.value("tokenizer.chat_template") == folder.chat_template


@pytest.mark.parametrize("place", ["file", "config", "nowhere"])
def test_a_model_that_spoke_harmony_before_keeps_its_files(model: Path, place: str) -> None:
    (model / "chat_template.jinja").unlink()
    if place == "file":
        (model / "chat_template.jinja").write_text(HARMONY)
    elif place == "config":
        (model / "tokenizer_config.json").write_text(json.dumps({"chat_template": HARMONY}))
    assert side_files(model, harmony=True) == side_files(model)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff"])
@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json"])
def test_a_file_that_cannot_be_changed_is_named(model: Path, name: str, content: bytes) -> None:
    with_files(model, {name: content})
    with pytest.raises(CheckpointError, match=name):
        side_files(model, harmony=True)
