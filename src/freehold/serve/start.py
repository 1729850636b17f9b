"""From settings to a server that listens: everything is checked and bound before a model is loaded.

The order is the point: what is wrong with addresses, certificates or the store is known at once; the network is closed,
where that is asked for, after the sockets are bound and before a model or any foreign library runs.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path

from fastapi import FastAPI

from freehold import airgap
from freehold.errors import FreeholdError
from freehold.log import NOTICE, Progress, logger, no_progress
from freehold.paths import data_dir
from freehold.serve.app import create_app
from freehold.serve.connection import ConnectionLimits
from freehold.serve.containers import Containers
from freehold.serve.guard import guard
from freehold.serve.hosted import prepare
from freehold.serve.hosts import host_name, origin
from freehold.serve.keys import Keys
from freehold.serve.responses.seal import Sealer
from freehold.serve.run import bind, check_exposure, serve, tls_context
from freehold.serve.server import Server
from freehold.serve.settings import ServeSettings
from freehold.serve.threads import Threads
from freehold.serve.tuning.models import TunedModels
from freehold.serve.tuning.trainer import Trainer
from freehold.serve.tuning.tuning import Tuning, TuningLimits
from freehold.serve.tuning.workshop import Workshop
from freehold.session.served import Served
from freehold.session.store.store import Store
from freehold.tools.kit import ToolChoices

_HOUSEKEEPING_SECONDS = 600.0
_DAY = 86_400.0
_NO_TOOLS = ToolChoices()


def _unseen() -> AbstractContextManager[Progress]:
    return nullcontext(no_progress)


def start(
    load: Callable[[], Served],
    settings: ServeSettings,
    *,
    store_url: str | None,
    no_network: bool,
    tools: ToolChoices = _NO_TOOLS,
    tuning: Path | None = None,
    trainer: Trainer | None = None,
    progress: Callable[[], AbstractContextManager[Progress]] = _unseen,
) -> int:
    """Serve until a signal; returns the exit code. `load` makes the model when everything else is in order. `tools` are
    what clients may use; `tuning` is where their files lie and what the `trainer` makes of them, which is None where
    there is no model to train; `progress` opens what shows how far the indexing of their documents is.

    Raises UsageError, StoreError, DiskError and whatever `load` does.
    """
    for name in settings.allowed_hosts:
        host_name(name)
    for name in settings.cors_origins:
        origin(name)
    tls = tls_context(settings.tls_cert, settings.tls_key)
    airgap.stay_offline()
    sockets = bind(settings.host, settings.port, write_seconds=settings.send_timeout)
    try:
        if no_network:
            airgap.close_network()
        with Store.open(store_url) as store, ExitStack() as held:
            workshop = None if tuning is None else held.enter_context(Workshop.open(tuning))
            check_exposure(
                settings.host, settings.port, has_keys=bool(store.keys_by_hash()), allow_no_key=settings.allow_no_key
            )
            for response_id in store.recover():
                logger.log(NOTICE, "response %s was not complete when the server stopped: it has failed", response_id)
            with progress() as show:
                prepared = prepare(tools, no_network=no_network, progress=show)
            served = load()
            served.warm_up()
            sealer = Sealer.from_file(data_dir() / "sealing.key")
            containers = Containers(idle_seconds=settings.container_timeout, most=settings.max_containers)
            hosted = None if prepared is None else prepared.hosted(served.prompting.the_tokenizer(), containers)
            if hosted is not None and not served.speaks_harmony:
                logger.log(NOTICE, "%s does not speak Harmony and uses no tools: clients are told so", served.name)
            tuned = None if workshop is None else _tuning(workshop, store, served, trainer, settings)
            app = create_app(served, settings, store=store, sealer=sealer, tools=hosted, tuning=tuned, lifespan=_life)
            app.state.failure = None
            server: Server = app.state.server
            guarded = guard(
                app,
                keys=Keys(store.keys_by_hash, open_to_all=settings.allow_no_key),
                gate=server.gate,
                allowed_hosts=settings.allowed_hosts,
                cors_origins=settings.cors_origins,
                max_body_bytes=settings.max_body_bytes,
                max_upload_bytes=settings.max_upload_bytes,
                receive_timeout=settings.receive_timeout,
                log_content=settings.log_content,
            )
            try:
                return serve(
                    guarded,
                    sockets,
                    tls=tls,
                    limits=ConnectionLimits(write_seconds=settings.send_timeout),
                    drain_timeout=settings.drain_timeout,
                    on_drain=server.gate.drain,
                    on_late=server.stop,
                    on_ready=_log_ready if settings.log_json else None,
                )
            except FreeholdError as error:
                raise app.state.failure or error from None
    finally:
        for socket in sockets:
            socket.close()


def _tuning(
    workshop: Workshop, store: Store, served: Served, trainer: Trainer | None, settings: ServeSettings
) -> Tuning:
    threads = Threads("freehold-tuning", 4)
    if trainer is not None:
        trainer = replace(trainer, max_length=min(trainer.max_length, served.prompting.longest))
    return Tuning(
        workshop,
        store,
        TunedModels(workshop.root, threads, served.add_adapter, served.remove_adapter),
        trainer=trainer,
        limits=TuningLimits(file_bytes=settings.max_files_bytes),
        threads=threads,
    )


def _log_ready(url: str) -> None:
    """Who reads the log as JSON reads nothing else there."""
    logger.log(NOTICE, "serving on %s", url)


@asynccontextmanager
async def _life(app: FastAPI) -> AsyncIterator[None]:
    """While the server runs its store is kept tidy; then what is still being made comes to an end, and is stored."""
    server: Server = app.state.server
    if server.tools is not None:
        try:
            await server.tools.connect()
        except FreeholdError as error:
            app.state.failure = error  # uvicorn has no way to hand it on, and tells of it by a traceback
            logging.getLogger("uvicorn.error").disabled = True
            await server.tools.aclose()
            raise
    training = None
    if server.tuning is not None:
        await server.tuning.open()
        training = asyncio.create_task(server.tuning.run())
    tidying = asyncio.create_task(_tidy(server))
    await asyncio.to_thread(app.openapi)  # a second's work, which the first to ask for it would impose on everybody
    try:
        yield
    finally:
        tidying.cancel()
        with suppress(asyncio.CancelledError):
            await tidying
        if server.tuning is not None and training is not None:
            await server.tuning.stop()
            await training
        await server.background.finish(server.settings.drain_timeout)
        await server.stop()
        await server.background.finish()
        if server.tools is not None:
            await server.tools.aclose()


async def _tidy(server: Server) -> None:
    settings = server.settings
    while server.store is not None:
        try:
            max_age = None if settings.keep_days is None else settings.keep_days * _DAY
            await server.store_threads.run(server.store.sweep, max_age_seconds=max_age, max_bytes=settings.keep_bytes)
            if server.tuning is not None:
                await server.tuning.sweep(max_age_seconds=max_age)
        except Exception as error:  # noqa: BLE001 - the next time may go better, and serving goes on
            logger.warning("the store could not be tidied: %s", error)
        await asyncio.sleep(_HOUSEKEEPING_SECONDS)
