"""``serve``: a model over HTTP, by DJLServing's contract."""

from __future__ import annotations

import argparse
import logging
import socket
from typing import Any

from handler.cli.common import add_model_arguments, choose_model, start_log
from handler.errors import LoadError
from handler.service import service

logger = logging.getLogger(__name__)

# On top of request_timeout: time to send the last answers after SIGTERM.
_SENDING_SECONDS = 5


def add_to(commands: Any) -> None:
    parser = commands.add_parser(
        "serve", help="serve a model over HTTP", description="Serve a model over HTTP."
    )
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="checkpoint folder or hub id (default: the demo)"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8080, help="port (default: %(default)s)")
    add_model_arguments(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Load, then listen until SIGTERM or Ctrl-C; what runs then is finished first."""
    import uvicorn

    from handler.server import application

    start_log()
    choice = choose_model(arguments.model, arguments.option)
    listener = _bind(arguments.host, arguments.port)
    service.load(choice.configuration)
    config = uvicorn.Config(
        application(service, choice.name),
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=int(choice.configuration.request_timeout) + _SENDING_SECONDS,
    )
    listener.listen()
    host, port = listener.getsockname()[:2]
    logger.info("serving %s on http://%s:%s", choice.name, host, port)
    try:
        uvicorn.Server(config).run(sockets=[listener])
    finally:
        service.close()


def _bind(host: str, port: int) -> socket.socket:
    """Bound before the model is loaded, so that a port in use is told at once."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise LoadError(f"cannot listen on {host} port {port}: {error}; change --port") from error
    return listener
