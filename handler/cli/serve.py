"""``serve``: a model over HTTP, by DJLServing's contract."""

from __future__ import annotations

import argparse
import logging
import signal
import socket
import sys
from typing import Any

from handler.cli.common import add_model_arguments, choose_model, start_log
from handler.cli.container import IMAGES, run_in_container
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
    parser.add_argument(
        "--container",
        choices=IMAGES,
        metavar="IMAGE",
        help=f"in this image of DJLServing's: {', '.join(IMAGES)}; where no Docker engine is, only "
        "print the commands, and exit with 3",
    )
    add_model_arguments(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Load, then listen until SIGTERM or Ctrl-C; what runs then is finished first."""
    if arguments.container is not None:
        run_in_container(arguments)
    import uvicorn

    from handler.server import application

    start_log()
    # uvicorn has its own handler while it runs, and raises the signal again when it has stopped
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    choice = choose_model(arguments.model, arguments.option)
    listener = bind(arguments.host, arguments.port)
    service.load(choice.configuration, choice.name)
    config = uvicorn.Config(
        application(service, choice.name),
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=int(choice.configuration.request_timeout) + _SENDING_SECONDS,
    )
    address = listen(listener)

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            """Told when signals are handled, so that whoever waits for it may send one."""
            await super().startup(sockets)
            logger.info("serving %s on %s", choice.name, address)

    try:
        Server(config).run(sockets=[listener])
    finally:
        service.close()


def bind(host: str, port: int) -> socket.socket:
    """Bound before the model is loaded, so that a port in use is told at once."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise _cannot_listen(host, port, error) from error
    return listener


def listen(listener: socket.socket) -> str:
    """The URL. Another process may have taken the port since it was bound."""
    host, port = listener.getsockname()[:2]
    try:
        listener.listen()
    except OSError as error:
        raise _cannot_listen(host, port, error) from error
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _cannot_listen(host: str, port: int, error: Exception) -> LoadError:
    return LoadError(f"cannot listen on {host} port {port}: {error}; change --host or --port")
