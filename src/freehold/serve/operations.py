"""What operators ask: `/health`, `/ready`, `/metrics`.

`/health` says that the process answers, `/ready` that it takes requests: not while it drains. `/metrics` is
Prometheus's text: the engine's figures, the server's own, and the process's.
"""

import asyncio
from collections.abc import Iterator

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from freehold.serve.bodies import StrictRoute
from freehold.serve.server import Server


def router(server: Server) -> APIRouter:
    routes = APIRouter(route_class=StrictRoute, tags=["Operation"])
    ours = CollectorRegistry()
    ours.register(_Now(server))
    ProcessCollector(registry=ours)

    @routes.get("/health")
    async def health() -> dict[str, str]:
        """The process answers."""
        return {"status": "ok"}

    @routes.get("/ready", response_model=None)
    async def ready() -> dict[str, str] | JSONResponse:
        """Requests are taken; 503 while the server drains."""
        if server.gate.draining:
            return JSONResponse({"status": "draining"}, status_code=503)
        return {"status": "ready"}

    @routes.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Figures for Prometheus."""
        registries = (server.served.runner.metrics.registry, ours)
        return Response(b"".join(map(generate_latest, registries)), media_type=CONTENT_TYPE_LATEST)

    return routes


class _Now(Collector):
    def __init__(self, server: Server) -> None:
        self._server = server

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily("freehold_places_taken", "Of those that run and wait.", self._server.gate.taken)
        yield GaugeMetricFamily("freehold_tasks", "Tasks of the event loop.", len(asyncio.all_tasks()))
