"""A model folder as a GGUF file: what the file says of the tokeniser, what is refused, and llama.cpp as the oracle."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import freehold
from freehold.config import DenseFormat, ExpertFormat, Layout, ModelConfig, RopeConfig, alternating_windows
from freehold.errors import CheckpointError, DiskSpaceError, UnsupportedError, UsageError
from freehold.formats.byte_level import CHARACTERS
from freehold.formats.conversation import Conversation
from freehold.formats.tokenizer import Tokenizer
from freehold.hub import gguf
from freehold.weights import gguf_export
from freehold.weights.gguf import GgufFile
from freehold.weights.layouts import TableSource, write_checkpoint
from tests.checkpoints import random_table, small_config

TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "don't DON'T 1234567 3.14\n\n\tdef f(x):\n        return x  # naïve façade",
    "<|im_start|>user<|endoftext|> is only text here",
    "日本語の文章、한국어 문장, Быстрая лиса 🙂",
)
READ_BY_FROM_GGUF = ("tokens", "token_type", "merges", "pre")


def make_folder(folder: Path, config: ModelConfig, *, layout: Layout = Layout.HF) -> Path:
    """A random model of order-1 logits; in the Hugging Face layout with a tokeniser of bytes."""
    folder.mkdir()
    source = TableSource(random_table(config, dtype=torch.bfloat16), origin="the test")
    write_checkpoint(folder, config, source, layout=layout, experts=ExpertFormat.BF16)
    if layout is Layout.HF:
        control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
        tokens = [*control, *CHARACTERS, "he", "ll"]
        types = [3] * len(control) + [1] * (len(tokens) - len(control))
        tokenizer = Tokenizer.from_gguf(tokens, types, ["h e", "l l"], "smollm")
        tokenizer.save(folder / "tokenizer.json")
    return folder


def vocabulary_of(file: GgufFile) -> Tokenizer:
    assert file.value("tokenizer.ggml.model") == "gpt2"
    return Tokenizer.from_gguf(*(file.value(f"tokenizer.ggml.{key}") for key in READ_BY_FROM_GGUF))


@pytest.fixture
def small_folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "small", small_config(vocab_size=300))


# --- what the file says -----------------------------------------------------------------------------------------


def test_the_default_model(default_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "default.gguf"
    seen: list[tuple[int, int]] = []
    gguf.export(default_folder, path, progress=lambda label, done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1]
    file = GgufFile(path)
    ours, theirs = Tokenizer.from_file(default_folder / "tokenizer.json"), vocabulary_of(file)
    assert theirs.control_tokens == ours.control_tokens
    assert theirs.vocab_size == ours.vocab_size
    for text in TEXTS:
        assert theirs.encode(text) == ours.encode(text)
    assert file.value("general.name") == "default"
    assert file.value("tokenizer.ggml.pre") == "smollm"
    roles = {"bos": "<|endoftext|>", "eos": "<|return|>", "eot": "<|return|>", "padding": "<|endoftext|>"}
    for role, name in roles.items():
        assert file.value(f"tokenizer.ggml.{role}_token_id") == ours.control_id(name)
    assert file.value("tokenizer.ggml.add_bos_token") is False
    assert file.value("tokenizer.chat_template") == (default_folder / "chat_template.jinja").read_text()
    assert torch.equal(file.tensor("output.weight"), file.tensor("token_embd.weight"))


def test_gpt_oss_without_a_tokenizer_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_folder(tmp_path / "original", small_config(vocab_size=201_088), layout=Layout.ORIGINAL)
    written: dict[str, Any] = {}  # the gguf package takes a minute to read so many tokens
    monkeypatch.setattr(gguf_export, "write", lambda file, metadata, tensors, progress: written.update(metadata))
    gguf.export(folder, tmp_path / "model.gguf")
    assert f"the model has no chat template, so {tmp_path / 'model.gguf'} has none" in caplog.text
    ids = {role: written[f"tokenizer.ggml.{role}_token_id"] for role in ("bos", "eos", "eot", "padding")}
    assert ids == {"bos": 199_998, "eos": 200_002, "eot": 200_002, "padding": 199_999}
    assert written["tokenizer.ggml.pre"] == "gpt-4o"


def test_rows_without_a_token_are_marked_unused(small_folder: Path, tmp_path: Path) -> None:
    gguf.export(small_folder, tmp_path / "model.gguf")
    file = GgufFile(tmp_path / "model.gguf")
    tokens, types = file.value("tokenizer.ggml.tokens"), file.value("tokenizer.ggml.token_type")
    assert len(tokens) == len(types) == len(set(tokens)) == 300
    assert types[261:] == [5] * 39
    assert 5 not in types[:261]
    assert "tokenizer.ggml.bos_token_id" not in file.metadata  # nothing is called <|startoftext|> here


# --- refusals ---------------------------------------------------------------------------------------------------


def test_failures_leave_nothing(small_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = tmp_path / "there.gguf"
    there.write_text("mine")
    with pytest.raises(UsageError, match=r"there\.gguf exists already"):
        gguf.export(small_folder, there)
    assert there.read_text() == "mine"

    with monkeypatch.context() as full:
        usage = shutil.disk_usage(tmp_path)
        full.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        with pytest.raises(DiskSpaceError, match=r"model\.gguf needs .* and its disk has 0\.97 KiB free"):
            gguf.export(small_folder, tmp_path / "model.gguf")

    config = small_folder / "config.json"
    sound = config.read_text()
    config.write_text(sound.replace('"swiglu_limit": 7.0', '"swiglu_limit": 9.0'))
    with pytest.raises(UnsupportedError, match="at 7, this model at 9"):
        gguf.export(small_folder, tmp_path / "model.gguf")
    config.write_text(sound)

    (small_folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"small holds no tokenizer\.json.*copy it there"):
        gguf.export(small_folder, tmp_path / "model.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small", "there.gguf"]


def test_a_damaged_tensor_leaves_nothing(tmp_path: Path) -> None:
    config = small_config(vocab_size=300)
    table = random_table(config)
    table["layers.1.down"][-1].fill_(torch.nan)  # type: ignore[union-attr]
    folder = make_folder(tmp_path / "small", config)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    write_checkpoint(folder, config, TableSource(table, origin="the test"), layout=Layout.HF, experts=ExpertFormat.BF16)
    with pytest.raises(CheckpointError, match=r"small: layers\.1\.down of expert 3: .*NaN"):
        gguf.export(folder, tmp_path / "model.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small"]


# --- llama.cpp as the oracle ------------------------------------------------------------------------------------


@pytest.fixture
def llama_cpp() -> Any:
    return pytest.importorskip("llama_cpp")


def opened(llama_cpp: Any, path: Path, **options: Any) -> Any:
    model = llama_cpp.Llama(str(path), n_ctx=512, n_batch=512, n_threads=1, n_threads_batch=1, verbose=False, **options)
    path.unlink()  # it is mapped; pytest keeps folders for a while, and these files are large
    return model


def greedy(model: Any, tokens: list[int], count: int) -> list[int]:
    new: list[int] = []
    model.reset()
    for token in model.generate(tokens, temp=0.0, repeat_penalty=1.0):
        new.append(token)
        if len(new) == count or token == model.token_eos():
            break
    return new


PROMPTS = ("What is the capital of France?", "Explain what a CPU does.", "List three fruits.", "Why is the sky blue?")


def test_the_same_greedy_text(llama_cpp: Any, reference_ops: None, default_folder: Path, tmp_path: Path) -> None:
    """All in float32, so that llama.cpp rounds no activations: it does to 8 bits in front of MXFP4 and Q8_0."""
    gguf.export(default_folder, tmp_path / "f32.gguf", dense=DenseFormat.F32, experts=ExpertFormat.BF16)
    theirs = opened(llama_cpp, tmp_path / "f32.gguf")
    ours = freehold.load(default_folder, device="cpu", dtype="float32")
    prompts = [
        ours.prompting.chat_format().render(Conversation.from_openai([{"role": "user", "content": question}])).ids
        for question in PROMPTS
    ]
    for prompt in (*prompts, *(ours.tokenizer.encode(text) for text in TEXTS[:2])):  # type: ignore[union-attr]
        new = greedy(theirs, prompt, 40)
        assert len(new) > 10
        likeliest = ours.logits([*prompt, *new]).argmax(-1).tolist()
        assert likeliest[len(prompt) - 1 : -1] == new  # token after token, so it is what generating gives


@pytest.mark.parametrize("dense", [DenseFormat.Q8, DenseFormat.BF16])
def test_packed_experts_stay_close(
    llama_cpp: Any, reference_ops: None, default_folder: Path, tmp_path: Path, dense: DenseFormat
) -> None:
    gguf.export(default_folder, tmp_path / "packed.gguf", dense=dense)
    theirs = opened(llama_cpp, tmp_path / "packed.gguf", logits_all=True)
    ours = freehold.load(default_folder, device="cpu", dtype="float32")
    assert ours.tokenizer is not None
    tokens = ours.tokenizer.encode((default_folder / "LICENSE").read_text())[:300]
    theirs.eval(tokens)
    expected = ours.logits(tokens).log_softmax(-1)
    found = torch.from_numpy(np.array(theirs.scores[: len(tokens)])).log_softmax(-1)
    divergence = (expected.exp() * (expected - found)).sum(-1).mean()
    assert divergence < 0.01  # nats; quantising the default model's experts cost about 0.2
    assert (expected.argmax(-1) == found.argmax(-1)).float().mean() > 0.9
    assert (
        "Paris"
        in theirs.create_chat_completion([{"role": "user", "content": PROMPTS[0]}], temperature=0.0, max_tokens=20)[
            "choices"
        ][0]["message"]["content"]
    )


YARN = RopeConfig(theta=10_000.0, factor=8.0, original_context=32, truncate=True)
SHAPES = {
    "windows and yarn": small_config(
        vocab_size=300, num_layers=4, max_context=256, rope=YARN, windows=alternating_windows(4, 8),
    ),
    "no windows, tied": small_config(
        vocab_size=300, max_context=256, rope=YARN, windows=(None, None), tied_embeddings=True,
    ),
    "odd sizes": small_config(
        vocab_size=300, hidden_size=96, expert_width=160, num_experts=5, num_active_experts=3, num_heads=6,
        num_kv_heads=3, head_dim=32, max_context=256, rope=RopeConfig(factor=1.0, original_context=256),
        norm_eps=1e-6, windows=(16, None),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_logits_of_other_shapes(llama_cpp: Any, reference_ops: None, tmp_path: Path, name: str) -> None:
    folder = make_folder(tmp_path / "model", SHAPES[name])
    gguf.export(folder, tmp_path / "model.gguf", dense=DenseFormat.F32)
    theirs = opened(llama_cpp, tmp_path / "model.gguf", logits_all=True, type_k=0, type_v=0)  # a cache in float32
    tokens = torch.randint(300, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    theirs.eval(tokens)
    expected = freehold.load(folder, device="cpu", dtype="float32").logits(tokens)
    assert expected.std() > 0.5
    torch.testing.assert_close(torch.from_numpy(np.array(theirs.scores[:200])), expected, atol=2e-3, rtol=0)


@pytest.mark.parametrize("gpt_oss", [False, True])
def test_text_becomes_the_same_tokens(llama_cpp: Any, default_folder: Path, tmp_path: Path, gpt_oss: bool) -> None:
    folder = default_folder
    if gpt_oss:
        config = small_config(vocab_size=201_088, hidden_size=32)
        folder = make_folder(tmp_path / "original", config, layout=Layout.ORIGINAL)
    gguf.export(folder, tmp_path / "model.gguf")
    ours = Tokenizer.o200k_harmony() if gpt_oss else Tokenizer.from_file(folder / "tokenizer.json")
    theirs = llama_cpp.Llama(str(tmp_path / "model.gguf"), vocab_only=True, verbose=False)
    for text in TEXTS:
        assert theirs.tokenize(text.encode(), add_bos=False, special=False) == ours.encode(text)
    turn = "<|im_start|>user\nHi<|im_end|>\n" if not gpt_oss else "<|start|>user<|message|>Hi<|end|>"
    assert theirs.tokenize(turn.encode(), add_bos=False, special=True) == ours.encode_with_control(turn)
    stops = ("<|im_end|>", "<|endoftext|>") if not gpt_oss else ("<|return|>", "<|call|>", "<|endoftext|>")
    is_end = llama_cpp.llama_vocab_is_eog
    vocabulary = llama_cpp.llama_model_get_vocab(theirs.model)
    for stop in stops:
        assert is_end(vocabulary, ours.control_id(stop)), stop
    if gpt_oss:
        assert not is_end(vocabulary, ours.control_id("<|end|>"))  # ends a message, not the turn
