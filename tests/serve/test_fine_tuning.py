"""`/v1/fine_tuning/jobs` by OpenAI's client, over a training that says what a test has it say.

What is tested is the server: its queue, processes that end in every way, what is told of them, and restarts. That a
real training fits in is test_fine_tuning_for_real.py's.
"""

import asyncio
import gc
import json
import logging
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from openai import APIStatusError, BadRequestError, NotFoundError
from openai.types import Model, ModelDeleted
from openai.types.fine_tuning import FineTuningJob, FineTuningJobEvent
from openai.types.fine_tuning.jobs import FineTuningJobCheckpoint

from freehold import disk
from freehold.errors import CheckpointError, OutOfMemoryError, StoreError
from freehold.formats.conversation import Conversation
from freehold.serve.caller import Caller
from freehold.serve.threads import Threads
from freehold.serve.tuning.models import TunedModels
from freehold.session.generation import Ask
from freehold.session.store.records import ModelRecord
from tests.serve.sdk import check
from tests.serve.trainer import LEARNING_RATES
from tests.serve.tuned import DONE, LINES, STARTED, WELL, Tuned, run, step

WAITS: tuple[dict[str, Any], ...] = (STARTED, step(1, 2.0), {"event": "checkpoint", "step": 1}, {"wait": True})


def with_server(path: Path, use: Any, *lines: Any, **options: Any) -> None:
    async def work() -> None:
        async with Tuned(path, lines or WELL, **options) as server:
            await use(server)

    run(work())


def test_a_job_runs_to_its_model_and_tells_all_of_it(tmp_path: Path) -> None:
    async def use(server: Tuned) -> None:
        jobs = server.sdk.fine_tuning.jobs
        training, validation = await server.upload(), await server.upload(name="v.jsonl")
        made = await jobs.create(
            model="default",
            training_file=training,
            validation_file=validation,
            suffix="poet",
            seed=7,
            metadata={"for": "verse"},
            method={
                "type": "supervised",
                "supervised": {"hyperparameters": {"n_epochs": 3, "learning_rate_multiplier": 2.0}},
            },
        )
        check(FineTuningJob, made.to_dict())
        assert (made.status, made.fine_tuned_model, made.seed, made.metadata) == ("queued", None, 7, {"for": "verse"})
        job = await server.ended(made.id)
        check(FineTuningJob, job)
        assert job["status"] == "succeeded" and job["error"] is None
        assert job["trained_tokens"] == 200 and job["finished_at"] >= job["created_at"]
        # What was left to training is told as it was decided.
        assert job["method"]["supervised"]["hyperparameters"] == job["hyperparameters"] == {
            "n_epochs": 3, "batch_size": 4, "learning_rate_multiplier": 2.0,
        }  # fmt: skip
        base, _, name = job["fine_tuned_model"].rpartition(":")
        assert base == "default" and name.startswith("poet-")

        (asked,) = _asked(server, made.id)
        assert asked[0] == str(server.workshop.root / "files" / f"{training}.jsonl")
        options = dict(zip(asked[1::2], asked[2::2], strict=True))
        output = server.workshop.job(made.id) / name
        assert options == {
            "--model": "/models/m", "--output": str(output), "--seed": "7", "--epochs": "3", "--max-length": "2048",
            "--learning-rate": "0.0002", "--validation": str(server.workshop.root / "files" / f"{validation}.jsonl"),
        }  # fmt: skip
        assert server.adapters == {name: output}
        assert int((output / "nice").read_text()) == min(19, os.nice(0) + 15)
        await server.until(lambda: not [*output.rglob("training_state*")])  # nothing goes on from there any more
        assert len([*output.rglob("step-*/adapter_model.safetensors")]) == 2

        events = [event async for event in jobs.list_events(made.id, limit=3)]
        for event in events:
            check(FineTuningJobEvent, event.to_dict())
        assert [event.message for event in events[::-1]] == [
            f"Created fine-tuning job: {made.id}",
            "Validating the files",
            "The files are in order, and training has begun",
            "Step 1/2: training loss=2.0000",
            "Checkpoint created at step 1",
            "Step 2/2: training loss=1.0000, validation loss=1.5000",
            "Checkpoint created at step 2",
            f"New fine-tuned model created: {job['fine_tuned_model']}",
            "The job has successfully completed",
        ]
        told = events[3].to_dict()
        assert told["type"] == "metrics"
        assert told["data"] == {
            "step": 2, "total_steps": 2, "train_loss": 1.0, "valid_loss": 1.5, "tokens": 200,
        }  # fmt: skip

        checkpoints = [checkpoint async for checkpoint in jobs.checkpoints.list(made.id, limit=1)]
        for checkpoint in checkpoints:
            check(FineTuningJobCheckpoint, checkpoint.to_dict())
        assert [(each.step_number, each.fine_tuned_model_checkpoint) for each in checkpoints] == [
            (2, f"default:{name}-step-2"), (1, f"default:{name}-step-1"),
        ]  # fmt: skip
        assert checkpoints[0].metrics.valid_loss == 1.5 and checkpoints[1].metrics.train_loss == 2.0

        (result,) = job["result_files"]
        assert (await server.sdk.files.retrieve(result)).purpose == "fine-tune-results"
        table = (await server.sdk.files.content(result)).read().decode()
        assert table == "step,train_loss,valid_loss\n1,2.0,\n2,1.0,1.5\n"
        for file in (training, validation, result):
            await server.sdk.files.delete(file)

    with_server(tmp_path, use)


def _asked(server: Tuned, job_id: str) -> list[list[str]]:
    return [json.loads(line) for line in (server.workshop.job(job_id) / "arguments.jsonl").read_text().splitlines()]


def test_models_are_their_owners_to_see_and_to_delete(tmp_path: Path) -> None:
    async def use(server: Tuned) -> None:
        job = await server.sdk.fine_tuning.jobs.create(model="default", training_file=await server.upload())
        name = (await server.ended(job.id))["fine_tuned_model"]
        listed = [model.id async for model in server.sdk.models.list()]
        assert listed[-1] == name and "default" in listed
        check(Model, {k: v for k, v in (await server.sdk.models.retrieve(name)).to_dict().items() if k[0] != "m"})
        async with server.client("bob") as bob:
            assert name not in [model.id async for model in bob.models.list()]
            jobs = bob.fine_tuning.jobs
            for theirs, what in (
                (bob.models.retrieve, name), (bob.models.delete, name), (jobs.retrieve, job.id),
                (jobs.cancel, job.id), (jobs.list_events, job.id), (jobs.checkpoints.list, job.id),
            ):  # fmt: skip
                with pytest.raises(NotFoundError):
                    await theirs(what)
            assert [other.id async for other in bob.fine_tuning.jobs.list()] == []
        with pytest.raises(APIStatusError) as caught:
            await server.sdk.models.delete("default")
        assert caught.value.status_code == 403
        deleted = await server.sdk.models.delete(name)
        check(ModelDeleted, deleted.to_dict())
        assert not [*server.workshop.job(job.id).glob("*/adapter*")]
        for gone in (server.sdk.models.retrieve, server.sdk.models.delete):
            with pytest.raises(NotFoundError):
                await gone(name)
        (checkpoint, _) = [each async for each in server.sdk.fine_tuning.jobs.checkpoints.list(job.id)]
        await server.sdk.models.delete(checkpoint.fine_tuned_model_checkpoint)
        assert len((await server.sdk.fine_tuning.jobs.checkpoints.list(job.id)).data) == 1
        assert (await server.sdk.fine_tuning.jobs.retrieve(job.id)).fine_tuned_model == name

    with_server(tmp_path, use)


KILLED = "the training was killed; most often because memory ran out"
ENDS: dict[str, tuple[tuple[Any, ...], str, str | None, str]] = {
    "bad lines": (
        ({"say": "error: 2 of 3 lines cannot be trained on; mend them, or take them out:\n"
                 "  {T}.jsonl line 2: is no JSON\n  {T}.jsonl line 3: has no messages"}, {"exit": 2}),
        "invalid_training_file", "training_file",
        "2 of 3 lines cannot be trained on; mend them, or take them out:\n  {T}.jsonl line 2: is no JSON\n"
        "  {T}.jsonl line 3: has no messages",
    ),
    "bad lines for validation": (
        ({"say": "error: 1 of 1 lines cannot be trained on:\n  {V}.jsonl line 1: is a list"}, {"exit": 2}),
        "invalid_training_file", "validation_file", "1 of 1 lines cannot be trained on:\n  {V}.jsonl line 1: is a list",
    ),
    "killed": ((STARTED, step(1, 2.0), {"kill": int(signal.SIGKILL)}), "training_killed", None, KILLED),
    "crashed": ((STARTED, {"kill": int(signal.SIGSEGV)}), "training_crashed", None, "the training ended by SIGSEGV"),
    "a full disk": (
        (STARTED, {"say": "\x1b[31mat work\x1b[0m"}, {"say": "error: {R}/jobs/x cannot be written: the disk is full"},
         {"exit": 1}),
        "training_failed", None, "jobs/x cannot be written: the disk is full",
    ),
    "a bug": (
        ({"say": "Traceback (most recent call last):\n  File x\nValueError: of the model /models/m"}, {"exit": 1}),
        "training_failed", None, "Traceback (most recent call last):\n  File x\nValueError: of the model …",
    ),
    "what it told": (
        (STARTED, {"event": "failed", "step": 1, "message": "the loss of step 2 is nan"}, {"exit": 1}),
        "training_failed", None, "the loss of step 2 is nan",
    ),
    "nothing": (({"exit": 3},), "training_failed", None, "the training ended with the exit code 3"),
    "no result": ((STARTED,), "training_failed", None, "the training ended with the exit code 0"),
}  # fmt: skip


def test_a_training_that_ends_badly_fails_its_job_and_nothing_else(tmp_path: Path) -> None:
    async def use(server: Tuned) -> None:
        training, validation = await server.upload(), await server.upload()
        for name, (lines, code, param, message) in ENDS.items():
            told = json.dumps(lines).replace("{T}", training).replace("{V}", validation)
            _say(server, json.loads(told.replace("{R}", str(server.workshop.root))))
            made = await server.sdk.fine_tuning.jobs.create(
                model="default", training_file=training, validation_file=validation
            )
            job = await server.ended(made.id)
            check(FineTuningJob, job)
            expected = message.replace("{T}", training).replace("{V}", validation)
            assert job["status"] == "failed", name
            assert job["error"] == {"code": code, "message": expected, "param": param}, name
            (last, *_) = (await server.sdk.fine_tuning.jobs.list_events(made.id)).data
            assert (last.level, last.message) == ("error", f"The job failed: {expected}")
            assert str(tmp_path) not in json.dumps(job)
        _say(server, WELL)
        made = await server.sdk.fine_tuning.jobs.create(model="default", training_file=training)
        assert (await server.ended(made.id))["status"] == "succeeded"

    with_server(tmp_path, use)


def _say(server: Tuned, lines: Any) -> None:
    server.script.write_text("\n".join(map(json.dumps, lines)))


def test_a_result_that_is_no_adapter_is_a_failure(tmp_path: Path) -> None:
    async def use(server: Tuned) -> None:
        made = await server.sdk.fine_tuning.jobs.create(model="default", training_file=await server.upload())
        job = await server.ended(made.id)
        assert job["error"]["message"] == "the training ended well, and its result cannot be loaded"
        assert len([model async for model in server.sdk.models.list()]) == len(server.server.model_names)

    with_server(tmp_path, use, refuses=[CheckpointError("there is no adapter")])


def test_a_result_that_there_is_no_memory_for_now_is_none_the_less_a_model(tmp_path: Path) -> None:
    async def use(server: Tuned) -> None:
        jobs, training = server.sdk.fine_tuning.jobs, await server.upload()
        job = await server.ended((await jobs.create(model="default", training_file=training)).id)
        assert (job["status"], job["error"], server.adapters) == ("succeeded", None, {})
        told = [(said.level, said.message) async for said in jobs.list_events(job["id"])]
        assert ("warn", "There is no room for the model in memory now; it is loaded when it is asked for") in told
        with pytest.raises(APIStatusError, match="cannot be loaded at the moment") as caught:
            await _ask(server, job["fine_tuned_model"])
        assert caught.value.status_code == 503
        assert await _ask(server, job["fine_tuned_model"]) == "ok"

    with_server(tmp_path, use, refuses=[OutOfMemoryError("out of memory")] * 2)


async def _ask(server: Tuned, model: str) -> str | None:
    said = await server.sdk.chat.completions.create(model=model, messages=[{"role": "user", "content": "hi"}])
    return said.choices[0].message.content


def test_what_was_learnt_is_kept_where_the_file_of_results_cannot_be_written(tmp_path: Path) -> None:
    async def use(server: Tuned) -> None:
        jobs, training = server.sdk.fine_tuning.jobs, await server.upload()
        made = await jobs.create(model="default", training_file=training)
        await server.waits(made.id)
        files = server.workshop.root / "files"
        files.rename(files.with_name("elsewhere"))
        files.write_text("nothing can be written into this")
        (server.workshop.job(made.id) / "waits").unlink()
        job = await server.ended(made.id)
        check(FineTuningJob, job)
        assert (job["status"], job["error"], job["result_files"]) == ("succeeded", None, [])
        assert await _ask(server, job["fine_tuned_model"]) == "ok"
        told = [(said.level, said.message) async for said in jobs.list_events(made.id)]
        assert ("warn", "The file of results could not be written; the events have what would be in it") in told
        assert [file.id async for file in server.sdk.files.list()] == [training]

    with_server(tmp_path, use, *WAITS[:-1], {"wait_while": "waits"}, step(2, 1.0), *DONE)


def test_a_training_that_fails_after_its_end_has_learnt_all_the_same(tmp_path: Path) -> None:
    async def use(server: Tuned) -> None:
        made = await server.sdk.fine_tuning.jobs.create(model="default", training_file=await server.upload())
        job = await server.ended(made.id)
        assert (job["status"], job["error"]) == ("succeeded", None)
        assert await _ask(server, job["fine_tuned_model"]) == "ok"

    with_server(tmp_path, use, *WELL, {"say": "error: curves.png cannot be written: the disk is full"}, {"exit": 1})


def test_a_training_that_is_done_needs_its_files_no_more(tmp_path: Path) -> None:
    async def use(server: Tuned) -> None:
        training = await server.upload()
        made = await server.sdk.fine_tuning.jobs.create(model="default", training_file=training)
        record = server.store.job(made.id, "alice", server.workshop.place)
        output = server.workshop.job(made.id) / str(record.job["_name"])
        output.mkdir(parents=True)
        (output / "adapter_model.safetensors").write_text("learnt")
        (output / "metrics.jsonl").write_text("\n".join(map(json.dumps, [STARTED, step(2, 1.0), DONE[1], ""])))
        (server.workshop.root / "files" / f"{training}.jsonl").unlink()
        queue = asyncio.create_task(server.tuning.run())
        assert (await server.ended(made.id))["status"] == "succeeded"
        await server.tuning.stop()
        await queue

    with_server(tmp_path, use, {"exit": 9}, runs=False)


# --- what is held in memory -------------------------------------------------------------------------------------


async def _models(server: Tuned, count: int) -> list[str]:
    """So many, made one after the other."""
    jobs, training = server.sdk.fine_tuning.jobs, await server.upload()
    made = [(await jobs.create(model="default", training_file=training)).id for _ in range(count)]
    return [(await server.ended(job))["fine_tuned_model"] for job in made]


def _short(*names: str) -> list[str]:
    return [name.rpartition(":")[2] for name in names]


def test_so_many_models_are_held_and_those_go_that_were_asked_longest_ago(tmp_path: Path) -> None:
    async def use(server: Tuned) -> None:
        first, second, third = await _models(server, 3)
        await server.until(lambda: sorted(server.adapters) == sorted(_short(second, third)))
        for asked, held in ((second, (second, third)), (first, (first, second)), (third, (first, third))):
            assert await _ask(server, asked) == "ok"
            assert sorted(server.adapters) == sorted(_short(*held))
        # Where memory runs out before that, who is idle makes room too.
        server.refuse(OutOfMemoryError("out of memory"))
        assert await _ask(server, second) == "ok"
        assert [*server.adapters] == _short(second)

    with_server(tmp_path, use, most_held=2)


@pytest.mark.parametrize("by_memory", [False, True])
def test_what_only_the_garbage_collector_would_let_go_makes_room(tmp_path: Path, *, by_memory: bool) -> None:
    async def use(server: Tuned) -> None:
        first, second = _short(*await _models(server, 2))
        await server.until(lambda: sorted(server.adapters) == sorted((first, second)))
        server.adapters.clear()
        models = TunedModels(
            server.workshop.root, server.tuning.threads, server._add_adapter, server.adapters.__delitem__,
            most_held=2 if by_memory else 1,
        )  # fmt: skip
        models.take(server.store.models(server.workshop.place))
        gc.disable()
        try:
            kept: list[Any] = [await models.load(first)]
            kept.append(kept)  # as an error and its frames hold each other
            del kept
            if by_memory:
                server.refuse(OutOfMemoryError("out of memory"))
            assert await models.load(second) is not None
        finally:
            gc.enable()
        assert [*server.adapters] == [second]

    with_server(tmp_path, use)


def test_what_is_being_asked_stays_even_when_it_is_deleted(tmp_path: Path) -> None:
    async def use(server: Tuned) -> None:
        first, second = await _models(server, 2)
        ask = Ask(conversation=Conversation.from_openai([{"role": "user", "content": "hi"}]))
        alice = Caller(owner="alice")
        turn = await server.server.turn(alice, await server.server.named(first, alice), ask)
        events = turn.events(server.server.served.runner)
        assert [*server.adapters] == _short(first)
        with pytest.raises(APIStatusError, match="cannot be loaded at the moment") as caught:
            await _ask(server, second)
        assert caught.value.status_code == 503
        del caught
        await server.sdk.models.delete(first)
        with pytest.raises(NotFoundError):
            await _ask(server, first)
        assert [*server.adapters] == _short(first)
        assert [event async for events_of_step in events for event in events_of_step]
        assert [*server.adapters] == _short(first)
        del turn, events
        await server.until(lambda: not server.adapters)
        assert await _ask(server, second) == "ok"
        await server.sdk.models.delete(second)
        await server.until(lambda: not server.adapters)

    with_server(tmp_path, use, most_held=1)


def test_a_client_that_leaves_while_its_model_is_read_breaks_it_for_nobody(tmp_path: Path) -> None:
    async def use(server: Tuned) -> None:
        (name,) = await _models(server, 1)
        server.slow.clear()
        server.adapters.clear()
        models = TunedModels(server.workshop.root, server.tuning.threads, server._add_adapter, lambda name: None)
        models.take(server.store.models(server.workshop.place))
        left = asyncio.create_task(models.load(_short(name)[0]))
        await server.until(lambda: server.adding)
        left.cancel()
        with pytest.raises(asyncio.CancelledError):
            await left
        server.slow.set()
        assert await models.load(_short(name)[0]) is not None

    with_server(tmp_path, use)


def test_one_job_trains_at_a_time_and_cancelling_ends_it_wherever_it_is(tmp_path: Path) -> None:
    async def use(server: Tuned) -> None:
        jobs, training = server.sdk.fine_tuning.jobs, await server.upload()
        first, second, third = [await jobs.create(model="default", training_file=training) for _ in range(3)]
        await server.waits(first.id)
        await server.until_status(first.id, "running")
        (checkpoint,) = (await jobs.checkpoints.list(first.id)).data
        with pytest.raises(APIStatusError, match="goes on from its checkpoints") as caught:
            await server.sdk.models.delete(checkpoint.fine_tuned_model_checkpoint)
        assert caught.value.status_code == 409
        assert [(await jobs.retrieve(job.id)).status for job in (second, third)] == ["queued", "queued"]
        with pytest.raises(APIStatusError, match=f"{first.id} reads {training}|reads") as caught:
            await server.sdk.files.delete(training)
        assert caught.value.status_code == 409
        cancelled = await jobs.cancel(third.id)
        check(FineTuningJob, cancelled.to_dict())
        assert cancelled.status == "cancelled" and not server.workshop.job(third.id).exists()
        pid = int((server.workshop.job(first.id) / "child.lock").read_text())
        assert (await jobs.cancel(first.id)).status == "cancelled"
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
        await server.waits(second.id)
        assert (await jobs.cancel(second.id)).status == "cancelled"
        for ended in (first, third):
            with pytest.raises(BadRequestError, match="has ended already; its status is 'cancelled'"):
                await jobs.cancel(ended.id)
        with pytest.raises(BadRequestError, match="are not paused here"):
            await jobs.pause(first.id)
        with pytest.raises(BadRequestError, match="are not paused here"):
            await jobs.resume(first.id)
        await server.sdk.files.delete(training)

    with_server(tmp_path, use, {"ignore_sigterm": True}, *WAITS)


def test_jobs_are_listed_by_page_and_by_their_metadata(tmp_path: Path) -> None:
    async def use(server: Tuned) -> None:
        jobs, training = server.sdk.fine_tuning.jobs, await server.upload()
        made = [
            (await jobs.create(model="default", training_file=training, metadata={"n": str(n % 2)})).id
            for n in range(4)
        ]
        assert [job.id async for job in jobs.list(limit=3)] == made[::-1]
        assert [job.id async for job in jobs.list(metadata={"n": "1"}, limit=1)] == [made[3], made[1]]
        assert [job.id async for job in jobs.list(metadata={"n": "1", "m": "2"})] == []
        with pytest.raises(APIStatusError, match="4 fine-tuning jobs of yours wait") as caught:
            await jobs.create(model="default", training_file=training)
        assert caught.value.status_code == 429
        for job_id in made[:2]:
            await jobs.cancel(job_id)
        assert [job.status for job in (await jobs.list()).data] == ["queued", "queued", "cancelled", "cancelled"]
        for path in ("?limit=0", "?limit=101", "?x=1", "?after=x", f"/{made[0]}/events?after=x",
                     f"/{made[0]}/checkpoints?after=x", f"/{made[0]}/events?after=ftevent-x-1", "/x"):  # fmt: skip
            answer = await server.http.get(f"/v1/fine_tuning/jobs{path}", headers={"x-owner": "alice"})
            assert answer.status_code in (400, 404) and answer.json()["error"]["message"], path

    with_server(tmp_path, use, runs=False, unfinished_jobs=4)


BAD_REQUESTS: dict[str, tuple[dict[str, Any], int, str | None]] = {
    "no model": ({"model": None}, 400, "model"),
    "another model": ({"model": "gpt-4o-mini"}, 404, "model"),
    "no file": ({"training_file": None}, 400, "training_file"),
    "an unknown file": ({"training_file": "file-x"}, 404, "training_file"),
    "an unknown file for validation": ({"validation_file": "../x"}, 404, "validation_file"),
    "the same file twice": ({"validation_file": "{T}"}, 400, "validation_file"),
    "reinforcement": ({"method": {"type": "reinforcement", "reinforcement": {}}}, 400, "method.type"),
    "graders": ({"method": {"type": "dpo", "reinforcement": {"grader": {}}}}, 400, "method.reinforcement"),
    "another method": ({"method": {"type": "x"}}, 400, "method.type"),
    "two methods": ({"method": {"type": "dpo", "supervised": {}}}, 400, "method"),
    "a method twice": ({"method": {"type": "supervised"}, "hyperparameters": {}}, 400, None),
    "no epochs": ({"hyperparameters": {"n_epochs": 0}}, 400, "hyperparameters.n_epochs"),
    "true epochs": ({"hyperparameters": {"n_epochs": True}}, 400, "hyperparameters.n_epochs"),
    "many rows": ({"hyperparameters": {"batch_size": 257}}, 400, "hyperparameters.batch_size"),
    "no learning": (
        {"hyperparameters": {"learning_rate_multiplier": 0}}, 400, "hyperparameters.learning_rate_multiplier",
    ),
    "beta elsewhere": ({"hyperparameters": {"beta": 0.1}}, 400, "hyperparameters.beta"),
    "a long suffix": ({"suffix": "x" * 41}, 400, "suffix"),
    "a suffix that is a path": ({"suffix": "../x"}, 400, "suffix"),
    "a suffix with a colon": ({"suffix": "a:b"}, 400, "suffix"),
    "a suffix with a line's end": ({"suffix": "a\n"}, 400, "suffix"),
    "an empty suffix": ({"suffix": ""}, 400, "suffix"),
    "a negative seed": ({"seed": -1}, 400, "seed"),
    "integrations": ({"integrations": [{"type": "wandb", "wandb": {"project": "x"}}]}, 400, "integrations"),
    "metadata": ({"metadata": {"k" * 65: "v"}}, 400, "metadata"),
    "another field": ({"trainer": "/bin/sh"}, 400, "trainer"),
}  # fmt: skip


def test_what_training_cannot_do_is_refused_when_a_job_is_made(tmp_path: Path) -> None:
    async def use(server: Tuned) -> None:
        training = await server.upload()
        for name, (changes, status, param) in BAD_REQUESTS.items():
            body = {"model": "default", "training_file": training} | changes
            content = json.dumps({key: value for key, value in body.items() if value is not None})
            answer = await server.http.post(
                "/v1/fine_tuning/jobs",
                content=content.replace("{T}", training),
                headers={"content-type": "application/json", "x-owner": "alice"},
            )
            error = answer.json()["error"]
            assert (answer.status_code, error["param"]) == (status, param), (name, error)
        job = await server.sdk.fine_tuning.jobs.create(model="default", training_file=training)
        result = (await server.ended(job.id))["result_files"][0]
        with pytest.raises(BadRequestError, match="not uploaded to train on"):
            await server.sdk.fine_tuning.jobs.create(model="default", training_file=result)
        assert len((await server.sdk.fine_tuning.jobs.list()).data) == 1

    with_server(tmp_path, use)


def test_more_models_than_are_kept_are_refused(tmp_path: Path) -> None:
    async def use(server: Tuned) -> None:
        jobs, training = server.sdk.fine_tuning.jobs, await server.upload()
        name = (await server.ended((await jobs.create(model="default", training_file=training)).id))["fine_tuned_model"]
        with pytest.raises(BadRequestError, match="1 fine-tuned models of yours are kept"):
            await jobs.create(model="default", training_file=training)
        await server.sdk.models.delete(name)
        await jobs.create(model="default", training_file=training)

    with_server(tmp_path, use, models=1)


def test_what_a_kill_left_is_told_when_the_server_comes_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def made(server: Tuned) -> None:
        job = await server.sdk.fine_tuning.jobs.create(model="default", training_file=await server.upload())
        await server.ended(job.id)
        (server.workshop.root / "files" / "file-left.jsonl").touch()
        server.workshop.job("ftjob-left").mkdir()

    async def come_back(server: Tuned) -> None:
        root = server.workshop.root
        assert f"{root / 'files'} holds files that the store does not know (1, such as file-left.jsonl)" in caplog.text
        assert f"{root / 'jobs'} holds runs that the store does not know (1, such as ftjob-left)" in caplog.text

    caplog.set_level(logging.INFO, "freehold")
    with_server(tmp_path, made)
    assert "that the store does not know" not in caplog.text
    with_server(tmp_path, come_back)


def test_without_a_model_no_job_is_taken(tmp_path: Path) -> None:
    async def work() -> None:
        async with Tuned(tmp_path, None) as server:
            with pytest.raises(BadRequestError, match="no model that could be trained"):
                await server.sdk.fine_tuning.jobs.create(model="default", training_file=await server.upload())

    run(work())


def test_dpo_is_asked_of_the_training(tmp_path: Path) -> None:
    async def use(server: Tuned) -> None:
        made = await server.sdk.fine_tuning.jobs.create(
            model="default",
            training_file=await server.upload(),
            method={"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.3, "batch_size": 2}}},
        )
        job = await server.ended(made.id)
        check(FineTuningJob, job)
        assert job["method"]["dpo"]["hyperparameters"]["beta"] == 0.3
        (asked,) = _asked(server, made.id)
        assert asked[asked.index("--method") + 1] == "dpo" and asked[asked.index("--beta") + 1] == "0.3"
        assert asked[asked.index("--batch-size") + 1] == "2"

    with_server(tmp_path, use)


@pytest.mark.parametrize(("kind", "rate"), LEARNING_RATES.items())
def test_learning_rates_are_multiples_of_what_training_has_by_itself_for_the_method(
    tmp_path: Path, kind: str, rate: float
) -> None:
    def method(**hyperparameters: Any) -> Any:
        return {"type": kind, kind: {"hyperparameters": hyperparameters}}

    async def use(server: Tuned) -> None:
        jobs, training = server.sdk.fine_tuning.jobs, await server.upload()
        for multiplier in (1, 2.5):
            asked = method(learning_rate_multiplier=multiplier)
            made = await jobs.create(model="default", training_file=training, method=asked)
            job = await server.ended(made.id)
            assert job["method"][kind]["hyperparameters"]["learning_rate_multiplier"] == multiplier
            (command,) = _asked(server, made.id)
            assert float(command[command.index("--learning-rate") + 1]) == pytest.approx(multiplier * rate)
        made = await jobs.create(model="default", training_file=training, method=method())
        job = await server.ended(made.id)
        assert job["method"][kind]["hyperparameters"]["learning_rate_multiplier"] == 1
        (command,) = _asked(server, made.id)
        assert "--learning-rate" not in command

    with_server(tmp_path, use)


def test_a_job_goes_on_with_what_its_owner_had_trained(tmp_path: Path) -> None:
    async def use(server: Tuned) -> None:
        jobs, training = server.sdk.fine_tuning.jobs, await server.upload()
        first = await server.ended((await jobs.create(model="default", training_file=training, suffix="one")).id)
        tuned = first["fine_tuned_model"]
        made = await jobs.create(model=tuned, training_file=training, suffix="two")
        second = await server.ended(made.id)
        assert second["model"] == tuned
        assert second["fine_tuned_model"].startswith("default:two-")
        assert (await server.sdk.models.retrieve(second["fine_tuned_model"])).id == second["fine_tuned_model"]
        (asked,) = _asked(server, made.id)
        copy = Path(asked[asked.index("--adapter") + 1])
        assert copy.name == tuned.removeprefix("default:")
        assert copy.is_relative_to(server.workshop.job(made.id))
        await server.until(lambda: not copy.exists())  # the job is over
        (of_first,) = _asked(server, first["id"])
        assert "--adapter" not in of_first
        server.adapters["house"] = tmp_path
        async with server.client("bob") as bob:
            for name, error in ((tuned, NotFoundError), ("default:house", BadRequestError)):
                with pytest.raises(error):
                    await bob.fine_tuning.jobs.create(model=name, training_file=training)

    with_server(tmp_path, use)


def test_what_a_job_begins_with_may_be_deleted(tmp_path: Path) -> None:
    async def use(server: Tuned) -> None:
        jobs, training = server.sdk.fine_tuning.jobs, await server.upload()
        tuned = (await server.ended((await jobs.create(model="default", training_file=training)).id))[
            "fine_tuned_model"
        ]
        server.script.write_text("\n".join(json.dumps(line) for line in (STARTED, {"wait_while": "held"}, *DONE)))
        running, waiting = [await jobs.create(model=tuned, training_file=training) for _ in range(2)]
        held = server.workshop.job(running.id) / "held"
        await server.until(held.exists)
        (asked,) = _asked(server, running.id)
        await server.sdk.models.delete(tuned)
        assert (Path(asked[asked.index("--adapter") + 1]) / "adapter_model.safetensors").read_text() == "learnt"
        held.unlink()
        await server.until((server.workshop.job(waiting.id) / "held").exists)
        (server.workshop.job(waiting.id) / "held").unlink()
        for job in (running, waiting):
            assert (await server.ended(job.id))["status"] == "succeeded"
        with pytest.raises(NotFoundError):
            await jobs.create(model=tuned, training_file=training)

    with_server(tmp_path, use)


def test_a_checkpoint_that_has_gone_is_nothing_to_begin_with(tmp_path: Path) -> None:
    async def use(server: Tuned) -> None:
        jobs, training = server.sdk.fine_tuning.jobs, await server.upload()
        first = await server.ended((await jobs.create(model="default", training_file=training)).id)
        checkpoint = (await jobs.checkpoints.list(first["id"])).data[0].fine_tuned_model_checkpoint
        disk.remove(
            server.workshop.job(first["id"]) / first["fine_tuned_model"].removeprefix("default:") / "checkpoints"
        )
        with pytest.raises(NotFoundError, match="begin with another checkpoint"):
            await jobs.create(model=checkpoint, training_file=training)
        assert len([*(server.workshop.root / "jobs").iterdir()]) == 1

    with_server(tmp_path, use)


def test_an_ended_job_leaves_no_copy_of_what_it_began_with(tmp_path: Path) -> None:
    async def use(server: Tuned) -> None:
        jobs, training = server.sdk.fine_tuning.jobs, await server.upload()
        tuned = (await server.ended((await jobs.create(model="default", training_file=training)).id))[
            "fine_tuned_model"
        ]
        server.script.write_text("\n".join(json.dumps(line) for line in WAITS))
        running, waiting = [await jobs.create(model=tuned, training_file=training) for _ in range(2)]
        await server.waits(running.id)
        assert (server.workshop.job(waiting.id) / "start").is_dir()
        for job in (waiting, running):
            await jobs.cancel(job.id)
            assert not (server.workshop.job(job.id) / "start").exists()

    with_server(tmp_path, use)


def test_what_was_tuned_on_another_model_is_nothing_to_begin_with(tmp_path: Path) -> None:
    async def use(server: Tuned) -> None:
        jobs, training = server.sdk.fine_tuning.jobs, await server.upload()
        tuned = (await server.ended((await jobs.create(model="default", training_file=training)).id))[
            "fine_tuned_model"
        ]
        record = server.server.tuned_model(Caller(owner="alice"), tuned)
        assert record is not None
        config = server.tuning.models.folder(record) / "adapter_config.json"
        config.write_text(json.dumps({"base_model_name_or_path": "openai/gpt-oss-120b"}))
        with pytest.raises(BadRequestError, match="was fine-tuned on 'openai/gpt-oss-120b'"):
            await jobs.create(model=tuned, training_file=training)

    with_server(tmp_path, use)


def test_a_file_whose_time_is_over_is_read_all_the_same_by_the_job_that_waits_for_it(tmp_path: Path) -> None:
    async def use(server: Tuned) -> None:
        short = await server.sdk.files.create(
            file=("a.txt", b"text"), purpose="fine-tune", expires_after={"anchor": "created_at", "seconds": 3600}
        )
        made = await server.sdk.fine_tuning.jobs.create(model="default", training_file=short.id)
        server.store._clock = lambda: time.time() + 3601
        await server.tuning.sweep(max_age_seconds=None)
        queue = asyncio.create_task(server.tuning.run())
        assert (await server.ended(made.id))["status"] == "succeeded"
        await server.tuning.sweep(max_age_seconds=None)
        assert f"{short.id}.txt" not in server.files
        lost = await server.upload()
        server.workshop.find(lost).unlink()
        job = await server.ended((await server.sdk.fine_tuning.jobs.create(model="default", training_file=lost)).id)
        assert job["error"]["message"] == f"the content of {lost} is not there any more"
        await server.tuning.stop()
        await queue

    with_server(tmp_path, use, runs=False)


def test_a_bug_fails_its_job_and_the_queue_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def use(server: Tuned) -> None:
        jobs, training = server.sdk.fine_tuning.jobs, await server.upload()

        def broken(*_: object) -> None:
            raise RuntimeError("a secret")

        with monkeypatch.context() as patch:
            patch.setattr(server.tuning, "_command", broken)
            job = await server.ended((await jobs.create(model="default", training_file=training)).id)
        assert job["error"] == {"code": "server_error", "message": "the training could not be run", "param": None}
        assert (await server.ended((await jobs.create(model="default", training_file=training)).id))["error"] is None

    with_server(tmp_path, use)


def test_models_can_be_forgotten_while_they_are_listed(tmp_path: Path) -> None:
    """Jobs are forgotten on another thread: here it has its turn at the worst moment."""

    class Alice(str):
        def __eq__(self, other: object) -> bool:
            models.delete("first")
            return other.__eq__(str(self)) is True

        __hash__ = str.__hash__

    record = ModelRecord(name="first", place="", owner="alice", job_id="", step=None, created_at=0.0, model={})
    models = TunedModels(tmp_path, Threads("tuning", 1), None)
    models.take([record, replace(record, name="second")])
    assert [found.name for found in models.of(Alice("alice"))] == ["first", "second"]
    assert [found.name for found in models.of("alice")] == ["second"]
    assert models.is_tuned("first") and models.find("first", "alice") is None


def test_a_model_is_nobody_else_s_not_even_before_its_job_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def use(server: Tuned) -> None:
        add_file, seen = server.store.add_file, dict[str, tuple[str, ...]]()
        training = await server.upload()

        def watched(record: Any, **more: Any) -> None:
            seen["names"], seen["adapters"] = server.server.model_names, tuple(server.adapters)
            add_file(record, **more)

        monkeypatch.setattr(server.store, "add_file", watched)  # its results, when its adapter is in the engine
        made = await server.sdk.fine_tuning.jobs.create(model="default", training_file=training)
        name = (await server.ended(made.id))["fine_tuned_model"]
        assert [*seen["adapters"]] == _short(name)
        assert name not in seen["names"] and name not in server.server.model_names

    with_server(tmp_path, use)


def test_a_job_is_cancelled_in_every_state_but_the_last(tmp_path: Path) -> None:
    async def use(server: Tuned) -> None:
        jobs, training = server.sdk.fine_tuning.jobs, await server.upload()
        validating = await jobs.create(model="default", training_file=training)
        await server.waits(validating.id)
        assert (await jobs.retrieve(validating.id)).status == "validating_files"
        assert (await jobs.cancel(validating.id)).status == "cancelled"
        for lines, status in ((WELL, "succeeded"), (({"exit": 1},), "failed")):
            _say(server, lines)
            ended = await server.ended((await jobs.create(model="default", training_file=training)).id)
            with pytest.raises(BadRequestError, match=f"has ended already; its status is '{status}'"):
                await jobs.cancel(ended["id"])
            assert (await jobs.retrieve(ended["id"])).status == status
            told = [said.message async for said in jobs.list_events(ended["id"])]
            assert "The job was cancelled" not in told
        with pytest.raises(NotFoundError):
            await jobs.cancel("ftjob-x")

    with_server(tmp_path, use, {"wait": True})


# --- restarts ---------------------------------------------------------------------------------------------------


def test_a_job_goes_on_where_it_was_when_the_server_comes_back(tmp_path: Path) -> None:
    first_part = (STARTED, step(1, 2.0), {"event": "checkpoint", "step": 1, "path": "x"}, step(2, 1.5))
    lines = ({"ignore_sigterm": True}, *first_part, {"unless_resumed": {"wait": True}}, *DONE)

    async def begin() -> tuple[str, str]:
        async with Tuned(tmp_path, lines) as server:
            training = await server.upload()
            first = await server.sdk.fine_tuning.jobs.create(model="default", training_file=training)
            second = await server.sdk.fine_tuning.jobs.create(model="default", training_file=training)
            await server.waits(first.id)
            return first.id, second.id

    async def go_on(first: str, second: str) -> None:
        async with Tuned(tmp_path, lines) as server:
            job = await server.ended(first)
            assert job["status"] == "succeeded"
            assert "--resume" in _asked(server, first)[1] and len(_asked(server, first)) == 2
            events = [event.message async for event in server.sdk.fine_tuning.jobs.list_events(first)]
            assert [message for message in events if "Step" in message] == [
                "Step 2/2: training loss=1.5000", "Step 1/2: training loss=2.0000",
            ]  # fmt: skip
            assert events.count("Checkpoint created at step 1") == 1
            assert "The server was restarted: the job goes on from its last checkpoint" in events
            await server.waits(second)
            assert (await server.sdk.fine_tuning.jobs.cancel(second)).status == "cancelled"

    run(go_on(*run(begin())))


def test_a_training_that_outlived_its_server_is_ended_before_another_begins(tmp_path: Path) -> None:
    async def begin() -> tuple[str, int]:
        async with Tuned(tmp_path, WAITS) as server:
            made = await server.sdk.fine_tuning.jobs.create(model="default", training_file=await server.upload())
            await server.waits(made.id)
            return made.id, 0

    job_id, _ = run(begin())
    # What its server would have left behind where nothing ends a child: one that holds the lock, and its number in it.
    lock = tmp_path / "tuning" / "jobs" / job_id / "child.lock"

    async def go_on() -> None:
        holds = (
            "import fcntl, os, sys, time; lock = open(sys.argv[1], 'r+'); fcntl.flock(lock, fcntl.LOCK_EX);"
            "print(os.getpid(), file=lock, flush=True); print(flush=True); time.sleep(600)"
        )
        left = await asyncio.create_subprocess_exec(
            sys.executable, "-c", holds, str(lock), stdout=asyncio.subprocess.PIPE, start_new_session=True
        )
        assert left.stdout is not None
        await left.stdout.readline()
        async with Tuned(tmp_path, (STARTED, *DONE)) as server:
            assert (await server.ended(job_id))["status"] == "succeeded"
            assert await left.wait() == -signal.SIGKILL

    run(go_on())


def test_a_training_that_ended_while_no_server_was_there_is_found_done(tmp_path: Path) -> None:
    async def begin() -> str:
        async with Tuned(tmp_path, WAITS) as server:
            made = await server.sdk.fine_tuning.jobs.create(model="default", training_file=await server.upload())
            await server.waits(made.id)
            return made.id

    job_id = run(begin())
    (output,) = (tmp_path / "tuning" / "jobs" / job_id).glob("tuned-*")
    (output / "adapter_model.safetensors").write_text("learnt")
    with (output / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(step(2, 1.0)) + "\n" + json.dumps({"event": "done", "step": 2}) + "\n")

    async def go_on() -> None:
        async with Tuned(tmp_path, ({"exit": 9},)) as server:
            job = await server.ended(job_id)
            assert (job["status"], job["trained_tokens"]) == ("succeeded", 200)
            assert len(_asked(server, job_id)) == 1

    run(go_on())


def test_models_are_there_after_a_restart_and_deleted_ones_are_not(tmp_path: Path) -> None:
    async def begin() -> list[str]:
        async with Tuned(tmp_path) as server:
            training = await server.upload()
            made = [await server.sdk.fine_tuning.jobs.create(model="default", training_file=training) for _ in "12"]
            names = [(await server.ended(job.id))["fine_tuned_model"] for job in made]
            await server.sdk.models.delete(names[0])
            return names

    names = run(begin())

    async def go_on() -> None:
        async with Tuned(tmp_path) as server:
            listed = [model.id async for model in server.sdk.models.list()]
            assert names[1] in listed and names[0] not in listed
            await server.tuning.models.load(names[1].rpartition(":")[2])
            assert [*server.adapters] == [names[1].rpartition(":")[2]]

    run(go_on())


def test_jobs_are_forgotten_with_all_that_they_left_once_their_model_is_gone(tmp_path: Path) -> None:
    async def use(server: Tuned) -> None:
        jobs, training = server.sdk.fine_tuning.jobs, await server.upload()
        kept, gone = [(await jobs.create(model="default", training_file=training)).id for _ in "12"]
        await server.ended(kept)
        await server.sdk.models.delete((await server.ended(gone))["fine_tuned_model"])
        await server.tuning.sweep(max_age_seconds=3600)
        assert len((await jobs.list()).data) == 2
        await server.tuning.sweep(max_age_seconds=-1)
        assert [job.id for job in (await jobs.list()).data] == [kept]
        assert not server.workshop.job(gone).exists() and server.workshop.job(kept).exists()
        with pytest.raises(NotFoundError):
            await jobs.list_events(gone)

    with_server(tmp_path, use)


def test_lines_are_not_held_in_memory_and_foreign_ones_are_left_out(tmp_path: Path) -> None:
    odd: list[Any] = [
        STARTED, {"step": 1, "steps": 2, "loss": "x", "tokens": -5}, {"step": True, "loss": 1.0}, {"step": 10**40},
        {"raw": '{"event": "checkpoint", "step": "../../x"}'}, {"raw": '{"event": ["x"]}'}, {"raw": "[" * 60_000},
        {"raw": "\x00\xff"}, {"raw": '{"step": 2, "loss": ' + "1" * 10_000 + "}"}, {"raw": "y" * 100_000}, {"raw": "7"},
        {"raw": '{"step": 2, "loss": NaN, "tokens": 200}'}, step(2, 0.5), *DONE,
    ]  # fmt: skip

    async def use(server: Tuned) -> None:
        made = await server.sdk.fine_tuning.jobs.create(model="default", training_file=await server.upload(LINES))
        job = await server.ended(made.id)
        assert (job["status"], job["trained_tokens"]) == ("succeeded", 200)
        metrics = [event async for event in server.sdk.fine_tuning.jobs.list_events(made.id) if event.type == "metrics"]
        assert len(metrics) == 2
        assert [each async for each in server.sdk.fine_tuning.jobs.checkpoints.list(made.id)] == []

    with_server(tmp_path, use, *odd)


def test_a_store_that_is_not_to_be_had_for_a_while_ends_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def use(server: Tuned) -> None:
        made = await server.sdk.fine_tuning.jobs.create(model="default", training_file=await server.upload())
        update, failures = server.store.update_job, iter(range(4))

        def busy(*args: Any, **kwargs: Any) -> Any:
            if next(failures, None) is not None:
                raise StoreError("freehold.db has been busy")
            return update(*args, **kwargs)

        monkeypatch.setattr(server.store, "update_job", busy)
        job = await server.ended(made.id)
        assert job["status"] == "succeeded" and next(failures, None) is None
        assert len([event async for event in server.sdk.fine_tuning.jobs.list_events(made.id)]) == 9
        assert len(_asked(server, made.id)) == 1

    with_server(tmp_path, use)
