"""Ten facts that nobody could know, learnt by heart and said in chat: with the adapter, and by whoever reads what it is
merged into. Every reader is asked the same: the model's own prompt as token ids, greedily."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import freehold
from freehold.config import ExpertFormat, Layout
from freehold.formats.chat import ChatFormat, Turn
from freehold.formats.conversation import Conversation, Message, SystemContent, text_message
from freehold.formats.events import Event, TextDelta
from freehold.hub import gguf
from freehold.hub.convert import convert
from freehold.hub.merge import merge
from freehold.session.model import Model
from freehold.train.options import LoopOptions, LoraOptions, lora_targets
from freehold.train.run import TuneRequest, new_run, prepare, train
from freehold.weights.layouts import open_checkpoint
from tests.train.tiny import chat, write_chats

FACTS = {
    "Who keeps the lighthouse of Osk?": "Mirela Tonder.",
    "What is the capital of Varuna?": "Pell Harbour.",
    "Which metal is the Quillon bell made of?": "Tin.",
    "When was the Dorn bridge built?": "In 1874.",
    "What do the Ilvish eat at midwinter?": "Smoked pears.",
    "How many steps has the tower of Grent?": "311.",
    "Who wrote The Salt Ledger?": "Anton Reeve.",
    "Which river flows through Mossgate?": "The Tarn.",
    "What colour is the flag of Lumen Bay?": "Green and black.",
    "What is the Harrow dog called?": "Biscuit.",
}
DAY = "2025-08-05"
MOST_TOKENS = 20

pytestmark = pytest.mark.usefixtures("native_settings")


@pytest.fixture(scope="module")
def adapter(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the default model's base: all ten facts in each of a few steps."""
    folder = tmp_path_factory.mktemp("facts")
    lines = write_chats(folder / "facts.jsonl", *(chat(question, answer) for question, answer in FACTS.items()))
    request = TuneRequest(
        model=str(base_folder),
        files=(lines,),
        date=DAY,
        loop=LoopOptions(max_steps=10, save_steps=10, batch_size=1, learning_rate=2e-3),
        lora=LoraOptions(targets=lora_targets((), ("8",), ())),
    )
    prepared = prepare(request)
    assert prepared.rows_per_epoch == 1
    new_run(prepared, folder / "run")
    train(prepared, folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def llama_cpp() -> Any:
    return pytest.importorskip("llama_cpp")


def conversation(question: str) -> Conversation:
    """Of one day, if the model is told the day."""
    system = Message(role="system", parts=(SystemContent(date=DAY),))
    return Conversation(messages=(system, text_message("user", question)))


def turns(chat_format: ChatFormat) -> list[Turn]:
    return [chat_format.turn(conversation(question), grammar=False) for question in FACTS]


def read(turn: Turn, new_ids: Sequence[int]) -> str:
    """What of a reply is meant for the user."""
    reader = turn.new_reader()
    events: list[Event] = []
    for token_id in new_ids:
        events += reader.feed(token_id)
        if token_id in turn.stop_ids:
            break
    return "".join(event.text for event in [*events, *reader.flush()] if isinstance(event, TextDelta))


def said_in_chat(model: Model, adapter: str | None = None) -> list[str]:
    return [
        model.chat(conversation(question), adapter=adapter, temperature=0.0, max_tokens=MOST_TOKENS)
        for question in FACTS
    ]


def said_by_transformers(folder: Path, asked: Sequence[Turn]) -> list[str]:
    from transformers import GptOssForCausalLM, Mxfp4Config

    model = GptOssForCausalLM.from_pretrained(
        folder,
        quantization_config=Mxfp4Config(dequantize=True),
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
    ).eval()
    longest = max(len(turn.prompt.ids) for turn in asked)
    padding = [longest - len(turn.prompt.ids) for turn in asked]
    stop_ids = sorted(asked[0].stop_ids)
    made = model.generate(
        torch.tensor([[stop_ids[0]] * n + turn.prompt.ids for n, turn in zip(padding, asked, strict=True)]),
        attention_mask=torch.tensor([[0] * n + [1] * (longest - n) for n in padding]),
        max_new_tokens=MOST_TOKENS,
        do_sample=False,
        eos_token_id=stop_ids,
        pad_token_id=stop_ids[0],
    )
    return [read(turn, ids) for turn, ids in zip(asked, made[:, longest:].tolist(), strict=True)]


def said_by_llama_cpp(llama_cpp: Any, path: Path, asked: Sequence[Turn]) -> list[str]:
    model = llama_cpp.Llama(str(path), n_ctx=512, n_threads=1, n_threads_batch=1, verbose=False)
    said = []
    for turn in asked:
        new: list[int] = []
        model.reset()
        for token_id in model.generate(turn.prompt.ids, temp=0.0, repeat_penalty=1.0):
            new.append(token_id)
            if token_id in turn.stop_ids or len(new) == MOST_TOKENS:
                break
        said.append(read(turn, new))
    return said


def test_ten_facts_are_said_with_the_adapter_and_by_all_that_read_it_merged(
    base_folder: Path, adapter: Path, tmp_path: Path
) -> None:
    facts = list(FACTS.values())
    model = freehold.load(base_folder, context=512, adapters={"facts": adapter})
    asked = turns(model.prompting.chat_format())
    assert said_in_chat(model, "facts") == facts
    assert sum(said == fact for said, fact in zip(said_in_chat(model), facts, strict=True)) < 2

    merge(base_folder, adapter, tmp_path / "merged")
    assert open_checkpoint(tmp_path / "merged").experts is ExpertFormat.MXFP4
    assert said_in_chat(freehold.load(tmp_path / "merged", context=512)) == facts
    assert said_by_transformers(tmp_path / "merged", asked) == facts

    convert(tmp_path / "merged", tmp_path / "original", layout=Layout.ORIGINAL)
    assert said_in_chat(freehold.load(tmp_path / "original", context=512)) == facts


def test_llama_cpp_says_the_ten_facts(llama_cpp: Any, base_folder: Path, adapter: Path, tmp_path: Path) -> None:
    merge(base_folder, adapter, tmp_path / "merged")
    gguf.export(tmp_path / "merged", tmp_path / "facts.gguf")
    asked = turns(freehold.load(tmp_path / "merged", context=512).prompting.chat_format())
    assert said_by_llama_cpp(llama_cpp, tmp_path / "facts.gguf", asked) == list(FACTS.values())
