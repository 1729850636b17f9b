"""Whole or not at all: nothing half-made stays, nothing is overwritten, and a full disk is a typed error."""

import errno
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from freehold.disk import (
    exclusive,
    new_file,
    new_folder,
    remove,
    remove_all_abandoned,
    scratch_folder,
    size_of,
    unfinished_in,
    write_text,
)
from freehold.errors import CheckpointError, DiskError, DiskSpaceError, FreeholdError, UsageError


def test_a_finished_folder_has_its_name(tmp_path: Path) -> None:
    with new_folder(tmp_path / "deep" / "model") as partial:
        (partial / "x").write_text("x")
        assert not (tmp_path / "deep" / "model").exists()
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["model"]
    assert (tmp_path / "deep" / "model" / "x").read_text() == "x"


def test_a_scratch_folder_goes_and_what_was_made_of_it_stays(tmp_path: Path) -> None:
    with scratch_folder(tmp_path / "made") as scratch:
        (scratch / "x").write_text("x")
        (tmp_path / "made").write_text((scratch / "x").read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    with pytest.raises(UsageError, match="exists already"), scratch_folder(tmp_path / "made"):
        pass
    with pytest.raises(KeyboardInterrupt), scratch_folder(tmp_path / "other"):
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, CheckpointError])
def test_a_failure_inside_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), new_folder(tmp_path / "model") as partial:
        (partial / "x").write_text("x")
        raise error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["file", "folder", "dangling link"])
def test_nothing_is_ever_overwritten(tmp_path: Path, kind: str) -> None:
    taken = tmp_path / "model"
    if kind == "file":
        taken.write_text("precious")
    elif kind == "folder":
        taken.mkdir()
    else:
        taken.symlink_to(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="exists already"), new_folder(taken):
        raise AssertionError("not reached")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_disk_that_is_too_small_is_noticed_before_writing(tmp_path: Path) -> None:
    with pytest.raises(DiskSpaceError, match="GiB free"), new_folder(tmp_path / "model", needed_bytes=1 << 60):
        raise AssertionError("not reached")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("needed", "free", "said"),
    [
        (9_000, 0, "needs 8.79 KiB and its disk has 0.00 KiB free"),
        (1, 0, "needs 0.01 KiB and its disk has 0.00 KiB free"),
        (3 << 20, 65_536, "needs 3.00 MiB and its disk has 64.00 KiB free"),
        ((5 << 30) + 1, 5 << 30, "needs 5.01 GiB and its disk has 5.00 GiB free"),
        (5 << 30, (5 << 30) - 1, "needs 5.00 GiB and its disk has 4.99 GiB free"),
    ],
)
def test_what_is_missing_shows_however_little_it_is(
    needed: int, free: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": free})())
    with pytest.raises(DiskSpaceError, match=said), new_file(tmp_path / "model.gguf", needed_bytes=needed):
        raise AssertionError("not reached")


@pytest.mark.parametrize(
    ("code", "error", "said"),
    [
        (errno.ENOSPC, DiskSpaceError, "the disk is full"),
        (errno.EDQUOT, DiskSpaceError, "the disk is full"),
        (errno.EROFS, DiskError, "Read-only file system"),
    ],
)
def test_a_disk_that_fills_up(tmp_path: Path, code: int, error: type[FreeholdError], said: str) -> None:
    with pytest.raises(error, match=said) as caught, new_folder(tmp_path / "model") as partial:
        (partial / "weights").write_bytes(b"half of them")
        raise OSError(code, os.strerror(code))
    assert str(tmp_path / "model") in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_in_earnest(tmp_path: Path) -> None:
    """On a file system of 8 MB, where the kernel allows one to be made without being root."""
    script = f"""
import sys, torch
from pathlib import Path
from freehold.disk import new_folder
from freehold.errors import DiskSpaceError
from freehold.weights.files import TensorToWrite, write_shards
one = torch.ones(1 << 20, dtype=torch.uint8)
big = TensorToWrite("big", torch.uint8, (32 << 20,), lambda: (one for _ in range(32)))
try:
    with new_folder(Path({str(tmp_path)!r}, "model")) as folder:
        write_shards(folder, [big], shard_bytes=1 << 40)
except DiskSpaceError as error:
    print(error, list(Path({str(tmp_path)!r}).iterdir()))
"""
    mount = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    in_small_disk = f'mount -t tmpfs -o size=8m tmpfs "{tmp_path}" && exec "$0" "$@"'
    try:
        subprocess.run([*mount, in_small_disk, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this machine lets nobody mount a small file system")
    done = subprocess.run([*mount, in_small_disk, sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (
        f"{tmp_path / 'model'} cannot be written: the disk is full; free some space and run it again []\n"
    )


@pytest.mark.parametrize("name", ["x" * 300, "file/model"])
def test_paths_that_cannot_be(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="cannot be written"), new_folder(tmp_path / name):
        raise AssertionError("not reached")
    with pytest.raises(DiskError, match="cannot be written"), new_file(tmp_path / name):
        raise AssertionError("not reached")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failed_file_leaves_the_old_one(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "config.json"
    write_text(path, "old")
    with pytest.raises(error), new_file(path) as file:
        file.write(b"new")
        raise error
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("config.json", "old")]


def test_a_new_file_replaces_only_if_it_may(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    with new_file(path, replace=False) as file:
        file.write(b"new")
    with pytest.raises(UsageError, match=r"model\.gguf exists already"), new_file(path, replace=False):
        pass
    path.unlink()
    path.symlink_to(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="exists already"), new_file(path, replace=False):
        pass
    with new_file(path) as file:
        file.write(b"newer")
    assert [(left.name, left.read_bytes()) for left in tmp_path.iterdir()] == [("model.gguf", b"newer")]


def test_a_file_that_will_not_fit(tmp_path: Path) -> None:
    with pytest.raises(DiskSpaceError, match=r"model\.gguf needs .* GiB free"):  # noqa: SIM117
        with new_file(tmp_path / "model.gguf", needed_bytes=1 << 60):
            pytest.fail("nothing is to be written")
    assert not list(tmp_path.iterdir())


def test_text_is_replaced_whole_and_in_utf_8(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    write_text(path, "a much longer text than the one that follows")
    write_text(path, "naïve – 模型\n")
    assert path.read_bytes() == "naïve – 模型\n".encode()


def test_work_of_a_killed_process_is_cleared_away(tmp_path: Path) -> None:
    """And only that: what another process is still writing stays."""
    code = (
        "import sys, time; from pathlib import Path; from freehold.disk import new_folder\n"
        "with new_folder(Path(sys.argv[1])) as folder:\n"
        "    (folder / 'half').write_bytes(b'x'); print('writing', flush=True); time.sleep(60)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "model")]
    writers = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(2)]
    try:
        for writer in writers:
            assert writer.stdout is not None
            assert writer.stdout.readline() == b"writing\n"
        writers[0].kill()
        writers[0].wait()
        partials = list(tmp_path.iterdir())
        assert len(partials) == 2
        with new_folder(tmp_path / "model"):  # too young to be called abandoned
            assert len(list(tmp_path.iterdir())) == 3
        shutil.rmtree(tmp_path / "model")
        for partial in partials:
            os.utime(partial, (0, 0))
        with new_folder(tmp_path / "model") as folder:
            (folder / "whole").write_bytes(b"y")
        assert len(list(tmp_path.glob(".model.partial-*"))) == 1
        assert (tmp_path / "model").is_dir()
    finally:
        for writer in writers:
            writer.kill()
            writer.communicate()


def test_two_writers_in_one_process(tmp_path: Path) -> None:
    """The one that comes second fails without touching what the first is writing."""
    with new_folder(tmp_path / "model") as first:
        (first / "x").write_text("x")
        with pytest.raises(DiskError), new_folder(tmp_path / "model") as second:
            (second / "y").write_text("y")
            (tmp_path / "model").mkdir()
            (tmp_path / "model" / "z").write_text("z")
        assert (first / "x").read_text() == "x"
        (tmp_path / "model" / "z").unlink()
        (tmp_path / "model").rmdir()
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["x"]


# --- one at a time, and removing ---------------------------------------------------------------------------------


def test_only_one_holds_a_name(tmp_path: Path) -> None:
    events: list[str] = []
    inside = threading.Event()

    def progress(label: str, done: int, total: int) -> None:
        events.append(f"{label} {done}/{total}")
        inside.set()

    def second() -> None:
        with exclusive(tmp_path / "deep" / "work", progress=progress):
            events.append("second")

    with exclusive(tmp_path / "deep" / "work"):
        thread = threading.Thread(target=second)
        thread.start()
        assert inside.wait(10)
        events.append("first")
    thread.join(10)
    waiting = "waiting for another process"
    assert events == [f"{waiting} 0/1", "first", f"{waiting} 1/1", "second"]
    assert list((tmp_path / "deep").iterdir()) == []


def test_many_hold_a_name_in_turn(tmp_path: Path) -> None:
    """The lock's file comes and goes: nobody may hold one that the others no longer see."""
    holders: list[int] = []
    most = 0

    def hold() -> None:
        nonlocal most
        for _ in range(25):
            with exclusive(tmp_path / "work"):
                holders.append(1)
                most = max(most, len(holders))
                time.sleep(0.0005)
                holders.pop()

    threads = [threading.Thread(target=hold) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert most == 1
    assert list(tmp_path.iterdir()) == []


def test_a_failure_while_a_name_is_held_lets_go(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), exclusive(tmp_path / "work"):
        raise KeyboardInterrupt
    with exclusive(tmp_path / "work"):
        assert [path.name for path in unfinished_in(tmp_path)] == [".work.lock"]
    with pytest.raises(DiskError, match="cannot be written"), exclusive(Path("/proc/nowhere/work")):
        raise AssertionError("not reached")


def test_removing_what_there_is(tmp_path: Path) -> None:
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    (tmp_path / "folder" / "deep" / "a").write_bytes(bytes(100))
    (tmp_path / "folder" / "b").write_bytes(bytes(20))
    (tmp_path / "file").write_bytes(bytes(3))
    (tmp_path / "folder" / "link").symlink_to(tmp_path / "file")
    (tmp_path / "linked").symlink_to(tmp_path / "folder")
    length_of_link = len(str(tmp_path / "file"))
    assert size_of(tmp_path / "folder") == 120 + length_of_link
    assert size_of(tmp_path / "file") == 3
    remove(tmp_path / "linked")
    assert remove(tmp_path / "folder") == 120 + length_of_link
    assert remove(tmp_path / "file") == 3
    assert remove(tmp_path / "file") == 0
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(DiskError, match="/proc/self/status cannot be removed"):
        remove(Path("/proc/self/status"))


def test_clearing_a_folder_of_what_was_left(tmp_path: Path) -> None:
    left = [tmp_path / name for name in (".a.b.partial-01234567", ".a.b.lock", ".c.partial-89abcdef")]
    for path in left:
        path.write_bytes(bytes(5))
    other = [tmp_path / name for name in ("a.b", ".hidden", ".c.partial-")]
    for path in other:
        path.write_bytes(b"x")
    assert unfinished_in(tmp_path) == sorted(left)
    assert remove_all_abandoned(tmp_path) == 0
    for path in left:
        os.utime(path, (0, 0))
    with exclusive(tmp_path / "a.b"):  # it found the lock there, and works
        assert remove_all_abandoned(tmp_path) == 10
    assert sorted(tmp_path.iterdir()) == sorted(other)
