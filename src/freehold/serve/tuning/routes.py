"""`/v1/fine_tuning/jobs`: made, listed, watched, cancelled. Off unless there is a workshop.

A job trains the model, or goes on with what its caller had trained before. What is quickly found is refused when a job
is made: another model, files that are not there, options that training does not have. What the lines of its files say,
training finds out before it begins, and the job fails with all of it.
"""

import secrets
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Query
from starlette.requests import Request

from freehold.errors import ModelNotFoundError, NotFoundError, UsageError
from freehold.hub.bases import other_base
from freehold.serve.bodies import StrictRoute
from freehold.serve.caller import caller_of
from freehold.serve.errors import ApiError, api_error
from freehold.serve.files import listed
from freehold.serve.responses.routes import check_query, stored
from freehold.serve.server import Server
from freehold.serve.tuning.report import Standing
from freehold.serve.tuning.trainer import Trainer
from freehold.serve.tuning.tuning import Tuning
from freehold.serve.tuning.wire import LARGEST_SEED, PURPOSE, JobCreate
from freehold.session.store.records import FileRecord, JobRecord, Listed, ModelRecord

_PARAM = "fine_tuning_job_id"
_Limit = Annotated[int, Query(ge=1, le=100)]


def router(server: Server) -> APIRouter:
    routes = APIRouter(route_class=StrictRoute, prefix="/v1/fine_tuning/jobs", tags=["Fine-tuning"])

    @routes.post("")
    async def create_job(request: Request, body: JobCreate) -> dict[str, Any]:
        """A job, which waits for its turn: one trains at a time, and keys take turns."""
        tuning, caller = server.the_tuning(), caller_of(request)
        owner = caller.owner
        if tuning.trainer is None:
            raise ApiError(400, "This server has no model that could be trained.", param="model")
        begins_with = server.trained_from(body.model, caller)
        if begins_with is not None:
            await _check_start(server, tuning, tuning.trainer, begins_with, body.model)
        if len(tuning.models.of(owner)) >= tuning.limits.models:
            message = f"{tuning.limits.models} fine-tuned models of yours are kept; delete one first."
            raise ApiError(400, message, code="too_many_models")
        for param, name in (("training_file", body.training_file), ("validation_file", body.validation_file)):
            if name is not None:
                await _check_file(server, tuning, owner, name, param)
        if body.validation_file == body.training_file:
            raise ApiError(400, "'validation_file' is the training file; leave it out", param="validation_file")
        record = _new_job(body, owner, tuning.place, begins_with)
        try:
            await tuning.create(record)
        except UsageError as error:
            raise ApiError(429, str(error), code="too_many_jobs", headers={"x-should-retry": "false"}) from None
        except ModelNotFoundError as error:
            raise ApiError(404, str(error), param="model", code="model_not_found") from None
        return on_wire(record)

    @routes.get("")
    async def list_jobs(
        request: Request, after: Annotated[str | None, Query()] = None, limit: _Limit = 20
    ) -> dict[str, Any]:
        """The caller's jobs, the newest first; with `metadata[key]=value`, those that have it."""
        wanted = _metadata(request)
        place, owner = server.the_tuning().place, caller_of(request).owner
        page: Listed[JobRecord] = await stored(
            server, lambda store: store.jobs(owner, place, after=after, limit=limit, metadata=wanted), "after"
        )
        return listed([on_wire(record) for record in page.items], has_more=page.has_more)

    @routes.get("/{fine_tuning_job_id}")
    async def retrieve_job(request: Request, fine_tuning_job_id: str) -> dict[str, Any]:
        check_query(request)
        return on_wire(await _job(server, caller_of(request).owner, fine_tuning_job_id))

    @routes.post("/{fine_tuning_job_id}/cancel")
    async def cancel_job(request: Request, fine_tuning_job_id: str) -> dict[str, Any]:
        """End a job that has not ended. Its checkpoints stay."""
        check_query(request)
        try:
            return on_wire(await server.the_tuning().cancel(fine_tuning_job_id, caller_of(request).owner))
        except NotFoundError as error:
            raise api_error(error, param=_PARAM) from None
        except UsageError as error:
            raise ApiError(400, str(error), param=_PARAM, code="job_has_ended") from None

    @routes.post("/{fine_tuning_job_id}/pause", include_in_schema=False)
    @routes.post("/{fine_tuning_job_id}/resume", include_in_schema=False)
    async def pause_or_resume_job(request: Request, fine_tuning_job_id: str) -> None:
        await _job(server, caller_of(request).owner, fine_tuning_job_id)
        raise ApiError(400, "Jobs are not paused here: they wait for their turn, run to their end, or are cancelled.")

    @routes.get("/{fine_tuning_job_id}/events")
    async def list_events(
        request: Request, fine_tuning_job_id: str, after: Annotated[str | None, Query()] = None, limit: _Limit = 20
    ) -> dict[str, Any]:
        """What a job told, the newest first."""
        check_query(request, "after", "limit")
        place, owner = server.the_tuning().place, caller_of(request).owner
        before = None if after is None else _number_of(fine_tuning_job_id, after)
        page: Listed[tuple[int, dict[str, Any]]] = await stored(
            server,
            lambda store: store.job_events(fine_tuning_job_id, owner, place, before=before, limit=limit),
            _PARAM,
        )
        data = [
            {"id": _event_id(fine_tuning_job_id, number), "object": "fine_tuning.job.event", **said}
            for number, said in page.items
        ]
        return listed(data, has_more=page.has_more)

    @routes.get("/{fine_tuning_job_id}/checkpoints")
    async def list_checkpoints(
        request: Request, fine_tuning_job_id: str, after: Annotated[str | None, Query()] = None, limit: _Limit = 10
    ) -> dict[str, Any]:
        """A job's checkpoints that are there, the newest first. Each is a model that can be asked."""
        check_query(request, "after", "limit")
        tuning, owner = server.the_tuning(), caller_of(request).owner
        await _job(server, owner, fine_tuning_job_id)
        records: list[ModelRecord] = await stored(
            server, lambda store: store.models(tuning.place, owner=owner, job_id=fine_tuning_job_id), _PARAM
        )
        there = [record for record in records if record.step is not None and tuning.models.folder(record).is_dir()]
        data = [_checkpoint(record) for record in sorted(there, key=lambda record: -(record.step or 0))]
        ids = [each["id"] for each in data]
        if after is not None:
            if after not in ids:
                raise ApiError(
                    404, f"there is no checkpoint {after[:64]!r} of this job", param="after", code="not_found"
                )
            data = data[ids.index(after) + 1 :]
        return listed(data[:limit], has_more=len(data) > limit)

    return routes


def on_wire(record: JobRecord) -> dict[str, Any]:
    """OpenAI's object."""
    job = {name: value for name, value in record.job.items() if not name.startswith("_")}
    return {
        "id": record.id,
        "object": "fine_tuning.job",
        "created_at": int(record.created_at),
        "finished_at": None if record.finished_at is None else int(record.finished_at),
        "status": record.status,
        "training_file": record.training_file,
        "validation_file": record.validation_file,
        **job,
    }


async def _job(server: Server, owner: str, job_id: str) -> JobRecord:
    place = server.the_tuning().place
    record: JobRecord = await stored(server, lambda store: store.job(job_id, owner, place), _PARAM)
    return record


async def _check_start(server: Server, tuning: Tuning, trainer: Trainer, start: ModelRecord, name: str) -> None:
    """That it was tuned on the model that is here: its changes mean nothing to another."""
    adapter, here = tuning.models.folder(start), Path(server.served.prompting.source)
    if (named := await tuning.threads.run(other_base, adapter, trainer.model, here)) is not None:
        message = f"'{name:.200}' was fine-tuned on {named!r:.200}, and this server has another model; tune that anew."
        raise ApiError(400, message, param="model")


async def _check_file(server: Server, tuning: Tuning, owner: str, name: str, param: str) -> None:
    file: FileRecord = await stored(server, lambda store: store.file(name, owner, tuning.place), param)
    if file.purpose != PURPOSE:
        message = f"{file.id} was not uploaded to train on: its purpose is {file.purpose!r}, not {PURPOSE!r}"
        raise ApiError(400, message, param=param)


def _new_job(body: JobCreate, owner: str, place: str, begins_with: ModelRecord | None) -> JobRecord:
    method = body.the_method
    asked = getattr(method, method.type)
    shown = {} if asked is None or asked.hyperparameters is None else asked.hyperparameters.model_dump()
    job: dict[str, Any] = {
        "model": body.model,
        "fine_tuned_model": None,
        "error": None,
        "estimated_finish": None,
        "trained_tokens": None,
        "result_files": [],
        "organization_id": "",
        "seed": secrets.randbelow(LARGEST_SEED + 1) if body.seed is None else body.seed,
        "method": {"type": method.type, method.type: {"hyperparameters": shown or _auto(method.type)}},
        "hyperparameters": (shown or _auto(method.type)) if method.type == "supervised" else {},
        "integrations": [],
        "metadata": body.metadata,
        "_base": body.model if begins_with is None else begins_with.model["base"],
        "_begins_with": None if begins_with is None else begins_with.name,
        "_name": f"{body.suffix or 'tuned'}-{secrets.token_hex(4)}",
        "_standing": asdict(Standing()),
    }
    return JobRecord(
        id=f"ftjob-{secrets.token_hex(12)}",
        owner=owner,
        place=place,
        created_at=time.time(),
        finished_at=None,
        status="queued",
        training_file=body.training_file,
        validation_file=body.validation_file,
        job=job,
    )


def _auto(kind: str) -> dict[str, str]:
    names = ["n_epochs", "batch_size", "learning_rate_multiplier"]
    return dict.fromkeys([*names, "beta"] if kind == "dpo" else names, "auto")


def _metadata(request: Request) -> dict[str, str] | None:
    """`metadata[key]=value`, and all of them together."""
    wanted: dict[str, str] = {}
    for name, value in request.query_params.multi_items():
        if name.startswith("metadata[") and name.endswith("]"):
            wanted[name[len("metadata[") : -1]] = value
        elif name not in ("after", "limit"):
            raise ApiError(400, f"Unknown parameter: '{name:.80}'.", param=name[:80], code="unknown_parameter")
    return wanted or None


def _event_id(job_id: str, number: int) -> str:
    return f"ftevent-{job_id.removeprefix('ftjob-')}-{number}"


def _number_of(job_id: str, event_id: str) -> int:
    number = event_id.removeprefix(_event_id(job_id, 0)[:-1])
    if not number.isascii() or not number.isdigit() or len(number) > 15:
        raise ApiError(404, f"there is no event {event_id[:64]!r} of this job", param="after", code="not_found")
    return int(number)


def _checkpoint(record: ModelRecord) -> dict[str, Any]:
    return {
        "id": f"ftckpt_{record.job_id.removeprefix('ftjob-')}_{record.step}",
        "object": "fine_tuning.job.checkpoint",
        "created_at": int(record.created_at),
        "fine_tuned_model_checkpoint": f"{record.model['base']}:{record.name}",
        "fine_tuning_job_id": record.job_id,
        "metrics": record.model["metrics"],
        "step_number": record.step,
    }
