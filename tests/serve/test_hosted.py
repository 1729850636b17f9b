"""Tools that the server runs for its clients: a browser, Python, MCP servers, on the wire of the Responses API."""

import asyncio
import json
import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai.types.responses import ResponseItemList

from freehold.errors import BackendError, UsageError
from freehold.formats.conversation import ToolNamespace
from freehold.formats.harmony.builtins import PYTHON as PYTHON_NAMESPACE
from freehold.formats.tokenizer import Tokenizer
from freehold.serve.caller import Caller
from freehold.serve.containers import Containers
from freehold.serve.hosted import HostedServer, HostedTools, prepare
from freehold.serve.responses.plan import plan
from freehold.serve.responses.wire import ResponseCreate
from freehold.serve.settings import ServeSettings
from freehold.serve.start import start
from freehold.session.scripted import ScriptedTurn, serve_script
from freehold.tools.base import ToolResult
from freehold.tools.browser.browser import Browser
from freehold.tools.browser.documents import Documents
from freehold.tools.functions import FunctionToolset
from freehold.tools.kit import ToolChoices
from tests.cli.test_chat_tools import needs_sandbox
from tests.serve.http import vanish
from tests.serve.process import Process
from tests.serve.responding import WEATHER, Responding, result_of
from tests.serve.sdk import check
from tests.serve.test_responses import prompts_of
from tests.serve.test_responses_state import ended, until
from tests.tools.test_mcp import lines, peer

pytestmark = pytest.mark.anyio

SEARCH, PYTHON = {"type": "web_search"}, {"type": "code_interpreter", "container": {"type": "auto"}}
INCLUDE = ["code_interpreter_call.outputs", "web_search_call.action.sources"]


def said(*messages: str) -> dict[str, str]:
    return {"completion": "<|start|>assistant".join(messages)}


def thought(text: str) -> str:
    return f"<|channel|>analysis<|message|>{text}<|end|>"


def browse(function: str, **arguments: Any) -> str:
    return f" to=browser.{function}<|channel|>analysis <|constrain|>json<|message|>{json.dumps(arguments)}<|call|>"


def run(code: str) -> str:
    return f"<|channel|>analysis to=python code<|message|>{code}<|call|>"


def use(function: str, **arguments: Any) -> str:
    return f"<|channel|>commentary to=functions.{function} <|constrain|>json<|message|>{json.dumps(arguments)}<|call|>"


def answer(text: str) -> str:
    return f"<|channel|>final<|message|>{text}<|return|>"


def kinds(response: dict[str, Any]) -> list[str]:
    return [item["type"] for item in response["output"]]


def first(response: dict[str, Any], kind: str) -> dict[str, Any]:
    item: dict[str, Any] = next(item for item in response["output"] if item["type"] == kind)
    return item


def shown(there: Responding, prompt: Sequence[int]) -> str:
    return there.server.served.prompting.the_tokenizer().decode(prompt, control="show")


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hosted") / "notes"
    folder.mkdir()
    (folder / "tides.md").write_text("# Tides\n\nThe spring tide at Saltmarsh is 7.2 metres.\nSee [boats](boats.md).\n")
    (folder / "boats.md").write_text("# Boats\n\nThe ferry leaves at nine.\n")
    return folder


@pytest.fixture
def searchable(notes: Path) -> Callable[..., HostedTools]:
    """Makes hosted tools with a browser over the notes."""

    def make(**more: Any) -> HostedTools:
        documents = Documents(notes, notes.parent / "index")
        browser = Browser(sources=[documents], tokenizer=Tokenizer.o200k_harmony())
        return HostedTools(browser=browser, offline_browser=browser, **more)

    return make


Searchable = Callable[..., HostedTools]


class Waiting:
    """Tools `local__wait` and `local__echo`; the first goes on until somebody ends it."""

    def __init__(self) -> None:
        self.began = asyncio.Event()
        self.ended = asyncio.Event()

    def tools(self) -> HostedTools:
        async def wait() -> str:
            """Waits."""
            self.began.set()
            try:
                await asyncio.Event().wait()
            finally:
                self.ended.set()
            return ""

        def echo(text: str) -> str:
            """Says it again."""
            return text

        return HostedTools(files=[HostedServer("local", FunctionToolset([wait, echo]))])


LOCAL = {"type": "mcp", "server_label": "local", "require_approval": "never"}
WAIT = said(use("local__wait"))


# --- the browser --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
async def test_a_search_is_carried_out_and_the_answer_cites_the_lines_of_files(
    searchable: Searchable, notes: Path, tmp_path: Path, stream: bool
) -> None:
    turns = [
        said(thought("Look."), browse("search", query="spring tide")),
        said(browse("open", id=0)),
        said(browse("find", pattern="Saltmarsh")),
        said(thought("There."), answer("It is 7.2 metres【1†L4】.")),
    ]
    async with Responding(*turns, path=tmp_path, tools=searchable()) as there:
        made = await there.make(input="How high?", tools=[SEARCH], include=INCLUDE, stream=stream)
        assert kinds(made) == ["reasoning", *["web_search_call"] * 3, "reasoning", "message"]
        tides = (notes / "tides.md").as_uri()
        actions = [item["action"] for item in made["output"] if item["type"] == "web_search_call"]
        assert actions[0] | {"sources": ...} == {
            "type": "search", "query": "spring tide", "queries": ["spring tide"], "sources": ...,
        }  # fmt: skip
        assert tides in [source["url"] for source in actions[0]["sources"]]
        assert actions[1:] == [
            {"type": "open_page", "url": tides},
            {"type": "find_in_page", "pattern": "Saltmarsh", "url": tides},
        ]
        [annotation] = made["output"][-1]["content"][0]["annotations"]
        text = made["output"][-1]["content"][0]["text"]
        assert text[annotation["start_index"] : annotation["end_index"]] == "【1†L4】"
        assert annotation["url"].startswith(f"{tides}#L") and annotation["title"] == "Tides"
        assert there.warnings == ""

        again = await there.get(f"responses/{made['id']}")
        assert again["output"] == made["output"]
        # The prompts of all steps count, and so does what was written in them.
        assert made["usage"]["input_tokens"] > 4 * 100
        assert made["usage"]["total_tokens"] == made["usage"]["input_tokens"] + made["usage"]["output_tokens"]


async def test_all_steps_are_charged_to_the_caller(searchable: Searchable) -> None:
    turns = [said(browse("search", query="ferry")), said(answer("At nine."))]
    async with Responding(*turns, tools=searchable()) as there:
        caller = Caller()
        planned = await plan(there.server, caller, ResponseCreate(input="When?", tools=[SEARCH]))
        stream = planned.stream(there.server)
        async for batch in there.server.read(caller, planned.turn, left=planned.release):
            for event in batch:
                stream.feed(event)
        assert caller.tally.tokens == stream.response["usage"]["total_tokens"]


async def test_a_clients_function_in_the_middle_keeps_what_was_found_and_the_pages_that_are_open(
    searchable: Searchable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = [
        said(browse("search", query="spring tide")),
        said(use("get_weather", city="Saltmarsh")),
        said(browse("open", id=0, cursor=0)),
        said(answer("Sunny【1†L4】.")),
        said(browse("open", cursor=1)),
        said(answer("Yes.")),
    ]
    async with Responding(*turns, path=tmp_path, tools=searchable()) as there:
        prompts = prompts_of(there, monkeypatch)
        made = await there.make(input="A walk?", tools=[SEARCH, WEATHER])
        assert kinds(made) == ["web_search_call", "function_call"] and len(there.server.tools.containers) == 1  # type: ignore[union-attr]
        then = await there.make(
            input=[result_of(made)], previous_response_id=made["id"], tools=[SEARCH, WEATHER], stream=True
        )
        assert prompts[2][: len(prompts[1])] == prompts[1]
        assert then["output"][0]["action"] == {"type": "open_page", "url": then["output"][0]["action"]["url"]}
        assert then["output"][0]["action"]["url"].endswith("tides.md")
        assert len(then["output"][-1]["content"][0]["annotations"]) == 1
        # After the answer Harmony leaves the pages out of the prompt, and the browser still has them.
        last = await there.make(input="Sure?", previous_response_id=then["id"], tools=[SEARCH])
        assert "7.2 metres" not in shown(there, prompts[4]) and "7.2 metres" in shown(there, prompts[5])
        assert last["output"][0]["status"] == "completed"
        listed = await there.get(f"responses/{then['id']}/input_items")
        check(ResponseItemList, listed)


async def test_a_client_that_keeps_its_items_goes_on_with_what_was_found_as_long_as_that_is_known(
    searchable: Searchable, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = [
        said(browse("search", query="spring tide")),
        said(use("get_weather", city="Saltmarsh")),
        said(answer("Sunny.")),
        said(answer("Sunny.")),
        said(answer("Sunny.")),
    ]
    async with Responding(*turns, tools=searchable()) as there:
        prompts = prompts_of(there, monkeypatch)
        made = await there.make(input="A walk?", tools=[SEARCH, WEATHER], store=False)
        asked = {"type": "message", "role": "user", "content": "A walk?"}
        items = [asked, *made["output"], result_of(made)]
        for owner in ("", "somebody else"):
            await there.make(input=items, tools=[SEARCH, WEATHER], store=False, owner=owner)
        assert prompts[2][: len(prompts[1])] == prompts[1]
        assert "7.2 metres" not in shown(there, prompts[3]) and "no longer kept" in shown(there, prompts[3])
        bare = [{key: value for key, value in item.items() if key != "id"} for item in items]
        await there.make(input=bare, tools=[SEARCH, WEATHER], store=False)
        assert "no longer kept" in shown(there, prompts[4]) and '"query":"spring tide"' in shown(there, prompts[4])


async def test_items_that_clients_send_back_are_what_they_say_and_nothing_else(
    searchable: Searchable, tmp_path: Path
) -> None:
    turns = [said(browse("search", query="spring tide")), said(use("local__echo", text="a")), said(answer("Hi."))]
    files = [HostedServer("local", FunctionToolset([_echo]))]
    echo = Echo()
    tools = searchable(files=files, python=echo)
    async with Responding(said(run("1")), *turns, *[said(answer("Hi."))] * 5, path=tmp_path, tools=tools) as there:
        made = await there.make(input="x", tools=[SEARCH, PYTHON, LOCAL], store=False)
        search, code = (first(made, kind) for kind in ("web_search_call", "code_interpreter_call"))
        call = {"type": "mcp_call", "server_label": "local", "name": "echo", "arguments": "{}"}
        for item in (
            {"type": "web_search_call", "id": code["id"], "action": {"type": "search", "query": "q"}},
            {**code, "id": search["id"]},
            {**call, "error": "It broke."},
            {**call, "error": {"content": [{"text": 3}, 4]}},
        ):
            then = await there.make(input=[item, {"role": "user", "content": "x"}], tools=[SEARCH])
            listed = await there.get(f"responses/{then['id']}/input_items", include=INCLUDE)
            check(ResponseItemList, listed)
            assert "7.2 metres" not in str(listed)
        listing = {"type": "mcp_list_tools", "server_label": "local", "tools": [1]}
        assert (await there.refused(input=[listing]))["param"] == "input[0].tools[0]"


async def test_what_is_not_switched_on_is_left_out_and_what_is_asked_of_it_is_honoured_or_refused(
    searchable: Searchable, tmp_path: Path
) -> None:
    async with Responding(*[said(answer("Hi."))] * 5, path=tmp_path, tools=searchable()) as there:
        made = await there.make(input="Hi", tools=[SEARCH, PYTHON, LOCAL])
        assert made["tools"] == [
            {"type": "web_search", "search_context_size": "medium", "user_location": None, "filters": None}
        ]
        assert "code_interpreter is not switched on here" in there.warnings and "mcp is not" in there.warnings
        located = {"type": "web_search_preview", "user_location": {"type": "approximate", "city": "Rome"}}
        await there.make(input="Hi", tools=[located, {**SEARCH, "external_web_access": False}])
        assert there.warnings == "web_search_preview: the sources here know no places, so user_location changed nothing"
        for tool, param in (
            ({**SEARCH, "filters": {"allowed_domains": ["example.com"]}}, "tools[0].filters.allowed_domains"),
            ({**SEARCH, "search_content_types": ["image"]}, "tools[0].search_content_types"),
            ({**SEARCH, "search_context_size": "giant"}, "tools[0].search_context_size"),
            ({**SEARCH, "depth": 3}, "tools[0].depth"),
        ):
            assert (await there.refused(input="Hi", tools=[tool]))["param"] == param
        assert "code_interpreter" in (await there.refused(
            input="Hi", tools=[SEARCH, PYTHON], tool_choice={"type": "code_interpreter"}
        ))["message"]  # fmt: skip
        await there.make(input="Hi", tools=[SEARCH], include=["web_search_call.results"])
        assert there.warnings.startswith("include: web_search_call.results adds nothing")
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    async with Responding(said("Hi."), template=template, tools=searchable()) as there:
        assert (await there.make(input="Hi", tools=[SEARCH]))["tools"] == []
        assert there.warnings == "web_search is not switched on here and was left out"


async def test_openais_sdk_and_agents_see_what_the_tools_do(searchable: Searchable, tmp_path: Path) -> None:
    from agents import (
        Agent,
        CodeInterpreterTool,
        HostedMCPTool,
        ModelSettings,
        OpenAIResponsesModel,
        RunConfig,
        Runner,
        WebSearchTool,
    )

    turns = [
        said(browse("search", query="spring tide")),
        said(use("local__echo", text="a")),
        said(answer("7【0†L4】.")),
    ]
    files = [HostedServer("local", FunctionToolset([_echo]))]
    async with Responding(*turns, *turns, path=tmp_path, tools=searchable(files=files)) as there:
        tools: Any = [{"type": "web_search_preview"}, LOCAL]
        async with there.sdk.responses.stream(model="default", input="How high?", tools=tools) as stream:
            seen = [event.type async for event in stream]
            whole = await stream.get_final_response()
        assert "response.output_text.annotation.added" in seen and "response.web_search_call.searching" in seen
        assert [item.type for item in whole.output] == ["mcp_list_tools", "web_search_call", "mcp_call", "message"]
        assert whole.tools[0].type == "web_search_preview"

        agent = Agent(
            name="Helper",
            model=OpenAIResponsesModel(model="default", openai_client=there.sdk),
            tools=[WebSearchTool(), CodeInterpreterTool(tool_config=PYTHON)],
            model_settings=ModelSettings(store=False),
        )
        agent.tools.append(HostedMCPTool(tool_config=LOCAL))
        ran = await Runner.run(agent, "How high?", run_config=RunConfig(tracing_disabled=True))
        assert ran.final_output == "7【0†L4】."
        items = ran.to_input_list()
        await there.sdk.responses.input_tokens.count(model="default", input=items)


async def test_tools_that_cannot_be_told_apart_or_called_are_refused_by_name() -> None:
    named = {"name": "echo", "type": "function", "parameters": {"type": "object", "properties": {}}}
    space = {"type": "namespace", "name": "local", "tools": [named]}
    async with Responding(tools=Waiting().tools()) as there:
        for tools, choice, param in (
            ([LOCAL, {**named, "name": "local__echo"}], "auto", "tools[1].name"),
            ([space, LOCAL], "auto", "tools[0].tools[0].name"),
            ([{**LOCAL, "allowed_tools": []}], "required", "tool_choice"),
        ):
            assert (await there.refused(input="x", tools=tools, tool_choice=choice))["param"] == param


# --- choices and limits -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("choice", "calls"),
    [
        ({"type": "web_search_preview"}, True),
        ("required", True),
        ({"type": "allowed_tools", "mode": "required", "tools": [{"type": "web_search"}]}, True),
        ({"type": "allowed_tools", "mode": "auto", "tools": [{"type": "web_search"}]}, True),
        ({"type": "allowed_tools", "mode": "auto", "tools": [{"type": "mcp", "server_label": "local"}]}, False),
        ({"type": "mcp", "server_label": "local", "name": "echo"}, False),
        ("none", False),
    ],
)
async def test_a_choice_among_hosted_tools_is_kept_to(searchable: Searchable, choice: Any, calls: bool) -> None:
    files = [HostedServer("local", FunctionToolset([_echo]))]
    turns = [said(browse("search", query="ferry")), said(answer("At nine."))]
    async with Responding(*turns, tools=searchable(files=files)) as there:
        body = {"input": "When?", "tools": [{"type": "web_search_preview"}, LOCAL], "tool_choice": choice}
        if calls:
            made = await there.make(**body)
            assert kinds(made) == ["mcp_list_tools", "web_search_call", "message"]
        else:
            failed = await there.refused(500, **body)
            assert "not allow it" in failed["message"]


def _echo(text: str) -> str:
    """Says it again."""
    return text


_echo.__name__ = "echo"


async def test_after_so_many_calls_the_model_has_to_answer(searchable: Searchable) -> None:
    search = said(browse("search", query="ferry"))
    async with Responding(search, said(answer("At nine.")), tools=searchable()) as there:
        made = await there.make(input="When?", tools=[SEARCH], max_tool_calls=1)
        assert kinds(made) == ["web_search_call", "message"] and made["max_tool_calls"] == 1
    async with Responding(search, search, tools=searchable()) as there:
        failed = await there.refused(500, input="When?", tools=[SEARCH], max_tool_calls=1)
        assert "not allow it" in failed["message"]


async def test_calls_in_one_turn_wait_for_one_another_and_one_that_fails_says_so() -> None:
    calls = said(use("local__echo", text="a"), use("local__echo", text="b"))
    turns = [calls, said(answer("a b"))]
    async with Responding(*turns, tools=Waiting().tools()) as there:
        made = await there.make(input="Say", tools=[LOCAL], stream=True, parallel_tool_calls=True)
        assert [item["output"] for item in made["output"] if item["type"] == "mcp_call"] == ["a", "b"]


# --- python -------------------------------------------------------------------------------------------------


@needs_sandbox
async def test_a_conversation_keeps_its_kernel_and_nobody_else_gets_it(tmp_path: Path) -> None:
    prepared = prepare(ToolChoices(python=True))
    assert prepared is not None
    tools = prepared.hosted(Tokenizer.o200k_harmony())
    turns = [
        *(said(thought("Sum."), run("x = 41\nprint(x)")), said(answer("41"))),
        *(said(run("print(x + 1)")), said(answer("42"))),
        *(said(run("print(x + 2)")), said(answer("43"))),
        *(said(run("print(x)")), said(answer("?"))),
    ]
    async with Responding(*turns, path=tmp_path, tools=tools) as there:
        made = await there.make(input="Set x", tools=[PYTHON], stream=True, owner="a")
        call = first(made, "code_interpreter_call")
        assert (call["code"], call["outputs"], call["status"]) == ("x = 41\nprint(x)", None, "completed")
        asked: dict[str, Any] = {"tools": [PYTHON], "include": INCLUDE, "owner": "a"}
        then = await there.make(input="And?", previous_response_id=made["id"], **asked)
        assert first(then, "code_interpreter_call")["outputs"] == [{"type": "logs", "logs": "42"}]
        assert first(then, "code_interpreter_call")["container_id"] == call["container_id"]
        named = {"type": "code_interpreter", "container": call["container_id"]}
        third = await there.make(input="And?", **(asked | {"tools": [named]}))
        assert first(third, "code_interpreter_call")["outputs"] == [{"type": "logs", "logs": "43"}]
        for path in (f"responses/{made['id']}", f"responses/{then['id']}/input_items"):
            full = await there.get(path, owner="a", include="code_interpreter_call.outputs")
            assert "output" not in full or first(full, "code_interpreter_call")["outputs"][0]["logs"] == "41"
        strange = await there.refused(404, input="And?", tools=[named], owner="b")
        assert strange["param"] == "tools[0].container"
        other = await there.make(input="And?", tools=[PYTHON], include=INCLUDE, owner="b")
        assert "NameError" in first(other, "code_interpreter_call")["outputs"][0]["logs"]
        assert len(there.server.tools.containers) == 2  # type: ignore[union-attr]
        for container, param in (
            ({"type": "auto", "memory_limit": "64g"}, "tools[0].container.memory_limit"),
            ({"type": "auto", "file_ids": ["file_1"]}, "tools[0].container.file_ids"),
            (7, "tools[0].container"),
        ):
            tool = {"type": "code_interpreter", "container": container}
            assert (await there.refused(input="x", tools=[tool]))["param"] == param
    assert len(tools.containers) == 0


@needs_sandbox
async def test_a_kernel_whose_files_somebody_removed_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    prepared = prepare(ToolChoices(python=True))
    assert prepared is not None
    turns = [said(run("print(1)")), said(answer("1")), said(run("print(2)")), said(run("print(3)")), said(answer("3"))]
    async with Responding(*turns, path=tmp_path, tools=prepared.hosted(Tokenizer.o200k_harmony())) as there:
        made = await there.make(input="x", tools=[PYTHON])
        [folder] = tmp_path.glob("freehold-python-*")
        shutil.rmtree(folder)
        then = await there.make(input="x", tools=[PYTHON], include=INCLUDE, previous_response_id=made["id"])
        logs = [item["outputs"][0]["logs"] for item in then["output"] if item["type"] == "code_interpreter_call"]
        assert "begins anew" in logs[0] and str(tmp_path) not in logs[0] and logs[1] == "3"
    assert not list(tmp_path.glob("freehold-python-*"))


# --- MCP ----------------------------------------------------------------------------------------------------


async def test_tools_of_the_operators_mcp_servers_are_listed_called_and_told_of(tmp_path: Path) -> None:
    server = {"type": "mcp", "server_label": "peer", "require_approval": "never"}
    turns = [
        *(said(use("peer__add", a=2, b=3)), said(use("peer__fail")), said(answer("5"))),
        said(answer("5")),
        *(said(use("peer__add", a=1)), said(answer("2"))),
    ]
    async with Responding(*turns, path=tmp_path, tools=HostedTools(mcp=[peer(tmp_path)])) as there:
        made = await there.make(input="2 + 3?", tools=[{**server, "allowed_tools": ["add", "fail"]}], stream=True)
        assert kinds(made) == ["mcp_list_tools", "mcp_call", "mcp_call", "message"]
        assert [tool["name"] for tool in first(made, "mcp_list_tools")["tools"]] == ["add", "fail"]
        right, wrong = (item for item in made["output"] if item["type"] == "mcp_call")
        assert (right["name"], json.loads(right["arguments"]), right["output"]) == ("add", {"a": 2, "b": 3}, "5")
        assert wrong["status"] == "failed" and "Error executing tool fail" in wrong["error"]["content"][0]["text"]
        sent_back = [{"role": "user", "content": "2 + 3?"}, *made["output"], {"role": "user", "content": "Sure?"}]
        again = await there.make(input=sent_back, tools=[server], store=False)
        assert kinds(again) == ["message"]  # the list is there already
        chosen = {"type": "mcp", "server_label": "peer", "name": "add"}
        last = await there.make(input="1 + 1?", tools=[server], tool_choice=chosen)
        assert first(last, "mcp_call")["output"] == "2"
        for change, param in (
            ({"server_label": "other"}, "tools[0].server_label"),
            ({"server_url": "https://example.com/mcp"}, "tools[0].server_url"),
            ({"require_approval": "always"}, "tools[0].require_approval"),
            ({"require_approval": None}, "tools[0].require_approval"),
            ({"allowed_tools": ["add", "sub"]}, "tools[0].allowed_tools[1]"),
            ({"headers": {"authorization": "Bearer x"}}, "tools[0].headers"),
            ({"authorization": "x"}, "tools[0].authorization"),
        ):
            assert (await there.refused(input="x", tools=[{**server, **change}]))["param"] == param
        assert lines(tmp_path, "started") and "example.com" not in str(there.server.tools)


def test_tools_that_need_a_network_or_one_name_are_refused() -> None:
    for choices, what in (
        (ToolChoices(search="exa"), "--search reaches the web.*--airgap"),
        (ToolChoices(mcp=("docs=https://example.com/mcp",)), "MCP server 'docs' is at a URL.*--airgap"),
        (ToolChoices(mcp=("uvx one", "one=uvx two")), "go by the name 'one'"),
    ):
        with pytest.raises(UsageError, match=what):
            prepare(choices, no_network=True)


# --- ends ---------------------------------------------------------------------------------------------------


async def test_a_tool_that_runs_ends_with_its_response(tmp_path: Path) -> None:
    waiting = Waiting()
    async with Responding(WAIT, WAIT, WAIT, path=tmp_path, tools=waiting.tools()) as there:
        queued = await there.make(input="Wait", tools=[LOCAL], background=True)
        await asyncio.wait_for(waiting.began.wait(), 30)
        cancelled = await there.get(f"responses/{queued['id']}/cancel", method="POST")
        assert cancelled["status"] == "cancelled" and waiting.ended.is_set()
        assert first(cancelled, "mcp_call")["status"] == "incomplete"
        for stream in (False, True):
            waiting.began.clear()
            waiting.ended.clear()
            body = {"input": "Wait", "tools": [LOCAL], "stream": stream}
            await vanish(there.app, "/v1/responses", body, once=waiting.began.is_set)
            assert waiting.ended.is_set() and there.server.gate.taken == 0


async def test_a_server_that_stops_ends_the_tools_that_run(tmp_path: Path) -> None:
    waiting = Waiting()
    async with Responding(WAIT, path=tmp_path, tools=waiting.tools()) as there:
        queued = await there.make(input="Wait", tools=[LOCAL], background=True)
        await asyncio.wait_for(waiting.began.wait(), 30)
        await there.server.stop()
        failed = await ended(there, queued["id"])
        assert waiting.ended.is_set() and failed["status"] == "failed"
        assert "shutting down" in failed["error"]["message"]


# --- containers ---------------------------------------------------------------------------------------------


class Echo:
    """A tool that counts its sessions."""

    def __init__(self) -> None:
        self.open_sessions = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.running = 0

    @property
    def namespace(self) -> ToolNamespace:
        return PYTHON_NAMESPACE

    async def open(self) -> Any:
        self.open_sessions += 1
        return EchoSession(self)


class EchoSession:
    def __init__(self, tool: Echo) -> None:
        self.tool = tool

    async def call(self, name: str, arguments: str) -> ToolResult:
        self.tool.running += 1
        try:
            await self.tool.gate.wait()
        finally:
            self.tool.running -= 1
        return ToolResult(text=arguments)

    def citations(self, answer: str) -> Sequence[Any]:
        return ()

    async def aclose(self) -> None:
        self.tool.open_sessions -= 1


async def test_two_turns_never_use_a_container_at_once() -> None:
    containers, echo = Containers(), Echo()
    one = containers.lease("a")
    assert containers.lease("a", wanted=one.id).id != one.id  # whoever does not insist gets one of their own
    two = containers.lease("a", exact=one.id)
    echo.gate.clear()
    sessions = [await lease.tool("echo", echo).open() for lease in (one, two)]
    begun = [asyncio.create_task(session.call("python", "x")) for session in sessions]
    await until(lambda: echo.running == 1)
    echo.gate.set()
    await asyncio.wait_for(begun[0], 30)
    await asyncio.sleep(0)
    assert not begun[1].done()
    one.release()
    assert (await asyncio.wait_for(begun[1], 30)).text == "x"
    two.release()
    assert containers.lease("a", wanted=one.id).id == one.id
    await containers.aclose()
    assert echo.open_sessions == 0


async def test_idle_containers_are_closed_and_the_oldest_make_room() -> None:
    echo = Echo()
    containers = Containers(most=2, clock=iter(range(100)).__next__)
    ids = []
    for _ in range(4):
        lease = containers.lease("a")
        await (await lease.tool("echo", echo).open()).call("python", "x")
        ids.append(lease.id)
        lease.release()
    await until(lambda: echo.open_sessions == 2)
    kept = [containers.lease("a", wanted=name) for name in reversed(ids)]
    assert [lease.id for lease in kept[:2]] == ids[:1:-1] and not {lease.id for lease in kept[2:]} & {*ids}
    await containers.aclose()

    # Who only asks takes nobody's, and who calls often takes their own.
    containers = Containers(most=2)
    victims = containers.lease("victim")
    await (await victims.tool("echo", echo).open()).call("python", "x")
    victims.release()
    asking = [containers.lease("other") for _ in range(4)]
    for lease in asking:
        await (await lease.tool("echo", echo).open()).call("python", "x")
    for lease in asking:
        lease.release()
    assert containers.lease("victim", wanted=victims.id).id == victims.id
    await containers.aclose()
    await until(lambda: echo.open_sessions == 0)

    containers = Containers(idle_seconds=0.001)
    forgotten = containers.lease("a")
    await (await forgotten.tool("echo", echo).open()).call("python", "x")
    assert echo.open_sessions == 1
    del forgotten
    await until(lambda: echo.open_sessions == 0 and len(containers) == 0)


@pytest.mark.parametrize(("limits", "left"), [({"most": 1}, 1), ({"idle_seconds": 0.001}, 0)])
async def test_the_operators_limits_on_containers_are_kept_to(limits: dict[str, Any], left: int) -> None:
    echo = Echo()
    turns = [said(run("1")), said(answer("1"))] * 2
    async with Responding(*turns, tools=HostedTools(python=echo, containers=Containers(**limits))) as there:
        for _ in range(2):
            await there.make(input="x", tools=[PYTHON], store=False)
        await until(lambda: echo.open_sessions == left)


# --- the command --------------------------------------------------------------------------------------------


def test_the_command_switches_tools_on(notes: Path, tmp_path: Path) -> None:
    script = tmp_path / "turns.jsonl"
    turns = [said(browse("search", query="spring tide")), said(use("my__double", number=21)), said(answer("42"))]
    script.write_text("".join(f"{json.dumps(turn)}\n" for turn in turns))
    (tmp_path / "my.py").write_text("def double(number: int) -> int:\n    'Twice it.'\n    return 2 * number\n")
    with Process(tmp_path, script, "--browse", str(notes), "--tools", str(tmp_path / "my.py")) as there:
        local = {"type": "mcp", "server_label": "my", "require_approval": "never"}
        body = {"input": "21 twice?", "tools": [SEARCH, local]}
        answered = httpx.post(f"http://127.0.0.1:{there.address[1]}/v1/responses", json=body, timeout=60).json()
        assert first(answered, "mcp_call")["output"] == "42" and "web_search_call" in kinds(answered)
        assert there.terminate() == 0


def test_a_server_whose_tools_cannot_be_had_does_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("uvicorn.error"), "disabled", False)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "DO_NOT_TRACK"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("FREEHOLD_DATA", str(tmp_path))
    turn = ScriptedTurn.from_json(said(answer("Hi.")))
    with pytest.raises(BackendError, match="MCP server gone cannot be used"):
        start(
            lambda: serve_script([turn]),
            ServeSettings(port=0),
            store_url=f"sqlite:///{tmp_path / 'responses.db'}",
            no_network=False,
            tools=ToolChoices(mcp=("gone=/no/such/program",)),
        )
