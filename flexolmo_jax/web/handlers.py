"""Errors of the framework, in the form of our own."""

import fastapi
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from flexolmo_jax.web.errors import ApiError


def add_handlers(app: fastapi.FastAPI) -> None:
    """Answers every refusal as an `ApiError`: what is wrong, in which parameter."""
    for kind, handler in (
        (ApiError, _refused),
        (RequestValidationError, _invalid),
        (HTTPException, _http_error),
    ):
        app.add_exception_handler(kind, handler)  # type: ignore[arg-type]


async def _refused(request: Request, error: ApiError) -> Response:
    return error.response()


async def _invalid(request: Request, error: RequestValidationError) -> Response:
    """The first thing that is wrong with a body, and where."""
    first = error.errors()[0]
    places = [str(x) for x in first["loc"] if x not in ("body", "path", "query")]
    param = ".".join(places) or None
    message = str(first["msg"]).removeprefix("Value error, ")
    if param is None and first["type"] == "value_error":
        name, is_named, _ = message.partition(":")
        param = name if is_named and name.isidentifier() else None
    if first["type"] == "extra_forbidden":
        message = "unknown parameter"
    if first["type"] == "json_invalid":
        param, message = None, f"the body is not JSON: {first.get('ctx', {}).get('error', '')}"
    kind = request.headers.get("content-type", "none")
    if param is None and first["type"] == "model_attributes_type" and "json" not in kind:
        message = f"expected the header `Content-Type: application/json`, found {kind[:100]}"
    said = f"{param}: {message}" if param else message
    return ApiError(400, said, param, "invalid_value").response()


async def _http_error(request: Request, error: HTTPException) -> Response:
    message = f"{request.method} {request.url.path}: {error.detail}"
    return ApiError(error.status_code, message, headers=error.headers).response()
