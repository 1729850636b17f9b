"""`/v1/conversations`: items that responses are made from and added to, kept under an id of their own."""

import time
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from starlette.requests import Request

from freehold.serve.bodies import StrictRoute
from freehold.serve.caller import Caller, caller_of
from freehold.serve.errors import ApiError
from freehold.serve.responses.items import Item, on_wire, read_items
from freehold.serve.responses.plan import new_id
from freehold.serve.responses.routes import check_query, listed, stored
from freehold.serve.responses.wire import ConversationCreate, ConversationUpdate, ItemsCreate
from freehold.serve.server import Server
from freehold.session.store.records import ConversationRecord, Page

_PARAM = "conversation_id"


def router(server: Server) -> APIRouter:
    routes = APIRouter(route_class=StrictRoute, prefix="/v1/conversations", tags=["Conversations"])

    @routes.post("")
    async def create_conversation(request: Request, body: ConversationCreate) -> dict[str, Any]:
        """A new conversation, with the items that it begins with."""
        caller = caller_of(request)
        record = ConversationRecord(
            id=new_id("conv"), owner=caller.owner, created_at=time.time(), metadata=body.metadata or {}
        )
        items = _items(server, caller, body.items)
        await stored(server, lambda store: store.create_conversation(record, items), _PARAM)
        return _on_wire(record)

    @routes.get("/{conversation_id}")
    async def retrieve_conversation(request: Request, conversation_id: str) -> dict[str, Any]:
        owner = caller_of(request).owner
        return _on_wire(await stored(server, lambda store: store.conversation(conversation_id, owner), _PARAM))

    @routes.post("/{conversation_id}")
    async def update_conversation(request: Request, conversation_id: str, body: ConversationUpdate) -> dict[str, Any]:
        """New metadata in place of the old."""
        owner, metadata = caller_of(request).owner, body.metadata or {}
        return _on_wire(
            await stored(server, lambda store: store.update_conversation(conversation_id, owner, metadata), _PARAM)
        )

    @routes.delete("/{conversation_id}")
    async def delete_conversation(request: Request, conversation_id: str) -> dict[str, Any]:
        """Delete a conversation with its items; responses that were made in it stay."""
        owner = caller_of(request).owner
        await stored(server, lambda store: store.delete_conversation(conversation_id, owner), _PARAM)
        return {"id": conversation_id, "object": "conversation.deleted", "deleted": True}

    @routes.post("/{conversation_id}/items")
    async def create_items(request: Request, conversation_id: str, body: ItemsCreate) -> dict[str, Any]:
        """Add items at its end; 20 at most."""
        include = check_query(request)
        caller = caller_of(request)
        items = _items(server, caller, body.items)
        await stored(server, lambda store: store.add_conversation_items(conversation_id, caller.owner, items), _PARAM)
        return listed(Page(items=tuple(items), has_more=False), include)

    @routes.get("/{conversation_id}/items")
    async def list_items(
        request: Request,
        conversation_id: str,
        after: Annotated[str | None, Query()] = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Annotated[Literal["asc", "desc"], Query()] = "desc",
    ) -> dict[str, Any]:
        """Its items, the last one first unless `order` says otherwise."""
        include = check_query(request, "after", "limit", "order")
        owner = caller_of(request).owner
        page: Page = await stored(
            server,
            lambda store: store.conversation_items(conversation_id, owner, after=after, limit=limit, order=order),
            _PARAM,
        )
        return listed(page, include)

    @routes.get("/{conversation_id}/items/{item_id}")
    async def retrieve_item(request: Request, conversation_id: str, item_id: str) -> dict[str, Any]:
        include = check_query(request)
        owner = caller_of(request).owner
        item: Item = await stored(
            server, lambda store: store.conversation_item(conversation_id, item_id, owner), "item_id"
        )
        return on_wire(item, include)

    @routes.delete("/{conversation_id}/items/{item_id}")
    async def delete_item(request: Request, conversation_id: str, item_id: str) -> dict[str, Any]:
        """Take an item out; returns the conversation."""
        owner = caller_of(request).owner
        await stored(server, lambda store: store.delete_conversation_item(conversation_id, item_id, owner), "item_id")
        return _on_wire(await stored(server, lambda store: store.conversation(conversation_id, owner), _PARAM))

    return routes


def _items(server: Server, caller: Caller, given: list[Item] | None) -> list[Item]:
    for at, item in enumerate(given or ()):
        if item.get("type") == "item_reference":
            raise ApiError(
                400, f"'items[{at}].type' 'item_reference' is not supported: send the item itself.",
                param=f"items[{at}].type",
            )  # fmt: skip
    return read_items(
        given,
        new_id=new_id,
        open_=lambda sealed: server.sealer.open(caller.owner, sealed),
        recall=lambda name: server.recall(caller, name),
        stored={},
        param="items",
    )


def _on_wire(record: ConversationRecord) -> dict[str, Any]:
    return {
        "id": record.id,
        "object": "conversation",
        "created_at": int(record.created_at),
        "metadata": record.metadata,
    }
