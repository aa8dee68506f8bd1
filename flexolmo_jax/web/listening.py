"""Listens, and runs an application until the process is told to stop."""

import logging
import socket
import ssl
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvicorn

# An idle connection stays open for longer than those of clients and proxies (httpx and so OpenAI's
# client keep theirs for 5 s, cloud load balancers for 60). uvicorn's own 5 s are httpx's, too: a
# request that left just then met a connection that was being closed, and its client saw a reset.
KEEP_ALIVE = 75  # seconds


def listen(host: str, port: int) -> socket.socket:
    """Binds first, so that a port in use is known before anything is loaded.

    Raises:
      ValueError: that is impossible.
    """
    try:
        kind = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=kind, backlog=2048)
    except (OSError, OverflowError) as error:
        raise ValueError(
            f"cannot listen at {host}:{port} ({error}); choose another --port"
        ) from error
    # Connections inherit it, and asyncio does not set it on them. Without it every first token
    # waits 40 ms, for the client's delayed acknowledgement of the headers.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def address(listener: socket.socket, scheme: str = "http") -> str:
    """Where it listens, as clients write it."""
    host, port = listener.getsockname()[:2]
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"


def check_certificate(certificate: Path, private_key: Path | None = None) -> None:
    """Raises ValueError if a certificate or its key, in PEM, cannot be used."""
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, private_key)
    except OSError as error:  # ssl.SSLError is one, too
        raise ValueError(
            f"{certificate}: expected a certificate in PEM, and its private key in the same file "
            f"or as --private-key ({error})"
        ) from error


def run(
    app: Any,
    listener: socket.socket,
    seconds: float,
    drain: Callable[[], None],
    certificate: Path | None = None,
    private_key: Path | None = None,
    most: int | None = None,
) -> None:
    """Runs an application until SIGINT or SIGTERM, and then lets what is in flight end.

    Args:
      app: of ASGI.
      seconds: that requests in flight may still take at the end.
      drain: is called as soon as the signal arrives.
      certificate, private_key: PEM, for TLS; `check_certificate` has seen them.
      most: connections at a time; None: any number.
    """
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # else a line for each owner it asks
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        log_level="warning",
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=int(seconds) + 1,
        ssl_certfile=certificate,
        ssl_keyfile=private_key,
        limit_concurrency=most,
    )
    _Server(config, drain).run([listener])


class _Server(uvicorn.Server):
    """Says that it is draining as soon as a signal arrives."""

    def __init__(self, config: uvicorn.Config, drain: Callable[[], None]):
        super().__init__(config)
        self._drain = drain

    def handle_exit(self, sig: int, frame) -> None:
        self._drain()
        super().handle_exit(sig, frame)
