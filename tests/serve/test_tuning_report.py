"""What a run says, read while it is written: each line once, also where a run that goes on takes some of them back."""

import json
from pathlib import Path
from typing import Any

import pytest

from freehold.serve.tuning.report import Lines

OLD: list[dict[str, Any]] = [{"event": "started", "step": 0}, *({"step": step, "time": 1.5} for step in range(1, 6))]
TAKEN_BACK: list[dict[str, Any]] = [{"step": 6, "time": 2.5}, {"event": "failed", "step": 6, "message": "x" * 200}]


def _write(path: Path, *lines: dict[str, Any]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize("cut", range(len(OLD) + 1))
@pytest.mark.parametrize("num_new", [0, 1, 2, 3, 100])
def test_a_file_that_was_cut_back_is_read_on_from_there_however_much_it_has_grown(
    tmp_path: Path, cut: int, num_new: int
) -> None:
    path = tmp_path / "metrics.jsonl"
    _write(path, *OLD, *TAKEN_BACK)
    lines = Lines(path)
    assert lines.more() == [*OLD, *TAKEN_BACK]
    new = [{"step": step, "time": 3.5} for step in range(cut, cut + num_new)]
    _write(path, *OLD[:cut], *new)
    assert lines.rest() == new
    more = {"step": 1000, "time": 4.5}
    _write(path, *OLD[:cut], *new, more)
    assert (lines.more(), lines.more()) == ([more], [])


def test_a_line_comes_when_it_is_whole_wherever_it_was_written_in_two(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    _write(path, *OLD[:2])
    data = path.read_bytes()
    for end in range(len(data)):
        lines = Lines(path)
        path.write_bytes(data[:end])
        first = lines.more()
        assert first == OLD[: data.count(b"\n", 0, end)]
        path.write_bytes(data)
        assert first + lines.more() == OLD[:2]


def test_what_is_too_long_for_a_line_is_passed_over_and_a_cut_in_it_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    _write(path, OLD[0])
    with path.open("ab") as file:
        file.write(b"y" * 100_000)
    lines = Lines(path)
    assert lines.more() == OLD[:1] and lines.more() == []
    _write(path, *OLD, *({"step": step, "time": 3.5} for step in range(6, 10_000)))
    assert [line["step"] for line in lines.rest()] == list(range(1, 10_000))
