"""`/v1/files` by OpenAI's client, and by clients that mean harm: what is refused leaves nothing behind."""

import asyncio
import json
import resource
import shutil
import time
from collections import namedtuple
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from openai import BadRequestError, NotFoundError
from openai.types import FileDeleted, FileObject

from freehold.disk import new_file
from freehold.serve.tuning.workshop import Workshop
from tests.serve.fortress import Fortress
from tests.serve.sdk import check
from tests.serve.tuned import LINES, Tuned, run

BOUNDARY = {"content-type": "multipart/form-data; boundary=B"}


def test_a_file_comes_back_as_it_was_and_goes_for_good(tmp_path: Path) -> None:
    async def use(server: Tuned) -> None:
        data = LINES * 40_000  # several writes
        made = await server.sdk.files.create(file=("chats.jsonl", data), purpose="fine-tune")
        check(FileObject, made.to_dict())
        assert (made.bytes, made.filename, made.purpose, made.status) == (
            len(data), "chats.jsonl", "fine-tune", "processed",
        )  # fmt: skip
        assert made.expires_at is None and abs(made.created_at - time.time()) < 60
        assert await server.sdk.files.retrieve(made.id) == made
        content = await server.sdk.files.content(made.id)
        assert content.read() == data
        assert content.response.headers["content-type"] == "application/octet-stream"
        assert content.response.headers["x-content-type-options"] == "nosniff"
        assert server.files == [f"{made.id}.jsonl"]
        deleted = await server.sdk.files.delete(made.id)
        check(FileDeleted, deleted.to_dict())
        assert server.files == []
        for gone in (server.sdk.files.retrieve, server.sdk.files.content, server.sdk.files.delete):
            with pytest.raises(NotFoundError, match="there is no file"):
                await gone(made.id)

    _with(tmp_path, use, max_upload_bytes=1 << 23)


def test_files_are_listed_by_page_order_and_purpose_and_only_to_their_owner(tmp_path: Path) -> None:
    async def use(server: Tuned) -> None:
        ids = [await server.upload(name=f"{number}.jsonl") for number in range(5)]
        assert [file.id async for file in server.sdk.files.list()] == ids[::-1]
        assert [file.id async for file in server.sdk.files.list(order="asc", limit=2)] == ids
        page = await server.sdk.files.list(order="asc", limit=2, after=ids[1])
        assert ([file.id for file in page.data], page.has_more) == (ids[2:4], True)
        assert [file.id async for file in server.sdk.files.list(purpose="fine-tune", limit=3)] == ids[::-1]
        assert [file.id async for file in server.sdk.files.list(purpose="batch")] == []
        async with server.client("bob") as bob:
            assert [file.id async for file in bob.files.list()] == []
            for theirs in (bob.files.retrieve, bob.files.content, bob.files.delete):
                with pytest.raises(NotFoundError) as caught:
                    await theirs(ids[0])
                assert str(caught.value).replace(ids[0], "?") == await _unknown(bob)
            with pytest.raises(NotFoundError):
                await bob.files.list(after=ids[0])
        assert [file.id async for file in server.sdk.files.list()] == ids[::-1]

    _with(tmp_path, use)


async def _unknown(client: Any) -> str:
    with pytest.raises(NotFoundError) as caught:
        await client.files.retrieve("file-x")
    return str(caught.value).replace("file-x", "?")


def test_a_file_goes_when_its_time_is_over(tmp_path: Path) -> None:
    async def use(server: Tuned) -> None:
        kept = await server.upload()
        short = await server.sdk.files.create(
            file=("a.txt", b"text"), purpose="fine-tune", expires_after={"anchor": "created_at", "seconds": 3600}
        )
        assert short.expires_at == short.created_at + 3600
        assert server.files == sorted([f"{kept}.jsonl", f"{short.id}.txt"])
        server.store._clock = lambda: time.time() + 3601
        with pytest.raises(NotFoundError):
            await server.sdk.files.retrieve(short.id)
        assert len(server.files) == 2
        await server.tuning.sweep(max_age_seconds=None)
        assert server.files == [f"{kept}.jsonl"]
        assert [file.id async for file in server.sdk.files.list()] == [kept]

    _with(tmp_path, use)


def test_no_name_that_a_client_sends_is_ever_a_path(tmp_path: Path) -> None:
    async def use(server: Tuned) -> None:
        for name, kept in (
            ("../../../etc/passwd", "passwd"),
            ("C:\\Users\\me\\chats.jsonl", "chats.jsonl"),
            ("/etc/shadow.txt", "shadow.txt"),
            ("~", "~"),
            ("-rf *; $(reboot).jsonl", "-rf *; $(reboot).jsonl"),
            ('a"; filename="b.jsonl', 'a"; filename="b.jsonl'),
            ("ж中👩.jsonl", "ж中👩.jsonl"),
            ("x" * 255, "x" * 255),
        ):
            made = await server.sdk.files.create(file=(name, b"{}"), purpose="fine-tune")
            assert made.filename == kept
            assert Path(server.files[0]).stem == made.id
            content = await server.sdk.files.content(made.id)
            assert "\n" not in content.response.headers["content-disposition"]
            await server.sdk.files.delete(made.id)
        for name in ("a\0b", "a%0Ab.jsonl", "a\x1b[2Jb", "..", "x/..", "a/", "x" * 256, "\u202egpj.exe", ""):
            answer = await server.http.post("/v1/files", content=form(("file", name, LINES), PURPOSE), headers=BOUNDARY)
            assert answer.status_code == 400 and "the file's name must have" in answer.text, name
        assert {path.name for path in tmp_path.iterdir()} <= {
            "tuning", "script.jsonl", "freehold.db", "freehold.db-wal", "freehold.db-shm",
        }  # fmt: skip
        assert server.files == []

    _with(tmp_path, use)


def form(*parts: tuple[str, str | None, bytes]) -> bytes:
    written = b""
    for name, filename, data in parts:
        named = "" if filename is None else f'; filename="{filename}"'
        written += f'--B\r\nContent-Disposition: form-data; name="{name}"{named}\r\n\r\n'.encode() + data + b"\r\n"
    return written + b"--B--\r\n"


FILE, PURPOSE = ("file", "a.jsonl", LINES), ("purpose", None, b"fine-tune")
HOUR = (("expires_after[anchor]", None, b"created_at"), ("expires_after[seconds]", None, b"3600"))
REFUSED: dict[str, tuple[bytes, int, str | None, str]] = {
    "another purpose": (form(FILE, ("purpose", None, b"batch")), 400, "purpose", "nothing on this server reads"),
    "no such purpose": (form(FILE, ("purpose", None, b"x")), 400, "purpose", "fine-tune"),
    "a result": (form(FILE, ("purpose", None, b"fine-tune-results")), 400, "purpose", "fine-tune"),
    "no purpose": (form(FILE), 400, "purpose", "Missing required parameter"),
    "two purposes": (form(FILE, PURPOSE, PURPOSE), 400, "purpose", "once"),
    "a purpose that is a file": (form(FILE, ("purpose", "p", b"fine-tune")), 400, "purpose", "plain field"),
    "a purpose that is not text": (form(FILE, ("purpose", None, b"\xff")), 400, "purpose", "not UTF-8"),
    "a long purpose": (form(FILE, ("purpose", None, b"x" * 5000)), 400, "purpose", "too long"),
    "no file": (form(PURPOSE), 400, "file", "Missing required parameter"),
    "a file without a name": (form(("file", None, LINES), PURPOSE), 400, "file", "with a filename"),
    "two files": (form(FILE, FILE, PURPOSE), 400, "file", "two files"),
    "an empty file": (form(("file", "a.jsonl", b""), PURPOSE), 400, "file", "is empty"),
    "another field": (form(FILE, PURPOSE, ("path", None, b"/etc")), 400, "path", "Unknown parameter"),
    "half an expiry": (form(FILE, PURPOSE, HOUR[0]), 400, "expires_after.seconds", "Missing required"),
    "a short expiry": (form(FILE, PURPOSE, HOUR[0], (HOUR[1][0], None, b"3599")), 400, "expires_after.seconds", "3600"),
    "no number": (form(FILE, PURPOSE, HOUR[0], (HOUR[1][0], None, b"1e9")), 400, "expires_after.seconds", "integer"),
    "another anchor": (
        form(FILE, PURPOSE, (HOUR[0][0], None, b"now"), HOUR[1]), 400, "expires_after.anchor", "created_at",
    ),
    "no end": (form(FILE, PURPOSE)[:-8], 400, None, "not complete"),
    "no form": (b'{"purpose": "fine-tune"}', 400, None, "does not begin with its boundary"),
    "too large": (form(("file", "a.jsonl", b"x" * 70_000), PURPOSE), 413, None, "65536 bytes"),
}  # fmt: skip


def test_what_is_refused_says_why_and_leaves_nothing_behind(tmp_path: Path) -> None:
    async def use(server: Tuned) -> None:
        for name, (body, status, param, says) in REFUSED.items():
            for content in (body, _in_pieces(body)):  # with its length, and without
                answer = await server.http.post("/v1/files", content=content, headers=BOUNDARY)
                assert answer.status_code == status, (name, answer.text)
                error = answer.json()["error"]
                assert error["param"] == param and says in error["message"], (name, error)
                assert server.files == [], name
        assert (await server.http.post("/v1/files", content=b"{}", headers={"content-type": "application/json"}))\
            .status_code == 415  # fmt: skip
        assert (await server.http.post("/v1/files")).status_code == 400
        answer = await server.http.post("/v1/files", content=form(*HOUR, FILE, PURPOSE), headers=BOUNDARY)
        assert answer.status_code == 200, answer.text
        for query in ("limit=0", "limit=10001", "order=up", "page=2", "after=file-x"):
            answer = await server.http.get(f"/v1/files?{query}")
            assert answer.status_code == (404 if "after" in query else 400), answer.text

    _with(tmp_path, use, max_upload_bytes=1 << 16)


async def _in_pieces(body: bytes) -> AsyncIterator[bytes]:
    for at in range(0, len(body), 1000):
        yield body[at : at + 1000]


OWNERS = ("ada", "bob", "cy", "dan", "eve", "flo", "gus", "hal")


async def _send_by_hand(server: Tuned, receive: Any, owner: str = "") -> int:
    """An upload of which `receive` gives the pieces; the status that it gets."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    headers = {"host": "127.0.0.1", "transfer-encoding": "chunked", "x-owner": owner, **BOUNDARY}
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
        "path": "/v1/files", "raw_path": b"/v1/files", "root_path": "", "query_string": b"", "client": None,
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()], "server": ("127.0.0.1", 80),
    }  # fmt: skip
    await server._door(scope, receive, send)
    return int(sent[0]["status"])


def test_a_client_that_goes_away_leaves_nothing_behind(tmp_path: Path) -> None:
    async def use(server: Tuned) -> None:
        pieces = [form(FILE, PURPOSE)[:100], b"x" * (3 << 20)]

        async def receive() -> dict[str, Any]:
            if pieces:
                return {"type": "http.request", "body": pieces.pop(0), "more_body": True}
            assert any(name.startswith(".") for name in server.files)  # it is on its way
            return {"type": "http.disconnect"}

        assert await _send_by_hand(server, receive) == 499
        assert not pieces and server.files == []

    _with(tmp_path, use, max_upload_bytes=1 << 23)


def test_uploads_that_stand_still_are_few_and_not_waited_for(tmp_path: Path) -> None:
    async def use(server: Tuned) -> None:
        def stalled() -> Any:
            pieces = [form(FILE, PURPOSE)[:100]]

            async def receive() -> dict[str, Any]:
                if pieces:
                    return {"type": "http.request", "body": pieces.pop(0), "more_body": True}
                await asyncio.Event().wait()
                raise AssertionError

            return receive

        standing = [asyncio.create_task(_send_by_hand(server, stalled(), owner)) for owner in OWNERS for _ in range(4)]
        await server.until(lambda: len(server.files) == 32)
        assert await _send_by_hand(server, stalled(), "ian") == 429
        assert await asyncio.gather(*standing) == [408] * 32
        assert server.files == []
        await server.upload()

    _with(tmp_path, use, read_seconds=1)


def test_one_caller_s_uploads_leave_room_for_others(tmp_path: Path) -> None:
    async def use(server: Tuned) -> None:
        ends = asyncio.Event()

        def held_up() -> Any:
            pieces = [form(FILE, PURPOSE)[:100]]

            async def receive() -> dict[str, Any]:
                if pieces:
                    return {"type": "http.request", "body": pieces.pop(0), "more_body": True}
                await ends.wait()
                return {"type": "http.disconnect"}

            return receive

        standing = [asyncio.create_task(_send_by_hand(server, held_up(), "bob")) for _ in range(4)]
        await server.until(lambda: len(server.files) == 4)
        assert await _send_by_hand(server, held_up(), "bob") == 429
        await server.upload()  # alice's
        ends.set()
        assert await asyncio.gather(*standing) == [499] * 4
        async with server.client("bob") as bob:
            await bob.files.create(file=("a.jsonl", LINES), purpose="fine-tune")

    _with(tmp_path, use)


def test_an_upload_that_came_fast_and_stands_still_is_not_waited_for(tmp_path: Path) -> None:
    """What comes at once is no credit to spend on doing nothing: 8 MiB would be two minutes of it."""

    async def use(server: Tuned) -> None:
        pieces = [form(FILE, PURPOSE)[:100], b"x" * (8 << 20)]

        async def receive() -> dict[str, Any]:
            if pieces:
                return {"type": "http.request", "body": pieces.pop(0), "more_body": True}
            await asyncio.Event().wait()
            raise AssertionError

        assert await asyncio.wait_for(_send_by_hand(server, receive), 100) == 408
        assert server.files == []

    _with(tmp_path, use, read_seconds=1, max_upload_bytes=1 << 24)


def test_no_more_is_written_than_a_key_may_have(tmp_path: Path) -> None:
    """Also of several at once, and before the end of any."""

    async def use(server: Tuned) -> None:
        most = 0

        def endless() -> Any:
            first = [form(FILE, PURPOSE)[:100]]

            async def receive() -> dict[str, Any]:
                nonlocal most
                files = (server.workshop.root / "files").iterdir()
                most = max(most, sum(path.stat().st_size for path in files))
                body = first.pop() if first else b"x" * (1 << 20)
                return {"type": "http.request", "body": body, "more_body": True}

            return receive

        assert await asyncio.gather(*(_send_by_hand(server, endless(), "bob") for _ in range(3))) == [400] * 3
        assert 0 < most <= 8 << 20
        assert server.files == [] and not +server.tuning.arriving
        async with server.client("bob") as bob:
            await bob.files.create(file=("a.jsonl", b"x" * (7 << 20)), purpose="fine-tune")

    _with(tmp_path, use, max_upload_bytes=1 << 30, file_bytes=8 << 20)


def test_what_a_kill_cut_off_is_gone_when_the_server_is_back(tmp_path: Path) -> None:
    with Workshop.open(tmp_path / "tuning") as workshop:
        with new_file(workshop.file("file-whole", "a.jsonl")) as file:
            file.write(LINES)
        (workshop.root / "files" / ".file-half.jsonl.partial-0123abcd").write_bytes(LINES)
    with Workshop.open(tmp_path / "tuning") as workshop:
        assert [path.name for path in (workshop.root / "files").iterdir()] == ["file-whole.jsonl"]


def test_a_disk_that_is_full_is_said_and_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def use(server: Tuned) -> None:
        body = form(("file", "a.jsonl", b"x" * (2 << 20)), PURPOSE)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))  # the disk gives no more than this
        try:
            answer = await server.http.post("/v1/files", content=body, headers=BOUNDARY)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert (answer.status_code, answer.json()["error"]["code"]) == (507, "storage_failed")
        assert str(tmp_path) not in answer.text and server.files == []
        disk = namedtuple("disk", "total used free")
        monkeypatch.setattr(shutil, "disk_usage", lambda path: disk(1 << 40, 1 << 40, 1 << 20))
        answer = await server.http.post("/v1/files", content=body, headers=BOUNDARY)
        assert answer.status_code == 507 and server.files == []  # before anything of it was read

    _with(tmp_path, use, max_upload_bytes=1 << 23)


def test_a_key_has_so_much_room_and_no_other_keys_is_taken(tmp_path: Path) -> None:
    async def use(server: Tuned) -> None:
        first = await server.upload()
        with pytest.raises(BadRequestError, match="delete some"):
            await server.upload()
        assert server.files == [f"{first}.jsonl"]
        async with server.client("bob") as bob:
            await bob.files.create(file=("a.jsonl", LINES), purpose="fine-tune")
        await server.sdk.files.delete(first)
        await server.upload()

    _with(tmp_path, use, file_bytes=len(LINES) + 1)


def test_a_folder_is_one_servers_at_a_time_and_is_known_again(tmp_path: Path) -> None:
    with Workshop.open(tmp_path / "tuning") as workshop:
        place = workshop.place
        with pytest.raises(ValueError, match="is another server's at the moment"):
            Workshop.open(tmp_path / "tuning")
    with Workshop.open(tmp_path / "tuning") as workshop:
        assert workshop.place == place
    with Workshop.open(tmp_path / "another") as another:
        assert another.place != place


def test_no_web_page_and_nobody_without_a_key_uploads_anything(tmp_path: Path) -> None:
    with Fortress(tmp_path, {"match": "", "answer": "ok"}) as fortress:
        body = form(FILE, PURPOSE)
        # A page can have a browser send forms without asking first.
        evil = fortress.ask("/v1/files", body, headers={**BOUNDARY, "origin": "https://evil.example"})
        stranger = fortress.ask("/v1/files", body, headers=BOUNDARY, key="fh-nobody")
        assert (evil.status, stranger.status) == (403, 401)
        assert [*(fortress.workshop.root / "files").iterdir()] == []
        made = fortress.ask("/v1/files", body, headers=BOUNDARY)
        assert made.status == 200
        path = f"/v1/files/{made.json['id']}"
        assert fortress.ask(path, method="GET", key=fortress.bob).status == 404
        assert fortress.ask(f"{path}/content", method="GET").body == LINES


def test_a_server_without_tuning_says_so(tmp_path: Path) -> None:
    async def use(server: Tuned) -> None:
        object.__setattr__(server.server, "tuning", None)
        for method, path in (
            ("GET", "/v1/files"), ("GET", "/v1/files/file-x"), ("GET", "/v1/files/file-x/content"),
            ("DELETE", "/v1/files/file-x"), ("GET", "/v1/fine_tuning/jobs"), ("GET", "/v1/fine_tuning/jobs/x"),
            ("POST", "/v1/fine_tuning/jobs/x/cancel"), ("GET", "/v1/fine_tuning/jobs/x/events"),
            ("GET", "/v1/fine_tuning/jobs/x/checkpoints"), ("POST", "/v1/fine_tuning/jobs"), ("POST", "/v1/files"),
        ):  # fmt: skip
            body: dict[str, Any] = {}
            if method == "POST" and path == "/v1/files":
                body = {"content": form(FILE, PURPOSE), "headers": BOUNDARY}
            elif method == "POST" and path.endswith("jobs"):
                content = json.dumps({"model": "default", "training_file": "file-x"})
                body = {"content": content, "headers": {"content-type": "application/json"}}
            answer = await server.http.request(method, path, **body)
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "tuning_is_off"), path
            assert "--tuning" in answer.json()["error"]["message"]

    _with(tmp_path, use)


def _with(path: Path, use: Any, **options: Any) -> None:
    async def work() -> None:
        async with Tuned(path, **options) as server:
            await use(server)

    run(work())
