"""The HTTP server without Java: ``python -m handler serve``.

DJLServing's routes, and those that OpenAI's, Hugging Face's and SageMaker's clients call.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine
from typing import Any, Union

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from handler import __version__
from handler.answering import Wanted
from handler.metrics import Metrics
from handler.responses import Reply, StreamReply
from handler.sagemaker import (
    ACCEPT,
    AWS_EVENT_STREAM,
    CONTENT_TYPE,
    model_error,
    payload_part,
)
from handler.schemas import COMPLETIONS, ROOT, TGI, TGI_GENERATE
from handler.schemas.completions import openai_error
from handler.service import Service
from handler.streaming import AsyncStream

# DJLServing's max_request_size
_LARGEST_BODY = 64 * 1024 * 1024

# How long an upload may stand still
_STALLED_SECONDS = 20.0

# In the User-Agent of huggingface_hub and of @huggingface/inference
_HUGGING_FACE = ("hf_hub/", "@huggingface/")

# What DJLServing says of its own errors: type and message by status.
_DJL_ERRORS = {
    404: ("ResourceNotFoundException", "Requested resource is not found"),
    405: ("MethodNotAllowedException", "Requested method is not allowed"),
    408: ("RequestTimeoutException", f"Nothing of the body came for {_STALLED_SECONDS:g} s"),
    413: ("BadRequestException", f"The body is larger than {_LARGEST_BODY} bytes"),
}

_Answer = Union[Reply, "StreamReply[AsyncStream]"]


def application(service: Service, model_name: str) -> Starlette:
    """The routes for one loaded model."""
    return _Application(service, model_name).starlette()


class _Application:
    def __init__(self, service: Service, model_name: str) -> None:
        self._service = service
        self._name = model_name
        self._metrics = Metrics(service)

    def starlette(self) -> Starlette:
        routes = [
            # DJLServing's
            Route("/ping", self._ping),
            Route("/invocations", self._invoke, methods=["POST"]),
            Route("/predictions/{name}", self._invoke, methods=["POST"]),
            Route("/models/{name}/invoke", self._invoke, methods=["POST"]),
            Route("/models", self._models),
            Route("/models/{name}", self._describe),
            Route("/metrics", self._metrics.endpoint),
            # TGI's
            Route("/", self._tgi_root, methods=["POST"]),
            Route("/generate", self._tgi_generate, methods=["POST"]),
            Route("/generate_stream", self._tgi_generate_stream, methods=["POST"]),
            Route("/health", self._healthy),
            Route("/info", self._tgi_info),
            # OpenAI's
            Route("/v1/completions", self._completions, methods=["POST"]),
            Route("/v1/models", self._openai_models),
            Route("/v1/models/{name:path}", self._openai_model),
            # SageMaker's, of its runtime
            Route("/endpoints/{endpoint}/invocations", self._endpoint, methods=["POST"]),
            Route(
                "/endpoints/{endpoint}/invocations-response-stream",
                self._endpoint_stream,
                methods=["POST"],
            ),
        ]
        handlers = {HTTPException: _http_error, ClientDisconnect: _nobody_listens}
        return Starlette(routes=routes, exception_handlers=handlers)

    # Answers

    async def _invoke(self, request: Request) -> Response:
        self._check_name(
            request.path_params.get("name", request.query_params.get("model_name", self._name))
        )
        return await self._respond(request, _wanted(request))

    async def _tgi_root(self, request: Request) -> Response:
        """Hugging Face's clients post to the base URL."""
        self._check_name(request.query_params.get("model_name", self._name))
        is_theirs = any(name in request.headers.get("user-agent", "") for name in _HUGGING_FACE)
        return await self._respond(request, _wanted(request, TGI if is_theirs else ROOT))

    async def _tgi_generate(self, request: Request) -> Response:
        return await self._respond(request, _wanted(request, TGI_GENERATE))

    async def _tgi_generate_stream(self, request: Request) -> Response:
        return await self._respond(request, Wanted(route=TGI_GENERATE, streams=True))

    async def _completions(self, request: Request) -> Response:
        return await self._respond(request, _wanted(request, COMPLETIONS))

    async def _endpoint(self, request: Request) -> Response:
        answer, start = await self._answer(request, _wanted(request))
        if isinstance(answer, Reply) and answer.error is not None:
            answer = model_error(answer)
        return self._response(answer, start)

    async def _endpoint_stream(self, request: Request) -> Response:
        """Every piece of the answer as an event; an answer that is not streamed is one piece."""
        wanted = Wanted(request.headers.get(ACCEPT, ""), _content_type(request))
        answer, start = await self._answer(request, wanted)
        if isinstance(answer, Reply) and answer.error is not None:
            return self._response(model_error(answer), start)
        headers = {
            "content-type": AWS_EVENT_STREAM,
            CONTENT_TYPE: answer.headers["content-type"],
        }
        if isinstance(answer, Reply):
            return self._response(Reply(payload_part(answer.body), headers=headers), start)
        return self._response(StreamReply(answer.stream, headers), start, as_aws_events=True)

    async def _respond(self, request: Request, wanted: Wanted) -> Response:
        return self._response(*await self._answer(request, wanted))

    async def _answer(self, request: Request, wanted: Wanted) -> tuple[_Answer, float]:
        """The answer, and when its request was read."""
        body = await _read(request)
        start = time.perf_counter()
        answering = self._service.answer_async(body, wanted)
        return await _while_connected(request, answering), start

    def _response(self, answer: _Answer, start: float, as_aws_events: bool = False) -> Response:
        if isinstance(answer, Reply):
            self._metrics.answered(answer.status, start)
            return Response(answer.body, answer.status, answer.headers)
        return _StreamResponse(answer, self._metrics, start, as_aws_events)

    # What the model is

    async def _ping(self, request: Request) -> Response:
        healthy = self._service.model.healthy
        status = "Healthy" if healthy else "Unhealthy"
        return JSONResponse({self._name: {"status": status}}, 200 if healthy else 500)

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

    async def _healthy(self, request: Request) -> Response:
        return Response()

    async def _tgi_info(self, request: Request) -> Response:
        limits = self._service.model.limits
        return JSONResponse(
            {
                "model_id": self._name,
                "model_pipeline_tag": "text2text-generation",
                "max_concurrent_requests": self._service.configuration.max_queue,
                "max_client_batch_size": self._service.configuration.max_queue,
                "max_input_tokens": limits.max_input_tokens,
                "max_total_tokens": limits.max_input_tokens + limits.max_output_tokens,
                "router": "djl-t5-handler",
                "version": __version__,
            }
        )

    async def _openai_models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._openai_description()]})

    async def _openai_model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name == self._name:
            return JSONResponse(self._openai_description())
        message = f"The model {name!r} does not exist; this server has {self._name!r}"
        return JSONResponse(openai_error(message, param="model", code="model_not_found"), 404)

    def _openai_description(self) -> dict[str, Any]:
        return {
            "id": self._name,
            "object": "model",
            "created": self._service.loaded_at,
            "owned_by": "djl-t5-handler",
        }

    def _url(self) -> str:
        configuration = self._service.configuration
        return configuration.model_id or configuration.model_dir or ""

    def _check_name(self, name: str) -> None:
        if name != self._name:
            raise HTTPException(404, f"Model or workflow not found: {name}")


class _StreamResponse(StreamingResponse):
    """Pieces as they come. However it ends, also when the client leaves, its row is freed."""

    def __init__(
        self,
        answer: StreamReply[AsyncStream],
        metrics: Metrics,
        start: float,
        as_aws_events: bool,
    ) -> None:
        self._stream, self._metrics, self._start = answer.stream, metrics, start
        pieces = _as_aws_events(answer.stream) if as_aws_events else answer.stream
        super().__init__(pieces, answer.status, answer.headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._stream.close()
            self._metrics.answered(self.status_code, self._start)


async def _as_aws_events(stream: AsyncStream) -> AsyncIterator[bytes]:
    async for piece in stream:
        yield payload_part(piece)


def _wanted(request: Request, route: str | None = None) -> Wanted:
    accept = ",".join(request.headers.getlist("accept"))
    return Wanted(accept, _content_type(request), route)


def _content_type(request: Request) -> str:
    return request.headers.get("content-type", "")


async def _read(request: Request) -> bytes:
    told = request.headers.get("content-length", "")
    if told.isdigit() and int(told) > _LARGEST_BODY:
        raise HTTPException(413)
    body = bytearray()
    chunks = request.stream()
    try:
        while True:
            body += await asyncio.wait_for(chunks.__anext__(), _STALLED_SECONDS)
            if len(body) > _LARGEST_BODY:
                raise HTTPException(413)
    except StopAsyncIteration:
        return bytes(body)
    except asyncio.TimeoutError:
        raise HTTPException(408) from None


async def _while_connected(request: Request, answering: Coroutine[Any, Any, _Answer]) -> _Answer:
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
    if request.url.path.startswith("/v1/"):
        return JSONResponse(openai_error(message), error.status_code, error.headers)
    body = {"code": error.status_code, "type": type_name, "message": message, "error": message}
    return JSONResponse(body, error.status_code, error.headers)
