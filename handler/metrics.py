"""Prometheus figures of one server."""

from __future__ import annotations

import time
from functools import partial

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import generate_latest
from starlette.requests import Request
from starlette.responses import Response

from handler.service import Service

_CACHE_FIGURES = (
    ("handler_encoder_cache_hits", "Prompts that the encoder had read already."),
    ("handler_encoder_cache_misses", "Prompts that it had to read."),
)


def _cache_use(service: Service, place: int) -> float:
    return service.model.encoder_cache_use[place]


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
        for place, (name, meaning) in enumerate(_CACHE_FIGURES):
            count = Gauge(name, meaning, registry=self._registry)
            count.set_function(partial(_cache_use, service, place))

    def answered(self, status: int, start: float) -> None:
        """Count an answer whose request was read at ``start``, of time.perf_counter."""
        self._seconds.observe(time.perf_counter() - start)
        self._requests.labels(str(status)).inc()

    async def endpoint(self, request: Request) -> Response:
        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST)
