"""Prometheus figures of one server."""

from __future__ import annotations

import time

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import generate_latest
from starlette.requests import Request
from starlette.responses import Response

from handler.service import Service


class Metrics:
    """Each server has its own."""

    def __init__(self, service: Service) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "handler_requests", "Requests answered.", ["code"], registry=self._registry
        )
        self._seconds = Histogram(
            "handler_request_seconds",
            "Time from a request's last byte to its answer's last.",
            buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
            registry=self._registry,
        )
        waiting = Gauge("handler_prompts_waiting", "Prompts that wait.", registry=self._registry)
        waiting.set_function(lambda: service.model.waiting)
        running = Gauge(
            "handler_prompts_running", "Prompts being answered.", registry=self._registry
        )
        running.set_function(lambda: service.model.running)

    def answered(self, status: int, start: float) -> None:
        """Count an answer whose request was read at ``start``, of time.perf_counter."""
        self._seconds.observe(time.perf_counter() - start)
        self._requests.labels(str(status)).inc()

    async def endpoint(self, request: Request) -> Response:
        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST)
