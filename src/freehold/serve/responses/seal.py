"""Reasoning that a client keeps for us: sealed, so that what comes back is what we gave, and to whom we gave it.

Opaque and authentic, not secret: the same text stands beside it for the client to read. HMAC-SHA-256 with one secret,
over the owner and the text. Nothing is kept here: what was sealed with another secret, or for another owner, is not
opened.
"""

import base64
import binascii
import hmac
import os
import secrets
from pathlib import Path

from freehold.disk import exclusive
from freehold.errors import DiskError, UsageError

_SECRET_BYTES = 32
_TAG_BYTES = 32
_PREFIX = "fh1_"


class Sealer:
    """Seals and opens with a secret of 32 bytes; one that nobody else has where none is given."""

    def __init__(self, secret: bytes | None = None) -> None:
        self._secret = secrets.token_bytes(_SECRET_BYTES) if secret is None else secret
        if len(self._secret) != _SECRET_BYTES:
            raise UsageError(f"a sealing secret has {_SECRET_BYTES} bytes, got {len(self._secret)}")

    @classmethod
    def from_file(cls, path: Path) -> "Sealer":
        """With the secret in a file that only its user can read; made if it is not there."""
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with exclusive(path):
                if not path.exists():
                    _write_for_its_user(path, secrets.token_bytes(_SECRET_BYTES))
                return cls(path.read_bytes())
        except OSError as error:
            raise DiskError(f"{path} cannot be read ({error.strerror}); check its permissions") from None

    def seal(self, owner: str, text: str) -> str:
        """Something opaque that `open` makes the text of again, for this owner."""
        body = text.encode("utf-8", "surrogatepass")
        return _PREFIX + base64.urlsafe_b64encode(body + self._tag(owner, body)).decode("ascii")

    def open(self, owner: str, sealed: str) -> str:
        """What was sealed for this owner. Raises UsageError for anything else."""
        try:
            raw = base64.b64decode(sealed.removeprefix(_PREFIX).encode("ascii"), altchars=b"-_", validate=True)
        except (UnicodeEncodeError, binascii.Error):
            raw = b""
        body, tag = raw[:-_TAG_BYTES], raw[-_TAG_BYTES:]
        if not hmac.compare_digest(tag, self._tag(owner, body)):
            raise UsageError(
                "the encrypted content could not be verified: it was made elsewhere, or for somebody else, or has been "
                "changed; leave this item out"
            )
        return body.decode("utf-8", "surrogatepass")

    def _tag(self, owner: str, body: bytes) -> bytes:
        name = owner.encode("utf-8", "surrogatepass")
        return hmac.digest(self._secret, len(name).to_bytes(8) + name + body, "sha256")


def _write_for_its_user(path: Path, data: bytes) -> None:
    """Whole or not at all, and at no moment readable for others."""
    new = path.with_name(f"{path.name}.new")
    new.unlink(missing_ok=True)
    file = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.write(file, data)
        os.fsync(file)
    finally:
        os.close(file)
    new.replace(path)
