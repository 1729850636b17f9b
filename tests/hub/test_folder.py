"""What a model folder says besides its tensors."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from freehold.config import NAMED_CONFIGS
from freehold.errors import CheckpointError
from freehold.formats.templates import CHATML
from freehold.formats.tokenizer import Tokenizer
from freehold.hub.folder import open_folder
from freehold.sampling import GenerationDefaults, Sampling
from freehold.weights.synth import write_random_checkpoint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "tiny"
    write_random_checkpoint(path, NAMED_CONFIGS["tiny"])
    return path


def _say(folder: Path, name: str, content: Any) -> None:
    (folder / name).write_text(json.dumps(content))


def test_a_bare_folder(folder: Path) -> None:
    opened = open_folder(folder)
    assert opened.tokenizer is None
    assert opened.chat_template is None
    assert opened.defaults == GenerationDefaults()


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"eos_token_id": 7}, GenerationDefaults(stop_ids=frozenset({7}))),
        (
            # as published with gpt-oss
            {
                "bos_token_id": 199998,
                "do_sample": True,
                "eos_token_id": [200002, 199999, 200012],
                "pad_token_id": 199999,
            },
            GenerationDefaults(stop_ids=frozenset({200002, 199999, 200012})),
        ),
        ({"do_sample": False, "temperature": 0.6}, GenerationDefaults(sampling=Sampling(temperature=0.0))),
        (
            {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": 0.05},
            GenerationDefaults(sampling=Sampling(temperature=0.6, top_p=0.9, top_k=20, min_p=0.05)),
        ),
        ({"max_new_tokens": 9}, GenerationDefaults(max_tokens=9)),
        ({"temperature": None, "eos_token_id": None}, GenerationDefaults()),
    ],
)
def test_generation_defaults(folder: Path, said: dict[str, Any], expected: GenerationDefaults) -> None:
    _say(folder, "generation_config.json", said)
    assert open_folder(folder).defaults == expected


@pytest.mark.parametrize(
    "said",
    [
        {"eos_token_id": "</s>"},
        {"eos_token_id": [1, "2"]},
        {"eos_token_id": {"a": 1}},
        {"eos_token_id": True},
        {"temperature": "hot"},
        {"temperature": float("inf")},
        {"temperature": True},
        {"top_k": 2.5},
        {"max_new_tokens": 0},
        {"max_new_tokens": "many"},
        {"top_p": 0},
        {"min_p": -1},
        {"temperature": -1},
    ],
)
def test_damaged_generation_defaults(folder: Path, said: dict[str, Any]) -> None:
    _say(folder, "generation_config.json", said)
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        open_folder(folder)


def test_templates_in_a_file_and_in_the_config(folder: Path) -> None:
    _say(folder, "tokenizer_config.json", {"chat_template": "from the config", "bos_token": {"content": "<s>"}})
    opened = open_folder(folder)
    assert (opened.chat_template, opened.template_variables) == ("from the config", {"bos_token": "<s>"})
    several = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    _say(folder, "tokenizer_config.json", {"chat_template": several, "eos_token": "</s>", "unk_token": None})
    opened = open_folder(folder)
    assert (opened.chat_template, opened.template_variables) == ("plain", {"eos_token": "</s>"})
    (folder / "chat_template.jinja").write_text(CHATML)
    assert open_folder(folder).chat_template == CHATML


def test_foreign_tokenisers_are_refused(folder: Path) -> None:
    Tokenizer.o200k_harmony().save(folder / "tokenizer.json")
    with pytest.raises(CheckpointError, match="201088 tokens, the model 512"):
        open_folder(folder)


def test_odd_token_names_are_passed_over(folder: Path) -> None:
    several = [{"name": ["default"], "template": "x"}, {"name": "default", "template": "plain"}]
    odd = {"bos_token": {"content": None}, "pad_token": 3, "eos_token": "</s>", "chat_template": several}
    _say(folder, "tokenizer_config.json", odd)
    opened = open_folder(folder)
    assert opened.template_variables == {"eos_token": "</s>"}
    assert opened.chat_template == "plain"


def test_where_stop_ids_come_from(base_folder: Path, tmp_path: Path) -> None:
    """generation_config.json, else config.json, else the tokeniser's own end; a chat without any is refused."""
    copy = tmp_path / "copy"
    shutil.copytree(base_folder, copy)
    (copy / "generation_config.json").unlink()
    assert open_folder(copy).defaults.stop_ids == {2}  # eos_token in tokenizer_config.json
    config = json.loads((copy / "config.json").read_text())
    _say(copy, "config.json", config | {"eos_token_id": [5, 6]})
    assert open_folder(copy).defaults.stop_ids == {5, 6}
    _say(copy, "generation_config.json", {"eos_token_id": 7})
    assert open_folder(copy).defaults.stop_ids == {7}


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_broken_json_names_its_file(folder: Path, name: str) -> None:
    (folder / name).write_text('{"unfinished": ')
    with pytest.raises(CheckpointError, match=name):
        open_folder(folder)
