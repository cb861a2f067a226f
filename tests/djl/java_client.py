"""Drives DJL's own Java engine: a command per line of stdin, its answers on a line of stdout.

A process of its own, because a process can start one JVM only, and the leader of its group.
Arguments: the folder of jars, the engine's name, the model folder, a temporary folder for DJL, and
the engine's options as JSON, options of Java.
"""

from __future__ import annotations

import atexit
import base64
import json
import os
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jpype
import jpype.imports

Message = dict[str, Any]

_PIECE_SECONDS = 120


def main(
    jars: str, engine: str, model_folder: str, temporary_folder: str, options: str, *java: str
) -> None:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever Java prints is log

    if Path(jars).name == "0.20.0":
        take_turns()
    # DJL's sockets and pid files lie there; it kills the process whose pid it finds.
    jpype.startJVM(*java, f"-Djava.io.tmpdir={temporary_folder}", classpath=[f"{jars}/*"])
    # Java would wait for the worker and, in async mode, start another for the one that ends.
    atexit.register(os.killpg, 0, signal.SIGKILL)
    predictor = new_predictor(engine, model_folder, json.loads(options))
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(execute(predictor, line)), file=answers, flush=True)


def take_turns() -> None:
    """From here on a thread that wakes another goes on first.

    DJL 0.20's reader tells that the worker has started and only then writes it down. Whoever it
    told may look before, and then waits for the worker's end: in one start of three, of two on a
    busy machine.
    """
    if hasattr(os, "SCHED_BATCH"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def execute(predictor: Any, line: str) -> list[Message] | str:
    """Answers, or Java's exception."""
    command, requests = json.loads(line)
    try:
        return COMMANDS[command](predictor, requests)
    except jpype.JException as exception:
        return str(exception)


def new_predictor(engine: str, model_folder: str, options: dict[str, str]) -> Any:
    """Load the model: DJL starts its Python workers and sends them the empty first call."""
    from ai.djl.modality import Input, Output
    from ai.djl.repository.zoo import Criteria
    from java.nio.file import Paths

    criteria = (
        Criteria.builder()
        .setTypes(Input, Output)
        .optModelPath(Paths.get(model_folder))
        .optEngine(engine)
    )
    for name, value in options.items():
        criteria.optOption(name, value)
    return criteria.build().loadModel().newPredictor()


def predict(predictor: Any, requests: list[Message]) -> list[Message]:
    """One after another."""
    return [_answer(predictor.predict(_input(request))) for request in requests]


def predict_together(predictor: Any, requests: list[Message]) -> list[Message]:
    """All at once, each from its own thread."""
    gate = threading.Barrier(len(requests))

    def call(request: Message) -> Message:
        prepared = _input(request)
        gate.wait()
        return _answer(predictor.predict(prepared))

    with ThreadPoolExecutor(len(requests)) as threads:
        return list(threads.map(call, requests))


def batch_predict(predictor: Any, requests: list[Message]) -> list[Message]:
    """As one dynamic batch."""
    from java.util import ArrayList

    outputs = predictor.batchPredict(ArrayList([_input(request) for request in requests]))
    return [_answer(output) for output in outputs]


def abandon(predictor: Any, requests: list[Message]) -> list[Message]:
    """Ask, and read no answer, as DJLServing does whose client has left."""
    for request in requests:
        predictor.predict(_input(request))
    return []


COMMANDS = {
    "abandon": abandon,
    "predict": predict,
    "predict_together": predict_together,
    "batch_predict": batch_predict,
}


def _input(request: Message) -> Any:
    """The Input that DJLServing makes of an HTTP request."""
    from ai.djl.modality import Input

    made = Input()
    for name, value in request["properties"].items():
        made.addProperty(name, value)
    for key, value in request["content"]:
        made.add(key, jpype.JArray(jpype.JByte)(base64.b64decode(value)))
    return made


def _answer(output: Any) -> Message:
    # In async mode the body arrives later than the Output, and with it the rest.
    pieces = [piece for item in output.getContent() for piece in _pieces(item.getValue())]
    return {
        "code": int(output.getCode()),
        "message": str(output.getMessage()),
        "properties": {str(name): str(value) for name, value in output.getProperties().items()},
        "body": base64.b64encode(b"".join(pieces)).decode(),
        "pieces": len(pieces),
        "finished": time.monotonic(),
    }


def _pieces(value: Any) -> list[bytes]:
    """A body as it comes: in async mode, and as a stream, in pieces."""
    if not hasattr(value, "nextChunk"):
        return [bytes(value.getAsBytes())]
    from java.util.concurrent import TimeUnit

    pieces = []
    while value.hasNext():
        pieces.append(bytes(value.nextChunk(_PIECE_SECONDS, TimeUnit.SECONDS)))
    return list(filter(None, pieces))  # in sync mode an empty one ends a stream


if __name__ == "__main__":
    main(*sys.argv[1:])
