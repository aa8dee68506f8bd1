"""Runs the server until it is told to stop, and then lets what is in flight end."""

import logging
import signal
import socket
import sys

import uvicorn

from flexolmo_jax.inference.engine import Engine
from flexolmo_jax.inference.lockstep import follow
from flexolmo_jax.runtime.console import tell
from flexolmo_jax.runtime.processes import is_main_process
from flexolmo_jax.serving.app import make_app
from flexolmo_jax.serving.runner import new_engine
from flexolmo_jax.serving.service import Settings, load_served

# An idle connection stays open for longer than those of clients and proxies (httpx and so OpenAI's
# client keep theirs for 5 s, cloud load balancers for 60). uvicorn's own 5 s are httpx's, too: a
# request that left just then met a connection that was being closed, and its client saw a reset.
KEEP_ALIVE = 75  # seconds


def serve(settings: Settings, host: str, port: int) -> None:
    """Loads the model and serves it.

    Raises:
      ValueError: the model, the keys or the chat template is damaged; the port is in use.
    """
    if not is_main_process():
        _follow(settings)
        return
    listener = listen(host, port)
    app = make_app(settings, load_served(settings))
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
    server = _Server(
        uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            log_level="warning",
            timeout_keep_alive=KEEP_ALIVE,
            timeout_graceful_shutdown=int(settings.seconds) + 1,
        )
    )
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    tell(
        f"serving {settings.name} at http://{shown}:{port}  (a page, and OpenAI's interface at /v1)"
    )
    server.run([listener])


def _follow(settings: Settings) -> None:
    """What the processes do that nobody asks: they step as process 0 does, until it has ended."""
    for ended_by in (signal.SIGTERM, signal.SIGINT):  # which process 0 gets, too, and then drains
        signal.signal(ended_by, signal.SIG_IGN)

    def load() -> Engine:
        model = load_served(settings)
        return new_engine(model, settings.slots, settings.length or model.config.max_length)

    follow(load(), load)


class _Server(uvicorn.Server):
    """Says that it is draining as soon as a signal arrives."""

    def handle_exit(self, sig: int, frame) -> None:
        self.config.app.state.service.is_draining = True  # type: ignore[union-attr]
        super().handle_exit(sig, frame)


def listen(host: str, port: int) -> socket.socket:
    """Binds first, so that a port in use is known before a model is loaded.

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
