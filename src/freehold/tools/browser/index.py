"""The index of a folder: which files it has seen in which state, and their passages for full-text search.

    index_dir/
    ├── lock         held by the one who brings the index up to date, in this process or another
    ├── files.db     SQLite: each file's state and the hash of its contents
    └── passages/    tantivy: stretches of about 4,000 characters

Tantivy commits first, SQLite then. Whoever is killed between the two leaves passages that the next one writes once
more, after it has removed them: everything is idempotent. What cannot be opened is made anew; nothing in here is worth
more than the time that it takes. Readers need no lock. The index holds what the documents say: its folder is private.
"""

import fcntl
import hashlib
import os
import re
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from freehold.errors import DiskError
from freehold.log import Progress, logger, no_progress
from freehold.tools.browser.apart import UnreadableError
from freehold.tools.browser.content import Content, without_links
from freehold.tools.browser.folder import Folder, Found, NotTextError

_VERSION = "1"
_PASSAGE = 4000  # characters
_HEAP_BYTES = 96 << 20
_WRITER_THREADS = 2
_COMMIT_CHARACTERS = 256 << 20  # so that a stopped first run goes on where it was
SETTLED = 2_000_000_000  # nanoseconds: younger files may change again without another time stamp
_MAX_NAMED = 20
_CJK = re.compile("([\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff])")
_SYNTAX = re.compile(r"[^\w\s\".-]+")
_FIELDS = ("title", "words", "body")
_BOOSTS = {"title": 2.0, "words": 1.5}


class Changes(NamedTuple):
    """What bringing an index up to date has done. `skipped` are the files that could not be read, with the reasons.

    `look_seconds` is what looking through the folder took, without what was then read.
    """

    added: int
    changed: int
    removed: int
    unchanged: int
    skipped: dict[str, str]
    look_seconds: float


class Passage(NamedTuple):
    """A stretch of a document that a search found: of characters `start` to `end` of its text, from `line` on.

    `kept` is the text itself, of documents that take long to read again; "" of others.
    """

    name: str
    title: str
    start: int
    end: int
    line: int
    kept: str


class _State(NamedTuple):
    found: Found
    digest: bytes
    seen: int  # when, in nanoseconds; files that change afterwards within one tick of the clock are read again
    problem: str  # "" where it was read


class StoppedError(Exception):
    """The work was stopped; what is done so far is kept."""


class Index:
    """One folder's index. For any thread and any number of processes."""

    def __init__(self, folder: Folder, index_dir: Path) -> None:
        self._folder, self._dir = folder, index_dir
        self._passages: Any = None
        self._warned: set[str] = set()  # files that the log has named
        self._merging: threading.Thread | None = None

    # --- searching ---

    def search(self, query: str, limit: int) -> list[Passage]:
        """The best passages, in what was committed last, by whom ever."""
        index = self._reader()
        if index is None:
            return []
        cleaned = _spread(_SYNTAX.sub(" ", query[:1000])).strip(" .-")
        if cleaned.count('"') % 2:  # half a phrase would swallow what follows
            cleaned = cleaned.replace('"', " ")
        parsed, _ = index.parse_query_lenient(cleaned, list(_FIELDS), field_boosts=_BOOSTS)
        searcher = index.searcher()
        passages = []
        for _, address in searcher.search(parsed, limit, count=False).hits:
            stored = searcher.doc(address)
            name, title, start, end, line = (
                stored.get_first(field) for field in ("name", "title", "start", "end", "line")
            )
            passages.append(Passage(name, title, start, end, line, bytes(stored.get_first("kept") or b"").decode()))
        return passages

    def is_complete(self) -> bool:
        """Whether all files have been seen once."""
        try:
            with closing(self._database(create=False)) as database:
                return _meta(database, "complete") == "1"
        except sqlite3.Error:
            return False

    def _reader(self) -> Any:
        import tantivy

        for fresh in (self._passages is None, True):
            try:
                if fresh:
                    self._passages = _with_words(tantivy.Index.open(str(self._dir / "passages")))
                self._passages.reload()
                return self._passages
            except (ValueError, OSError):  # not there yet, or being made anew
                self._passages = None
        return None

    # --- bringing it up to date ---

    def refresh(
        self,
        *,
        progress: Progress = no_progress,
        stopped: Callable[[], bool] = lambda: False,
        wait: float | None = None,
        in_a_hurry: bool = False,
    ) -> Changes | None:
        """See what changed, and index that. None where another does it and `wait` seconds were not enough.

        Every now and then the index merges its pieces, which for a large one takes seconds; for who is `in_a_hurry`
        that is done after the return, with the lock held. Raises StoppedError, and DiskError where nothing can be
        written.
        """
        try:
            self._dir.mkdir(parents=True, exist_ok=True, mode=0o700)
            with ExitStack() as held:
                if not held.enter_context(self._locked(stopped, wait, progress)):
                    return None
                changes, merge = self._refresh(progress, stopped)
                if not in_a_hurry:
                    merge()
                elif merge.is_needed:
                    merging = threading.Thread(target=_merge, args=(merge, held.pop_all()), name="freehold-merge")
                    merging.start()
                    self._merging = merging
                return changes
        except UnreadableError as error:
            raise DiskError(f"{self._folder.path} cannot be read: {error}") from None
        except OSError as error:
            raise DiskError(
                f"{self._dir} cannot be written ({error.strerror or error}); name another folder for the index"
            ) from None

    @contextmanager
    def _locked(self, stopped: Callable[[], bool], wait: float | None, progress: Progress) -> Iterator[bool]:
        until = None if wait is None else time.monotonic() + wait
        waits = False
        with (self._dir / "lock").open("a") as lock:
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if stopped():
                        raise StoppedError from None
                    if until is not None and time.monotonic() >= until:
                        yield False
                        return
                    if not waits:
                        progress("waiting for another process to index", 0, 1)
                        waits = True
                    time.sleep(0.02)
            if waits:
                progress("waiting for another process to index", 1, 1)
            yield True

    def close(self) -> None:
        """Wait for what was left to be done."""
        if self._merging is not None:
            self._merging.join()

    def _refresh(self, progress: Progress, stopped: Callable[[], bool]) -> tuple[Changes, "_Merge"]:
        try:
            passages, database, is_new = self._open()
        except (ValueError, sqlite3.Error):
            logger.warning("the index in %s is damaged or of another version, and is made anew", self._dir)
            self._remove()
            passages, database, is_new = self._open()
        with closing(database):
            run = _Run(self._folder, passages, database, progress, stopped, is_new, self._warned)
            try:
                try:
                    return run.run(), run.merge
                except BaseException:
                    run.merge()
                    raise
            except (ValueError, sqlite3.Error) as error:
                self._remove()
                raise DiskError(
                    f"the index in {self._dir} cannot be written ({error}); it is made anew the next time: "
                    "see that its disk has space"
                ) from None

    def _open(self) -> tuple[Any, sqlite3.Connection, bool]:
        import tantivy

        folder = self._dir / "passages"
        is_new = not (folder / "meta.json").exists()
        if is_new:
            self._remove()
            folder.mkdir(mode=0o700)
            passages = tantivy.Index(_schema(), path=str(folder))
        else:
            passages = tantivy.Index.open(str(folder))
        database = self._database(create=True)
        try:
            kind = f"{_VERSION} {self._folder.path}"
            if not is_new and _meta(database, "kind") != kind:
                raise ValueError
            with database:
                database.execute("INSERT OR REPLACE INTO meta VALUES ('kind', ?)", (kind,))
        except BaseException:
            database.close()
            raise
        return _with_words(passages), database, is_new

    def _remove(self) -> None:
        self._passages = None
        for name in ("files.db", "files.db-wal", "files.db-shm"):
            (self._dir / name).unlink(missing_ok=True)
        if (self._dir / "passages").exists():
            shutil.rmtree(self._dir / "passages")

    def _database(self, *, create: bool) -> sqlite3.Connection:
        path = self._dir / "files.db"
        mode = "rwc" if create else "ro"
        database = sqlite3.connect(f"file:{_quoted(path)}?mode={mode}", uri=True, timeout=30)
        try:
            if create:
                database.execute("PRAGMA journal_mode=WAL")
                database.execute("PRAGMA synchronous=FULL")
                database.execute(
                    "CREATE TABLE IF NOT EXISTS files (name TEXT PRIMARY KEY, size INTEGER, modified INTEGER, "
                    "changed INTEGER, inode INTEGER, digest BLOB, seen INTEGER, problem TEXT) WITHOUT ROWID"
                )
                database.execute("CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT)")
        except BaseException:
            database.close()
            raise
        return database


class _Run:
    """One pass over the folder, by whoever holds the lock."""

    def __init__(
        self,
        folder: Folder,
        passages: Any,
        database: sqlite3.Connection,
        progress: Progress,
        stopped: Callable[[], bool],
        is_new: bool,
        warned: set[str],
    ) -> None:
        self._folder, self._passages, self._database = folder, passages, database
        self._progress, self._stopped = progress, stopped
        self._is_new = is_new
        self._writer: Any = None
        self._pending: list[tuple[Any, ...]] = []
        self._gone: list[tuple[str]] = []
        self._uncommitted = 0
        self._warned, self._more_warned = warned, 0

    def run(self) -> Changes:
        known = {
            row[0]: _State(Found(*row[:5]), row[5], row[6], row[7])
            for row in self._database.execute(
                "SELECT name, size, modified, changed, inode, digest, seen, problem FROM files"
            )
        }
        skipped: dict[str, str] = {}
        unlisted: list[str] = []

        def problem(name: str, reason: str) -> None:
            unlisted.append(name)
            skipped[name] = reason
            self._warn(name, reason)

        begun, now = time.monotonic(), time.time_ns()
        present, todo, total = set(), [], 0
        for found in self._folder.files(problem):
            if self._stopped():
                raise StoppedError
            present.add(found.name)
            state = known.get(found.name)
            if state and state.found == found and found.changed < state.seen - SETTLED:
                if state.problem:
                    skipped[found.name] = state.problem
                continue
            todo.append(found)
            total += found.size
        # What lies in a folder that cannot be listed at the moment is not gone.
        missing = known.keys() - present
        gone = [name for name in missing if not any(name == part or name.startswith(part + "/") for part in unlisted)]

        look_seconds = time.monotonic() - begun
        added = changed = done = 0
        try:
            for name in gone:
                self._delete(name)
                self._gone.append((name,))
            for found in todo:
                if self._stopped():
                    raise StoppedError
                self._progress("indexing", done, total)
                done += found.size
                outcome = self._take(found, known.get(found.name), now, skipped)
                added += outcome == "added"
                changed += outcome == "changed"
                if self._uncommitted > _COMMIT_CHARACTERS:
                    self._commit()
        finally:
            self._commit()
        if total:
            self._progress("indexing", total, total)
        if _meta(self._database, "complete") != "1":
            with self._database:
                self._database.execute("INSERT OR REPLACE INTO meta VALUES ('complete', '1')")
        if self._more_warned:
            logger.warning("%d more files cannot be read", self._more_warned)
        return Changes(added, changed, len(gone), len(present) - added - changed, skipped, look_seconds)

    @property
    def merge(self) -> "_Merge":
        return _Merge(self._writer)

    def _take(self, found: Found, state: _State | None, now: int, skipped: dict[str, str]) -> str:
        digest, reason, outcome = b"", "", ""
        try:
            with self._folder.open(found.name) as file:
                if found.size <= self._folder.max_bytes(found.name, file):  # what is larger is not read anyway
                    digest = _digest(file)
                    file.seek(0)
                if digest and state and state.digest == digest and not state.problem:
                    self._remember(found, digest, now, "")
                    return ""
                content = self._folder.read(found.name, file, self._stopped)
        except NotTextError:
            content = None
        except (UnreadableError, OSError, ValueError) as error:
            if self._stopped():
                raise StoppedError from None
            reason, content = str(error) or type(error).__name__, None
            skipped[found.name] = reason
            self._warn(found.name, reason)
        if state and not state.problem:
            self._delete(found.name)
        if content is not None:
            if not state and not self._is_new:
                self._delete(found.name)  # what a killed run may have left
            self._add(found.name, content)
            outcome = "changed" if state else "added"
        self._remember(found, digest, now, reason)
        return outcome

    def _remember(self, found: Found, digest: bytes, now: int, problem: str) -> None:
        self._pending.append((*found, digest, now, problem))
        self._uncommitted += 100

    def _add(self, name: str, content: Content) -> None:
        import tantivy

        words, line = _spread(name), 0
        for start, end in _stretches(content.text):
            body = content.text[start:end]
            fields: dict[str, Any] = {
                "name": name,
                "title": content.title,
                "words": words,
                "body": _spread(without_links(body)),
                "start": start,
                "end": end,
                "line": line,
            }
            if not content.own_lines:
                fields["kept"] = body.encode()
            self._write().add_document(tantivy.Document(**fields))
            line += body.count("\n")
        self._uncommitted += len(content.text)

    def _delete(self, name: str) -> None:
        self._write().delete_documents_by_term("name", name)

    def _write(self) -> Any:
        if self._writer is None:
            self._writer = self._passages.writer(heap_size=_HEAP_BYTES, num_threads=_WRITER_THREADS)
        return self._writer

    def _commit(self) -> None:
        if self._writer is not None:
            self._writer.commit()
        if self._pending or self._gone:
            with self._database:
                self._database.executemany("DELETE FROM files WHERE name = ?", self._gone)
                self._database.executemany(
                    "INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?, ?, ?, ?)", self._pending
                )
        self._pending, self._gone, self._uncommitted = [], [], 0

    def _warn(self, name: str, reason: str) -> None:
        if name in self._warned:
            return
        self._warned.add(name)
        if len(self._warned) > _MAX_NAMED:
            self._more_warned += 1
        else:
            logger.warning("%s is left out: %s", self._folder.path / name, reason)


class _Merge(NamedTuple):
    """Lets merges of passages come to their end, so that the index stays in few pieces."""

    writer: Any

    @property
    def is_needed(self) -> bool:
        return self.writer is not None

    def __call__(self) -> None:
        if self.writer is not None:
            self.writer.wait_merging_threads()


def _merge(merge: _Merge, held: ExitStack) -> None:
    with held:
        try:
            merge()
        except ValueError as error:  # nothing is lost: the pieces are there as they were
            logger.warning("an index could not be merged (%s): see that its disk has space", error)


def _schema() -> Any:
    import tantivy

    builder = tantivy.SchemaBuilder()
    builder.add_text_field("name", stored=True, tokenizer_name="raw", index_option="basic")
    for field in _FIELDS:
        builder.add_text_field(field, stored=field == "title", tokenizer_name="words")
    for field in ("start", "end", "line"):
        builder.add_unsigned_field(field, stored=True)
    builder.add_bytes_field("kept", stored=True)
    return builder.build()


def _with_words(index: Any) -> Any:
    import tantivy

    analyzer = tantivy.TextAnalyzerBuilder(tantivy.Tokenizer.simple())
    for part in (
        tantivy.Filter.remove_long(80),
        tantivy.Filter.lowercase(),
        tantivy.Filter.ascii_fold(),
        tantivy.Filter.stemmer("english"),
    ):
        analyzer = analyzer.filter(part)
    index.register_tokenizer("words", analyzer.build())
    return index


def _spread(text: str) -> str:
    """Chinese and Japanese, which have no spaces, a character a word."""
    return text if text.isascii() else _CJK.sub(r" \1 ", text)


def _stretches(text: str) -> Sequence[tuple[int, int]]:
    """The text in passages, cut at ends of lines where there are any."""
    cuts: list[tuple[int, int]] = []
    start = 0
    while start < len(text) or not cuts:
        end = min(start + _PASSAGE, len(text))
        if end < len(text):
            end = max(text.rfind("\n", start + _PASSAGE // 2, end), text.rfind(" ", end - 200, end)) + 1 or end
        cuts.append((start, end))
        start = end
    return cuts


def _digest(file: Any) -> bytes:
    return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).digest()


def _meta(database: sqlite3.Connection, key: str) -> str | None:
    row = database.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
    return None if row is None else str(row[0])


def _quoted(path: Path) -> str:
    from urllib.parse import quote

    return quote(os.fspath(path.absolute()))
