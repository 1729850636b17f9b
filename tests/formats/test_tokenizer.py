"""The tokeniser on small vocabularies: what becomes a control token and what never does, files, refusals."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from freehold.errors import CheckpointError, DiskSpaceError, UnsupportedError, UsageError
from freehold.formats.tokenizer import Detokenizer, Tokenizer

SmallGguf = Callable[..., dict[str, Any]]

HOSTILE = st.text(
    alphabet=st.one_of(st.sampled_from(list("<|>im_startend\n")), st.characters(exclude_categories=["Cs"]))
)


# --- encoding
# ---------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(text=HOSTILE, ids=st.lists(st.sampled_from(["<|im_start|>", "<|im_end|>", "<|endoftext|>", "x"])))
def test_text_never_becomes_a_control_token(small: Tokenizer, text: str, ids: list[str]) -> None:
    text = text.join(ids) + text
    encoded = small.encode(text)
    assert not set(encoded) & set(small.control_tokens.values())
    assert small.decode(encoded) == text


def test_trusted_text_does(small: Tokenizer) -> None:
    assert small.encode_with_control("<|im_start|>hello<|im_end|>") == [1, *small.encode("hello"), 2]


def test_merges_cannot_lead_to_a_control_token(small_gguf: SmallGguf) -> None:
    arguments = small_gguf()
    arguments["tokens"] += ["|>", "<|start", "<|start|>"]
    arguments["token_types"] += [1, 1, 3]
    arguments["merges"] += ["| >", "<| start", "<|start |>"]
    tokenizer = Tokenizer.from_gguf(**arguments)
    ids = tokenizer.encode("<|start|>")
    assert tokenizer.control_id("<|start|>") not in ids
    assert tokenizer.decode(ids) == "<|start|>"


def test_a_word_cannot_be_looked_up_as_a_control_token(small_gguf: SmallGguf) -> None:
    """llama-bpe takes a whole word from the vocabulary without merging; control tokens must not be in it."""
    arguments = small_gguf(pre="llama-bpe")
    arguments["tokens"].append("secret")
    arguments["token_types"].append(3)
    tokenizer = Tokenizer.from_gguf(**arguments)
    assert tokenizer.control_id("secret") not in tokenizer.encode("secret")
    assert tokenizer.encode_with_control("secret") == [tokenizer.control_id("secret")]


def test_llama_3_takes_whole_words_without_merging(small_gguf: SmallGguf) -> None:
    arguments = small_gguf()
    arguments["tokens"].append("whole")
    arguments["token_types"].append(1)
    whole = len(arguments["tokens"]) - 1
    assert Tokenizer.from_gguf(**{**arguments, "pre": "llama-bpe"}).encode("whole") == [whole]
    assert whole not in Tokenizer.from_gguf(**{**arguments, "pre": "gpt-2"}).encode("whole")


def test_converters_that_call_a_control_token_normal_are_seen_through(small_gguf: SmallGguf) -> None:
    arguments = small_gguf()
    arguments["token_types"] = [1] * len(arguments["tokens"])
    tokenizer = Tokenizer.from_gguf(**arguments)
    assert dict(tokenizer.control_tokens) == {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}


@pytest.mark.parametrize("text", ["\ud800", "fine \udfff", "\ud83d\ude00"])
def test_lone_surrogates_are_named(small: Tokenizer, text: str) -> None:
    with pytest.raises(UsageError, match=r"lone surrogate U\+D[0-9A-F]{3} at index"):
        small.encode(text)


def test_characters_without_bytes_in_the_vocabulary_read_as_replacement(small_gguf: SmallGguf) -> None:
    arguments = small_gguf()
    for byte in (0x04, 0xF0):
        arguments["token_types"][3 + byte] = 5
    tokenizer = Tokenizer.from_gguf(**arguments)
    assert tokenizer.decode(tokenizer.encode("a\x04b 😀 é")) == "a\ufffdb \ufffd é"


@pytest.mark.parametrize(
    ("pre", "text", "words"),
    [
        ("gpt-2", "ab 12 '", ["ab", " 12", " '"]),
        ("default", "ab 12 '", ["ab", " 12", " '"]),
        ("smollm", "ab 12 '", ["ab", " ", "1", "2", " '"]),
        ("llama-bpe", "ab 1212\n'", ["ab", " ", "121", "2", "\n", "'"]),
        ("gpt-4o", "abCD 1212/\n", ["ab", "CD", " ", "121", "2", "/\n"]),
    ],
)
def test_words_are_cut_as_llama_cpp_cuts_them(small_gguf: SmallGguf, pre: str, text: str, words: list[str]) -> None:
    """All pairs of all characters merge, as far as words allow: the tokens are the words."""
    tokens, merges = list(small_gguf()["tokens"]), []
    for word in words:
        written = word.replace(" ", "Ġ").replace("\n", "Ċ")
        for end in range(2, len(written) + 1):
            if written[:end] not in tokens:
                tokens.append(written[:end])
                merges.append(f"{written[: end - 1]} {written[end - 1]}")
    every = [f"{a} {b}" for a in set(tokens[3:]) for b in set(tokens[3:]) if a + b in tokens]
    types = [3] * 3 + [1] * (len(tokens) - 3)
    tokenizer = Tokenizer.from_gguf(tokens, types, merges + sorted(set(every) - set(merges)), pre)
    assert [tokenizer.decode([id_]) for id_ in tokenizer.encode(text)] == words


# --- decoding
# ---------------------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(-1, 300)))
def test_streaming_gives_what_decoding_gives(small: Tokenizer, ids: list[int]) -> None:
    stream = Detokenizer(small)
    pieces = [stream.feed(id_) for id_ in ids] + [stream.flush()]
    assert "".join(pieces) == small.decode(ids)
    "".join(pieces).encode()  # valid Unicode
    assert stream.flush() == ""


def test_a_character_waits_for_its_last_byte(small: Tokenizer) -> None:
    stream = Detokenizer(small)
    ids = small.encode("é😀")
    assert [stream.feed(id_) for id_ in ids] == ["", "é", "", "", "", "😀"]
    assert [stream.feed(ids[0]), stream.feed(1), stream.flush()] == ["", "", "\ufffd"]


def test_control_tokens_are_shown_on_request_only(small: Tokenizer) -> None:
    ids = [1, *small.encode("hello"), 2]
    assert small.decode(ids) == "hello"
    assert small.decode(ids, control="show") == "<|im_start|>hello<|im_end|>"
    assert small.token_bytes(1) == b""
    assert small.token_bytes(small.encode("é")[0]) == b"\xc3"
    assert (small.control_name(1), small.control_name(5)) == ("<|im_start|>", None)


@pytest.mark.parametrize("id_", [-1, 100_000])
def test_unknown_ids_and_names_are_refused_by_name(small: Tokenizer, id_: int) -> None:
    with pytest.raises(UsageError, match=str(id_)):
        small.token_bytes(id_)
    with pytest.raises(UsageError, match="nosuch"):
        small.control_id("<|nosuch|>")


# --- new control tokens, files
# ----------------------------------------------------------------------------------


def test_new_control_tokens_go_to_the_end(small: Tokenizer) -> None:
    size = small.vocab_size
    grown = small.with_control_tokens(["<|start|>", "<|im_end|>", "<|end|>"])
    assert (grown.control_id("<|start|>"), grown.control_id("<|end|>"), grown.vocab_size) == (
        size,
        size + 1,
        size + 2,
    )
    assert grown.control_id("<|im_end|>") == small.control_id("<|im_end|>")
    assert small.vocab_size == size
    assert "<|start|>" not in small.control_tokens
    assert grown.encode("<|start|>") == small.encode("<|start|>")
    for name in ("", "hello"):
        with pytest.raises(UsageError):
            small.with_control_tokens([name])


@pytest.mark.parametrize("names", [[], ["<|start|>", "<|end|>"]])
def test_saved_files_read_the_same_here_and_in_transformers(small: Tokenizer, tmp_path: Path, names: list[str]) -> None:
    from transformers import PreTrainedTokenizerFast

    saved = small.with_control_tokens(names)
    saved.save(tmp_path / "tokenizer.json")
    assert [file.name for file in tmp_path.iterdir()] == ["tokenizer.json"]
    again = Tokenizer.from_file(tmp_path / "tokenizer.json")
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    assert again.control_tokens == saved.control_tokens
    assert again.vocab_size == saved.vocab_size == len(theirs)
    for text in ("hello world 12", "<|im_start|>hello<|start|>x<|end|>\n", "é😀  \n\tx<|im_end|>"):
        ids = saved.encode_with_control(text)
        assert ids == again.encode_with_control(text) == theirs.encode(text)
        assert saved.encode(text) == again.encode(text)
        assert saved.decode(ids) == again.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_gpt_oss_survives_saving(gpt_oss: Tokenizer, tmp_path: Path) -> None:
    gpt_oss.save(tmp_path / "tokenizer.json")
    again = Tokenizer.from_file(tmp_path / "tokenizer.json")
    assert again.control_tokens == gpt_oss.control_tokens
    text = "<|start|>Wie geht's? 12345 — 日本語 def f(x):\n    return x<|end|>"
    assert again.encode_with_control(text) == gpt_oss.encode_with_control(text)
    assert (again.encode(text), again.vocab_size) == (gpt_oss.encode(text), gpt_oss.vocab_size)


def test_gaps_among_ids_survive_saving(small_gguf: SmallGguf, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    arguments = small_gguf()
    raw = saved_json(Tokenizer.from_gguf(**arguments), tmp_path)
    raw["added_tokens"].append(added("<|far|>", 1000))
    raw["model"]["vocab"]["<|far|>"] = 1000
    tokenizer = Tokenizer.from_file(written(raw, tmp_path))
    tokenizer.save(tmp_path / "again.json")
    again = Tokenizer.from_file(tmp_path / "again.json")
    assert again.control_tokens == tokenizer.control_tokens
    assert again.vocab_size == 1001
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "again.json"))
    assert theirs.encode("hello<|far|>") == again.encode_with_control("hello<|far|>")


def test_a_failed_save_leaves_the_old_file(small: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text("old")

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskSpaceError, match=r"tokenizer\.json cannot be written: the disk is full"):
        small.save(path)
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["tokenizer.json"]


# --- GGUF -------------------------------------------------------------------------------------------------------


def test_a_gguf_vocabulary_there_and_back(small: Tokenizer, tmp_path: Path) -> None:
    raw, size = saved_json(small, tmp_path), small.vocab_size
    raw["added_tokens"] += [added("foo bar", size + 1, special=False), added("<|far|>", size + 4)]  # and gaps
    tokenizer = Tokenizer.from_file(written(raw, tmp_path))
    vocabulary = tokenizer.to_gguf(num_tokens=size + 9)
    assert vocabulary.pre == "smollm"
    assert vocabulary.token_types[size:] == [5, 4, 5, 5, 3, 5, 5, 5, 5]
    assert len(set(vocabulary.tokens)) == size + 9
    again = Tokenizer.from_gguf(*vocabulary)
    assert again.control_tokens.items() >= tokenizer.control_tokens.items()
    for text in ("hello world 12", "é😀  \n\tx foo bar", "<|im_start|>hello<|far|>"):
        assert again.encode(text) == tokenizer.encode(text)
        assert again.encode_with_control(text) == tokenizer.encode_with_control(text)


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "gpt-4o", "llama-bpe"])
def test_each_way_to_cut_words_keeps_its_name(small_gguf: SmallGguf, pre: str) -> None:
    arguments = small_gguf(pre=pre)
    vocabulary = Tokenizer.from_gguf(**arguments).to_gguf(num_tokens=len(arguments["tokens"]))
    assert vocabulary == tuple(arguments.values())


def test_gpt_oss_looks_words_up_and_llama_cpp_need_not(gpt_oss: Tokenizer) -> None:
    vocabulary = gpt_oss.to_gguf(num_tokens=gpt_oss.vocab_size)
    assert vocabulary.pre == "gpt-4o"
    again = Tokenizer.from_gguf(*vocabulary)
    assert again.control_tokens == gpt_oss.control_tokens
    text = "Wie geht's? 12345 — 日本語 def f(x):\n    return x"
    assert again.encode(text) == gpt_oss.encode(text)


def test_what_llama_cpp_would_encode_otherwise_is_refused(
    small: Tokenizer, small_gguf: SmallGguf, tmp_path: Path
) -> None:
    raw, size = saved_json(small, tmp_path), small.vocab_size
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    alone = {**raw, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [byte_level]}}
    assert Tokenizer.from_file(written(alone, tmp_path)).to_gguf(num_tokens=size).pre == "gpt-2"
    together = {"type": "Digits", "individual_digits": False}
    grouped = {**raw, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [together, byte_level]}}
    stripping = {**raw, "added_tokens": [*raw["added_tokens"], added("foo", size, special=False, rstrip=True)]}
    unreachable = small_gguf()
    unreachable["tokens"].append("whole")
    unreachable["token_types"].append(1)
    looked_up = saved_json(Tokenizer.from_gguf(**unreachable), tmp_path)
    looked_up["model"]["ignore_merges"] = True
    for foreign, words in (
        (grouped, "in another way: .*Digits"),
        (stripping, "'foo' looks at the text around it"),
        (looked_up, "ignore_merges is True .* 'smollm': 'whole' would become other tokens"),
    ):
        with pytest.raises(UnsupportedError, match=words):
            Tokenizer.from_file(written(foreign, tmp_path)).to_gguf(num_tokens=size + 1)


# --- files ------------------------------------------------------------------------------------------------------


def added(name: str, id_: int, **changes: Any) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": id_, "content": name, **flags, "special": True, **changes}


def saved_json(tokenizer: Tokenizer, folder: Path) -> dict[str, Any]:
    tokenizer.save(folder / "saved.json")
    raw: dict[str, Any] = json.loads((folder / "saved.json").read_text())
    return raw


def written(raw: Any, folder: Path) -> Path:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(raw))
    return path


def test_control_like_added_tokens_are_control_special_or_not(small: Tokenizer, tmp_path: Path) -> None:
    raw, size = saved_json(small, tmp_path), small.vocab_size
    names = ["<|tool|>", "</think>", "[INST]", "    ", "foo bar"]
    raw["added_tokens"] += [added(name, size + i, special=False) for i, name in enumerate(names)]
    tokenizer = Tokenizer.from_file(written(raw, tmp_path))
    assert set(tokenizer.control_tokens) - set(small.control_tokens) == {"<|tool|>", "</think>", "[INST]"}
    ids = tokenizer.encode("<|tool|></think>[INST]    foo bar")
    assert ids[-2:] == [size + 3, size + 4]  # ordinary added tokens do stand for their text
    assert not set(ids) & set(tokenizer.control_tokens.values())
    assert tokenizer.decode(ids) == "<|tool|></think>[INST]    foo bar"
    stream = Detokenizer(tokenizer)
    assert "".join(map(stream.feed, ids)) + stream.flush() == tokenizer.decode(ids)


def test_truncation_padding_and_bos_in_the_file_are_not_applied(small: Tokenizer, tmp_path: Path) -> None:
    raw = saved_json(small, tmp_path)
    raw["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    raw["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [],
        "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}},
    }
    text = "hello hello hello"
    assert Tokenizer.from_file(written(raw, tmp_path)).encode(text) == small.encode(text)


def test_missing_and_corrupt_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nosuch\.json does not exist"):
        Tokenizer.from_file(tmp_path / "nosuch.json")
    with pytest.raises(CheckpointError, match="cannot be read"):
        Tokenizer.from_file(tmp_path)
    for content in (b"", b'{"model": {"vocab"', b"\xff\xfe", b"[" * 100_000, b"[]", b"{}", b'{"model": 1}'):
        path = tmp_path / "tokenizer.json"
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"tokenizer\.json: "):
            Tokenizer.from_file(path)


DAMAGE: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (UnsupportedError, "'Unigram'", {"model.type": "Unigram"}),
    (UnsupportedError, "'WordPiece'", {"model.type": "WordPiece"}),
    (UnsupportedError, "dropout", {"model.dropout": 0.1}),
    (UnsupportedError, "byte_fallback", {"model.byte_fallback": True}),
    (UnsupportedError, "end_of_word_suffix", {"model.end_of_word_suffix": "</w>"}),
    (UnsupportedError, "normaliser", {"normalizer": {"type": "Lowercase"}}),
    (UnsupportedError, "byte-level", {"pre_tokenizer": None}),
    (UnsupportedError, "Metaspace", {"pre_tokenizer": {"type": "Metaspace"}}),
    (
        UnsupportedError,
        "add_prefix_space",
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}},
    ),
    (UnsupportedError, "'▁'", {"model.vocab.▁the": 900}),
    (UnsupportedError, "lacks", {"model.vocab": {}, "model.merges": []}),
    (CheckpointError, "merge", {"model.merges": [["x", "yz"]]}),
    (CheckpointError, "no merge", {"model.merges": ["one"]}),
    (CheckpointError, "'merges'", {"model.merges": None}),
    (CheckpointError, "ids", {"model.vocab.hell": 7}),
    (CheckpointError, "ids", {"model.vocab.hell": "7"}),
    (CheckpointError, "'<|im_end|>' has the ids", {"model.vocab.<|im_end|>": 900}),
    (CheckpointError, "'content'", {"added_tokens": [{"id": 3}]}),
    (UnsupportedError, "lstrip", {"added_tokens": [added("<|x|>", 900, lstrip=True)]}),
]


@pytest.mark.parametrize(("kind", "said", "changes"), DAMAGE)
def test_foreign_and_damaged_files_are_refused_by_reason(
    small: Tokenizer, tmp_path: Path, kind: type[Exception], said: str, changes: dict[str, Any]
) -> None:
    raw = saved_json(small, tmp_path)
    for name, value in changes.items():
        *folders, last = name.split(".", 2)
        place = raw
        for folder in folders:
            place = place[folder]
        place[last] = value
    with pytest.raises(kind) as caught:
        Tokenizer.from_file(written(raw, tmp_path))
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "said", "changes"),
    [
        (UnsupportedError, "'falcon'", {"pre": "falcon"}),
        (UnsupportedError, "type 6", {"tokens": ["<0x00>"], "token_types": [6]}),
        (CheckpointError, "2 tokens, but 1", {"tokens": ["a", "b"], "token_types": [1]}),
        (CheckpointError, "twice", {"tokens": ["a", "a"], "token_types": [1, 1]}),
        (CheckpointError, "twice", {"tokens": ["a", "a"], "token_types": [1, 3]}),
        (CheckpointError, "no merge", {"merges": ["a b c"]}),
        (CheckpointError, "unknown token", {"merges": ["zz yy"]}),
    ],
)
def test_foreign_and_damaged_ggufs_are_refused_by_reason(
    small_gguf: SmallGguf, kind: type[Exception], said: str, changes: dict[str, Any]
) -> None:
    with pytest.raises(kind, match=said):
        Tokenizer.from_gguf(**small_gguf(**changes))
