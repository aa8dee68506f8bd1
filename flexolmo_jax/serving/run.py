"""Runs the server until it is told to stop, and then lets what is in flight end."""

from flexolmo_jax.runtime.console import tell
from flexolmo_jax.serving.app import make_app
from flexolmo_jax.serving.service import Service, Settings, load_served
from flexolmo_jax.web import listening


def serve(settings: Settings, host: str, port: int) -> None:
    """Loads the model and serves it.

    Raises:
      ValueError: the model, the keys or the chat template is damaged; the port is in use.
    """
    listener = listening.listen(host, port)
    app = make_app(settings, load_served(settings))
    service: Service = app.state.service

    def drain() -> None:
        service.is_draining = True

    shown = listening.address(listener)
    tell(f"serving {settings.name} at {shown}  (a page, and OpenAI's interface at /v1)")
    listening.run(app, listener, settings.seconds, drain)
