"""A model of two layers with a tokeniser of bytes and a chat template, to be tuned in seconds; and chats for it."""

import json
from pathlib import Path
from typing import Any

import torch

from freehold.config import ExpertFormat, Layout
from freehold.formats.byte_level import CHARACTERS
from freehold.formats.harmony.vocabulary import CONTROL_TOKENS
from freehold.formats.templates import CHATML
from freehold.formats.tokenizer import Tokenizer
from freehold.weights.layouts import TableSource, write_checkpoint
from tests.checkpoints import random_table, small_config

CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def make_tiny_model(folder: Path, *, harmony: bool = False) -> Path:
    """MXFP4 experts, which the native kernels run; `harmony`: with Harmony's control tokens, and a ChatML template."""
    config = small_config(vocab_size=300, max_context=1024 if harmony else 256)
    folder.mkdir(parents=True)
    source = TableSource(random_table(config, dtype=torch.bfloat16), origin="a test")
    write_checkpoint(folder, config, source, layout=Layout.HF, experts=ExpertFormat.MXFP4)
    save_tokenizer(folder, harmony=harmony)
    return folder


def save_tokenizer(folder: Path, *, harmony: bool = False) -> None:
    """Of bytes, with ChatML."""
    control = [*dict.fromkeys([*CONTROL, *(CONTROL_TOKENS if harmony else ())])]
    tokens = [*control, *CHARACTERS, "he", "ll"]
    types = [3] * len(control) + [1] * (len(tokens) - len(control))
    Tokenizer.from_gguf(tokens, types, ["h e", "l l"], "smollm").save(folder / "tokenizer.json")
    (folder / "chat_template.jinja").write_text(CHATML)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": CONTROL.index("<|im_end|>")}))


def chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def write_chats(path: Path, *chats: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(each) + "\n" for each in chats))
    return path
