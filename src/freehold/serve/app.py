"""The application: a factory over a served model. Knows no sockets and no weights."""

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.routing import compile_path

from freehold import __version__
from freehold.errors import FreeholdError
from freehold.serve import chat, completions, conversations, files, messages, models, operations, tokens
from freehold.serve.document import document
from freehold.serve.errors import ApiError, api_error
from freehold.serve.gate import Gate
from freehold.serve.hosted import HostedTools
from freehold.serve.journal import log_failure
from freehold.serve.refusal import body_of
from freehold.serve.responses import routes as responses
from freehold.serve.responses.seal import Sealer
from freehold.serve.server import Server
from freehold.serve.settings import ServeSettings
from freehold.serve.tuning import routes as tuning_routes
from freehold.serve.tuning.tuning import Tuning
from freehold.serve.wire import invalid
from freehold.session.served import Served
from freehold.session.store.store import Store


def create_app(
    served: Served,
    settings: ServeSettings | None = None,
    *,
    store: Store | None = None,
    sealer: Sealer | None = None,
    tools: HostedTools | None = None,
    tuning: Tuning | None = None,
    lifespan: Callable[[FastAPI], AbstractAsyncContextManager[None]] | None = None,
) -> FastAPI:
    """All endpoints for this model.

    Without a `store` no response is kept; a `sealer` opens what it sealed before. `tools` are run for clients; who made
    them connects and closes them, and who made `tuning` lets it run. `lifespan` is entered when serving begins, and
    left when it has ended.
    """
    settings = settings or ServeSettings()
    gate = Gate(max_running=settings.max_running, max_queue=settings.max_queue)
    server = Server(
        served=served,
        settings=settings,
        gate=gate,
        store=store,
        sealer=sealer or Sealer(),
        tools=tools,
        tuning=tuning,
    )
    app = FastAPI(
        title="Freehold",
        version=__version__,
        description="gpt-oss on hardware you own, behind the APIs that clients know.",
        docs_url=None,  # its page would fetch scripts from elsewhere
        redoc_url=None,
        lifespan=lifespan,
        redirect_slashes=False,  # a path is what it says; nobody is sent elsewhere
    )
    app.state.server = server
    for module in (
        responses,
        conversations,
        chat,
        completions,
        messages,
        models,
        files,
        tuning_routes,
        tokens,
        operations,
    ):
        app.include_router(module.router(server))
    app.add_exception_handler(ApiError, _answer)
    app.add_exception_handler(FreeholdError, _answer)
    app.add_exception_handler(RequestValidationError, _answer)
    app.add_exception_handler(HTTPException, _answer)
    app.add_exception_handler(Exception, _answer_for_a_bug)
    app.openapi = lambda: document(app)  # type: ignore[method-assign]
    return app


async def _answer(request: Request, error: Exception) -> JSONResponse:
    """An error in the shape that the endpoint's clients expect."""
    match error:
        case RequestValidationError():
            known = invalid(error)
        case HTTPException():
            known = ApiError(error.status_code, _unrouted(request, error), headers=error.headers)
            if known.status == 405 and (methods := _methods(request)):
                known.headers["allow"] = ", ".join(methods)
        case _:
            known = api_error(error)
            log_failure("a request failed", error)
    return JSONResponse(body_of(known, request.scope), status_code=known.status, headers=known.headers)


async def _answer_for_a_bug(request: Request, error: Exception) -> JSONResponse:
    """The journal, outside of all this, has the error raised anew, and logs it."""
    known = api_error(error)
    return JSONResponse(body_of(known, request.scope), status_code=known.status, headers=known.headers)


def _methods(request: Request) -> list[str]:
    """What this path takes, of all routes together: each of them knows its own."""
    paths: dict[str, dict[str, Any]] = document(request.app)["paths"]
    path: str = request.scope["path"]
    if path not in paths:
        path = next((known for known in paths if compile_path(known)[0].fullmatch(path)), "")
    return sorted(method.upper() for method in paths.get(path, ()))


def _unrouted(request: Request, error: HTTPException) -> str:
    match error.status_code:
        case 404:
            return f"there is no {request.url.path[:200]} here; docs/api.md lists what there is"
        case 405:
            return f"{request.url.path[:200]} does not take {request.method[:20]}"
    return str(error.detail)
