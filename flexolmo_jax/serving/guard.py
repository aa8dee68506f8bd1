"""What every request passes: a limit on its body, a line in the log, a count."""

import json
import logging
import secrets
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flexolmo_jax.serving.errors import ApiError
from flexolmo_jax.serving.metrics import Metrics

# An upgrade must not mix old and new files, and no other site may show the page as its own.
OF_THE_PAGE = [
    (b"cache-control", b"no-cache"),
    (b"content-security-policy", b"frame-ancestors 'none'"),
]
log = logging.getLogger("flexolmo_jax.serving.requests")


class Guard:
    """Middleware. A line of the log has no text of a prompt or an answer, and no key.

    Args:
      most: bytes of a body.
      metrics: count what passes.
    """

    def __init__(self, app: ASGIApp, most: int, metrics: Metrics):
        self._app, self._most, self._metrics = app, most, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun, status, number = time.monotonic(), 499, secrets.token_hex(8)
        too_large = ApiError(413, f"expected a body of at most {self._most} bytes")
        size, has_begun = 0, False

        async def limited() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self._most:
                raise too_large
            return message

        async def counted(message: Message) -> None:
            if size > self._most and status != 413:  # whatever was made of the exception
                await too_large.response()(scope, receive, told)
            elif size <= self._most:
                await told(message)

        async def told(message: Message) -> None:
            nonlocal status, has_begun
            if message["type"] == "http.response.start":
                status, has_begun = message["status"], True
                own = [(b"x-request-id", number.encode()), (b"x-content-type-options", b"nosniff")]
                if scope["path"] == "/" or scope["path"].startswith("/static/"):
                    own += OF_THE_PAGE
                message["headers"] = [*message["headers"], *own]
            await send(message)

        try:
            declared = dict(scope["headers"]).get(b"content-length", b"0")
            if declared.isdigit() and int(declared) > self._most:
                await too_large.response()(scope, receive, told)
            else:
                await self._app(scope, limited, counted)
        except Exception as error:
            log.error("a request failed", exc_info=error)
            if has_begun:
                raise
            await ApiError(500, "the server failed; see its log").response()(scope, receive, told)
        finally:
            seconds = time.monotonic() - begun
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.answered(route, status, seconds)
            if route.startswith("/v1"):
                line = {"id": number, "route": route, "status": status}
                line |= {"seconds": round(seconds, 4), **scope.get("flexolmo", {})}
                log.info(json.dumps(line))
