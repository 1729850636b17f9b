"""Patches carried out in one folder: all of one, or nothing; inside of it, or not at all.

Everything new is written aside first, in a hidden folder of its own, and synced; the old files are kept there until all
of the new ones have their names. Whatever fails on the way is undone. What a killed process left half-done is undone by
the next patch in the folder, or by `recover`: a journal says what was meant, and only a file that is exactly as the
patch left it is put back. A living process holds a lock on the folder.

Refused: absolute paths, `..`, control characters, links anywhere on the way, what is no regular file, other mounted
file systems, write-protected files, one file under two names, and `.git`, whose hooks are programs. All steps go from
folder to folder by handle, so that a link that somebody puts there meanwhile leads nowhere. Permissions, owner and
extended attributes stay, but for set-user-ID, set-group-ID and capabilities. A hard link to elsewhere is cut: the file
there stays as it was.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import stat
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from freehold.errors import UsageError
from freehold.tools.patch_format import AddFile, DeleteFile, Patch, PatchError, UpdateFile
from freehold.tools.patch_plan import Change, plan

ASIDE = ".freehold-patch-"
_JOURNAL = "journal.json"
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_MAX_FILE_BYTES = 16 * 2**20
_PIECE = 2**20
_LOCK_SECONDS = 10.0
# With those that end lines, and those that turn around what is shown of the text after them.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


class PatchDirectory:
    """The folder that patches are confined to. Every method opens what it needs, and may run on any thread."""

    def __init__(self, root: Path) -> None:
        """Raises UsageError where there is no such folder."""
        if not root.is_dir():
            raise UsageError(f"{root} is no folder; give one that patches may change")
        self.root = root.resolve()

    def plan(self, patch: Patch) -> tuple[Change, ...]:
        """What the patch would change here; reads only. Raises PatchError."""
        with self._opened() as root:
            identities: dict[tuple[int, int], str] = {}

            def read(path: str) -> bytes | None:
                found = _read(root, path)
                if found is None:
                    return None
                data, status = found
                known = identities.setdefault((status.st_dev, status.st_ino), path)
                if known != path:
                    raise PatchError(f"{path} and {known} are the same file; patch it under one name")
                return data

            changes = plan(_normalised(patch), read)
            _check_folders(changes)
            return changes

    def apply(self, changes: Sequence[Change]) -> None:
        """Carry out what was planned. Raises PatchError, and has changed nothing, where a file is not any more what it
        was then or something fails."""
        with self._locked() as root:
            _recover(root)
            states: dict[str, _State] = {}
            for change in changes:
                found = _read(root, change.path)
                if (None if found is None else found[0]) != change.before:
                    raise _changed(change.path)
                if found is not None:
                    states[change.path] = _state(found[1])
            if changes:
                _Transaction(root, changes, states).run()

    def recover(self) -> list[str]:
        """Undo what a killed process left half-done; returns the paths that were put back."""
        with self._locked() as root:
            return _recover(root)

    @contextmanager
    def _opened(self) -> Iterator[int]:
        try:
            root = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise PatchError(f"the folder cannot be opened: {error.strerror}") from None
        try:
            yield root
        finally:
            os.close(root)

    @contextmanager
    def _locked(self) -> Iterator[int]:
        with self._opened() as root:
            _lock(root)
            yield root


def _lock(root: int) -> None:
    """Against other patches; it ends with the handle. Whoever has it and does not let go is not waited for for ever."""
    until = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            return fcntl.flock(root, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                raise PatchError("another program holds the folder's lock; nothing was changed. Try again.") from None
            time.sleep(0.02)
        except OSError as error:
            raise PatchError(f"the folder cannot be locked against other patches: {error.strerror}") from None


# --- paths --------------------------------------------------------------------------------------------------


def _normalised(patch: Patch) -> Patch:
    """The same patch with one spelling for each path."""
    sections: list[AddFile | DeleteFile | UpdateFile] = []
    for section in patch.sections:
        section = replace(section, path="/".join(_parts(section.path)))
        if isinstance(section, UpdateFile) and section.move_to is not None:
            section = replace(section, move_to="/".join(_parts(section.move_to)))
        sections.append(section)
    return Patch(tuple(sections))


def _check_folders(changes: Sequence[Change]) -> None:
    """Raises PatchError where a path that is to be a file is to be a folder too."""
    files = {change.path for change in changes if change.after is not None}
    for path in files:
        for depth in range(1, path.count("/") + 1):
            folder = "/".join(path.split("/")[:depth])
            if folder in files:
                raise PatchError(f"{path} cannot be written: {folder} is a file of this patch. Nothing was changed.")


def _parts(path: str) -> list[str]:
    """The names on the way to a file. Raises PatchError for what leads out, or where nothing may be written."""
    if path.startswith("/"):
        raise PatchError(f"{path} is an absolute path; paths are relative to the folder that patches may change")
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if not parts or path.endswith("/"):
        raise PatchError(f"{path!r} names no file")
    for part in parts:
        if part == "..":
            raise PatchError(f"{path} leads out of its folder; paths go down only, without '..'")
        if part.casefold() == ".git" or part.startswith(ASIDE):
            raise PatchError(f"{path} cannot be patched: {part} is not for patches")
        if _CONTROL.search(part):
            raise PatchError(f"{path!r} has a control character in it")
        try:
            length = len(part.encode("utf-8"))
        except UnicodeEncodeError:
            raise PatchError(f"{path!a} is no path: half a character") from None
        if length > 255:
            raise PatchError(f"{part[:40]}… is too long a name")
    return parts


@contextmanager
def _parent(root: int, path: str) -> Iterator[tuple[int, str]]:
    """The folder that a path is in, as a handle, and the name there. Raises FileNotFoundError where it is missing."""
    *folders, name = _parts(path)
    handle = os.dup(root)
    try:
        for depth, folder in enumerate(folders):
            try:
                inner = os.open(folder, _FOLDER, dir_fd=handle)
            except OSError as error:
                if error.errno not in (errno.ELOOP, errno.ENOTDIR):
                    raise
                here = "/".join(folders[: depth + 1])
                is_link = stat.S_ISLNK(os.stat(folder, dir_fd=handle, follow_symlinks=False).st_mode)
                kind = "a symbolic link; name the place that it leads to" if is_link else "no folder"
                raise PatchError(f"{path} cannot be patched: {here} is {kind}") from None
            os.close(handle)
            handle = inner
            if os.fstat(handle).st_dev != os.fstat(root).st_dev:
                here = "/".join(folders[: depth + 1])
                raise PatchError(f"{path} cannot be patched: {here} is on another file system")
        yield handle, name
    finally:
        os.close(handle)


def _read(root: int, path: str) -> tuple[bytes, os.stat_result] | None:
    """A regular file's bytes and status; None where there is nothing. Raises PatchError for anything else."""
    try:
        with _parent(root, path) as (folder, name):
            status = os.stat(name, dir_fd=folder, follow_symlinks=False)
            _check_regular(path, status)
            # Not blocking: whatever took its place since cannot hold us up.
            handle = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
            with os.fdopen(handle, "rb") as file:
                status = os.fstat(handle)
                _check_regular(path, status)
                data = file.read(_MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise PatchError(f"{path} cannot be read: {error.strerror}") from None
    if len(data) > _MAX_FILE_BYTES:
        raise PatchError(f"{path} is larger than {_MAX_FILE_BYTES >> 20} MiB, the most that can be patched")
    return data, status


class _NoFileError(PatchError):
    """Something else than a file stands at a path."""


def _check_regular(path: str, status: os.stat_result) -> None:
    if stat.S_ISLNK(status.st_mode):
        raise _NoFileError(f"{path} is a symbolic link; patch the file that it leads to, under its own name")
    if stat.S_ISDIR(status.st_mode):
        raise _NoFileError(f"{path} is a folder; name a file")
    if not stat.S_ISREG(status.st_mode):
        raise _NoFileError(f"{path} is no regular file")


# --- all or nothing -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Entry:
    """A line of the journal: what a path was and is to be, by hash; None for no file."""

    path: str
    before: str | None
    after: str | None


class _Transaction:
    """One patch while it is carried out."""

    def __init__(self, root: int, changes: Sequence[Change], states: "Mapping[str, _State]") -> None:
        """`states` are of the files as they were when their bytes were compared."""
        self._root = root
        self._changes = changes
        self._states = states

    def run(self) -> None:
        """All of it, or PatchError and nothing. Ctrl-C counts as a failure."""
        name = f"{ASIDE}{secrets.token_hex(4)}"
        try:
            os.mkdir(name, 0o700, dir_fd=self._root)
        except OSError as error:
            raise PatchError(f"the folder cannot be written: {_reason(error)}; nothing was changed") from None
        try:
            with _aside(self._root, name) as aside:
                made = self._prepare(aside)
                self._commit(aside, made)
                os.unlink(_JOURNAL, dir_fd=aside)  # from here on it is done
                with suppress(OSError):
                    os.fsync(aside)
        except BaseException as error:
            left = _undo(self._root, name)
            if isinstance(error, OSError | PatchError):
                raise PatchError(_failure(error, left, name)) from None
            raise
        with suppress(OSError):  # who comes next removes it
            _remove(self._root, name)

    def _prepare(self, aside: int) -> list[str]:
        """Write aside all that is new and keep all that is old; returns the folders that are to be made."""
        made: list[str] = []
        for index, change in enumerate(self._changes):
            if change.before is not None:
                self._keep(aside, f"old-{index}", change)
            if change.after is not None:
                self._write(aside, f"new-{index}", change)
            if change.before is None:
                made += [folder for folder in _missing(self._root, change.path) if folder not in made]
        entries = [[change.path, _hash(change.before), _hash(change.after)] for change in self._changes]
        with os.fdopen(os.open("draft", _NEW, 0o600, dir_fd=aside), "wb") as file:
            file.write(json.dumps({"changes": entries, "made": made}).encode())
            file.flush()
            os.fsync(file.fileno())
        os.rename("draft", _JOURNAL, src_dir_fd=aside, dst_dir_fd=aside)
        os.fsync(aside)
        os.fsync(self._root)
        return made

    def _keep(self, aside: int, name: str, change: Change) -> None:
        with _parent(self._root, change.path) as (folder, there):
            status = os.stat(there, dir_fd=folder, follow_symlinks=False)
            if not status.st_mode & 0o222 or not os.access(there, os.W_OK, dir_fd=folder):
                raise PermissionError(errno.EACCES, "write-protected", change.path)
            try:
                os.link(there, name, src_dir_fd=folder, dst_dir_fd=aside, follow_symlinks=False)
            except OSError:  # a file system without links, or a file of somebody else
                assert change.before is not None
                _write_new(aside, name, change.before, like=(folder, there))

    def _write(self, aside: int, name: str, change: Change) -> None:
        assert change.after is not None
        like = change.moved_from or (change.path if change.before is not None else None)
        if like is None:
            _write_new(aside, name, change.after, like=None)
            return
        with _parent(self._root, like) as place:
            _write_new(aside, name, change.after, like=place)

    def _commit(self, aside: int, made: Sequence[str]) -> None:
        for path in made:
            with _parent(self._root, path) as (above, name):
                os.mkdir(name, dir_fd=above)
                os.fsync(above)
        folders: dict[str, None] = {}
        for index, change in enumerate(self._changes):
            with _parent(self._root, change.path) as (folder, name):
                if change.before is not None:
                    status = os.stat(name, dir_fd=folder, follow_symlinks=False)
                    if _state(status) != self._states[change.path]:
                        raise _changed(change.path)
                if change.after is None:
                    os.unlink(name, dir_fd=folder)
                elif change.before is not None:
                    os.rename(f"new-{index}", name, src_dir_fd=aside, dst_dir_fd=folder)
                else:
                    _add(aside, f"new-{index}", folder, name)
            folders["/".join([*_parts(change.path)[:-1], "x"])] = None
        for path in folders:
            with _parent(self._root, path) as (folder, _):
                os.fsync(folder)


def _changed(path: str) -> PatchError:
    return PatchError(f"{path} was changed by somebody else meanwhile; read it again")


class _State(NamedTuple):
    """What is not the same any more where somebody has written or replaced a file."""

    inode: int
    size: int
    changed_ns: int


def _state(status: os.stat_result) -> _State:
    return _State(status.st_ino, status.st_size, status.st_mtime_ns)


def _add(aside: int, new: str, folder: int, name: str) -> None:
    """Give a file its name, unless somebody has one of that name by now: theirs is never replaced."""
    try:
        os.link(new, name, src_dir_fd=aside, dst_dir_fd=folder, follow_symlinks=False)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK):
            raise
        os.close(os.open(name, _NEW, 0o600, dir_fd=folder))  # a file system without links: take the name first
        os.rename(new, name, src_dir_fd=aside, dst_dir_fd=folder)


_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


@contextmanager
def _aside(root: int, name: str) -> Iterator[int]:
    handle = os.open(name, _FOLDER, dir_fd=root)
    try:
        yield handle
    finally:
        os.close(handle)


def _write_new(folder: int, name: str, data: bytes, *, like: tuple[int, str] | None) -> None:
    """A new file, on the disk, with the permissions of the one it is `like`."""
    with os.fdopen(os.open(name, _NEW, 0o666, dir_fd=folder), "wb") as file:
        for start in range(0, len(data), _PIECE):
            file.write(data[start : start + _PIECE])
        file.flush()
        if like is not None:
            _take_after(file.fileno(), *like)
        os.fsync(file.fileno())


def _take_after(new: int, folder: int, name: str) -> None:
    old = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    try:
        status = os.fstat(old)
        with suppress(OSError):  # only root may give files away
            os.fchown(new, status.st_uid, status.st_gid)
        # As the kernel has it when a file is written: what its program may do beyond its user is gone.
        os.fchmod(new, stat.S_IMODE(status.st_mode) & ~(stat.S_ISUID | stat.S_ISGID))
        with suppress(OSError):  # not every file system has them
            for attribute in os.listxattr(old):
                if attribute != "security.capability":
                    with suppress(OSError):
                        os.setxattr(new, attribute, os.getxattr(old, attribute))
    finally:
        os.close(old)


def _missing(root: int, path: str) -> list[str]:
    """The folders on the way to a path that are not there."""
    folders = _parts(path)[:-1]
    for depth in range(len(folders)):
        here = "/".join(folders[: depth + 1])
        try:
            with _parent(root, f"{here}/x"):
                pass
        except FileNotFoundError:
            return ["/".join(folders[: end + 1]) for end in range(depth, len(folders))]
    return []


def _hash(data: bytes | None) -> str | None:
    return None if data is None else hashlib.sha256(data).hexdigest()


# --- undoing ------------------------------------------------------------------------------------------------


def _recover(root: int) -> list[str]:
    """Undo all that is half-done here. The folder's lock is held, so that nobody is still at it."""
    restored: list[str] = []
    for name in sorted(os.listdir(root)):
        if name.startswith(ASIDE) and stat.S_ISDIR(os.stat(name, dir_fd=root, follow_symlinks=False).st_mode):
            left = _undo(root, name, restored.append)
            if left:
                raise PatchError(
                    f"a patch that was cut off cannot be undone: {', '.join(left)}; what was there is in {name}"
                )
    return restored


def _undo(root: int, name: str, restored: Callable[[str], None] = lambda path: None) -> list[str]:
    """Put back what a patch changed, by its journal, and remove what it wrote aside; returns what could not be."""
    left: list[str] = []
    try:
        with _aside(root, name) as aside:
            for index, entry, made in _journal(aside):
                try:
                    if entry is None:
                        _remove_folders(root, made)
                    elif _put_back(root, aside, index, entry):
                        restored(entry.path)
                except (OSError, PatchError) as error:
                    left.append(f"{entry.path if entry else name} ({error})")
        if not left:
            _remove(root, name)
    except (OSError, ValueError) as error:
        left.append(f"{name} ({error})")
    return left


def _journal(aside: int) -> Iterator[tuple[int, _Entry | None, list[str]]]:
    """Each change, the last one first; then the folders that were made. Nothing where there is no journal yet, or not
    any more. Raises ValueError for one that nobody here wrote."""
    try:
        # Not blocking: the folder may have come from anybody, with anything in it.
        handle = os.open(_JOURNAL, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=aside)
        with os.fdopen(handle, "rb") as file:
            raw: Any = json.load(file)
    except FileNotFoundError:
        return
    except RecursionError:
        raise ValueError("its journal is damaged") from None
    try:
        entries = [_entry(*entry) for entry in raw["changes"]]
        made = [str(folder) for folder in raw["made"]]
    except (TypeError, KeyError):
        raise ValueError("its journal is damaged") from None
    for index, entry in reversed([*enumerate(entries)]):
        yield index, entry, made
    yield -1, None, made


def _entry(path: object, before: object, after: object) -> _Entry:
    if isinstance(path, str) and isinstance(before, str | None) and isinstance(after, str | None):
        return _Entry(path, before, after)
    raise TypeError


def _put_back(root: int, aside: int, index: int, entry: _Entry) -> bool:
    """Whether there was anything to undo. What somebody changed since is theirs, and stays."""
    try:
        found = _read(root, entry.path)
    except _NoFileError:
        return False
    data = None if found is None else found[0]
    if _hash(data) == entry.before:
        return False
    is_ours = _hash(data) == entry.after or (entry.before is None and data == b"")
    if not is_ours:
        return False
    with _parent(root, entry.path) as (folder, name):
        if entry.before is None:
            os.unlink(name, dir_fd=folder)
        else:
            os.rename(f"old-{index}", name, src_dir_fd=aside, dst_dir_fd=folder)
        os.fsync(folder)
    return True


def _remove_folders(root: int, made: Sequence[str]) -> None:
    for folder in reversed(made):
        with suppress(OSError), _parent(root, folder) as (parent, name):  # somebody's files may be in it by now
            os.rmdir(name, dir_fd=parent)


def _remove(root: int, name: str) -> None:
    with _aside(root, name) as aside:
        names = os.listdir(aside)  # noqa: PTH208 — of a handle, not of a path
        for inner in sorted(names, key=lambda inner: inner == _JOURNAL):
            os.unlink(inner, dir_fd=aside)
    os.rmdir(name, dir_fd=root)


def _reason(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full"
    return error.strerror or str(error)


def _failure(error: OSError | PatchError, left: Sequence[str], aside: str) -> str:
    reason = str(error)
    if isinstance(error, OSError):
        reason = f"{error.filename}: {_reason(error)}" if isinstance(error.filename, str) else _reason(error)
    if not left:
        return f"the patch was not carried out, and nothing was changed: {reason}"
    return (
        f"the patch was cut off ({reason}) and could not all be undone: {', '.join(left)}. What was there before is in "
        f"{aside}; the next patch tries to put it back."
    )
