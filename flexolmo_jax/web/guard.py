"""What every request passes: a limit on its body, a line in the log, a count."""

import asyncio
import json
import logging
import secrets
import time
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flexolmo_jax.web.errors import ApiError

# An upgrade must not mix old and new files, and no other site may show the page as its own.
OF_THE_PAGE = [
    (b"cache-control", b"no-cache"),
    (b"content-security-policy", b"frame-ancestors 'none'"),
]
log = logging.getLogger("flexolmo_jax.web.requests")


class Guard:
    """Middleware. A line of the log has no text of a prompt or an answer, and no key.

    Args:
      most: bytes of a body.
      seconds: in which a body has to arrive.
      answered: is told the route, the status and the seconds of each answer.
    """

    def __init__(
        self, app: ASGIApp, most: int, seconds: float, answered: Callable[[str, int, float], None]
    ):
        self._app, self._most, self._seconds, self._answered = app, most, seconds, answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun, status, number = time.monotonic(), 499, secrets.token_hex(8)
        too_large = ApiError(413, f"expected a body of at most {self._most} bytes")
        too_slow = ApiError(408, f"expected the whole body within {self._seconds:g} seconds")
        size, has_begun, is_read, refusal = 0, False, False, None

        async def limited() -> Message:
            nonlocal size, is_read, refusal
            try:
                async with asyncio.timeout(
                    None if is_read else begun + self._seconds - time.monotonic()
                ):
                    message = await receive()
            except TimeoutError:
                refusal = too_slow
                raise refusal from None
            size += len(message.get("body", b""))
            is_read = not message.get("more_body", False)
            if size > self._most:
                refusal = too_large
                raise refusal
            return message

        async def counted(message: Message) -> None:
            if refusal is None:
                await told(message)
            elif status != refusal.status:  # whatever was made of the exception
                await refusal.response()(scope, receive, told)

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
            self._answered(route, status, seconds)
            if route.startswith("/v1"):
                line = {"id": number, "route": route, "status": status}
                line |= {"seconds": round(seconds, 4), **scope.get("flexolmo", {})}
                log.info(json.dumps(line))
