"""MCP: real servers over stdio and HTTP as our tools, and our tools for real clients."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import mcp
import pytest
from mcp.client.stdio import StdioServerParameters, stdio_client
from typer.testing import CliRunner

from freehold.cli.main import app
from freehold.errors import BackendError, FreeholdError, UnsupportedError, UsageError
from freehold.formats.harmony.builtins import PYTHON
from freehold.formats.schema import enforceable
from freehold.tools.base import ToolError, ToolSession
from freehold.tools.mcp import McpLimits, McpTools, environment
from freehold.tools.mcp_config import HttpServer, McpServer, StdioServer, parse_server, read_config
from freehold.tools.python import PythonTool
from tests.tools.test_apply_patch import patch
from tests.tools.trees import contents, plant

T = TypeVar("T")
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


class Shared:
    """A connection for several tests, on an event loop of its own: the server takes a second to start."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self._runner = asyncio.Runner()
        servers = (peer(state, "a", MINE="yes"), mortal(state))
        self.tools = self.run(McpTools.connect(servers, McpLimits(result_characters=5000)))
        self.session = self.run(self.tools.open())

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self._runner.run(work)

    def close(self) -> None:
        self.run(self.tools.aclose())
        self._runner.close()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    with pytest.MonkeyPatch.context() as patching:
        patching.setenv("OPENAI_API_KEY", "secret")
        made = Shared(tmp_path_factory.mktemp("shared"))
    yield made
    made.close()
    for pid in lines(made.state, "started"):
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)


# --- their tools --------------------------------------------------------------------------------------------


def test_a_servers_tools_are_functions_and_what_they_give_is_text(shared: Shared) -> None:
    async def run() -> None:
        tools, session = shared.tools, shared.session
        offered = {tool.name: tool for tool in tools.functions}
        assert set(offered) >= {"a__add", "mortal__live", "a__a_strange_name", "a__tagged"}
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

        assert await call("a__add", a=2, b=3) == "5" and await call("mortal__live") == "lives"
        assert await call("a__a_strange_name") == "fine"
        assert json.loads(await call("a__data")) == {"é": [1, 2]}
        assert await call("a__much", size=5010) == "x" * 5000 + "\n[10 more characters are not shown]"
        assert (await session.call("a__add", '{"a": 1}')).text == "2"
        for name, arguments, complaint in (
            ("a__add", '{"a": "x"}', "valid integer"),
            ("a__add", "{", "are no JSON"),
            ("a__add", "[1]", "are a JSON object"),
            ("a__fail", "{}", "Error executing tool fail"),
            ("a__add", '{"a": "\\ud800"}', "half a character"),
            ("mortal__error", "{}", r"error failed: of its own"),
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

    shared.run(run())


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


@pytest.mark.parametrize("server", ["a", "mortal"])  # of today, and of the days of the handshake
def test_a_list_that_changes_is_followed(shared: Shared, server: str) -> None:
    async def run() -> None:
        assert f"{server}__learnt" not in {tool.name for tool in shared.tools.functions}
        await shared.session.call(f"{server}__learn", "{}")
        await until(lambda: f"{server}__learnt" in {tool.name for tool in shared.tools.functions})
        await shared.session.call(f"{server}__learnt", "{}")

    shared.run(run())


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


def test_a_server_that_hangs_is_started_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("freehold.tools.mcp._PATIENCE", 0.1)

    async def run() -> None:
        async with connected(mortal(tmp_path), call_seconds=0.1) as (_, session):
            with pytest.raises(ToolError, match=r"hang did not answer within 0\.1 s"):
                await session.call("mortal__hang", "{}")
            async with asyncio.timeout(20):
                while len(lines(tmp_path, "started")) < 2:
                    with contextlib.suppress(ToolError):
                        await session.call("mortal__live", "{}")

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
        (StdioServer(name="s", command="sh", args=("-c", "cat > /dev/null")), r"did not answer within 1\.5 s"),
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
    shown = repr((git, docs, HttpServer(name="x", url="https://me:t0k@e.com/?key=t0k"), parse_server("run --key=t0k")))
    assert "t0k" not in shown


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
        ('{"mcpServers": {"a": {"url": "ftp://me:s3cret@x/?key=s3cret"}}}', UsageError, "'ftp://x/' is no http"),
        (
            '{"mcpServers": {"a": {"url": "http://x", "headers": {"Authorization": "s3cret\\n"}}}}',
            UsageError,
            "header 'Authorization' cannot be sent",
        ),
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
        "import asyncio, os, pathlib, subprocess\n"
        "def double(x: int) -> int:\n"
        "    '''Twice.\n\n    Args:\n        x: What.\n    '''\n"
        "    print('this is not the wire')\n"
        "    subprocess.run(['echo', 'nor is this'], check=True)\n"
        "    return 2 * x\n"
        "async def wait(folder: str) -> None:\n"
        "    'Wait.'\n"
        "    (pathlib.Path(folder) / 'waiting').touch()\n"
        "    try:\n"
        "        await asyncio.Event().wait()\n"
        "    finally:\n"
        "        (pathlib.Path(folder) / 'cancelled').touch()\n"
        "def pid() -> int:\n"
        "    'Whose.'\n"
        "    return os.getpid()\n"
    )
    plant(tmp_path, {"work/old": "", "notes/bees.md": "# Bees\n\nThey dance to tell where flowers are.\n"})
    command = [sys.executable, "-m", "freehold", "mcp", "--tools", str(tmp_path / "my_tools.py")]
    command += ["--patch", str(tmp_path / "work"), "--browse", str(tmp_path / "notes")]
    try:
        PythonTool()
        command.append("--python")
    except UnsupportedError:  # a machine without user namespaces
        pass
    paths = os.pathsep.join(path for path in sys.path if path)
    env = environment({"PYTHONPATH": paths, "FREEHOLD_CACHE": str(tmp_path / "cache")})
    # What it exits with is for its parent, which the library does not tell.
    args = ["-c", '"$@"; echo $? > "$0"', str(tmp_path / "status"), *command]
    parameters = StdioServerParameters(command="sh", args=args, env=env)

    async def run() -> None:
        with (tmp_path / "stderr").open("w") as errlog:
            async with mcp.Client(stdio_client(parameters, errlog=errlog), read_timeout_seconds=60) as client:
                await use(client)
                await until((tmp_path / "status").exists)

    async def use(client: mcp.Client) -> None:
        async def call(name: str, **arguments: Any) -> tuple[bool, str]:
            result = await client.call_tool(name, arguments)
            return bool(result.is_error), "\n".join(getattr(part, "text", part.type) for part in result.content)

        offered = {tool.name: tool for tool in (await client.list_tools()).tools}
        ours = {"double", "wait", "pid", "apply_patch", "browser_search", "browser_open", "browser_find"}
        assert set(offered) == (ours | {"python"} if "--python" in command else ours)
        assert offered["double"].input_schema["properties"] == {"x": {"type": "integer", "description": "What."}}
        assert await call("double", x=21) == (False, "42")
        is_error, text = await call("double", x="y")
        assert is_error and "double was not called: x: Input should be a valid integer" in text

        text = patch("*** Add File: a.txt", "+1")
        assert await call("apply_patch", input=text) == (False, "Done. Changed files:\nA a.txt\nresource_link")
        assert contents(tmp_path / "work") == {"old": b"", "a.txt": b"1\n"}
        is_error, text = await call("apply_patch")
        assert is_error and "a patch begins with a line" in text

        is_error, text = await call("browser_search", query="dance flowers")
        assert not is_error and "【0†" in text and "They dance" in text
        is_error, text = await call("browser_open", id=0)
        assert not is_error and "L4: They dance to tell where flowers are." in text

        if "--python" in command:
            is_error, text = await call("python", code="x = 6 * 7")
            assert not is_error
            is_error, text = await call("python", code="print(x); open('/mnt/data/n', 'w').write('1')")
            assert not is_error and text.startswith("42\n") and text.endswith("resource_link")

        calling = asyncio.create_task(call("wait", folder=str(tmp_path)))
        await until((tmp_path / "waiting").exists)
        calling.cancel()
        await until((tmp_path / "cancelled").exists)
        os.kill(int((await call("pid"))[1]), signal.SIGINT)

    asyncio.run(run())
    assert (tmp_path / "status").read_text() == "130\n"
    said = (tmp_path / "stderr").read_text()
    for line in ("freehold: indexing notes: 100 %", "this is not the wire", "nor is this"):
        assert f"{line}\n" in said


def test_nothing_to_serve_is_an_error() -> None:
    result = CliRunner().invoke(app, ["mcp"])
    assert isinstance(result.exception, UsageError) and "nothing to serve" in str(result.exception)


def test_built_in_tools_go_by_their_names(tmp_path: Path) -> None:
    program = (
        "import asyncio, sys\n"
        "from pathlib import Path\n"
        "from freehold.formats.harmony.builtins import BROWSER, PYTHON\n"
        "from freehold.tools.mcp_server import serve_mcp\n"
        "from tests.tools.echo_tool import Echo\n"
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
