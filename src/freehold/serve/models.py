"""`/v1/models`: the one model, under all its names, with each of its adapters, and with what the caller fine-tuned."""

from fastapi import APIRouter
from openai.types import Model
from starlette.requests import Request

from freehold.errors import NotFoundError, UsageError
from freehold.serve.bodies import StrictRoute
from freehold.serve.caller import caller_of
from freehold.serve.errors import ApiError, api_error
from freehold.serve.server import Server


def router(server: Server) -> APIRouter:
    routes = APIRouter(route_class=StrictRoute, prefix="/v1/models", tags=["Models"])

    def model(name: str, created: float | None = None) -> dict[str, object]:
        began = server.created if created is None else int(created)
        described = Model(id=name, created=began, object="model", owned_by="freehold")
        return {**described.to_dict(), "max_model_len": server.served.prompting.context}

    @routes.get("")
    async def list_models(request: Request) -> dict[str, object]:
        """The names that the model answers to, `name:adapter` for each of its adapters, and the caller's fine-tuned
        models. `max_model_len` is its context, as vLLM has it."""
        data = [model(name) for name in server.model_names]
        if server.tuning is not None:
            tuned = server.tuning.models.of(caller_of(request).owner)
            data += [model(f"{record.model['base']}:{record.name}", record.created_at) for record in tuned]
        return {"object": "list", "data": data}

    @routes.get("/{name:path}")
    async def retrieve_model(request: Request, name: str) -> dict[str, object]:
        caller = caller_of(request)
        server.check_model(name, caller)
        tuned = server.tuned_model(caller, name)
        return model(name) if tuned is None else model(name, tuned.created_at)

    @routes.delete("/{name:path}")
    async def delete_model(request: Request, name: str) -> dict[str, object]:
        """Delete a fine-tuned model, or a checkpoint, for good. Only whoever had it made can."""
        caller = caller_of(request)
        server.check_model(name, caller)
        tuned = server.tuned_model(caller, name)
        if tuned is None or server.tuning is None:
            message = f"The model '{name:.200}' is the operator's, and was not fine-tuned by you."
            raise ApiError(403, message, param="model")
        try:
            await server.tuning.delete_model(tuned)
        except NotFoundError as error:
            raise api_error(error, param="model") from None
        except UsageError as error:
            raise ApiError(409, str(error), param="model") from None
        return {"id": name, "object": "model", "deleted": True}

    return routes
