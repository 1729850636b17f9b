"""What stands around the endpoints, without sockets: who is let in, what is read, what is logged."""

import asyncio
import hashlib
import io
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from freehold.errors import UsageError
from freehold.serve import journal
from freehold.serve.bodies import MAX_DEPTH, Bodies, StrictRoute, parse_json
from freehold.serve.caller import Caller
from freehold.serve.errors import ApiError
from freehold.serve.gate import Gate
from freehold.serve.guard import guard
from freehold.serve.hosts import host_name, origin
from freehold.serve.keys import Keys

SECRET = "fh-a-secret-that-is-nowhere-else"


@dataclass(frozen=True, kw_only=True)
class Key:
    id: str
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    revoked_at: float | None = None


def digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> dict[str, Any]:
        found = json.loads(self.body)["error"]
        assert isinstance(found, dict)
        return found


@dataclass
class Endpoint:
    """Says OK, and remembers what it was given."""

    bodies: list[bytes] = field(default_factory=list)
    states: list[dict[str, Any]] = field(default_factory=list)
    act: Callable[[Scope], None] = lambda scope: None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message["body"], message.get("more_body", False)
        self.bodies.append(body)
        self.states.append(scope["state"])
        self.act(scope)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"OK"})


def ask(
    app: ASGIApp,
    path: str = "/v1/models",
    *,
    method: str = "GET",
    headers: dict[str, str] | list[tuple[str, str]] | None = None,
    pieces: list[bytes] | None = None,
    client: str = "127.0.0.1",
    server: str = "127.0.0.1",
) -> Answer:
    return asyncio.run(_ask(app, path, method, headers, pieces, client, server))


async def _ask(app: ASGIApp, path: str, method: str, headers: Any, pieces: Any, client: str, server: str) -> Answer:
    given = [*(headers.items() if isinstance(headers, dict) else headers or [])]
    if not any(name.lower() == "host" for name, _ in given):
        given.append(("host", "localhost:8000"))
    scope: Scope = {
        "type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": b"secret=query",
        "headers": [(name.lower().encode(), value.encode("latin-1")) for name, value in given if value != ""],
        "client": (client, 5), "server": (server, 8000), "scheme": "http", "http_version": "1.1",
    }  # fmt: skip
    incoming = [*(pieces or [b""])]
    sent: list[Message] = []

    async def receive() -> Message:
        piece = incoming.pop(0)
        return {"type": "http.request", "body": piece, "more_body": bool(incoming)}

    async def send(message: Message) -> None:
        sent.append(message)

    await app(scope, receive, send)
    assert [message["type"] for message in sent[:2]] == ["http.response.start", "http.response.body"]
    got = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return Answer(sent[0]["status"], got, b"".join(message.get("body", b"") for message in sent[1:]))


def post(app: ASGIApp, body: bytes, path: str = "/v1/responses", **headers: str) -> Answer:
    named = {"content-type": "application/json", "content-length": str(len(body))}
    named |= {name.replace("_", "-"): value for name, value in headers.items()}
    return ask(app, path, method="POST", headers=named, pieces=[body])


def guarded(endpoint: ASGIApp, keys: dict[bytes, Key] | None = None, **options: Any) -> ASGIApp:
    found = options.pop("keys_object", None) or Keys(lambda: keys or {}, clock=options.pop("clock", Clock()))
    return guard(endpoint, keys=found, gate=options.pop("gate", Gate(max_running=1, max_queue=0)), **options)


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    kept = [(each, each.handlers, each.propagate, each.level) for each in map(
        logging.getLogger, ("freehold", "uvicorn", "uvicorn.access", "uvicorn.error", "asyncio"))]  # fmt: skip
    stream = io.StringIO()
    journal.start_logging(as_json=True, stream=stream)
    yield stream
    for each, handlers, propagate, level in kept:
        each.handlers, each.propagate = handlers, propagate
        each.setLevel(level)


# --- names and pages ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200), ("LOCALHOST:8000", 200), ("127.0.0.1:1", 200), ("[::1]:8000", 200), ("localhost.", 200),
        ("box.example:443", 200), ("10.1.2.3:8000", 200),  # named; the address that the connection came in at
        ("evil.example", 421), ("10.1.2.4", 421), ("localhost.evil.example", 421), ("2130706433", 421), ("[::2]", 421),
        ("", 400), ("localhost:", 400), ("localhost:99999", 400), ("localhost:80:80", 400), ("user@localhost", 400),
        ("localhost/", 400), ("local host", 400), ("a,localhost", 400), ("[::1", 400), ("localhost\x00", 400),
        ("\xe9", 400),
    ],
)  # fmt: skip
def test_only_names_of_this_server_are_answered(host: str, status: int) -> None:
    app = guarded(Endpoint(), allowed_hosts=["box.example"])
    answer = ask(app, headers=[("host", host)], server="10.1.2.3", client="127.0.0.1")
    assert answer.status == status
    if status != 200:
        assert answer.error["message"].isprintable() and answer.error["message"].isascii()
    if status == 421:
        assert f"--allowed-host {host.rpartition(':')[0] if host.count(':') == 1 else host}" in answer.error["message"]


def test_two_host_headers_are_refused() -> None:
    assert ask(guarded(Endpoint()), headers=[("host", "localhost"), ("host", "localhost")]).status == 400


@pytest.mark.parametrize(
    ("page", "status"),
    [
        ("http://localhost:8000", 200), ("https://chat.example", 200), ("http://localhost:3000", 403), ("null", 403),
        ("https://evil.example", 403), ("http://chat.example", 403), ("https://chat.example.evil.example", 403),
        ("https://chat.example:444", 403), ("file://", 403), ("http://localhost:8000, https://chat.example", 403),
    ],
)  # fmt: skip
def test_a_page_of_another_origin_must_have_been_named(page: str, status: int) -> None:
    endpoint = Endpoint()
    answer = post(guarded(endpoint, cors_origins=["https://chat.example/"]), b"{}", origin=page)
    assert answer.status == status
    assert len(endpoint.bodies) == (status == 200)
    assert ("access-control-allow-origin" in answer.headers) is (page == "https://chat.example")


def test_no_page_of_another_origin_gets_in_by_default_nor_learns_that_it_could() -> None:
    app = guarded(Endpoint())
    preflight = {"origin": "https://chat.example", "access-control-request-method": "POST"}
    answer = ask(app, method="OPTIONS", headers=preflight)
    assert answer.status == 403 and "--cors-origin https://chat.example" in answer.error["message"]
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_a_preflight_of_a_named_origin_needs_no_key_and_a_refusal_can_be_read() -> None:
    app = guarded(Endpoint(), {digest(SECRET): Key(id="k")}, cors_origins=["https://chat.example"])
    preflight = {
        "origin": "https://chat.example",
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type",
    }
    answer = ask(app, method="OPTIONS", headers=preflight)
    assert (answer.status, answer.headers["access-control-allow-origin"]) == (200, "https://chat.example")
    assert "authorization" in answer.headers["access-control-allow-headers"]
    refused = post(app, b"{}", origin="https://chat.example")
    assert (refused.status, refused.headers["access-control-allow-origin"]) == (401, "https://chat.example")
    assert "x-request-id" in refused.headers["access-control-expose-headers"]


def test_names_and_origins_are_checked_when_they_are_given() -> None:
    for name in ("", "http://box", "box:80", "a b", "*"):
        with pytest.raises(UsageError, match="a host's name is wanted"):
            host_name(name)
    for page in ("*", "null", "chat.example", "https://", "https://a/b", "ftp://a", "https://a:b", "https://u@a"):
        with pytest.raises(UsageError, match="an origin is wanted"):
            origin(page)
    assert (host_name("Box.Example."), host_name("0:0::1"), host_name("[::1]")) == ("box.example", "[::1]", "[::1]")


def test_websockets_are_closed() -> None:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        raise AssertionError("nothing is read")

    asyncio.run(guarded(Endpoint())({"type": "websocket", "headers": [], "path": "/"}, receive, send))  # type: ignore[arg-type]
    assert [message["type"] for message in sent] == ["websocket.close"]


# --- keys ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"authorization": f"Bearer {SECRET}"}, 200),
        ({"authorization": f"bearer  {SECRET}"}, 200),
        ({"x-api-key": SECRET}, 200),
        ({}, 401),
        ({"authorization": SECRET}, 401),
        ({"authorization": f"Basic {SECRET}"}, 401),
        ({"authorization": "Bearer "}, 401),
        ({"authorization": f"Bearer {SECRET}x"}, 401),
        ({"authorization": f"Bearer {digest(SECRET).hex()}"}, 401),
        ({"authorization": "Bearer \xff"}, 401),
        ({"authorization": "Bearer " + "x" * 9000}, 401),
        ({"authorization": "Bearer fh-revoked"}, 401),
        ({"x-api-key": "fh-revoked"}, 401),
    ],
)
def test_a_key_is_asked_for_and_compared(headers: dict[str, str], status: int, log: io.StringIO) -> None:
    keys = {digest("fh-other"): Key(id="other"), digest(SECRET): Key(id="mine"),
            digest("fh-revoked"): Key(id="old", revoked_at=1.0)}  # fmt: skip
    endpoint = Endpoint()
    answer = ask(guarded(endpoint, keys), headers=headers)
    assert answer.status == status
    if status == 200:
        assert endpoint.states[0]["caller"].owner == "mine"
    else:
        assert answer.error["code"] == "invalid_api_key"
        assert answer.headers["www-authenticate"] == "Bearer"
        assert endpoint.bodies == []
    assert SECRET not in log.getvalue() and "fh-revoked" not in log.getvalue()


def test_health_needs_no_key_and_nothing_that_looks_like_it_gets_by() -> None:
    app = guarded(Endpoint(), {digest(SECRET): Key(id="k")})
    assert [ask(app, path).status for path in ("/health", "/ready")] == [200, 200]
    for path in ("/metrics", "/health/", "//health", "/health/../v1/models", "/HEALTH", "/v1/models", "/"):
        assert ask(app, path).status == 401


def test_without_keys_the_loopback_is_let_in_and_others_are_not() -> None:
    endpoint = Endpoint()
    app = guarded(endpoint)
    for address in ("127.0.0.1", "127.8.8.8", "::1", "::ffff:127.0.0.1"):
        assert ask(app, client=address).status == 200
    assert {(state["caller"].owner, state["caller"].salt) for state in endpoint.states} == {("", "")}
    for address in ("10.0.0.1", "::ffff:10.0.0.1", "2001:db8::1", "somewhere"):
        refused = ask(app, client=address, headers={"x-forwarded-for": "127.0.0.1"})
        assert refused.status == 403 and "freehold keys create" in refused.error["message"]
    assert ask(guarded(endpoint, keys_object=Keys(dict, open_to_all=True)), client="10.0.0.1").status == 200


def test_keys_are_read_again_and_the_last_one_revoked_does_not_open_the_door() -> None:
    clock, stored, reads = Clock(), {digest(SECRET): Key(id="k")}, []
    app = guarded(Endpoint(), keys_object=Keys(lambda: reads.append(1) or dict(stored), clock=clock))  # type: ignore[func-returns-value]
    shown = {"authorization": f"Bearer {SECRET}"}
    assert [ask(app, headers=shown).status for _ in range(5)] == [200] * 5
    assert len(reads) == 1
    stored.clear()
    clock.now += 1.01
    assert [ask(app, headers=shown).status, ask(app).status] == [401, 401]
    stored[digest("fh-new")] = Key(id="new")
    clock.now += 1.01
    assert ask(app, headers={"x-api-key": "fh-new"}).status == 200


def test_a_server_whose_keys_are_all_revoked_is_closed_from_its_start() -> None:
    revoked = {digest(SECRET): Key(id="k", revoked_at=1.0)}
    for open_to_all in (False, True):
        app = guarded(Endpoint(), keys_object=Keys(lambda: revoked, open_to_all=open_to_all))
        assert [ask(app).status, ask(app, headers={"x-api-key": SECRET}).status] == [401, 401]


def test_keys_that_cannot_be_read_serve_for_a_while_and_then_nobody(log: io.StringIO) -> None:
    clock, broken = Clock(), False

    def load() -> dict[bytes, Key]:
        if broken:
            raise OSError(f"postgresql://user:{SECRET}@box is down")
        return {digest(SECRET): Key(id="k")}

    app = guarded(Endpoint(), keys_object=Keys(load, clock=clock))
    shown = {"x-api-key": SECRET}
    assert ask(app, headers=shown).status == 200
    broken = True
    clock.now += 2
    assert ask(app, headers=shown).status == 200
    clock.now += 30
    refused = ask(app, headers=shown)
    assert (refused.status, refused.headers["retry-after"]) == (503, "5")
    assert SECRET not in log.getvalue()
    broken = False
    assert ask(app, headers=shown).status == 200


def test_each_key_has_a_salt_that_stays_and_tells_nothing() -> None:
    def salts(secrets: list[str]) -> list[str]:
        endpoint = Endpoint()
        app = guarded(endpoint, {digest(secret): Key(id=secret) for secret in ("fh-a", "fh-b")})
        for secret in secrets:
            ask(app, headers={"x-api-key": secret})
        return [state["caller"].salt for state in endpoint.states]

    a, b, again = salts(["fh-a", "fh-b", "fh-a"])
    assert a == again != b
    assert salts(["fh-a"]) == [a]  # and after a restart
    assert len(a) == 64 and a not in (digest("fh-a").hex(), "fh-a")


# --- rates --------------------------------------------------------------------------------------------------------


def test_requests_per_minute_are_counted_and_come_back() -> None:
    clock = Clock()
    app = guarded(Endpoint(), {digest(SECRET): Key(id="k", requests_per_minute=3)}, clock=clock)

    def status() -> Answer:
        return post(app, b"{}", x_api_key=SECRET)

    first = status()
    assert {name: value for name, value in first.headers.items() if name.startswith("x-ratelimit")} == {
        "x-ratelimit-limit-requests": "3",
        "x-ratelimit-remaining-requests": "2",
        "x-ratelimit-reset-requests": "20.000s",
    }
    assert [status().status for _ in range(2)] == [200, 200]
    refused = status()
    assert (refused.status, refused.headers["retry-after"]) == (429, "20")
    assert refused.error["code"] == "rate_limit_exceeded"
    assert refused.error["message"].startswith("this key's 3 requests per minute are used up")
    assert refused.headers["x-ratelimit-remaining-requests"] == "0"
    assert ask(app, headers={"x-api-key": SECRET}).status == 200  # looking is free
    clock.now += 19.9
    assert status().status == 429
    clock.now += 0.2
    assert [status().status, status().status] == [200, 429]
    clock.now += 6000
    assert [status().status for _ in range(4)] == [200, 200, 200, 429]  # a minute's worth and no more


def test_tokens_are_charged_afterwards_and_a_debt_is_paid_off_first() -> None:
    clock, records = Clock(), {digest(SECRET): Key(id="k", tokens_per_minute=600), digest("fh-b"): Key(id="b")}
    endpoint = Endpoint(act=lambda scope: scope["state"]["caller"].charge(900))
    app = guarded(endpoint, records, clock=clock)
    answer = post(app, b"{}", x_api_key=SECRET)
    assert (answer.status, answer.headers["x-ratelimit-remaining-tokens"]) == (200, "0")
    refused = post(app, b"{}", x_api_key=SECRET)
    assert (refused.status, refused.headers["retry-after"]) == (429, "31")
    assert refused.error["message"].startswith("this key's 600 tokens per minute are used up")
    assert post(app, b"{}", x_api_key="fh-b").status == 200  # another's limits are another's
    clock.now += 30.2
    assert post(app, b"{}", x_api_key=SECRET).status == 200
    records[digest(SECRET)] = replace(records[digest(SECRET)], tokens_per_minute=None)
    clock.now += 1.1
    assert post(app, b"{}", x_api_key=SECRET).status == 200
    Caller().charge(5)  # nobody's tokens are nobody's limit


# --- bodies -------------------------------------------------------------------------------------------------------


def test_the_size_is_held_whether_it_is_announced_or_not() -> None:
    endpoint = Endpoint()
    app = guarded(endpoint, max_body_bytes=10)
    kind = {"content-type": "application/json"}
    assert post(app, b"0123456789").status == 200
    assert post(app, b"0123456789a").status == 413
    for pieces, status in (([b"01234", b"56789"], 200), ([b"01234", b"56789", b"a"], 413)):
        answer = ask(app, method="POST", headers=kind | {"transfer-encoding": "chunked"}, pieces=pieces)
        assert answer.status == status
    assert endpoint.bodies == [b"0123456789"] * 2
    assert ask(app, method="POST", headers=kind | {"content-length": "1" * 30}).status == 400
    assert ask(app, method="POST", headers=kind | {"content-length": "2", "transfer-encoding": "chunked"}).status == 400
    answer = ask(app, "/v1/messages", method="POST", headers=kind | {"content-length": "11"}, pieces=[b"x"])
    assert json.loads(answer.body)["error"]["type"] == "request_too_large"


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("application/json", 200), ("Application/JSON; charset=UTF-8", 200), ('application/json;charset="utf-8"', 200),
        ("application/vnd.api+json", 200), ("text/plain", 415), ("application/x-www-form-urlencoded", 415),
        ("multipart/form-data; boundary=x", 415), ("application/json; charset=utf-16", 415), ("", 415),
        ("application/json, text/plain", 415), ("application/jsonp", 415),
    ],
)  # fmt: skip
def test_a_body_must_say_that_it_is_json(kind: str, status: int) -> None:
    endpoint = Endpoint()
    assert post(guarded(endpoint), b"{}", content_type=kind).status == status
    chunked = {"content-type": kind, "transfer-encoding": "chunked"}
    assert ask(guarded(endpoint), method="POST", headers=chunked, pieces=[b"{}"]).status == status
    assert len(endpoint.bodies) == (2 if status == 200 else 0)


def test_no_body_needs_no_type_and_a_compressed_one_is_refused() -> None:
    assert ask(guarded(Endpoint()), method="POST").status == 200
    assert post(guarded(Endpoint()), b"", content_type="").status == 200
    assert post(guarded(Endpoint()), b"{}", content_encoding="gzip").status == 415


def test_many_large_bodies_at_once_are_too_many() -> None:
    async def run() -> list[int]:
        arrived, go = asyncio.Event(), asyncio.Event()
        statuses, waiting = [], 0
        app = Bodies(Endpoint(), max_bytes=100)

        async def one() -> None:
            nonlocal waiting
            pieces = [b"x" * 99, b"x"]

            async def receive() -> Message:
                nonlocal waiting
                if len(pieces) == 1:
                    waiting += 1
                    if waiting == 8:
                        arrived.set()
                    await go.wait()
                return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}

            async def send(message: Message) -> None:
                if message["type"] == "http.response.start":
                    statuses.append(message["status"])

            headers = [(b"content-type", b"application/json"), (b"content-length", b"100")]
            scope = {"type": "http", "method": "POST", "path": "/", "headers": headers, "state": {}}
            await app(scope, receive, send)

        first = [asyncio.create_task(one()) for _ in range(8)]
        await arrived.wait()
        await one()
        go.set()
        await asyncio.gather(*first)
        await one()  # everything was given back
        return statuses

    assert asyncio.run(run()) == [429] + [200] * 9


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(st.characters(exclude_categories=["Cs"])),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner),
    ),
    st.booleans(),
)  # fmt: skip
def test_json_is_read_as_it_was_written(value: Any, ascii_only: bool) -> None:
    assert parse_json(json.dumps(value, ensure_ascii=ascii_only).encode()) == value


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "not JSON"), (b"{", "line 1, column 2"), (b"{}x", "not JSON"), (b"{'a':1}", "not JSON"),
        (b"[1,]", "not JSON"),
        (b"\xef\xbb\xbf{}", "not JSON"), (b'{"a":01}', "not JSON"), (b'"\x01"', "not JSON"), (b'"\xff"', "not UTF-8"),
        (b'"\xed\xa0\x80"', "not UTF-8"), ("{}".encode("utf-16"), "not UTF-8"),
        (b'{"a":NaN}', "NaN"), (b"[-Infinity]", "-Infinity"), (b"1e999", "too large"), (b"-1e999", "too large"),
        (b'{"a":1,"a":2}', "same key twice"), (b'{"a":1,"\\u0061":2}', "same key twice"),
        (rb'"\ud800"', "surrogate"), (rb'{"a":[{"\udc00":1}]}', "surrogate"), (rb'["\ud83d\ud83d\ude00"]', "surrogate"),
        (b"18446744073709551616", "64 bits"), (b"[-9223372036854775809]", "64 bits"), (b"1" * 100_000, "64 bits"),
        (b"[" * 101 + b"]" * 101, "nested"), (b'{"a":' * 101 + b"1" + b"}" * 101, "nested"), (b"[" * 500_000, "nested"),
        (b'["\\"",' + b"[" * 100 + b"]" * 101, "nested"),
        (b"[" + b"0," * 1_000_000 + b"0]", "more than 1000000 values"),
        (b'"' + b'\\"' * 300_000, "not JSON"),  # in linear time, that is
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else None,
)  # fmt: skip
def test_what_could_be_taken_for_two_things_or_costs_too_much_is_refused(body: bytes, says: str) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        parse_json(body)
    assert len(str(caught.value)) < 120


def test_brackets_and_digits_in_texts_are_texts() -> None:
    text = '[{"' * 200 + "9" * 50 + "\\" * 7 + "\U0001f600"
    value: Any = text
    for _ in range(MAX_DEPTH):
        value = [value]
    for ascii_only in (True, False):
        assert parse_json(json.dumps(value, ensure_ascii=ascii_only).encode()) == value


def test_endpoints_of_a_strict_route_get_what_was_read_strictly() -> None:
    from fastapi import APIRouter, FastAPI

    router = APIRouter(route_class=StrictRoute)

    @router.post("/echo")
    async def echo(body: dict[str, Any]) -> dict[str, Any]:
        return body

    app = FastAPI()
    app.include_router(router)
    assert json.loads(post(app, b'{"a":1}', path="/echo").body) == {"a": 1}
    large = json.dumps({"a": "x" * 2**19}).encode()  # read on a thread
    assert json.loads(post(app, large, path="/echo").body) == json.loads(large)
    for body, says in ((b'{"a":1,"a":1}', "same key twice"), (b'{"a":NaN}', "NaN"), (large[:-1], "not JSON")):
        refused = post(app, body, path="/echo")
        assert refused.status == 400 and says in json.loads(refused.body)["detail"]


# --- the journal --------------------------------------------------------------------------------------------------


def _lines(log: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.getvalue().splitlines()]


def test_a_request_is_one_line_without_contents(log: io.StringIO) -> None:
    endpoint = Endpoint(act=lambda scope: scope["state"]["caller"].charge(42))
    app = guarded(endpoint, {digest(SECRET): Key(id="key_1")})
    answer = post(app, b'{"input":"a private matter"}', x_api_key=SECRET, x_request_id="their-id.1")
    assert answer.headers["x-request-id"] == "their-id.1" == endpoint.states[0]["request_id"]
    (line,) = _lines(log)
    assert line.pop("ms") >= 0 and line.pop("time").endswith("Z")
    assert line == {"level": "notice", "message": "request", "method": "POST", "path": "/v1/responses", "status": 200,
                    "tokens": 42, "key": "key_1", "request_id": "their-id.1"}  # fmt: skip
    for hidden in ("private", SECRET, "query"):
        assert hidden not in log.getvalue()


@pytest.mark.parametrize("given_id", ["", "two words", "a" * 129, "a\nb", 'a"b', "\xe9", "a\x1b[0m"])
def test_an_id_that_will_not_do_is_made_anew(given_id: str) -> None:
    answer = ask(guarded(Endpoint()), headers={"x-request-id": given_id})
    assert answer.headers["x-request-id"].startswith("req_") and len(answer.headers["x-request-id"]) == 36


def test_anthropics_clients_get_their_shapes_and_the_id_under_their_name() -> None:
    answer = post(guarded(Endpoint(), {digest(SECRET): Key(id="k")}), b"{}", path="/v1/messages")
    body = json.loads(answer.body)
    assert (answer.status, body["type"], body["error"]["type"]) == (401, "error", "authentication_error")
    assert body["request_id"] == answer.headers["request-id"] == answer.headers["x-request-id"]


def test_nothing_that_a_client_sends_makes_lines_of_its_own(log: io.StringIO) -> None:
    path = '/v1/x\nFAKE status=200 \x1b[31m\u2028"' + "y" * 500
    app = guarded(Endpoint())
    for as_json in (True, False):
        log.truncate(log.seek(0))
        journal.start_logging(as_json=as_json, stream=log)
        assert ask(app, path).status == 200
        (line,) = log.getvalue().splitlines()
        assert line.isascii() and line.isprintable() and len(line) < 700
        assert "FAKE" in line


def _fail(scope: Scope) -> None:
    raise RuntimeError(f"while reading {SECRET}")


def test_an_exception_is_a_500_that_tells_nothing_and_a_line_without_its_message(log: io.StringIO) -> None:
    answer = ask(guarded(Endpoint(act=_fail)))
    assert answer.status == 500
    assert answer.error["code"] == "internal_error" and answer.headers["x-request-id"] in answer.error["message"]
    assert SECRET not in log.getvalue() + answer.body.decode()
    failure, request = _lines(log)
    assert failure["message"].startswith("RuntimeError at ") and "in _fail" in failure["message"]
    assert (request["status"], request["request_id"]) == (500, failure["request_id"])


def test_contents_are_logged_where_that_was_asked_for_but_secrets_are_not(log: io.StringIO) -> None:
    app = guarded(Endpoint(), {digest(SECRET): Key(id="k")}, log_content=True)
    post(app, b'{"input":"a private matter"}', x_api_key=SECRET)
    (content,) = [line for line in _lines(log) if line["message"] == "content"]
    assert (content["request"], content["response"]) == ('{"input":"a private matter"}', "OK")
    assert SECRET not in log.getvalue()


def test_libraries_are_logged_without_their_tracebacks(log: io.StringIO) -> None:
    try:
        _fail({})
    except RuntimeError:
        logging.getLogger("uvicorn.error").exception("Exception in ASGI application\n")
    logging.getLogger("uvicorn.error").info("chatter")
    (line,) = _lines(log)
    assert line["message"].startswith("uvicorn.error: RuntimeError at ") and SECRET not in log.getvalue()


# --- the gate -----------------------------------------------------------------------------------------------------


def test_the_gate_counts_and_tells_when_to_return() -> None:
    clock = Clock()
    gate = Gate(max_running=2, max_queue=1, clock=clock)
    for _ in range(50):
        gate.enter()
        clock.now += 10
        gate.leave()
        clock.now += 1000  # an hour of rest is not how long a request takes
    gate.enter(2)
    with pytest.raises(ApiError, match="queue is full with 2 requests") as caught:
        gate.enter(2)
    assert (caught.value.status, caught.value.headers["retry-after"]) == (429, "10")
    gate.enter()
    gate.leave(3)
    gate.enter(3)


def test_a_gate_that_drains_lets_nobody_in_and_the_guard_says_so_for_every_path_but_health() -> None:
    gate = Gate(max_running=1, max_queue=0)
    gate.enter()
    gate.drain()
    gate.leave()
    with pytest.raises(ApiError, match="shutting down"):
        gate.enter()
    app = guarded(Endpoint(), gate=gate)
    refused = post(app, b"{}")
    assert (refused.status, refused.headers["retry-after"], refused.headers["connection"]) == (503, "10", "close")
    assert ask(app, "/health").status == 200
