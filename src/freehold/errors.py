"""Every error that Freehold raises on purpose.

    FreeholdError
    ├── UsageError             a value given by the caller cannot be used; also a ValueError
    │   ├── ContextError       a prompt is longer than the context
    │   └── TrainingDataError  lines of a training file cannot be used
    ├── ModelNotFoundError     a model's name or path leads to nothing
    ├── NotFoundError          an id leads to nothing
    ├── CheckpointError        a model file is truncated, corrupt or foreign
    │   └── MisfitError        an adapter's layers or shapes are not those of the model
    ├── UnsupportedError       the file or request is sound, but Freehold does not do this
    │   └── SchemaError        a part of a JSON schema that no grammar can hold a model to
    ├── DownloadError          something could not be fetched, or was not what its hash promised
    ├── DiskError              a file or folder cannot be written
    │   └── DiskSpaceError     the disk is full, or would be
    ├── StoreError             the database of responses cannot be used, now or at all
    ├── OutOfMemoryError       memory ran out while a model was loaded or run
    ├── TrainingError          training cannot go on: its loss is no number, or grows
    ├── RequestError           one request failed while it ran; others go on
    ├── ClosedError            the engine takes no more requests
    └── BackendError           an asked-for backend cannot run here

Each message is one sentence or two: what was wrong, naming the value, and what to do about it. The command line
prints the message and exits with 1 (2 for UsageError); it never shows a traceback for these.
"""

from collections.abc import Sequence


class FreeholdError(Exception):
    """Base of all errors that a user or client can cause."""

    def __str__(self) -> str:
        # Messages quote names from foreign files: control characters are shown, not obeyed by the terminal.
        return _printable(super().__str__())


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class UsageError(FreeholdError, ValueError):
    """A value given by the caller cannot be used."""


class ContextError(UsageError):
    """A prompt is longer than the context, both in tokens."""

    def __init__(self, message: str, *, num_tokens: int, context: int) -> None:
        super().__init__(message)
        self.num_tokens = num_tokens
        self.context = context


class TrainingDataError(UsageError):
    """Lines of a training file cannot be used. `problems` say which and why, each on a line of its own in the message;
    `num_problems` counts also those that were too many to tell."""

    def __init__(self, message: str, *, problems: Sequence[str], num_problems: int) -> None:
        super().__init__(message)
        self.problems = tuple(problems)
        self.num_problems = num_problems

    def __str__(self) -> str:
        untold = self.num_problems - len(self.problems)
        more = [f"... and {untold} more"] if untold else []
        return "\n".join([super().__str__(), *(f"  {_printable(problem)}" for problem in self.problems), *more])


class ModelNotFoundError(FreeholdError):
    """A model's name or path leads to nothing."""


class NotFoundError(FreeholdError):
    """An id leads to nothing."""


class CheckpointError(FreeholdError):
    """A model file is truncated, corrupt or foreign."""


class MisfitError(CheckpointError):
    """An adapter's layers or shapes are not those of the model: it is for another, or parts of it are missing."""


class UnsupportedError(FreeholdError):
    """The file or request is sound, but Freehold does not do this."""


class SchemaError(UnsupportedError):
    """A part of a JSON schema, named by its JSON pointer, that no grammar can hold a model to."""

    def __init__(self, message: str, *, pointer: str) -> None:
        super().__init__(message)
        self.pointer = pointer


class DownloadError(FreeholdError):
    """Something could not be fetched, or was not what its hash promised."""


class DiskError(FreeholdError):
    """A file or folder cannot be written."""


class StoreError(FreeholdError):
    """The database of responses cannot be used, now or at all."""


class OutOfMemoryError(FreeholdError):
    """Memory ran out while a model was loaded or run."""


class TrainingError(FreeholdError):
    """Training cannot go on: its loss is no number, or grows."""


class RequestError(FreeholdError):
    """One request failed while it ran; others go on."""


class ClosedError(FreeholdError):
    """The engine takes no more requests."""


class DiskSpaceError(DiskError):
    """The disk is full, or would be."""


class BackendError(FreeholdError):
    """An asked-for backend cannot run here."""
