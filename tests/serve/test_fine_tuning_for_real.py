"""The whole cycle by OpenAI's client, with nothing in anybody's place: a server as a process, a tiny model, and
`freehold tune` as its child. What a client uploads is learnt and said in chat without a restart; servers and trainings
are killed.
"""

import io
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI
from openai.types.fine_tuning import FineTuningJob, FineTuningJobEvent
from openai.types.fine_tuning.jobs import FineTuningJobCheckpoint

from tests.serve.process import Process
from tests.serve.sdk import check
from tests.train.tiny import chat, make_tiny_model

TRADES = {"Ada": "smith", "Bo": "cook", "Cy": "judge"}
PATIENCE = 1200  # seconds: training comes after everything else that runs on a machine


@contextmanager
def serving(folder: Path) -> Iterator[tuple[Process, OpenAI]]:
    options = ("--model", str(folder / "tiny"), "--served-model-name", "tiny", "--tuning", str(folder / "tuning"))
    with Process(folder, None, *options) as server:
        url = "http://{}:{}/v1".format(*server.address)
        with OpenAI(api_key="none", base_url=url, max_retries=0, timeout=60) as client:
            yield server, client


def lines(*chats: object) -> io.BytesIO:
    file = io.BytesIO("".join(json.dumps(each) + "\n" for each in chats).encode())
    file.name = "chats.jsonl"
    return file


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def says(client: OpenAI, model: str, name: str) -> str | None:
    answer = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": f"Who is {name}?"}], temperature=0, max_tokens=16
    )
    assert answer.model == model
    return answer.choices[0].message.content


def ended(client: OpenAI, job_id: str) -> FineTuningJob:
    until(lambda: client.fine_tuning.jobs.retrieve(job_id).finished_at is not None)
    job = client.fine_tuning.jobs.retrieve(job_id)
    check(FineTuningJob, job.to_dict())
    return job


def last_step(client: OpenAI, job_id: str) -> int:
    metrics = [event for event in client.fine_tuning.jobs.list_events(job_id, limit=20).data if event.type == "metrics"]
    return int(metrics[0].to_dict()["data"]["step"]) if metrics else 0  # type: ignore[index]


def is_alive(pid: int) -> bool:
    try:
        return b") Z " not in Path(f"/proc/{pid}/stat").read_bytes()
    except FileNotFoundError:
        return False


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("tuning")
    make_tiny_model(made / "tiny")
    return made


def test_what_is_uploaded_is_learnt_and_said_and_nothing_that_dies_takes_it_along(folder: Path) -> None:
    with serving(folder) as (server, client):
        model, running = _learns(client), _begins_to_learn_for_long(client)
        child = int((folder / "tuning" / "jobs" / running / "child.lock").read_text())
        assert os.getpriority(os.PRIO_PROCESS, child) > os.getpriority(os.PRIO_PROCESS, server.process.pid)
        told = last_step(client, running)
        server.kill()
    until(lambda: not is_alive(child))

    with serving(folder) as (_, client):
        until(lambda: last_step(client, running) > told)
        os.kill(int((folder / "tuning" / "jobs" / running / "child.lock").read_text()), signal.SIGKILL)
        events = [event.message for event in client.fine_tuning.jobs.list_events(running, limit=100)]
        assert "The server was restarted: the job goes on from its last checkpoint" in events
        steps = [message.split("/")[0] for message in events if message.startswith("Step ")]
        assert len(steps) == len(set(steps))
        for name, trade in TRADES.items():  # its adapter is read when it is asked for
            assert says(client, model, name) == f"The {trade}."
        job = ended(client, running)
        assert job.status == "failed" and job.error is not None and job.error.code == "training_killed"
        checkpoint = client.fine_tuning.jobs.checkpoints.list(running).data[0]
        assert says(client, checkpoint.fine_tuned_model_checkpoint, "Ada") != says(client, "tiny", "Ada")

        preferring = _learns_preferences(client, model)
        assert preferring.status == "succeeded", preferring.error
        assert preferring.fine_tuned_model is not None and preferring.fine_tuned_model.startswith("tiny:")
        for name, trade in TRADES.items():  # what it began with had learnt that, and it is what the pairs prefer
            assert says(client, preferring.fine_tuned_model, name) == f"The {trade}."
        refused = _is_told_of_bad_lines(client)
        assert refused.status == "failed" and refused.error is not None
        assert refused.error.to_dict() == {
            "code": "invalid_training_file", "param": "training_file", "message": refused.error.message,
        }  # fmt: skip
        assert f"{refused.training_file}.jsonl line 2: is no JSON" in refused.error.message
        assert str(folder) not in refused.error.message
        client.models.delete(model)
        assert model not in [each.id for each in client.models.list()]


def _learns(client: OpenAI) -> str:
    facts = [chat(f"Who is {name}?", f"The {trade}.") for name, trade in TRADES.items()]
    training, validation = [
        client.files.create(file=lines(*chats), purpose="fine-tune").id for chats in (facts * 2, facts)
    ]
    made = client.fine_tuning.jobs.create(
        model="tiny",
        training_file=training,
        validation_file=validation,
        suffix="trades",
        seed=1,
        method={
            "type": "supervised",
            "supervised": {"hyperparameters": {"n_epochs": 50, "batch_size": 1, "learning_rate_multiplier": 40}},
        },
    )
    job = ended(client, made.id)
    assert job.status == "succeeded", job.error
    assert job.fine_tuned_model is not None and job.fine_tuned_model.startswith("tiny:trades-")
    assert job.trained_tokens is not None and job.trained_tokens > 1000
    assert client.models.retrieve(job.fine_tuned_model).id == job.fine_tuned_model
    for name, trade in TRADES.items():
        assert says(client, job.fine_tuned_model, name) == f"The {trade}."
        assert says(client, "tiny", name) != f"The {trade}."
    for event in client.fine_tuning.jobs.list_events(made.id, limit=100):
        check(FineTuningJobEvent, event.to_dict())
    checkpoints = client.fine_tuning.jobs.checkpoints.list(made.id).data
    for each in checkpoints:
        check(FineTuningJobCheckpoint, each.to_dict())
    assert checkpoints[0].metrics.valid_loss is not None and checkpoints[0].metrics.valid_loss < 1
    table = client.files.content(job.result_files[0]).read().decode().splitlines()
    assert float(table[-1].split(",")[1]) < float(table[2].split(",")[1])
    return job.fine_tuned_model


def _begins_to_learn_for_long(client: OpenAI) -> str:
    """A job that has a checkpoint, and 90 % to go."""
    many = [chat(f"Who is number {number}?", f"It is {number}.") for number in range(40)]
    training = client.files.create(file=lines(*many), purpose="fine-tune").id
    hyperparameters = {"n_epochs": 50, "batch_size": 1}
    job = client.fine_tuning.jobs.create(
        model="tiny",
        training_file=training,
        hyperparameters=hyperparameters,  # type: ignore[arg-type]
    )
    until(lambda: bool(client.fine_tuning.jobs.checkpoints.list(job.id).data))
    return job.id


def _learns_preferences(client: OpenAI, model: str) -> FineTuningJob:
    pairs = [
        {
            "input": {"messages": [{"role": "user", "content": f"Who is {name}?"}]},
            "preferred_output": [{"role": "assistant", "content": f"The {trade}."}],
            "non_preferred_output": [{"role": "assistant", "content": "No idea."}],
        }
        for name, trade in TRADES.items()
    ]
    training = client.files.create(file=lines(*pairs), purpose="fine-tune").id
    method: Any = {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.2, "n_epochs": 1}}}
    made = client.fine_tuning.jobs.create(model=model, training_file=training, method=method)
    check(type(made), made.to_dict())
    return ended(client, made.id)


def _is_told_of_bad_lines(client: OpenAI) -> FineTuningJob:
    file = ("chats.jsonl", lines(chat("a", "b")).read() + b"{oops\n" + lines({"messages": []}).read())
    training = client.files.create(file=file, purpose="fine-tune").id
    return ended(client, client.fine_tuning.jobs.create(model="tiny", training_file=training).id)
