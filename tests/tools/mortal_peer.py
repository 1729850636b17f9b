"""The least that is an MCP server over stdio, of the days of the handshake; run as a program.

    mortal_peer.py STATE

Starts at once, since it imports next to nothing. Its tools die in various ways. STATE is a folder in which it counts
its starts and what it did.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

STATE = Path(sys.argv[1])
TOOLS: dict[str, dict[str, bool]] = {
    "live": {},
    "die": {},
    "die_once": {"readOnlyHint": True},
    "die_always": {"idempotentHint": True},
    "learn": {},
    "hang": {},
    "error": {},
}


def note(name: str, text: str = "") -> None:
    with (STATE / name).open("a") as file:
        file.write(f"{text}\n")


def say(message: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps({"jsonrpc": "2.0", **message}) + "\n")
    sys.stdout.flush()


def called(name: str) -> str:
    is_mortal = name in ("die", "die_always") or (name == "die_once" and not (STATE / name).exists())
    note(name)
    if is_mortal:
        os._exit(3)
    if name == "hang":
        sys.exit(len(sys.stdin.read()))  # the client's end of it, and no answer before
    if name == "learn":
        TOOLS["learnt"] = {}
        say({"method": "notifications/tools/list_changed"})
    return "lives"


def answer(method: str, parameters: dict[str, Any]) -> dict[str, Any]:
    match method:
        case "initialize":
            about = {"capabilities": {"tools": {"listChanged": True}}, "serverInfo": {"name": "mortal", "version": "1"}}
            return {"result": {"protocolVersion": "2025-06-18", **about}}
        case "tools/list":
            tools = [
                {"name": name, "inputSchema": {"type": "object"}, "annotations": hints} for name, hints in TOOLS.items()
            ]
            return {"result": {"tools": tools}}
        case "tools/call" if parameters["name"] == "error":
            return {"error": {"code": -32000, "message": "of its own"}}
        case "tools/call":
            return {"result": {"content": [{"type": "text", "text": called(parameters["name"])}]}}
    return {"error": {"code": -32601, "message": f"no method {method}"}}


def main() -> None:
    note("started", str(os.getpid()))
    for line in sys.stdin:
        message = json.loads(line)
        if "id" in message:
            say({"id": message["id"], **answer(message["method"], message.get("params", {}))})


if __name__ == "__main__":
    main()
