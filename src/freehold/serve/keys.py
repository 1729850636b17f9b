"""Who may use the server: keys, and the caller that each stands for.

`Keys` reads the store's keys again at most once a second, so that a revoked one soon ends. What a client shows is
hashed and compared with every key's hash, in a time that tells nothing. Where there is no key at all, the loopback may
do everything and others nothing. `/health` and `/ready` ask for no key; `/metrics` does, as it tells how much is used.
Secrets are neither kept nor logged. Endpoints find the `Caller` in `scope["state"]["caller"]`.
"""

import asyncio
import hashlib
import hmac
import ipaddress
import time
from collections.abc import Callable, Mapping
from typing import Protocol

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from freehold.log import logger
from freehold.serve.caller import Caller
from freehold.serve.errors import ApiError
from freehold.serve.rates import Meter
from freehold.serve.refusal import answer, retry_after, values

FREE_PATHS = frozenset({"/health", "/ready"})
FRESH_SECONDS, STALE_SECONDS = 1.0, 30.0
_LONGEST_SECRET = 512
_SALT = b"freehold prefix cache"


class KeyRecord(Protocol):
    """What is asked of a key of the store. Limits of None are none."""

    @property
    def id(self) -> str: ...
    @property
    def requests_per_minute(self) -> int | None: ...
    @property
    def tokens_per_minute(self) -> int | None: ...
    @property
    def revoked_at(self) -> object: ...


class Keys:
    """The store's keys and their use. `load` may block, and is called on a thread.

    `open_to_all` lets everybody in while there is no key; else the loopback alone.
    """

    def __init__(
        self,
        load: Callable[[], Mapping[bytes, KeyRecord]],
        *,
        clock: Callable[[], float] = time.monotonic,
        open_to_all: bool = False,
    ) -> None:
        self._load, self._clock, self._open_to_all = load, clock, open_to_all
        self._keys: dict[bytes, KeyRecord] = {}
        self._read_at: float | None = None
        self._ever_any = False
        self._meters: dict[str, Meter] = {}
        self._reading = asyncio.Lock()

    async def caller(self, scope: Scope) -> Caller:
        """Who sends this request. Raises ApiError: 401 for a wrong key, 403 for strangers while no key is."""
        await self._refresh()
        if not self._ever_any:
            if self._open_to_all or _from_loopback(scope):
                return Caller()
            raise ApiError(
                403,
                "this server has no keys and so serves its own machine only: make one with `freehold keys create`",
                code="no_keys",
            )
        digest = hashlib.sha256(_secret(scope)).digest()
        found: KeyRecord | None = None
        for known, record in self._keys.items():
            if hmac.compare_digest(known, digest):
                found = record
        if found is None:
            raise _unauthorised("the API key is not one of this server's, or was revoked")
        salt = hmac.new(digest, _SALT, hashlib.sha256).hexdigest()
        return Caller(owner=found.id, salt=salt, meter=self._meter(found))

    async def _refresh(self) -> None:
        if self._is_younger_than(FRESH_SECONDS):
            return
        async with self._reading:
            if self._is_younger_than(FRESH_SECONDS):
                return
            now = self._clock()
            try:
                loaded = await asyncio.to_thread(self._load)
            except Exception as error:  # noqa: BLE001 — whatever a database raises
                logger.warning("keys could not be read (%s)", type(error).__name__)
                if self._is_younger_than(STALE_SECONDS):
                    return
                raise ApiError(503, "the keys cannot be read at the moment", headers=retry_after(5)) from None
            self._ever_any = self._ever_any or bool(loaded)  # the last one revoked must not open the door
            self._keys = {digest: record for digest, record in loaded.items() if record.revoked_at is None}
            ids = {record.id for record in self._keys.values()}
            self._meters = {key: meter for key, meter in self._meters.items() if key in ids}
            self._read_at = now

    def _is_younger_than(self, seconds: float) -> bool:
        return self._read_at is not None and self._clock() - self._read_at < seconds

    def _meter(self, record: KeyRecord) -> Meter | None:
        limits = (record.requests_per_minute, record.tokens_per_minute)
        if limits == (None, None):
            return None
        meter = self._meters.get(record.id)
        if meter is None or meter.limits != limits:
            meter = self._meters[record.id] = Meter(*limits, self._clock)
        return meter


class KeyCheck:
    """Middleware: finds the caller, counts requests that ask for work (POST), and says what is left of the minute."""

    def __init__(self, app: ASGIApp, *, keys: Keys) -> None:
        self._app, self._keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in FREE_PATHS:
            return await self._app(scope, receive, send)
        state = scope.setdefault("state", {})
        try:
            caller = state["caller"] = await self._keys.caller(scope)
        except ApiError as refusal:
            return await answer(refusal, scope, send)
        meter = caller.meter
        if meter is None:
            return await self._app(scope, receive, send)

        async def send_with_rates(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), *meter.headers()]}
            await send(message)

        try:
            if scope["method"] == "POST":
                meter.admit()
        except ApiError as refusal:
            return await answer(refusal, scope, send_with_rates)
        return await self._app(scope, receive, send_with_rates)


def is_loopback(address: str) -> bool:
    """Whether an IP address is this machine's own; also one of IPv4 that comes by IPv6."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    return (getattr(parsed, "ipv4_mapped", None) or parsed).is_loopback


def _from_loopback(scope: Scope) -> bool:
    client = scope.get("client")
    return client is not None and is_loopback(client[0])


def _secret(scope: Scope) -> bytes:
    authorization, plain = values(scope, b"authorization"), values(scope, b"x-api-key")
    if len(authorization) > 1 or len(plain) > 1:
        raise _unauthorised("a request must show its API key once")
    if authorization:
        scheme, _, secret = authorization[0].partition(b" ")
        if scheme.lower() != b"bearer":
            raise _unauthorised("the Authorization header must read `Bearer` and the API key")
    elif plain:
        secret = plain[0]
    else:
        raise _unauthorised("an API key is wanted, as `Authorization: Bearer KEY` or `x-api-key: KEY`")
    if not secret.strip() or len(secret) > _LONGEST_SECRET:
        raise _unauthorised("the API key is not one of this server's, or was revoked")
    return secret.strip()


def _unauthorised(message: str) -> ApiError:
    return ApiError(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})
