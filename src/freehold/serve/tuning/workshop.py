"""The folder where clients' files and training runs lie: where what is, and whose folder it is meanwhile.

    place.json               the name by which the store knows this folder
    files/file-….jsonl       uploaded files, as they came
    jobs/ftjob-…/            one run of training each, as `freehold tune` lays it out; `child.lock`, `log.txt`

One server at a time works here. Names of files and folders are ids that the server made up; nothing that a client sent
is ever a part of a path. Decides nothing: what is kept and who may have it, the store knows.
"""

import fcntl
import json
import os
import secrets
from pathlib import Path
from typing import Self

from freehold import disk
from freehold.errors import DiskError, NotFoundError, StoreError, UsageError
from freehold.log import NOTICE, logger

_PLACE = "place.json"


class Workshop:
    """Made by `Workshop.open`; close it, or use it in a `with` block."""

    def __init__(self, root: Path, place: str, lock: int) -> None:
        self.root, self.place, self._lock = root, place, lock

    @classmethod
    def open(cls, root: Path) -> Self:
        """The folder, made if it is not there, for this process alone.

        Raises UsageError where another process has it, DiskError where it cannot be written.
        """
        root = root.absolute()
        lock: int | None = None
        try:
            for folder in (root, root / "files", root / "jobs"):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = os.open(root / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            place = _place_of(root / _PLACE)
        except BlockingIOError:
            assert lock is not None
            os.close(lock)
            raise UsageError(f"{root} is another server's at the moment; name another folder for --tuning") from None
        except OSError as error:
            if lock is not None:
                os.close(lock)
            raise DiskError(f"{root} cannot be written ({error.strerror}); check its permissions") from None
        except BaseException:
            if lock is not None:
                os.close(lock)
            raise
        disk.remove_all_abandoned(root / "files", settled=0)  # nobody else writes here: it was cut off by a kill
        return cls(root, place, lock)

    def close(self) -> None:
        """Let others have it. Closing twice is as good as once."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def file(self, file_id: str, filename: str) -> Path:
        """Where the bytes of a file lie. Its ending, of two that there are, is what training goes by."""
        return self.root / "files" / f"{file_id}{'.txt' if filename.lower().endswith('.txt') else '.jsonl'}"

    def find(self, file_id: str) -> Path:
        """The same, whatever it was called. Raises NotFoundError where it is gone."""
        for path in (self.file(file_id, ""), self.file(file_id, ".txt")):
            if path.is_file():
                return path
        raise NotFoundError(f"the content of {file_id} is not there any more")

    def job(self, job_id: str) -> Path:
        """Where a job's run lies."""
        return self.root / "jobs" / job_id

    def tell_strays(self, files: frozenset[str], jobs: frozenset[str]) -> None:
        """Say which files and runs are there that the store, of these ids, does not know: left by a kill, or another
        store's."""
        for folder, known, what in (("files", files, "files"), ("jobs", jobs, "runs")):
            strays = [path for path in sorted((self.root / folder).iterdir()) if path.stem not in known]
            strays = [path for path in strays if not path.name.startswith(".")]
            if strays:
                logger.log(
                    NOTICE,
                    "%s holds %s that the store does not know (%d, such as %s): left by a kill, or another --store's",
                    self.root / folder, what, len(strays), strays[0].name,
                )  # fmt: skip


def _place_of(path: Path) -> str:
    try:
        place = json.loads(path.read_bytes())["place"]
    except FileNotFoundError:
        place = f"place_{secrets.token_hex(12)}"
        disk.write_text(path, json.dumps({"place": place}) + "\n")
    except (ValueError, KeyError, TypeError):
        raise StoreError(f"{path} is damaged; put a copy in its place, or name another folder for --tuning") from None
    return str(place)
