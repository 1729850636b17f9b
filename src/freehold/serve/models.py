"""`/v1/models`: the one model, under all its names, and with each of its adapters."""

from fastapi import APIRouter
from openai.types import Model

from freehold.serve.bodies import StrictRoute
from freehold.serve.server import Server


def router(server: Server) -> APIRouter:
    routes = APIRouter(route_class=StrictRoute, prefix="/v1/models", tags=["Models"])

    def model(name: str) -> dict[str, object]:
        described = Model(id=name, created=server.created, object="model", owned_by="freehold")
        return {**described.to_dict(), "max_model_len": server.served.prompting.context}

    @routes.get("")
    async def list_models() -> dict[str, object]:
        """The names that the model answers to, and `name:adapter` for each of its adapters. `max_model_len` is its
        context, as vLLM has it."""
        return {"object": "list", "data": [model(name) for name in server.model_names]}

    @routes.get("/{name:path}")
    async def retrieve_model(name: str) -> dict[str, object]:
        server.check_model(name)
        return model(name)

    return routes
