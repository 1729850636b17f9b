"""An MCP server made with the mcp package, for the tests of our client; run as a program.

    mcp_peer.py stdio [STATE]    or    mcp_peer.py http PORT_FILE [STATE]

STATE is a folder in which it counts its starts, and leaves word of what it did.
"""

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from mcp.server.mcpserver import Context, Image, MCPServer
from mcp_types import (
    AudioContent,
    BlobResourceContents,
    EmbeddedResource,
    ResourceLink,
    TextContent,
    TextResourceContents,
)
from pydantic import Field

server = MCPServer("peer", instructions="A server for tests.")
state = Path(sys.argv[-1]) if len(sys.argv) > 2 and Path(sys.argv[-1]).is_dir() else None


def note(name: str, text: str = "") -> None:
    if state is not None:
        with (state / name).open("a") as file:
            file.write(f"{text}\n")


@server.tool(description="Adds.")
def add(a: int, b: Annotated[int, Field(ge=0)] = 1) -> str:
    return str(a + b)


@server.tool(description="Squares: not what a grammar holds anybody to.", structured_output=False)
def tagged(tags: Annotated[set[str], Field(min_length=1)], mode: Literal["x", "y"] = "x") -> str:
    return f"{sorted(tags)} {mode}"


@server.tool(name="a/strange name", description="Strange.")
def strange() -> str:
    return "fine"


@server.tool(description="Gives data.")
def data() -> dict[str, Any]:
    return {"é": [1, 2]}


@server.tool(description="Gives all sorts.", structured_output=False)
def sorts() -> list[Any]:
    return [
        TextContent(text="words <|end|>"),
        Image(data=b"x" * 30, format="png").to_image_content(),
        AudioContent(data="eHh4", mime_type="audio/wav"),
        EmbeddedResource(resource=TextResourceContents(uri="note://1", text="inside")),
        EmbeddedResource(resource=BlobResourceContents(uri="blob://1", blob="eHh4", mime_type="application/x")),
        ResourceLink(name="more", uri="file:///more"),
    ]


@server.tool(description="Fails.")
def fail() -> str:
    raise ValueError("no such thing")


@server.tool(description="Says much.")
def much(size: int) -> str:
    return "x" * size


@server.tool(description="Shows the environment.")
def environment() -> str:
    return json.dumps(dict(os.environ))


@server.tool(description="Waits for ever, and says when that is over.")
async def wait() -> str:
    note("waiting")
    try:
        await asyncio.Event().wait()
    finally:
        note("cancelled")
    return "never"


@server.tool(description="Adds a tool.")
async def learn(context: Context) -> str:
    server.add_tool(lambda: "new", name="learnt", description="New.")
    await context.notify_tools_changed()
    return "learnt"


def main() -> None:
    note("started", str(os.getpid()))
    if sys.argv[1] == "stdio":
        server.run("stdio")
        return
    import socket

    import uvicorn

    listener = socket.create_server(("127.0.0.1", 0))
    Path(sys.argv[2]).write_text(str(listener.getsockname()[1]))
    app = server.streamable_http_app()

    async def guarded(scope: Any, receive: Any, send: Any) -> None:
        headers = dict(scope.get("headers", ()))
        if scope["type"] == "http" and headers.get(b"authorization") != b"Bearer secret":
            await send({"type": "http.response.start", "status": 401, "headers": []})
            await send({"type": "http.response.body", "body": b""})
            return
        await app(scope, receive, send)

    uvicorn.Server(uvicorn.Config(guarded, log_level="error")).run(sockets=[listener])


if __name__ == "__main__":
    main()
