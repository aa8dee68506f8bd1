"""The routes of an owner's service, and its process."""

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any

import fastapi
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from flexolmo_jax.runtime.console import tell
from flexolmo_jax.tracing.service.owner import Owner, Settings
from flexolmo_jax.version import __version__
from flexolmo_jax.web import listening
from flexolmo_jax.web.errors import Json
from flexolmo_jax.web.guard import Guard
from flexolmo_jax.web.handlers import add_handlers

BODY = 1 << 23  # bytes: the longest text that a policy may permit, each character escaped
BODY_SECONDS = 10.0
CONNECTIONS = 128
MAX_TEXT = 1_000_000
ERRORS: Any = {
    status: {"description": text}
    for status, text in {
        400: "the text is wrong or too long", 401: "no known key", 403: "nothing may be said",
        408: "the body came too slowly", 413: "the body is too large",
        429: "the asker's limits are reached", 503: "no room, or a file cannot be read",
    }.items()
}  # fmt: skip


class Question(BaseModel):
    """The body of /v1/trace."""

    model_config = ConfigDict(strict=True, extra="forbid")

    text: Annotated[str, Field(max_length=MAX_TEXT)]


def make_app(settings: Settings) -> fastapi.FastAPI:
    """The application of an owner's service.

    Raises:
      ValueError: a file is missing or damaged.
    """
    owner = Owner(settings)

    @contextlib.asynccontextmanager
    async def lifespan(app: fastapi.FastAPI) -> AsyncIterator[None]:
        yield
        owner.close()

    app = fastapi.FastAPI(
        title="flexolmo trace serve",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    app.state.owner = owner
    app.include_router(routes)
    app.add_middleware(
        Guard, most=BODY, seconds=BODY_SECONDS, answered=lambda route, status, seconds: None
    )
    add_handlers(app)
    return app


routes = fastapi.APIRouter()


@routes.get("/health")
async def health() -> Response:
    """The process answers."""
    return Json({"status": "ok"})


@routes.post("/v1/trace", responses=ERRORS)
async def trace(request: Request, body: Question) -> Response:
    """Where the words of a text stand in the owner's documents, as far as its policy says it."""
    owner: Owner = request.app.state.owner
    asker = owner.asker(request.headers.get("authorization"))
    request.scope["flexolmo"] = {"asker": asker.name}
    return Json(await owner.answer(asker, body.text))


def serve(
    settings: Settings,
    host: str,
    port: int,
    certificate: Path | None = None,
    private_key: Path | None = None,
) -> None:
    """Serves an index until SIGINT or SIGTERM.

    Args:
      certificate, private_key: PEM, for TLS; without them it speaks plain HTTP.

    Raises:
      ValueError: a file is missing or damaged; the certificate cannot be used; the port is in use;
        another service has the log.
    """
    if certificate is not None:
        listening.check_certificate(certificate, private_key)
    listener = listening.listen(host, port)
    app = make_app(settings)
    owner: Owner = app.state.owner

    def drain() -> None:
        owner.is_draining = True

    with owner.revealed.held():
        shown = listening.address(listener, "https" if certificate else "http")
        asked = "" if settings.keys else "; anybody may ask, without --keys"
        tell(f"{owner.index.owner} answers traces at {shown}  (level: {owner.policy.level}{asked})")
        listening.run(
            app, listener, owner.policy.seconds, drain, certificate, private_key, CONNECTIONS
        )
