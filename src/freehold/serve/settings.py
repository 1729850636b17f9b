"""How a server is set up. Values only."""

from dataclasses import dataclass
from pathlib import Path

from freehold.errors import UsageError

_LONGEST_SECONDS = 1e6  # eleven days: what timers, and the kernel's, can hold


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeSettings:
    """Raises UsageError for values out of range.

    Times are in seconds. `max_running` requests run at once and `max_queue` more wait; what comes then is sent away.
    A request takes `request_timeout` at most, a client that stops reading is cut off after `send_timeout`, and on
    SIGTERM running requests have `drain_timeout` to come to their end. What a conversation's tools hold is closed when
    they have not been used for `container_timeout`, or where there are more than `max_containers`. Stored responses are
    kept for `keep_days` and up to `keep_bytes`, the oldest go first; None keeps them for ever. Without a `tls_key` the
    file `tls_cert` holds the key too. An upload has `max_upload_bytes`, all files of a key together `max_files_bytes`.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    model_names: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    allow_no_key: bool = False
    tls_cert: Path | None = None
    tls_key: Path | None = None
    max_running: int = 32
    max_queue: int = 256
    max_body_bytes: int = 32 << 20
    max_upload_bytes: int = 512 << 20
    max_files_bytes: int = 8 << 30
    request_timeout: float = 3600.0
    receive_timeout: float = 30.0
    send_timeout: float = 30.0
    drain_timeout: float = 60.0
    container_timeout: float = 1200.0
    max_containers: int = 32
    keep_days: float | None = 30.0
    keep_bytes: int | None = 4 << 30
    log_json: bool = False
    log_content: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise UsageError(f"the port must be between 0 and 65535, got {self.port!r}")
        if not all(self.model_names):
            raise UsageError("a model cannot go by no name; give --served-model-name one that clients can send")
        if self.tls_key is not None and self.tls_cert is None:
            raise UsageError("a key alone makes no TLS; give its certificate with --tls-cert")
        for name, least in (
            ("max_running", 1),
            ("max_queue", 0),
            ("max_body_bytes", 1),
            ("max_upload_bytes", 1),
            ("max_files_bytes", 1),
            ("max_containers", 1),
        ):
            if getattr(self, name) < least:
                raise UsageError(f"{option_of(name)} must be {least} or more, got {getattr(self, name)!r}")
        for name in ("request_timeout", "receive_timeout", "send_timeout", "drain_timeout", "container_timeout"):
            if not 0 < getattr(self, name) <= _LONGEST_SECONDS:
                raise UsageError(
                    f"{option_of(name)} must be more than 0 and at most {_LONGEST_SECONDS:,.0f} seconds, "
                    f"got {getattr(self, name)!r}"
                )
        for name in ("keep_days", "keep_bytes"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise UsageError(f"{option_of(name)} must be more than 0, got {getattr(self, name)!r}")


def option_of(name: str) -> str:
    """As the command line calls a field."""
    return "--max-concurrency" if name == "max_running" else f"--{name.replace('_', '-')}"
