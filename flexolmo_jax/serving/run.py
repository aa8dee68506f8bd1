"""Runs the server until it is told to stop, and then lets what is in flight end."""

import signal

from flexolmo_jax.inference.engine import Engine
from flexolmo_jax.inference.lockstep import follow
from flexolmo_jax.runtime.console import tell
from flexolmo_jax.runtime.processes import is_main_process
from flexolmo_jax.serving.app import make_app
from flexolmo_jax.serving.runner import new_engine
from flexolmo_jax.serving.service import Service, Settings, load_served
from flexolmo_jax.web import listening


def serve(settings: Settings, host: str, port: int) -> None:
    """Loads the model and serves it.

    Raises:
      ValueError: the model, the keys or the chat template is damaged; the port is in use.
    """
    if not is_main_process():
        _follow(settings)
        return
    listener = listening.listen(host, port)
    app = make_app(settings, load_served(settings))
    service: Service = app.state.service

    def drain() -> None:
        service.is_draining = True

    shown = listening.address(listener)
    tell(f"serving {settings.name} at {shown}  (a page, and OpenAI's interface at /v1)")
    listening.run(app, listener, settings.seconds, drain)


def _follow(settings: Settings) -> None:
    """What the processes do that nobody asks: they step as process 0 does, until it has ended."""
    for ended_by in (signal.SIGTERM, signal.SIGINT):  # which process 0 gets, too, and then drains
        signal.signal(ended_by, signal.SIG_IGN)

    def load() -> Engine:
        model = load_served(settings)
        return new_engine(model, settings.slots, settings.length or model.config.max_length)

    follow(load(), load)
