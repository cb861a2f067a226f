"""DJLServing's HTTP contract without Java, for a laptop: ``python -m handler serve``."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from handler.responses import Reply
from handler.service import Service

# DJLServing's max_request_size
_LARGEST_BODY = 64 * 1024 * 1024

# What DJLServing says of its own errors: type and message by status.
_DJL_ERRORS = {
    404: ("ResourceNotFoundException", "Requested resource is not found"),
    405: ("MethodNotAllowedException", "Requested method is not allowed"),
    413: ("BadRequestException", f"The body is larger than {_LARGEST_BODY} bytes"),
}


def application(service: Service, model_name: str) -> Starlette:
    """The routes of DJLServing for one loaded model."""
    return _Application(service, model_name).starlette()


class _Application:
    def __init__(self, service: Service, model_name: str) -> None:
        self._service = service
        self._name = model_name
        self._metrics = _Metrics(service)

    def starlette(self) -> Starlette:
        invoke = self._invoke
        return Starlette(
            routes=[
                Route("/ping", self._ping),
                Route("/invocations", invoke, methods=["POST"]),
                Route("/", invoke, methods=["POST"]),
                Route("/predictions/{name}", invoke, methods=["POST"]),
                Route("/models/{name}/invoke", invoke, methods=["POST"]),
                Route("/models", self._models),
                Route("/models/{name}", self._describe),
                Route("/metrics", self._metrics.endpoint),
            ],
            exception_handlers={HTTPException: _http_error, ClientDisconnect: _nobody_listens},
        )

    async def _invoke(self, request: Request) -> Response:
        self._check_name(
            request.path_params.get("name", request.query_params.get("model_name", self._name))
        )
        body = await _read(request)
        answer = await self._metrics.observe(
            lambda: _while_connected(request, self._service.answer_async(body))
        )
        return Response(answer.body, answer.status, answer.headers)

    async def _ping(self, request: Request) -> Response:
        return JSONResponse({self._name: {"status": "Healthy"}})

    async def _models(self, request: Request) -> Response:
        model = {"modelName": self._name, "modelUrl": self._url(), "status": "READY"}
        return JSONResponse({"models": [model]})

    async def _describe(self, request: Request) -> Response:
        self._check_name(request.path_params["name"])
        model = self._service.model
        description = {
            "modelName": self._name,
            "modelUrl": self._url(),
            "batchSize": 1,
            "queueSize": self._service.configuration.max_queue,
            "requestInQueue": model.waiting,
            "status": "Healthy",
            "backend": model.backend,
        }
        return JSONResponse([{"workflowName": self._name, "models": [description]}])

    def _url(self) -> str:
        configuration = self._service.configuration
        return configuration.model_id or configuration.model_dir or ""

    def _check_name(self, name: str) -> None:
        if name != self._name:
            raise HTTPException(404, f"Model or workflow not found: {name}")


async def _read(request: Request) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > _LARGEST_BODY:
            raise HTTPException(413)
    return bytes(body)


async def _while_connected(request: Request, answering: Coroutine[Any, Any, Reply]) -> Reply:
    """The answer, given up when the client leaves, so that its rows are free for others."""
    answer = asyncio.create_task(answering)
    leaving = asyncio.create_task(_client_leaves(request))
    try:
        await asyncio.wait([answer, leaving], return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise ClientDisconnect
        return answer.result()
    finally:
        answer.cancel()
        leaving.cancel()


async def _client_leaves(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _nobody_listens(request: Request, error: Exception) -> Response:
    return Response(status_code=400)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    type_name, message = _DJL_ERRORS.get(error.status_code, ("InternalServerException", ""))
    if error.status_code == 404 and error.detail.startswith("Model"):
        type_name, message = "ModelNotFoundException", error.detail
    body = {"code": error.status_code, "type": type_name, "message": message, "error": message}
    return JSONResponse(body, error.status_code, error.headers)


class _Metrics:
    """Prometheus figures of this server, each server its own."""

    def __init__(self, service: Service) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "handler_requests", "Requests answered.", ["code"], registry=self._registry
        )
        self._seconds = Histogram(
            "handler_request_seconds",
            "Time from a request's last byte to its answer.",
            buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
            registry=self._registry,
        )
        waiting = Gauge("handler_prompts_waiting", "Prompts that wait.", registry=self._registry)
        waiting.set_function(lambda: service.model.waiting)
        running = Gauge(
            "handler_prompts_running", "Prompts being answered.", registry=self._registry
        )
        running.set_function(lambda: service.model.running)

    async def observe(self, answer: Callable[[], Awaitable[Reply]]) -> Reply:
        start = time.perf_counter()
        reply = await answer()
        self._seconds.observe(time.perf_counter() - start)
        self._requests.labels(str(reply.status)).inc()
        return reply

    async def endpoint(self, request: Request) -> Response:
        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST)
