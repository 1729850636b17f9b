"""Fine-tuning on this server, as one thing: the folder, who trains, the queue and the models. Server has one, or none.

One job trains at a time, owners in turn and the oldest of each first, so that serving keeps memory and cores; what had
begun when the server stopped goes on first. A training that ends badly is its job's failure and nobody else's. When the
server stops, training stops with it, and the next start goes on from the last checkpoint: a machine whose server was
stopped is meant to be idle, and training loses no more than what it did since, because it resumes exactly.
"""

import asyncio
import json
import secrets
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from freehold import disk
from freehold.errors import (
    CheckpointError,
    DiskError,
    FreeholdError,
    ModelNotFoundError,
    NotFoundError,
    StoreError,
    UnsupportedError,
    UsageError,
)
from freehold.log import logger
from freehold.serve.journal import log_failure
from freehold.serve.threads import Threads
from freehold.serve.tuning import report
from freehold.serve.tuning.models import TunedModels
from freehold.serve.tuning.outcome import Failure, why
from freehold.serve.tuning.report import Checkpoint, Lines, Standing, event
from freehold.serve.tuning.run import Run
from freehold.serve.tuning.trainer import Trainer
from freehold.serve.tuning.wire import RESULTS_PURPOSE
from freehold.serve.tuning.workshop import Workshop
from freehold.session.store.records import FileRecord, JobRecord, ModelRecord
from freehold.session.store.store import Store

_POLL_SECONDS = 0.5
_STOP_SECONDS = 10.0
_ADAPTER = "adapter_model.safetensors"
_ADAPTER_FILES = (_ADAPTER, "adapter_config.json")
_METRICS, _RUN = "metrics.jsonl", "run.json"
_RESULTS = "step_metrics.csv"
_RETRY_SECONDS = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TuningLimits:
    """Bytes of all of a key's files together; jobs of a key that wait or run; models of a key, without checkpoints."""

    file_bytes: int = 8 << 30
    unfinished_jobs: int = 16
    models: int = 100


class Tuning:
    """For one event loop. `run` is the queue, and whoever serves lets it run; without a `trainer` it does nothing."""

    def __init__(
        self,
        workshop: Workshop,
        store: Store,
        models: TunedModels,
        *,
        trainer: Trainer | None = None,
        limits: TuningLimits | None = None,
        threads: Threads | None = None,
        poll_seconds: float = _POLL_SECONDS,
        stop_seconds: float = _STOP_SECONDS,
        retry_seconds: float = _RETRY_SECONDS,
    ) -> None:
        self.workshop, self.trainer, self.models = workshop, trainer, models
        self.limits = limits or TuningLimits()
        self.threads = threads or Threads("freehold-tuning", 4)
        self.arriving: Counter[str] = Counter()
        """Bytes of files on their way to the disk, by owner."""
        self._store = store
        self._poll_seconds, self._stop_seconds, self._retry_seconds = poll_seconds, stop_seconds, retry_seconds
        self._changed = asyncio.Event()
        self._choosing = asyncio.Lock()
        self._current: _Current | None = None
        self._stopping = False

    @property
    def place(self) -> str:
        return self.workshop.place

    async def create(self, record: JobRecord) -> None:
        """Put a job into the queue. Raises NotFoundError, UsageError, DiskError, and ModelNotFoundError where what it
        is to begin with is gone."""
        await self.threads.run(self._create, record)
        self._changed.set()

    def _create(self, record: JobRecord) -> None:
        events = [event(f"Created fine-tuning job: {record.id}", record.created_at)]
        try:
            self._copy_start(record)
            self._store.create_job(record, events, most_unfinished=self.limits.unfinished_jobs)
        except BaseException:
            disk.remove(self.workshop.job(record.id))
            raise

    async def cancel(self, job_id: str, owner: str) -> JobRecord:
        """End a job, wherever it is. Raises NotFoundError, and UsageError for one that has ended already."""
        async with self._choosing:
            record = await self.threads.run(self._store.job, job_id, owner, self.place)
            current = self._current
            if current is None or not current.is_of(record):
                told = [event("The job was cancelled", time.time())]
                record = await self.threads.run(partial(self._store.update_job, record, _cancelled, events=told))
                with suppress(FreeholdError):
                    await self.threads.run(self._tidy, record)
                return record
        current.cancelled = True
        if current.run is not None:
            await current.run.kill()
        await current.over.wait()
        record = await self.threads.run(self._store.job, job_id, owner, self.place)
        if record.status != "cancelled":  # it ended by itself meanwhile
            _cancelled(record)
        return record

    async def delete_model(self, record: ModelRecord) -> None:
        """Its files, and itself. Its checkpoints are models of their own. Raises UsageError for a checkpoint of a job
        that may yet go on from it."""
        job = await self.threads.run(self._store.job, record.job_id, record.owner, self.place)
        if not job.finished:
            raise UsageError(
                f"the fine-tuning job {job.id} goes on from its checkpoints; cancel it, or wait for its end"
            )
        remove = partial(_remove_model, self.models.folder(record))
        await self.threads.run(
            partial(self._store.delete_model, record.name, record.owner, self.place, remove=lambda _: remove())
        )
        self.models.delete(record.name)

    async def open(self) -> None:
        """Before anybody is served: the models that are there."""
        self.models.take(await self.threads.run(self._store.models, self.place))
        files = await self.threads.run(self._store.file_ids, self.place)
        jobs = await self.threads.run(self._store.job_ids, self.place)
        self.workshop.tell_strays(files, jobs)

    async def run(self) -> None:
        """Do what is in the queue, until `stop`."""
        if self.trainer is None:
            return
        while not self._stopping:
            self._changed.clear()
            try:
                async with self._choosing:  # from here on it is not cancelled behind our back
                    record = await self.threads.run(self._store.next_job, self.place)
                    self._current = None if record is None else _Current(record)
                if self._current is not None:
                    await self._do(self._current, self.trainer)
                    continue
            except FreeholdError as error:  # of the store: the job stays where it was
                logger.warning("the queue of fine-tuning jobs cannot go on: %s", error)
                await self._pause(self._retry_seconds)
                continue
            await self._changed.wait()

    async def _pause(self, seconds: float) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), seconds)

    async def stop(self) -> None:
        """End the training that runs; it goes on where it was when the server does."""
        self._stopping = True
        self._changed.set()
        if (current := self._current) is not None:
            if current.run is not None:
                await current.run.stop(self._stop_seconds)
            await current.over.wait()

    async def sweep(self, *, max_age_seconds: float | None) -> None:
        """Remove files whose time is over, and jobs that ended long ago and whose model is not there."""
        await self.threads.run(partial(self._store.expire_files, self.place, remove=self._remove_file))
        if max_age_seconds is not None:
            before = time.time() - max_age_seconds
            forget = partial(self._store.forget_jobs, self.place, before=before, remove=self._remove_job)
            await self.threads.run(forget)

    def _remove_file(self, record: FileRecord) -> None:
        disk.remove(self.workshop.file(record.id, record.filename))

    def _remove_job(self, record: JobRecord) -> None:
        for model in self._store.models(self.place, job_id=record.id):
            self.models.delete(model.name)
        disk.remove(self.workshop.job(record.id))

    # --- one job ----------------------------------------------------------------------------------------------------

    async def _do(self, current: "_Current", trainer: Trainer) -> None:
        record = current.record
        try:
            await self._train(current, trainer)
        except StoreError:  # it could not be written down that it begins: it goes on waiting
            if current.run is not None:
                await current.run.kill()
            raise
        except NotFoundError as error:
            await self._fail(current.record, Failure("invalid_training_file", str(error), "training_file"))
        except Exception as error:  # noqa: BLE001 — whatever it is, the queue goes on
            log_failure(f"the fine-tuning job {record.id} failed", error)
            if current.run is not None:
                await current.run.kill()
            if not self._stopping:
                await self._fail(current.record, Failure("server_error", "the training could not be run"))
        finally:
            self._current = None
            current.over.set()

    async def _train(self, current: "_Current", trainer: Trainer) -> None:
        record = current.record
        output = self._output(record)
        done = await self.threads.run(_is_done, output)  # and only its server was not there to see it
        command = [] if done else await self.threads.run(self._command, record, trainer, output)
        if current.cancelled:
            await self._end(record, _cancelled, [event("The job was cancelled", time.time())])
            return
        if self._stopping:
            return
        if record.status == "queued":
            record = await self._set(record, "validating_files", [event("Validating the files", time.time())])
        else:
            message = "The server was restarted: the job goes on from its last checkpoint"
            record = await self._set(record, record.status, [event(message, time.time(), level="warn")])
        current.record = record
        lines = Lines(output / _METRICS)
        if done:
            await self._tell(current, await self.threads.run(lines.rest))
            await self._succeed(current.record)
            return
        current.run = await Run.begin(command, output.parent)
        if current.cancelled:
            await current.run.kill()
        elif self._stopping:
            await current.run.stop(self._stop_seconds)
        exit_code = await self._follow(current, current.run, lines)
        if current.cancelled:
            await self._end(current.record, _cancelled, [event("The job was cancelled", time.time())])
        elif (exit_code == 0 and (output / _ADAPTER).is_file()) or await self.threads.run(_is_done, output):
            # Whatever befell it after the end, such as curves that could not be drawn: what it learnt is there.
            await self._succeed(current.record)
        elif not self._stopping:
            standing = Standing(**current.record.job["_standing"])
            failure = why(
                exit_code,
                current.run.last_lines(),
                standing,
                validation_file=record.validation_file,
                hide=(str(self.workshop.root), str(Path.home()), trainer.model),
            )
            await self._fail(current.record, failure)

    def _output(self, record: JobRecord) -> Path:
        """Where its run lies, which bears the result's name."""
        return self.workshop.job(record.id) / str(record.job["_name"])

    def _command(self, record: JobRecord, trainer: Trainer, output: Path) -> list[str]:
        """Raises NotFoundError where a file is gone, DiskError."""
        paths = [self.workshop.find(name) for name in record.reads]
        resume = (output / _RUN).is_file()
        if not output.parent.is_dir():
            with disk.new_folder(output.parent):
                pass
        elif not resume:
            disk.remove(output)  # where it was killed before it had begun
        return trainer.arguments(
            record.job["method"],
            training=paths[0],
            validation=paths[1] if len(paths) > 1 else None,
            output=output,
            seed=record.job["seed"],
            resume=resume,
            adapter=None if resume else self._start(record),
        )

    def _copy_start(self, record: JobRecord) -> None:
        """Of the model that a job begins with: that one may be deleted, or go as checkpoints do, before it is done."""
        if (copy := self._start(record)) is None:
            return
        source = self.models.folder_of(copy.name)
        try:
            needed = sum((source / name).stat().st_size for name in _ADAPTER_FILES)
        except FileNotFoundError:
            raise ModelNotFoundError(f"there is no {copy.name!r} any more; begin with another checkpoint") from None
        with disk.new_folder(copy, needed_bytes=needed) as new:
            for name in _ADAPTER_FILES:
                shutil.copyfile(source / name, new / name)

    def _start(self, record: JobRecord) -> Path | None:
        """Where the copy lies of what it begins with."""
        name: str | None = record.job.get("_begins_with")
        return None if name is None else self.workshop.job(record.id) / "start" / name

    async def _follow(self, current: "_Current", run: Run, lines: Lines) -> int:
        """Tell what it says until it has ended; returns its exit code."""
        exit_code = None
        while True:
            read = await self.threads.run(lines.more)
            if read:
                await self._tell(current, read)
            elif exit_code is not None:
                return exit_code
            else:
                exit_code = await run.wait(self._poll_seconds)

    async def _tell(self, current: "_Current", lines: Sequence[Mapping[str, Any]]) -> None:
        record = current.record
        before = Standing(**record.job["_standing"])
        told = report.read(lines, before, now=time.time())
        status, events = record.status, told.events
        if status == "validating_files" and told.standing.started:
            status = "running"
            events = [event("The files are in order, and training has begun", time.time()), *events]
        elif not events and told.standing == before:
            return
        models = [self._checkpoint(record, checkpoint) for checkpoint in told.checkpoints]
        job: dict[str, Any] = {
            "_standing": asdict(told.standing),
            "estimated_finish": None if told.finish is None else int(told.finish),
        }
        if told.standing.started and not before.started:
            job |= await self.threads.run(self._settled, record)
        self.models.take(models)  # before anybody is told of them
        current.record = await self._set(record, status, events, models=models, **job)

    def _settled(self, record: JobRecord) -> dict[str, Any]:
        """What was left to `freehold tune`, as it was decided."""
        assert self.trainer is not None
        kind = record.job["method"]["type"]
        try:
            loop = json.loads((self._output(record) / _RUN).read_bytes())["request"]["loop"]
            settled = {
                "n_epochs": int(loop["epochs"]) if loop["epochs"] == int(loop["epochs"]) else "auto",
                "batch_size": int(loop["batch_size"]),
                "learning_rate_multiplier": float(f"{loop['learning_rate'] / self.trainer.learning_rates[kind]:.6g}"),
            }
        except (OSError, ValueError, KeyError, TypeError):  # it is only for show
            return {}
        asked = record.job["method"][kind]["hyperparameters"]
        shown = asked | {name: value for name, value in settled.items() if asked.get(name) == "auto"}
        method = {"type": kind, kind: {"hyperparameters": shown}}
        return {"method": method, "hyperparameters": shown if kind == "supervised" else {}}

    def _checkpoint(self, record: JobRecord, checkpoint: Checkpoint) -> ModelRecord:
        folder = self._output(record) / "checkpoints" / f"step-{checkpoint.step:08d}"
        return self._model(record, folder, step=checkpoint.step, metrics=dict(checkpoint.metrics))

    def _model(self, record: JobRecord, folder: Path, step: int | None = None, **more: Any) -> ModelRecord:
        name = record.job["_name"] if step is None else f"{record.job['_name']}-step-{step}"
        return ModelRecord(
            name=name,
            place=self.place,
            owner=record.owner,
            job_id=record.id,
            step=step,
            created_at=time.time(),
            model={"base": _base(record), "folder": str(folder.relative_to(self.workshop.root)), **more},
        )

    # --- how a job ends ---------------------------------------------------------------------------------------------

    async def _succeed(self, record: JobRecord) -> None:
        output = self._output(record)
        model = self._model(record, output)
        name = f"{_base(record)}:{model.name}"
        events = [event(f"New fine-tuned model created: {name}", time.time())]
        try:
            await self.models.load(model.name, output)
        except (CheckpointError, ModelNotFoundError, UnsupportedError) as error:
            logger.warning("the result of the fine-tuning job %s cannot be loaded: %s", record.id, error)
            await self._fail(
                record, Failure("server_error", "the training ended well, and its result cannot be loaded")
            )
            return
        except FreeholdError as error:  # of memory: it is on the disk, and another time there may be room
            logger.warning("the result of the fine-tuning job %s is not loaded yet: %s", record.id, error)
            message = "There is no room for the model in memory now; it is loaded when it is asked for"
            events.append(event(message, time.time(), level="warn"))
        results = await self._results(record, output)
        if results is None:
            message = "The file of results could not be written; the events have what would be in it"
            events.append(event(message, time.time(), level="warn"))
        files = [] if results is None else [results.id]
        standing = Standing(**record.job["_standing"])

        def done(old: JobRecord) -> JobRecord:
            return _ended(old, "succeeded", fine_tuned_model=name, result_files=files,
                          trained_tokens=standing.tokens)  # fmt: skip

        self.models.take([model])  # before anybody is told of it
        events.append(event("The job has successfully completed", time.time()))
        await self._end(record, done, events, models=[model])

    async def _results(self, record: JobRecord, output: Path) -> FileRecord | None:
        """The losses by step, as a file of the owner's; None where it cannot be written: that loses no training."""
        file: FileRecord | None = None
        try:
            data = report.table(await self.threads.run(Lines(output / _METRICS).rest)).encode()
            file = FileRecord(
                id=f"file-{secrets.token_hex(12)}", owner=record.owner, place=self.place, created_at=time.time(),
                expires_at=None, purpose=RESULTS_PURPOSE, filename=_RESULTS, num_bytes=len(data),
            )  # fmt: skip
            await self.threads.run(disk.write_bytes, self.workshop.file(file.id, file.filename), data)
            await self.threads.run(partial(self._store.add_file, file, most_bytes=1 << 62))
        except (FreeholdError, OSError) as error:
            logger.warning("the results of the fine-tuning job %s cannot be written: %s", record.id, error)
            if file is not None:
                with suppress(FreeholdError):
                    await self.threads.run(self._remove_file, file)
            return None
        return file

    async def _fail(self, record: JobRecord, failure: Failure) -> None:
        error = {"code": failure.code, "message": failure.message, "param": failure.param}
        message = f"The job failed: {failure.message}"

        def failed(old: JobRecord) -> JobRecord:
            return _ended(old, "failed", error=error)

        events = [event(message, time.time(), level="error")]
        await self._end(record, failed, events)

    async def _end(
        self,
        record: JobRecord,
        change: Callable[[JobRecord], JobRecord],
        events: Iterable[Mapping[str, Any]],
        models: Iterable[ModelRecord] = (),
    ) -> None:
        """Write down how it ended, and remove what only a run that goes on would need."""
        await self._update(record, change, events, models)
        with suppress(FreeholdError):
            await self.threads.run(self._tidy, record)

    def _tidy(self, record: JobRecord) -> None:
        for path in self._output(record).glob("checkpoints/step-*/training_state.*"):
            disk.remove(path)
        if (start := self._start(record)) is not None:
            disk.remove(start.parent)
        for model in self._store.models(self.place, job_id=record.id):
            if not self.models.folder(model).is_dir():
                self._store.delete_model(model.name, model.owner, self.place, remove=lambda _: None)
                self.models.delete(model.name)

    async def _set(
        self,
        record: JobRecord,
        status: str,
        events: Iterable[Mapping[str, Any]],
        models: Iterable[ModelRecord] = (),
        **job: Any,
    ) -> JobRecord:
        def change(old: JobRecord) -> JobRecord:
            return replace(old, status=status, job={**old.job, **job})

        return await self._update(record, change, events, models)

    async def _update(
        self,
        record: JobRecord,
        change: Callable[[JobRecord], JobRecord],
        events: Iterable[Mapping[str, Any]],
        models: Iterable[ModelRecord] = (),
    ) -> JobRecord:
        """Write it down, however long that takes: a store that is not to be had for a while ends no training."""
        write = partial(self._store.update_job, record, change, events=list(events), models=list(models))
        while True:
            try:
                return await self.threads.run(write)
            except (StoreError, DiskError) as error:
                if self._stopping:
                    raise
                logger.warning("the fine-tuning job %s cannot be written down: %s", record.id, error)
                await asyncio.sleep(self._retry_seconds)


class _Current:
    """The job that is being done. `record` is as it was last written, `over` is set when it is done."""

    def __init__(self, record: JobRecord) -> None:
        self.record = record
        self.run: Run | None = None
        self.cancelled = False
        self.over = asyncio.Event()

    def is_of(self, record: JobRecord) -> bool:
        return (self.record.id, self.record.owner) == (record.id, record.owner)


def _is_done(output: Path) -> bool:
    """Whether a run came to its end."""
    lines = Lines(output / _METRICS).rest()
    return bool(lines) and lines[-1].get("event") == "done" and (output / _ADAPTER).is_file()


def _ended(old: JobRecord, status: str, **job: Any) -> JobRecord:
    return replace(old, status=status, finished_at=time.time(), job={**old.job, "estimated_finish": None, **job})


def _cancelled(old: JobRecord) -> JobRecord:
    if old.finished:
        raise UsageError(f"the fine-tuning job {old.id} has ended already; its status is '{old.status}'")
    return _ended(old, "cancelled")


def _base(record: JobRecord) -> str:
    """The model itself, by the name that its owner had for it. Jobs from before there was anything to go on from do not
    say it apart."""
    return str(record.job.get("_base", record.job["model"]))


def _remove_model(folder: Path) -> None:
    """Its adapter. What else lies in the folder of a run belongs to its checkpoints, or tells how it went."""
    for name in _ADAPTER_FILES:
        disk.remove(folder / name)
