"""MCP: real servers over stdio and HTTP as our tools, and our tools for real clients."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from freehold.errors import BackendError, FreeholdError, UnsupportedError, UsageError
from freehold.formats.conversation import ToolNamespace
from freehold.formats.harmony.builtins import PYTHON
from freehold.formats.schema import enforceable
from freehold.tools.base import Citation, ToolError, ToolFile, ToolResult, ToolSession
from freehold.tools.mcp import McpLimits, McpTools
from freehold.tools.mcp_config import HttpServer, McpServer, StdioServer, parse_server, read_config

PEER, MORTAL = (Path(__file__).with_name(name) for name in ("mcp_peer.py", "mortal_peer.py"))


def peer(state: Path, name: str = "peer", **env: str) -> StdioServer:
    return StdioServer(name=name, command=sys.executable, args=(str(PEER), "stdio", str(state)), env=env)


def mortal(state: Path) -> StdioServer:
    return StdioServer(name="mortal", command=sys.executable, args=("-S", str(MORTAL), str(state)))


@asynccontextmanager
async def connected(*servers: McpServer, **limits: Any) -> AsyncIterator[tuple[McpTools, ToolSession]]:
    tools = await McpTools.connect(servers, McpLimits(**limits))
    try:
        yield tools, await tools.open()
    finally:
        await tools.aclose()


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


def lines(state: Path, name: str) -> list[str]:
    return (state / name).read_text().splitlines() if (state / name).exists() else []


# --- their tools --------------------------------------------------------------------------------------------


def test_a_servers_tools_are_functions_and_what_they_give_is_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")

    async def run() -> None:
        async with connected(peer(tmp_path, "a", MINE="yes"), peer(tmp_path, "b"), result_characters=5000) as (
            tools,
            session,
        ):
            offered = {tool.name: tool for tool in tools.functions}
            assert set(offered) >= {"a__add", "b__add", "a__a_strange_name", "a__tagged"}
            add = offered["a__add"]
            assert (add.description, add.strict) == ("Adds.", True)
            assert add.parameters is not None and add.parameters["properties"]["b"]["minimum"] == 0
            tagged = offered["a__tagged"]  # a set: uniqueItems, which no grammar holds a model to
            assert tagged.parameters is not None and not tagged.strict
            with pytest.raises(UnsupportedError):
                enforceable(tagged.parameters)
            assert offered["a__data"].parameters is None

            async def call(name: str, **arguments: Any) -> str:
                return (await session.call(f"functions.{name}", json.dumps(arguments))).text

            assert await call("a__add", a=2, b=3) == "5" and await call("b__add", a=2) == "3"
            assert await call("a__a_strange_name") == "fine"
            assert json.loads(await call("a__data")) == {"é": [1, 2]}
            assert await call("a__much", size=5010) == "x" * 5000 + "\n[10 more characters are not shown]"
            assert (await session.call("a__add", '{"a": 1}')).text == "2"
            for name, arguments, complaint in (
                ("a__add", '{"a": "x"}', "valid integer"),
                ("a__add", "{", "are no JSON"),
                ("a__add", "[1]", "are a JSON object"),
                ("a__fail", "{}", "Error executing tool fail"),
                ("a__nothing", "{}", "there is no tool a__nothing"),
            ):
                with pytest.raises(ToolError, match=complaint):
                    await session.call(name, arguments)
            assert (await session.call("a__sorts", "")).text == (
                "words <|end|>\n"
                "[image of type image/png, 30 bytes, not shown]\n"
                "[audio of type audio/wav, 3 bytes, not shown]\n"
                "[resource note://1]\ninside\n"
                "[resource blob://1 of type application/x, not shown]\n"
                "[resource more: file:///more]"
            )
            seen = json.loads((await session.call("a__environment", "{}")).text)
            assert seen["MINE"] == "yes" and seen["PATH"] == os.environ["PATH"]
            assert not {"OPENAI_API_KEY", "PYTHONPATH", "PYTEST_CURRENT_TEST"} & set(seen)

    asyncio.run(run())
    for pid in lines(tmp_path, "started"):
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)


def test_over_http_with_headers(tmp_path: Path) -> None:
    state, port_file = tmp_path / "state", tmp_path / "port"
    state.mkdir()
    process = subprocess.Popen(
        [sys.executable, str(PEER), "http", str(port_file), str(state)], stderr=subprocess.DEVNULL
    )

    async def run() -> None:
        await until(lambda: port_file.exists() and port_file.read_text())
        url = f"http://127.0.0.1:{port_file.read_text()}/mcp"
        server = HttpServer(name="web", url=url, headers={"Authorization": "Bearer secret"})
        with pytest.raises(BackendError, match="MCP server web cannot be used"):
            await McpTools.connect([HttpServer(name="web", url=url)])
        async with connected(server) as (tools, session):
            assert "web__add" in {tool.name for tool in tools.functions}
            assert (await session.call("web__add", '{"a": 1}')).text == "2"
            assert (await session.call("web__learn", "{}")).text == "learnt"
            await until(lambda: "web__learnt" in {tool.name for tool in tools.functions})
            assert (await session.call("web__learnt", "{}")).text == "new"
            process.kill()
            process.wait()
            with pytest.raises(ToolError, match="MCP server web"):
                await session.call("web__add", '{"a": 1}')

    try:
        asyncio.run(run())
    finally:
        process.kill()
        process.wait()


def test_a_list_that_changes_is_followed(tmp_path: Path) -> None:
    async def run(server: StdioServer) -> None:
        async with connected(server) as (tools, session):
            assert f"{server.name}__learnt" not in {tool.name for tool in tools.functions}
            await session.call(f"{server.name}__learn", "{}")
            await until(lambda: f"{server.name}__learnt" in {tool.name for tool in tools.functions})
            await session.call(f"{server.name}__learnt", "{}")

    for server in (peer(tmp_path), mortal(tmp_path)):  # of today, and of the days of the handshake
        asyncio.run(run(server))


def test_a_call_that_is_cancelled_or_takes_too_long_ends_there_too(tmp_path: Path) -> None:
    async def run() -> None:
        async with connected(peer(tmp_path), call_seconds=0.5) as (_, session):
            calling = asyncio.create_task(session.call("peer__wait", "{}"))
            await until(lambda: lines(tmp_path, "waiting"))
            calling.cancel()
            with pytest.raises(asyncio.CancelledError):
                await calling
            await until(lambda: lines(tmp_path, "cancelled"))
            with pytest.raises(ToolError, match=r"wait did not answer within 0\.5 s"):
                await session.call("peer__wait", "{}")
            await until(lambda: len(lines(tmp_path, "cancelled")) == 2)
            assert (await session.call("peer__add", '{"a": 1}')).text == "2"

    asyncio.run(run())
    assert len(lines(tmp_path, "started")) == 1


def test_a_server_that_dies_is_started_once_more(tmp_path: Path) -> None:
    async def run() -> None:
        async with connected(mortal(tmp_path)) as (_, session):
            with pytest.raises(ToolError, match="died during this call and was started anew"):
                await session.call("mortal__die", "{}")
            assert len(lines(tmp_path, "die")) == 1  # and was not asked to a second time
            assert (await session.call("mortal__live", "{}")).text == "lives"
            assert (await session.call("mortal__die_once", "{}")).text == "lives"  # may be repeated, it says
            with pytest.raises(ToolError, match="and again when it was repeated"):
                await session.call("mortal__die_always", "{}")
            assert len(lines(tmp_path, "die_always")) == 2
            assert (await session.call("mortal__live", "{}")).text == "lives"
            assert len(lines(tmp_path, "started")) == 5

    asyncio.run(run())


def test_a_server_that_dies_between_calls_is_not_missed(tmp_path: Path) -> None:
    async def run() -> None:
        async with connected(mortal(tmp_path)) as (tools, session):
            names = {tool.name for tool in tools.functions}
            os.kill(int(lines(tmp_path, "started")[0]), signal.SIGKILL)
            for _ in range(3):  # who calls the moment that it dies may be told so once
                with contextlib.suppress(ToolError):
                    await session.call("mortal__live", "{}")
            assert (await session.call("mortal__live", "{}")).text == "lives"
            assert len(lines(tmp_path, "started")) == 2 and {tool.name for tool in tools.functions} == names

    asyncio.run(run())


@pytest.mark.parametrize(
    ("server", "complaint"),
    [
        (StdioServer(name="s", command="/nowhere/at-all"), "cannot be used: there is no /nowhere/at-all"),
        (
            StdioServer(name="s", command=sys.executable, args=("-c", "import sys; sys.exit('a key\\nis missing')")),
            r"it said: a key\\nis missing",
        ),
        (StdioServer(name="s", command="sleep", args=("60",)), r"did not answer within 1\.5 s"),
        (StdioServer(name="s", command="echo", args=("no json",)), "MCP server s cannot be used"),
        (HttpServer(name="s", url="http://127.0.0.1:9/mcp"), "MCP server s cannot be used"),
    ],
)
def test_a_server_that_cannot_be_used_is_told_and_leaves_nothing(
    tmp_path: Path, server: McpServer, complaint: str
) -> None:
    async def run() -> None:
        with pytest.raises(BackendError, match=complaint):
            await McpTools.connect([mortal(tmp_path), server], McpLimits(start_seconds=1.5))

    asyncio.run(run())
    for pid in lines(tmp_path, "started"):
        assert not Path(f"/proc/{pid}").exists()


# --- which servers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name", "rest"),
    [
        ("uvx mcp-server-git --repository '/a b'", "mcp-server-git", ("uvx", "mcp-server-git", "--repository", "/a b")),
        ("npx -y @scope/server-files@1.2 /tmp", "server-files", ("npx", "-y", "@scope/server-files@1.2", "/tmp")),
        ("python3 -m my.server", "my_server", ("python3", "-m", "my.server")),
        ("/opt/tools/serve.py --x", "serve", ("/opt/tools/serve.py", "--x")),
        ("git=uvx mcp-server-git", "git", ("uvx", "mcp-server-git")),
        ("https://www.example.com/mcp?key=1", "example_com", "https://www.example.com/mcp?key=1"),
        ("docs=http://127.0.0.1:8000/mcp", "docs", "http://127.0.0.1:8000/mcp"),
    ],
)
def test_a_server_from_the_command_line(text: str, name: str, rest: Any) -> None:
    server = parse_server(text)
    assert server.name == name
    assert (server.url if isinstance(server, HttpServer) else (server.command, *server.args)) == rest


def test_servers_from_a_config_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", "t0k")
    monkeypatch.delenv("NOT_SET", raising=False)
    path = tmp_path / "mcp.json"
    path.write_text(
        json.dumps(
            {
                "mcpServers": {
                    "git": {
                        "command": "uvx",
                        "args": ["mcp-server-git", "${NOT_SET:-here}"],
                        "env": {"KEY": "${env:TOKEN}"},
                        "cwd": "sub",
                        "autoApprove": ["*"],
                    },
                    "my docs": {
                        "type": "http",
                        "url": "https://e.com/mcp",
                        "headers": {"Authorization": "Bearer ${TOKEN}"},
                    },
                    "off": {"command": "x", "disabled": True},
                }
            }
        )
    )
    git, docs = read_config(path)
    assert git == StdioServer(
        name="git", command="uvx", args=("mcp-server-git", "here"), env={"KEY": "t0k"}, cwd=tmp_path / "sub"
    )
    assert docs == HttpServer(name="my_docs", url="https://e.com/mcp", headers={"Authorization": "Bearer t0k"})
    assert "t0k" not in repr((git, docs))


@pytest.mark.parametrize(
    ("text", "error", "complaint"),
    [
        ("{", UsageError, "is no JSON"),
        ("[]", UsageError, "has no servers"),
        ('{"mcpServers": {"a": 1}}', UsageError, "a: expected an object"),
        ('{"mcpServers": {"a": {}}}', UsageError, "neither 'command' nor 'url'"),
        ('{"mcpServers": {"a": {"command": "x", "args": "y"}}}', UsageError, "'args' is a list"),
        (
            '{"mcpServers": {"a": {"command": "x", "env": {"K": ["s3cret"]}}}}',
            UsageError,
            "'env' is an object of texts",
        ),
        ('{"mcpServers": {"a": {"command": "${NOT_SET}"}}}', UsageError, r"\$\{NOT_SET\} is not set"),
        ('{"mcpServers": {"a": {"type": "sse", "url": "http://x"}}}', UnsupportedError, "transport 'sse'"),
        ('{"mcpServers": {"a": {"url": "ftp://x"}}}', UsageError, "no http or https URL"),
        ('{"mcpServers": {"a": {"command": "x", "envFile": ".env"}}}', UnsupportedError, "field 'envFile'"),
    ],
)
def test_what_a_config_file_cannot_say(tmp_path: Path, text: str, error: type[FreeholdError], complaint: str) -> None:
    path = tmp_path / "mcp.json"
    path.write_text(text)
    with pytest.raises(error, match=complaint) as raised:
        read_config(path)
    assert "s3cret" not in str(raised.value)


def test_two_servers_have_two_names(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="two MCP servers are called 'peer'"):
        asyncio.run(McpTools.connect([peer(tmp_path), peer(tmp_path)]))


# --- our tools, for others ----------------------------------------------------------------------------------


def test_our_tools_serve_other_clients(tmp_path: Path) -> None:
    (tmp_path / "my_tools.py").write_text(
        "import asyncio, pathlib\n"
        "def double(x: int) -> int:\n"
        "    '''Twice.\n\n    Args:\n        x: What.\n    '''\n"
        "    print('this is not the wire')\n"
        "    return 2 * x\n"
        "async def wait(folder: str) -> None:\n"
        "    'Wait.'\n"
        "    (pathlib.Path(folder) / 'waiting').touch()\n"
        "    try:\n"
        "        await asyncio.Event().wait()\n"
        "    finally:\n"
        "        (pathlib.Path(folder) / 'cancelled').touch()\n"
    )
    (tmp_path / "work").mkdir()
    command = [sys.executable, "-m", "freehold", "mcp", "--tools", str(tmp_path / "my_tools.py")]
    command += ["--patch", str(tmp_path / "work")]
    paths = os.pathsep.join(path for path in sys.path if path)
    server = StdioServer(name="ours", command=command[0], args=tuple(command[1:]), env={"PYTHONPATH": paths})

    async def run() -> None:
        async with connected(server) as (tools, session):
            offered = {tool.name: tool for tool in tools.functions}
            assert set(offered) == {"ours__double", "ours__wait", "ours__apply_patch"}
            double = offered["ours__double"]
            assert double.strict and double.parameters is not None
            assert double.parameters["properties"] == {"x": {"type": "integer", "description": "What."}}
            assert (await session.call("ours__double", '{"x": 21}')).text == "42"
            with pytest.raises(ToolError, match="double was not called: x: Input should be a valid integer"):
                await session.call("ours__double", '{"x": "y"}')
            patch = "*** Begin Patch\n*** Add File: a.txt\n+1\n*** End Patch\n"
            result = await session.call("ours__apply_patch", json.dumps({"input": patch}))
            assert result.text == (
                f"Done. Changed files:\nA a.txt\n[resource a.txt: {(tmp_path / 'work' / 'a.txt').as_uri()}]"
            )
            with pytest.raises(ToolError, match="a patch begins with a line"):
                await session.call("ours__apply_patch", "{}")
            calling = asyncio.create_task(session.call("ours__wait", json.dumps({"folder": str(tmp_path)})))
            await until((tmp_path / "waiting").exists)
            calling.cancel()
            await until((tmp_path / "cancelled").exists)

    asyncio.run(run())


class Echo:
    """A built-in tool of the kind that takes code, and one with tools inside."""

    def __init__(self, namespace: ToolNamespace, picture: Path) -> None:
        self.namespace = namespace
        self.picture = picture
        self.closed = 0

    async def open(self) -> ToolSession:
        return self

    async def call(self, name: str, arguments: str) -> ToolResult:
        if arguments == "fail":
            raise ToolError("first line\nsecond line")
        files = (ToolFile(name="p.png", path=self.picture, media_type="image/png"),)
        return ToolResult(text=f"{name}({arguments})", files=files)

    def citations(self, answer: str) -> Sequence[Citation]:
        return ()

    async def aclose(self) -> None:
        self.closed += 1


def test_built_in_tools_go_by_their_names(tmp_path: Path) -> None:
    program = (
        "import asyncio, sys\n"
        "from pathlib import Path\n"
        "from freehold.formats.harmony.builtins import BROWSER, PYTHON\n"
        "from freehold.tools.mcp_server import serve_mcp\n"
        "from tests.tools.test_mcp import Echo\n"
        "tools = [Echo(PYTHON, Path(sys.argv[1])), Echo(BROWSER, Path(sys.argv[1]))]\n"
        "asyncio.run(serve_mcp(tools))\n"
        "print([tool.closed for tool in tools])\n"
    )
    (tmp_path / "p.png").write_bytes(b"png")
    paths = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, sys.path)])
    args = ("-c", program, str(tmp_path / "p.png"))
    server = StdioServer(name="s", command=sys.executable, args=args, env={"PYTHONPATH": paths})

    async def run() -> None:
        async with connected(server) as (tools, session):
            offered = {tool.name: tool for tool in tools.functions}
            assert set(offered) == {"s__python", "s__browser_search", "s__browser_open", "s__browser_find"}
            assert offered["s__python"].description == PYTHON.description
            text = (await session.call("s__python", '{"code": "1 + 1"}')).text
            assert text == "python(1 + 1)\n[image of type image/png, 3 bytes, not shown]"
            text = (await session.call("s__browser_open", '{"id": 3}')).text
            assert text.startswith('browser.open({"id": 3})')
            with pytest.raises(ToolError, match="first line\nsecond line"):
                await session.call("s__python", '{"code": "fail"}')

    asyncio.run(run())


def test_ctrl_c_ends_a_server_of_ours(tmp_path: Path) -> None:
    (tmp_path / "t.py").write_text("def f() -> int:\n    'F.'\n    return 1\n")
    paths = os.pathsep.join(filter(None, sys.path))
    process = subprocess.Popen(
        [sys.executable, "-m", "freehold", "mcp", "--tools", str(tmp_path / "t.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": paths},
    )
    with process:
        assert process.stdin is not None and process.stdout is not None
        request = {"jsonrpc": "2.0", "id": 1, "method": "server/discover", "params": {}}
        process.stdin.write(json.dumps(request).encode() + b"\n")
        process.stdin.flush()
        assert b"jsonrpc" in process.stdout.readline()  # it serves
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
