"""`/v1/files`: what clients upload to train on, and what training leaves for them. Off unless there is a workshop.

A file goes to the disk as it comes, aside, and has its name there before the store knows it. Nothing here is ever run,
unpacked or looked into: its name is a text, its type a stream of bytes. Purposes that nothing on this server could use
are refused. What a file says, a job finds out (tuning/).
"""

import secrets
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack
from typing import Annotated, Any, BinaryIO, Literal

from fastapi import APIRouter, Query
from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse

from freehold.disk import new_file, remove
from freehold.errors import UsageError
from freehold.serve.bodies import StrictRoute
from freehold.serve.caller import caller_of
from freehold.serve.errors import ApiError
from freehold.serve.multipart import Data, FormReader, Part, boundary_of
from freehold.serve.refusal import values
from freehold.serve.responses.routes import check_query, stored
from freehold.serve.server import Server
from freehold.serve.tuning.tuning import Tuning
from freehold.serve.tuning.wire import PURPOSE
from freehold.serve.wire import Wire, read
from freehold.session.store.records import FileRecord, Listed

_PARAM = "file_id"
_FIELD_BYTES = 1024
_WRITE_BYTES = 1 << 20
"""Written at a time, on a thread."""
_NAME_CHARACTERS = 255
_FIELDS = ("purpose", "expires_after[anchor]", "expires_after[seconds]")
_OTHER_PURPOSES = ("assistants", "batch", "vision", "user_data", "evals")
_FORM = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["file", "purpose"],
                "additionalProperties": False,
                "properties": {
                    "file": {"type": "string", "format": "binary", "minLength": 1},
                    "purpose": {"const": PURPOSE},
                    "expires_after[anchor]": {"const": "created_at"},
                    "expires_after[seconds]": {"type": "integer", "minimum": 3600, "maximum": 2_592_000},
                },
            }
        }
    },
}


def _purpose(value: Any) -> Any:
    if value in _OTHER_PURPOSES:
        raise PydanticCustomError("refused", "is not supported: nothing on this server reads such files")
    return value


class ExpiresAfter(Wire):
    """Without it a file is kept until it is deleted."""

    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=3600, le=2_592_000)]


class FileCreate(Wire):
    """The form of `POST /v1/files`."""

    file: Annotated[str, Field(description="A file in the form, with its name")]
    purpose: Annotated[Literal["fine-tune"], BeforeValidator(_purpose)]
    expires_after: ExpiresAfter | None = None


def router(server: Server) -> APIRouter:
    routes = APIRouter(route_class=StrictRoute, prefix="/v1/files", tags=["Files"])

    @routes.post("", openapi_extra={"requestBody": _FORM})
    async def create_file(request: Request) -> dict[str, Any]:
        """A file to train on, as a form: one JSON object a line, or plain text where its name ends in `.txt`."""
        tuning = server.the_tuning()
        owner = caller_of(request).owner
        held = await stored(server, lambda store: store.file_bytes(owner, tuning.place), "file")
        upload = Upload(tuning, owner, held)
        try:
            record = await upload.receive(request)
            await stored(server, lambda store: store.add_file(record, most_bytes=tuning.limits.file_bytes), "file")
        except BaseException as error:
            upload.discard(error)
            raise
        finally:
            upload.arrived()
        return on_wire(record)

    @routes.get("")
    async def list_files(
        request: Request,
        purpose: Annotated[str | None, Query()] = None,
        after: Annotated[str | None, Query()] = None,
        limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
        order: Annotated[Literal["asc", "desc"], Query()] = "desc",
    ) -> dict[str, Any]:
        """The caller's files, the newest first unless `order` says otherwise."""
        check_query(request, "purpose", "after", "limit", "order")
        place, owner = server.the_tuning().place, caller_of(request).owner
        page: Listed[FileRecord] = await stored(
            server,
            lambda store: store.files(owner, place, purpose=purpose, after=after, limit=limit, order=order),
            "after",
        )
        return listed([on_wire(record) for record in page.items], has_more=page.has_more)

    @routes.get("/{file_id}")
    async def retrieve_file(request: Request, file_id: str) -> dict[str, Any]:
        check_query(request)
        return on_wire(await _record(server, caller_of(request).owner, file_id))

    @routes.get("/{file_id}/content", response_class=FileResponse)
    async def retrieve_content(request: Request, file_id: str) -> FileResponse:
        """The bytes of a file, as they came."""
        check_query(request)
        record = await _record(server, caller_of(request).owner, file_id)
        path = server.the_tuning().workshop.file(record.id, record.filename)
        if not path.is_file():
            raise ApiError(404, f"the content of {record.id} is not there any more", param=_PARAM, code="not_found")
        headers = {"x-content-type-options": "nosniff"}
        return FileResponse(path, media_type="application/octet-stream", filename=record.filename, headers=headers)

    @routes.delete("/{file_id}")
    async def delete_file(request: Request, file_id: str) -> dict[str, Any]:
        """Delete a file for good. A job that is not finished keeps the files that it reads."""
        tuning, owner = server.the_tuning(), caller_of(request).owner
        record = await _record(server, owner, file_id)
        path = tuning.workshop.file(record.id, record.filename)
        try:
            await stored(
                server,
                lambda store: store.delete_file(record.id, owner, tuning.place, remove=lambda: remove(path)),
                _PARAM,
            )
        except UsageError as error:
            raise ApiError(409, str(error), param=_PARAM, code="file_in_use") from None
        return {"id": record.id, "object": "file", "deleted": True}

    return routes


def on_wire(record: FileRecord) -> dict[str, Any]:
    return {
        "id": record.id,
        "object": "file",
        "bytes": record.num_bytes,
        "created_at": int(record.created_at),
        "expires_at": None if record.expires_at is None else int(record.expires_at),
        "filename": record.filename,
        "purpose": record.purpose,
        "status": "processed",
        "status_details": None,
    }


def listed(data: list[dict[str, Any]], *, has_more: bool) -> dict[str, Any]:
    """A page as it goes on the wire."""
    ids = [each["id"] for each in data] or [None]
    return {"object": "list", "data": data, "first_id": ids[0], "last_id": ids[-1], "has_more": has_more}


async def _record(server: Server, owner: str, file_id: str) -> FileRecord:
    place = server.the_tuning().place
    record: FileRecord = await stored(server, lambda store: store.file(file_id, owner, place), _PARAM)
    return record


class Upload:
    """One form on its way to the disk. It is stopped where all that its owner sends, and the bytes that are `held` for
    the owner already, come to more than a key may have: no disk is filled by what will be refused in the end."""

    def __init__(self, tuning: Tuning, owner: str, held: int) -> None:
        self._tuning, self._owner, self._held = tuning, owner, held
        self._id = f"file-{secrets.token_hex(12)}"
        self._fields: dict[str, bytearray] = {}
        self._filename: str | None = None
        self._open = ExitStack()
        self._file: BinaryIO | None = None
        self._waiting = bytearray()
        self._num_bytes = 0
        self._is_kept = False

    async def receive(self, request: Request) -> FileRecord:
        """The whole form, and the file under its name on the disk. Raises ApiError, DiskError."""
        (content_type,) = values(request.scope, b"content-type") or [b""]
        boundary = boundary_of(content_type)
        if boundary is None:
            raise ApiError(415, "the body must be a form: `Content-Type: multipart/form-data` with its boundary")
        reader, part = FormReader(boundary), None
        try:
            async for piece in _pieces(request):
                for found in reader.feed(piece):
                    if isinstance(found, Part):
                        part = found
                        await self._begin(found, request)
                    else:
                        assert part is not None
                        await self._take(part, found)
            reader.flush()
        except UsageError as error:
            raise ApiError(400, str(error)) from None
        record = self._checked()
        await self._write()
        await self._tuning.threads.run(self._open.close)  # waits for the disk, and gives it its name
        self._is_kept = True
        return record

    def discard(self, error: BaseException) -> None:
        """Leave nothing behind. Raises DiskError in place of what the disk said."""
        if self._is_kept:
            remove(self._tuning.workshop.file(self._id, self._filename or ""))
        elif self._file is not None:
            self._open.pop_all().__exit__(type(error), error, error.__traceback__)

    def arrived(self) -> None:
        """It is there, or not to be."""
        self._tuning.arriving[self._owner] -= self._num_bytes

    async def _begin(self, part: Part, request: Request) -> None:
        if part.name == "file":
            if self._filename is not None:
                raise ApiError(400, "the form has two files; send one", param="file")
            self._filename = _checked_name(part.filename)
            path = self._tuning.workshop.file(self._id, self._filename)
            announced = int((values(request.scope, b"content-length") or [b"0"])[0])
            self._file = await self._tuning.threads.run(
                self._open.enter_context, new_file(path, replace=False, needed_bytes=announced)
            )
        elif part.name not in _FIELDS:
            shown = part.name[:80]
            raise ApiError(400, f"Unknown parameter: '{shown}'.", param=shown, code="unknown_parameter")
        elif part.name in self._fields or part.filename is not None:
            raise ApiError(400, f"'{part.name}' is a plain field, which a form has once", param=part.name)
        else:
            self._fields[part.name] = bytearray()

    async def _take(self, part: Part, data: Data) -> None:
        if part.name == "file":
            self._num_bytes += len(data.data)
            self._tuning.arriving[self._owner] += len(data.data)
            if self._held + self._tuning.arriving[self._owner] > self._tuning.limits.file_bytes:
                raise ApiError(
                    400, f"your files have {self._held:,} bytes, and with what is on its way they would have more than "
                    f"{self._tuning.limits.file_bytes:,}; delete some", param="file",
                )  # fmt: skip
            self._waiting += data.data
            if len(self._waiting) >= _WRITE_BYTES:
                await self._write()
            return
        field = self._fields[part.name]
        field += data.data
        if len(field) > _FIELD_BYTES:
            raise ApiError(400, f"'{part.name}' is too long", param=part.name)

    async def _write(self) -> None:
        data, self._waiting = self._waiting, bytearray()
        if self._file is not None and data:
            await self._tuning.threads.run(self._file.write, data)

    def _checked(self) -> FileRecord:
        form = read(FileCreate, _form(self._fields, has_file=self._filename is not None), "")
        if not self._num_bytes:
            raise ApiError(400, "the file is empty; send some examples", param="file", code="empty_file")
        created = time.time()
        return FileRecord(
            id=self._id,
            owner=self._owner,
            place=self._tuning.place,
            created_at=created,
            expires_at=None if form.expires_after is None else created + form.expires_after.seconds,
            purpose=form.purpose,
            filename=self._filename or "",
            num_bytes=self._num_bytes,
        )


async def _pieces(request: Request) -> AsyncIterator[bytes]:
    try:
        async for piece in request.stream():
            yield piece
    except ClientDisconnect:
        raise ApiError(499, "the client has gone away") from None


def _checked_name(name: str | None) -> str:
    """What the file is called. Names of folders before it, which browsers and people may send, are left out."""
    if name is None:
        raise ApiError(400, "'file' must be a file: a part of the form with a filename", param="file")
    last = name.replace("\\", "/").rpartition("/")[2]
    if not last or not last.isprintable() or len(last) > _NAME_CHARACTERS or last in (".", ".."):
        raise ApiError(
            400, f"the file's name must have 1 to {_NAME_CHARACTERS} printable characters; rename it", param="file"
        )
    return last


def _form(fields: dict[str, bytearray], *, has_file: bool) -> dict[str, Any]:
    """The form's fields as if they had come as JSON."""
    form: dict[str, Any] = {"file": "…"} if has_file else {}
    for name, value in fields.items():
        try:
            text = value.decode("utf-8")
        except UnicodeDecodeError:
            raise ApiError(400, f"'{name}' is not UTF-8", param=name) from None
        outer, bracket, inner = name.removesuffix("]").partition("[")
        if bracket:
            is_number = text.isascii() and text.isdigit() and len(text) < 10
            form.setdefault(outer, {})[inner] = int(text) if is_number else text
        else:
            form[name] = text
    return form
