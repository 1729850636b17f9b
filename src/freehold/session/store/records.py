"""What goes into the store and comes out: values, checked when they are made."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from freehold.errors import UsageError
from freehold.session.store.text import escape

_T = TypeVar("_T")
MAX_ID_CHARACTERS = 512
"""Of an id as it is stored: databases put bounds on what an index may hold."""

UNFINISHED = frozenset({"queued", "in_progress"})
UNFINISHED_JOBS = frozenset({"queued", "validating_files", "running"})
JOB_STATUSES = UNFINISHED_JOBS | {"succeeded", "failed", "cancelled"}
STATUSES = UNFINISHED | {"completed", "incomplete", "failed", "cancelled"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseRecord:
    """A response as it was last written: the object on the wire, and the input items that are its own.

    The output items are `response["output"]`. All items have ids, and no id is there twice among the input or among the
    output.
    """

    id: str
    owner: str
    created_at: float
    status: str
    background: bool
    previous_response_id: str | None
    conversation_id: str | None
    response: dict[str, Any]
    input: tuple[dict[str, Any], ...]

    def __post_init__(self) -> None:
        check_id("response", self.id)
        check_id("owner", self.owner)
        check_id("previous response", self.previous_response_id or "")
        check_id("conversation", self.conversation_id or "")
        if self.status not in STATUSES:
            raise UsageError(f"a response cannot have the status {self.status!r}; give one of {sorted(STATUSES)}")
        if self.previous_response_id == self.id:
            raise UsageError(f"response {self.id!r} cannot come after itself; give another previous_response_id")
        check_items("input", self.input)
        check_items("output", self.output)

    @property
    def output(self) -> Sequence[dict[str, Any]]:
        """Its output items so far."""
        return self.response.get("output") or ()

    @property
    def finished(self) -> bool:
        """Whether it will not change any more."""
        return self.status not in UNFINISHED


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversationRecord:
    """A conversation without its items."""

    id: str
    owner: str
    created_at: float
    metadata: dict[str, str]

    def __post_init__(self) -> None:
        check_id("conversation", self.id)
        check_id("owner", self.owner)


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyRecord:
    """An API key, without its secret. A revoked one stays, so that it can be told whose responses are whose."""

    id: str
    name: str
    hint: str
    created_at: float
    revoked_at: float | None
    requests_per_minute: int | None
    tokens_per_minute: int | None

    def __post_init__(self) -> None:
        if not 0 < len(self.name) <= 64 or not self.name.isprintable():
            raise UsageError(f"a key cannot be called {self.name!r}; give 1 to 64 printable characters")
        for limit in ("requests_per_minute", "tokens_per_minute"):
            value = getattr(self, limit)
            if value is not None and not 1 <= value < 2**63:
                raise UsageError(f"a key cannot have {limit} {value}; give 1 or more, or leave it out for no limit")


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """An uploaded file, or one that the server made for its owner. Its bytes lie in the `place`."""

    id: str
    owner: str
    place: str
    created_at: float
    expires_at: float | None
    purpose: str
    filename: str
    num_bytes: int

    def __post_init__(self) -> None:
        check_id("file", self.id)
        check_id("owner", self.owner)


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRecord:
    """A fine-tuning job as it was last written: `job` is the object on the wire, without what stands here already."""

    id: str
    owner: str
    place: str
    created_at: float
    finished_at: float | None
    status: str
    training_file: str
    validation_file: str | None
    job: dict[str, Any]

    def __post_init__(self) -> None:
        check_id("job", self.id)
        check_id("owner", self.owner)
        check_id("file", self.training_file)
        check_id("file", self.validation_file or "")
        if self.status not in JOB_STATUSES:
            raise UsageError(f"a job cannot have the status {self.status!r}; give one of {sorted(JOB_STATUSES)}")

    @property
    def reads(self) -> tuple[str, ...]:
        """The ids of its files."""
        return (self.training_file,) if self.validation_file is None else (self.training_file, self.validation_file)

    @property
    def finished(self) -> bool:
        """Whether it will not change any more."""
        return self.status not in UNFINISHED_JOBS


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRecord:
    """A model that came of a job, or one of its checkpoints, after `step`. `model` says the rest."""

    name: str
    place: str
    owner: str
    job_id: str
    step: int | None
    created_at: float
    model: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed(Generic[_T]):
    """Some of a list, and whether more comes after it."""

    items: tuple[_T, ...]
    has_more: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """Some of a list of items, and whether more come after them."""

    items: tuple[dict[str, Any], ...]
    has_more: bool


def check_id(kind: str, value: str) -> None:
    """Raises UsageError for an id that is too long to be stored."""
    if len(escape(value)) > MAX_ID_CHARACTERS:
        raise UsageError(f"the {kind} id {value[:32]!r}… is too long; give at most {MAX_ID_CHARACTERS} characters")


def check_items(kind: str, items: Iterable[Mapping[str, Any]]) -> None:
    """Raises UsageError for an item without an id, or with one that another of them has."""
    seen: set[str] = set()
    for item in items:
        name = item.get("id")
        if not isinstance(name, str) or not name:
            raise UsageError(f"an {kind} item has the id {name!r}; give it a text that tells it from the others")
        check_id("item", name)
        if name in seen:
            raise UsageError(f"the {kind} item {name!r} is there twice; send it once")
        seen.add(name)
