"""`/v1/responses`: made at once, as a stream, or in the background; stored before anybody is told of
their end.

A client that goes away ends its response, unless that runs in the background; what was not told to the end is not
stored, since nobody could go on from it.
"""

import json
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from freehold.errors import NotFoundError
from freehold.serve.bodies import StrictRoute
from freehold.serve.caller import caller_of
from freehold.serve.errors import ApiError, api_error, warning_headers
from freehold.serve.journal import log_failure
from freehold.serve.responses.background import Numbered, Run
from freehold.serve.responses.items import Item, on_wire
from freehold.serve.responses.output import Event
from freehold.serve.responses.plan import Plan, count_input, plan
from freehold.serve.responses.stream import ResponseStream
from freehold.serve.responses.wire import INCLUDABLE, InputTokens, ResponseCreate
from freehold.serve.server import Reading, Server, whole
from freehold.serve.sse import DONE, EventStream, encode
from freehold.session.store.records import Page, ResponseRecord
from freehold.session.store.store import Store
from freehold.session.turn import TurnEvent

_ENCRYPTED = "reasoning.encrypted_content"


def router(server: Server) -> APIRouter:
    routes = APIRouter(route_class=StrictRoute, prefix="/v1/responses", tags=["Responses"])

    @routes.post("")
    async def create_response(request: Request, body: ResponseCreate) -> Response:
        """A response of the model: at once, with `stream` as it is made, with `background` later."""
        caller = caller_of(request)
        planned = await plan(server, caller, body)
        stream = planned.stream(server)
        if body.background:
            return await _in_background(server, planned, stream, is_stream=bool(body.stream))
        reading = _read(server, planned)
        if body.stream:
            return _streamed(server, planned, stream, reading)
        response = await whole(request, _at_once(server, planned, stream, reading))
        return JSONResponse(response, headers=planned.headers)

    @routes.post("/input_tokens")
    async def count_input_tokens(request: Request, body: InputTokens) -> Response:
        """How many tokens the input of such a response has."""
        count = await count_input(server, caller_of(request), body)
        counted = {"object": "response.input_tokens", "input_tokens": count.num_tokens}
        return JSONResponse(counted, headers=warning_headers(count.warnings))

    @routes.post("/compact", include_in_schema=False)
    async def compact() -> None:
        raise ApiError(404, "Conversations are not compacted here; send 'truncation': 'auto', or fewer items.")

    @routes.get("/{response_id}")
    async def retrieve_response(
        request: Request,
        response_id: str,
        stream: Annotated[bool, Query()] = False,
        starting_after: Annotated[int | None, Query()] = None,
        include_obfuscation: Annotated[bool, Query()] = False,
    ) -> Response:
        """A response that was stored; with `stream` the events of one in the background, also while they come."""
        include = check_query(request, "stream", "starting_after", "include_obfuscation")
        owner = caller_of(request).owner
        if stream:
            if include_obfuscation:
                message = "Events are kept as they were told first: ask for padding when the response is made."
                raise ApiError(400, message, param="include_obfuscation")
            return await _resumed(server, owner, response_id, -1 if starting_after is None else starting_after)
        for name, given in (
            ("starting_after", starting_after is not None),
            ("include_obfuscation", include_obfuscation),
        ):
            if given:
                raise ApiError(400, f"'{name}' is for streams; send stream=true as well.", param=name)
        response = _shown(await _current(server, owner, response_id), include)
        if _ENCRYPTED in include:
            response = {**response, "output": [_with_sealed(server, owner, item) for item in response["output"]]}
        return JSONResponse(response)

    @routes.delete("/{response_id}")
    async def delete_response(request: Request, response_id: str) -> dict[str, Any]:
        """Delete a response; one that is being made is cancelled first."""
        owner = caller_of(request).owner
        if (run := server.background.find(owner, response_id)) is not None:
            await run.cancel()
        await stored(server, lambda store: store.delete_response(response_id, owner), "response_id")
        return {"id": response_id, "object": "response", "deleted": True}

    @routes.post("/{response_id}/cancel")
    async def cancel_response(request: Request, response_id: str) -> dict[str, Any]:
        """End a response in the background. One that has ended stays what it is."""
        owner = caller_of(request).owner
        if (run := server.background.find(owner, response_id)) is not None:
            await run.cancel()
        record = await _record(server, owner, response_id)
        if not record.background:
            raise ApiError(400, f"The response {response_id!r} was not made in the background.", param="response_id")
        if not record.finished:
            raise _elsewhere(response_id)
        return _shown(record.response)

    @routes.get("/{response_id}/input_items")
    async def list_input_items(
        request: Request,
        response_id: str,
        after: Annotated[str | None, Query()] = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Annotated[Literal["asc", "desc"], Query()] = "desc",
    ) -> dict[str, Any]:
        """The response's own input items, the last one first unless `order` says otherwise."""
        include = check_query(request, "after", "limit", "order")
        owner = caller_of(request).owner
        page: Page = await stored(
            server,
            lambda store: store.input_items(response_id, owner, after=after, limit=limit, order=order),
            "response_id",
        )
        return listed(page, include)

    return routes


def listed(page: Page, include: Sequence[str] = ()) -> dict[str, Any]:
    """A page as it goes on the wire."""
    ids = [item["id"] for item in page.items] or [""]
    data = [on_wire(item, include) for item in page.items]
    return {"object": "list", "data": data, "first_id": ids[0], "last_id": ids[-1], "has_more": page.has_more}


def check_query(request: Request, *known: str) -> list[str]:
    """Raise ApiError for parameters that nobody knows; returns what is to be included."""
    include: list[str] = []
    for name, value in request.query_params.multi_items():
        if name.removesuffix("[]") == "include":
            if value not in INCLUDABLE:
                message = f"Invalid value for 'include': {value!r:.80} is none of {', '.join(INCLUDABLE)}."
                raise ApiError(400, message, param="include")
            include.append(value)
        elif name not in known:
            raise ApiError(400, f"Unknown parameter: '{name:.80}'.", param=name[:80], code="unknown_parameter")
    return include


async def stored(server: Server, work: Callable[[Store], Any], param: str) -> Any:
    """What the store gives, from another thread. Raises a 404 for what it does not have."""
    if server.store is None:
        raise ApiError(404, "Nothing is stored here: this server has no store.", param=param, code="not_found")
    try:
        return await server.store_threads.run(work, server.store)
    except NotFoundError as error:
        raise api_error(error, param=param) from None


# --- making -----------------------------------------------------------------------------------------------------


def _read(server: Server, planned: Plan) -> Reading[TurnEvent]:
    """Run the turn; whatever becomes of it, its tools are released."""
    return server.read(planned.caller, planned.turn, left=planned.release)


async def _at_once(
    server: Server, planned: Plan, stream: ResponseStream, reading: Reading[TurnEvent]
) -> dict[str, Any]:
    try:
        async for batch in reading:
            for event in batch:
                stream.feed(event)
    finally:
        await reading.aclose()
    await _keep(server, planned, stream)
    return stream.response


async def _keep(server: Server, planned: Plan, stream: ResponseStream) -> None:
    if planned.keeps and server.store is not None:
        await server.store_threads.run(server.store.put_response, planned.record(stream.stored))


def _streamed(server: Server, planned: Plan, stream: ResponseStream, reading: Reading[TurnEvent]) -> Response:
    def fault(error: ApiError) -> bytes:
        stream.fail(error)
        return _encoded(stream.ended()) + DONE

    return EventStream(_told(server, planned, stream, reading), fault=fault, headers=planned.headers)


async def _told(
    server: Server, planned: Plan, stream: ResponseStream, reading: Reading[TurnEvent]
) -> AsyncGenerator[bytes, None]:
    try:
        yield _encoded([*stream.created(), *stream.started()])
        async for batch in reading:
            if events := [told for event in batch for told in stream.feed(event)]:
                yield _encoded(events)
        await _keep(server, planned, stream)
    except Exception as error:
        await _keep_failure(server, planned, stream, error)
        raise
    finally:
        await reading.aclose()
    yield _encoded(stream.ended()) + DONE


async def _keep_failure(server: Server, planned: Plan, stream: ResponseStream, error: Exception) -> None:
    """So that who asks for it later learns what became of it; unless it is the store that fails."""
    stream.fail(api_error(error))
    try:
        await _keep(server, planned, stream)
    except Exception as failure:  # noqa: BLE001 - the client is told of the first one
        log_failure("a response could not be stored", failure)


async def _in_background(server: Server, planned: Plan, stream: ResponseStream, *, is_stream: bool) -> Response:
    assert server.store is not None
    reading = _read(server, planned)
    try:
        run = await server.background.begin(
            server.store, server.store_threads, stream, planned.record, keep_events=is_stream
        )
    except BaseException:
        await reading.aclose()
        raise
    queued = {**run.response}
    run.start(reading)
    if is_stream:
        return EventStream(_followed(run, -1), fault=_unable, headers=planned.headers)
    return JSONResponse(queued, headers=planned.headers)


def _encoded(events: list[Event]) -> bytes:
    return b"".join(encode(event, event["type"]) for event in events)


# --- coming back ------------------------------------------------------------------------------------------------


async def _resumed(server: Server, owner: str, name: str, after: int) -> Response:
    run = server.background.find(owner, name)
    if run is not None and run.keeps_events:
        return EventStream(_followed(run, after), fault=_unable)
    record = await _record(server, owner, name)
    if not record.finished:
        raise _elsewhere(name) if run is None else _no_events(name)
    events: list[Numbered] = await stored(server, lambda store: store.events(name, owner, -1), "response_id")
    if not events:
        raise _no_events(name)
    return EventStream(_replayed([event for event in events if event[0] > after]), fault=_unable)


def _no_events(name: str) -> ApiError:
    message = f"The response {name!r} was not made with both 'background' and 'stream', so it has no events to read."
    return ApiError(400, message, param="stream")


def _elsewhere(name: str) -> ApiError:
    return ApiError(409, f"The response {name!r} is being made by another server; ask that one.", param="response_id")


async def _followed(run: Run, after: int) -> AsyncGenerator[bytes, None]:
    async for events in run.follow(after):
        yield _encoded_again(events)
    yield DONE


async def _replayed(events: list[Numbered]) -> AsyncGenerator[bytes, None]:
    yield _encoded_again(events) + DONE


def _encoded_again(events: list[Numbered]) -> bytes:
    return b"".join(encode(text, json.loads(text)["type"]) for _, text in events)


def _unable(error: ApiError) -> bytes:
    """The stream of a response in the background breaks off, while the response goes on."""
    event = {"type": "error", "code": error.code, "message": error.message, "param": None, "sequence_number": 0}
    return encode(event, "error") + DONE


def _shown(response: dict[str, Any], include: Sequence[str] = ()) -> dict[str, Any]:
    """A response of the store's as it goes on the wire."""
    return {**response, "output": [on_wire(item, include) for item in response["output"]]}


async def _current(server: Server, owner: str, name: str) -> dict[str, Any]:
    run = server.background.find(owner, name)
    if run is not None and not run.is_over:
        return run.stored
    return (await _record(server, owner, name)).response


async def _record(server: Server, owner: str, name: str) -> ResponseRecord:
    record: ResponseRecord = await stored(server, lambda store: store.response(name, owner), "response_id")
    return record


def _with_sealed(server: Server, owner: str, item: Item) -> Item:
    if item["type"] != "reasoning" or not item.get("content"):
        return item
    text = "".join(part["text"] for part in item["content"])
    return {**item, "encrypted_content": server.sealer.seal(owner, text)}
