"""What survives: a server that is killed at any moment has lost nothing that it had acknowledged, and one that is asked
to stop ends what it is doing properly. With real processes; `FREEHOLD_KILLS` says how often to kill (default: 2)."""

import http.client
import json
import os
import random
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from freehold.session.store.store import Store
from tests.serve.process import Process, write_script

KILLS = int(os.environ.get("FREEHOLD_KILLS", "2"))
SECRET_ASKED, SECRET_SAID = "a zebra that nobody may keep", "quokkas were never mentioned"
TURNS = (
    {"match": "zebra", "reasoning": SECRET_SAID, "answer": SECRET_SAID},
    {"match": "long", "answer": "and so on and on " * 2000},
    {"match": "", "reasoning": "Let me see.", "answer": "The answer is as long as a short answer is. " * 3},
)
RESPONSES = "/v1/responses"


@dataclass
class Seen:
    """What clients were told, over all lives of the server."""

    completed: dict[str, dict[str, Any]] = field(default_factory=dict)
    accepted: set[str] = field(default_factory=set)
    events: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """Of streams in the background, by the response's id."""


class Crowd:
    """Clients that ask one after the other until the server is gone."""

    def __init__(self, server: Process, seen: Seen, enough: int, seed: int) -> None:
        self._server, self._seen, self._enough = server, seen, enough
        self._told = 0
        self._lock = threading.Condition()
        self.problems: list[BaseException] = []
        self._threads = [
            threading.Thread(target=self._live, args=(act, random.Random(seed * 10 + at)))
            for at, act in enumerate((self._plain, self._streamed, self._later, self._later_streamed, self._unkept))
        ]
        for thread in self._threads:
            thread.start()

    def wait(self) -> None:
        """Until they were told enough."""
        with self._lock:
            assert self._lock.wait_for(lambda: self._told >= self._enough or self.problems, 60)

    def join(self) -> None:
        for thread in self._threads:
            thread.join(60)
        assert not self.problems, self.problems

    def _live(self, act: Any, chance: random.Random) -> None:
        previous: str | None = None
        try:
            while True:
                body = {"input": f"Hello {chance.random()}"} | ({"previous_response_id": previous} if previous else {})
                previous = act(body) if chance.random() < 0.8 else None
        except (OSError, http.client.HTTPException, json.JSONDecodeError):
            pass  # it was killed
        except BaseException as problem:  # noqa: BLE001 - told by `join`
            self.problems.append(problem)

    def _note(self) -> None:
        with self._lock:
            self._told += 1
            self._lock.notify_all()

    def _complete(self, response: dict[str, Any]) -> str:
        assert response["status"] == "completed", response
        self._seen.completed[response["id"]] = response
        self._note()
        return str(response["id"])

    def _plain(self, body: dict[str, Any]) -> str:
        status, response = self._server.request("POST", RESPONSES, body)
        assert status == 200, response
        return self._complete(response)

    def _streamed(self, body: dict[str, Any]) -> str:
        for event in self._server.events("POST", RESPONSES, body | {"stream": True}):
            if event["type"] == "response.completed":
                return self._complete(event["response"])
        raise http.client.IncompleteRead(b"")

    def _later(self, body: dict[str, Any]) -> None:
        status, response = self._server.request("POST", RESPONSES, body | {"background": True})
        assert (status, response["status"]) == (200, "queued"), response
        self._seen.accepted.add(response["id"])
        self._note()

    def _later_streamed(self, body: dict[str, Any]) -> None:
        name = ""
        for event in self._server.events("POST", RESPONSES, body | {"background": True, "stream": True}):
            if event["type"] == "response.created":
                name = event["response"]["id"]
                self._seen.accepted.add(name)
            self._seen.events.setdefault(name, []).append(event)
            self._note()
            if event["type"] == "response.completed":
                self._complete(event["response"])

    def _unkept(self, body: dict[str, Any]) -> None:
        asked = {"input": SECRET_ASKED, "store": False, "stream": True, "user": SECRET_ASKED}
        for event in self._server.events("POST", RESPONSES, asked):
            if event["type"] == "response.completed":
                self._note()


def check(server: Process, seen: Seen) -> None:
    """All that clients were told of is there."""
    for name, response in seen.completed.items():
        assert server.request("GET", f"{RESPONSES}/{name}") == (200, response)
    for name in seen.accepted - set(seen.completed):
        status, response = server.request("GET", f"{RESPONSES}/{name}")
        assert status == 200 and response["status"] in ("completed", "failed"), response
        if response["status"] == "failed":
            assert "the server stopped" in response["error"]["message"]
    for name, events in seen.events.items():
        told = list(server.events("GET", f"{RESPONSES}/{name}?stream=true"))
        assert told[: len(events)] == events
        assert [event["sequence_number"] for event in told[:-1]] == list(range(len(told) - 1))
        assert told[-1]["type"] == "[DONE]" and told[-2]["type"] in ("response.completed", "response.failed")
        status, response = server.request("GET", f"{RESPONSES}/{name}")
        assert (status, response) == (200, told[-2]["response"])
    if seen.completed:
        last = [*seen.completed][-1]
        status, response = server.request("POST", RESPONSES, {"input": "Go on", "previous_response_id": last})
        assert (status, response["status"]) == (200, "completed")


def test_what_was_acknowledged_outlives_kill_9_and_what_is_not_to_be_stored_never_was(tmp_path: Path) -> None:
    script = write_script(tmp_path / "turns.jsonl", *TURNS)
    seen = Seen()
    chance = random.Random(6)
    for number in range(KILLS):
        with Process(tmp_path, script, "--tokens-per-second", "1500") as server:
            check(server, seen)
            crowd = Crowd(server, seen, chance.randrange(20, 80), number)
            crowd.wait()
            server.kill()
            crowd.join()
    assert seen.completed and seen.accepted and seen.events
    with Process(tmp_path, script, "--tokens-per-second", "300", "--drain-timeout", "0.3") as server:
        check(server, seen)
        assert "Traceback" not in server.log and "zebra" not in server.log
        _stop_in_the_middle(server, tmp_path)
    files = [path for path in (tmp_path / "data").rglob("*") if path.is_file()]
    kept = b"".join(path.read_bytes() for path in files)
    assert b"The answer is as long as" in kept  # it would be seen
    assert not re.search(rb"zebra|quokka", kept)


def _stop_in_the_middle(server: Process, folder: Path) -> None:
    """SIGTERM while a stream, a response at once and one in the background are made."""
    _, later = server.request("POST", RESPONSES, {"input": "long", "background": True})
    answers: list[tuple[int, Any]] = []
    waiting = threading.Thread(target=lambda: answers.append(server.request("POST", RESPONSES, {"input": "long"})))
    waiting.start()
    events: Iterator[dict[str, Any]] = server.events("POST", RESPONSES, {"input": "long", "stream": True})
    for event in events:
        if event["type"] == "response.output_text.delta":
            break
    code = server.terminate()
    waiting.join(60)
    assert code == 0
    rest = [event["type"] for event in events]
    assert rest[-2:] == ["response.failed", "[DONE]"]
    ((status, answer),) = answers
    assert status == 503 and "shutting down" in answer["error"]["message"]
    with Store.open(f"sqlite:///{folder / 'data' / 'freehold.db'}") as store:
        kept = store.response(later["id"], "")
        assert kept.status == "failed" and "shutting down" in kept.response["error"]["message"]
        assert store.recover() == []


def test_a_log_in_json_has_nothing_else_in_it(tmp_path: Path) -> None:
    script = tmp_path / "turns.jsonl"
    script.write_text('{"answer": "Yes."}\n')
    with Process(tmp_path, script, "--log-json") as server:
        assert server.request("GET", "/health")[0] == 200
        assert server.terminate() == 0
        said = [json.loads(line)["message"] for line in server.log.splitlines()]
        assert said == [f"serving on http://127.0.0.1:{server.address[1]}", "request"]
