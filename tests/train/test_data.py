"""Files as a whole: which side a line falls to, what is cut off, and what memory it takes."""

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from freehold.errors import TrainingDataError, UsageError
from freehold.formats.chat import HarmonyFormat
from freehold.formats.tokenizer import Tokenizer
from freehold.train import lines
from freehold.train.data import DataOptions, read_examples, read_preferences

WriteLines = Callable[..., Path]


def chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def pair(chosen: str, rejected: str) -> dict[str, Any]:
    return {
        "input": {"messages": [{"role": "user", "content": "2 + 2?"}]},
        "preferred_output": [{"role": "assistant", "content": chosen}],
        "non_preferred_output": [{"role": "assistant", "content": rejected}],
    }


def test_a_line_falls_to_the_same_side_whatever_else_is_there(
    harmony: HarmonyFormat, gpt_oss: Tokenizer, write_lines: WriteLines
) -> None:
    texts = [{"text": f"Number {i} is a number."} for i in range(200)]
    options = DataOptions(validation_share=0.25, seed=7)
    whole = read_examples([write_lines(*texts, *texts[:50])], harmony, gpt_oss, options)
    half = read_examples([write_lines(*reversed(texts[:100]))], harmony, gpt_oss, options)
    other = read_examples([write_lines(*texts)], harmony, gpt_oss, DataOptions(validation_share=0.25, seed=8))
    validation = {tuple(example.tokens) for example in whole.validation}
    assert not validation & {tuple(example.tokens) for example in whole.training}
    assert {tuple(example.tokens) for example in half.validation} < validation
    assert {tuple(example.tokens) for example in other.validation} != validation
    assert 30 < len(validation) < 70


def test_truncations_are_told_by_line_with_what_they_cost(
    harmony: HarmonyFormat, gpt_oss: Tokenizer, write_lines: WriteLines
) -> None:
    path = write_lines(chat("2 + 2?", "4"), chat("2 + 2?", "word " * 50), chat("word " * 200, "4"))
    data = read_examples([path], harmony, gpt_oss, DataOptions(max_length=100))
    assert len(data.training) == 2
    assert max(data.training.lengths) == 100
    cut, dropped = data.truncations.told
    whole = read_examples([path], harmony, gpt_oss, DataOptions()).training
    assert (cut.line, cut.is_dropped) == (2, False)
    assert cut.num_tokens_lost == cut.num_targets_lost == whole.lengths[1] - 100
    assert (dropped.line, dropped.is_dropped) == (3, True)
    assert dropped.num_tokens_lost == whole.lengths[2]
    assert dropped.num_targets_lost == whole[2].num_targets
    assert data.truncations.num_targets_lost == whole.num_targets - data.training.num_targets


def test_a_pair_that_reads_the_same_once_it_is_cut_is_dropped(harmony: HarmonyFormat, write_lines: WriteLines) -> None:
    path = write_lines(pair("4", "5"), pair("word " * 100 + "a", "word " * 100 + "b"))
    data = read_preferences([path], harmony, DataOptions(max_length=100))
    assert len(data.training) == 1
    assert data.training[0].chosen != data.training[0].rejected
    assert (data.truncations.count, data.truncations.num_dropped) == (1, 1)


def test_a_book_has_the_tokens_of_the_whole_though_it_is_read_in_pieces(
    harmony: HarmonyFormat, gpt_oss: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "_PIECE", 300)
    book = "".join(f"Chapter {i}\n\nIt was dark!\n  And  cold.\n/ It rained.\r\n\n\n日本 {i}\n" for i in range(50))
    (tmp_path / "book.txt").write_bytes(book.encode())
    data = read_examples([tmp_path / "book.txt"], harmony, gpt_oss, DataOptions())
    assert len(data.training) > 5
    end = gpt_oss.control_id("<|endoftext|>")
    ids = [[*example.tokens[:1], *example.targets] for example in data.training]
    assert [token for piece in ids for token in piece] == [*gpt_oss.encode(book), end]


def test_a_book_that_is_no_text_is_refused_by_its_line(
    harmony: HarmonyFormat, gpt_oss: Tokenizer, tmp_path: Path
) -> None:
    (tmp_path / "book.txt").write_bytes(b"One\ncaf\xe9\nThree\n")
    (tmp_path / "empty.txt").write_bytes(b"")
    with pytest.raises(TrainingDataError) as error:
        read_examples([tmp_path / "book.txt", tmp_path / "empty.txt"], harmony, gpt_oss, DataOptions())
    assert error.value.problems == (
        "book.txt line 2: is no UTF-8: byte 0xe9 at byte 4; save the file as UTF-8",
        "empty.txt line 1: text is empty",
    )


def test_memory_holds_the_tokens_and_not_the_lines(
    harmony: HarmonyFormat, gpt_oss: Tokenizer, write_lines: WriteLines
) -> None:
    text = "It was the best of times. " * 100
    path = write_lines(*({"text": f"{i} {text}"} for i in range(300)))
    read_examples([write_lines({"text": text}, name="warm.jsonl")], harmony, gpt_oss, DataOptions())
    tracemalloc.start()
    try:
        data = read_examples([path], harmony, gpt_oss, DataOptions())
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    num_bytes = 8 * data.training.num_tokens
    assert num_bytes > 1_000_000
    assert peak < 1.6 * num_bytes  # arrays grow by an eighth, and both are copied then at most


def test_options_that_cannot_be_and_sides_without_examples_are_refused(
    harmony: HarmonyFormat, gpt_oss: Tokenizer, write_lines: WriteLines
) -> None:
    for options in ({"max_length": 1}, {"validation_share": 1.0}, {"validation_share": -0.1}):
        with pytest.raises(UsageError, match=next(iter(options)).replace("_", "[-_]")):
            DataOptions(**options)
    with pytest.raises(UsageError, match="fell to validation"):
        read_examples([write_lines({"text": "Hello."})], harmony, gpt_oss, DataOptions(validation_share=0.999999))
    with pytest.raises(UsageError, match="leaves room for an answer in 10 tokens"):
        read_examples([write_lines(chat("2 + 2?", "4"))], harmony, gpt_oss, DataOptions(max_length=10))


def test_progress_is_told_in_bytes_to_the_end(
    harmony: HarmonyFormat, gpt_oss: Tokenizer, write_lines: WriteLines
) -> None:
    told: list[tuple[str, int, int]] = []
    path = write_lines({"text": "One."}, {"text": "Two."}, "")
    read_examples([path], harmony, gpt_oss, DataOptions(), progress=lambda *step: told.append(step))
    assert [done for _, done, _ in told] == [17, 34, 35]
    assert {(label, total) for label, _, total in told} == {("reading chats.jsonl", 35)}
