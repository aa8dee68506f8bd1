"""The tokenizer over HTTP, as vLLM offers it: lm-evaluation-harness finds and uses it by itself."""

import asyncio

import fastapi
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from flexolmo_jax.data.tokenizer import Tokenizer
from flexolmo_jax.serving.protocol import MAX_TOKEN_LISTS, Strict, Token
from flexolmo_jax.serving.service import service_of
from flexolmo_jax.web.errors import ApiError, Json

routes = fastapi.APIRouter()


class Text(Strict):
    prompt: str
    model: str | None = None
    add_special_tokens: bool = True


class Tokens(Strict):
    tokens: list[Token] = Field(max_length=MAX_TOKEN_LISTS)
    model: str | None = None


@routes.get("/tokenizer_info")
async def tokenizer_info(request: Request) -> Response:
    """The token that opens and ends documents, and the model's chat template."""
    separator = _tokenizer(request).separator_text
    template = service_of(request).chat_template
    return Json({"bos_token": separator, "eos_token": separator, "chat_template": template})


@routes.post("/tokenize")
async def tokenize(request: Request, body: Text) -> Response:
    """Ids of a text; control tokens that it spells are read as such."""
    tokenizer = _tokenizer(request)
    try:
        ids = await asyncio.to_thread(
            tokenizer.encode_as_transformers, body.prompt, body.add_special_tokens
        )
    except (ValueError, TypeError) as error:
        raise ApiError(400, str(error), "prompt") from error
    length = service_of(request).runner.length
    return Json({"tokens": ids, "count": len(ids), "max_model_len": length})


@routes.post("/detokenize")
async def detokenize(request: Request, body: Tokens) -> Response:
    """The text of ids."""
    tokenizer = _tokenizer(request)
    if any(not 0 <= token < tokenizer.vocab_size for token in body.tokens):
        raise ApiError(400, f"expected ids in [0, {tokenizer.vocab_size})", "tokens")
    return Json({"prompt": tokenizer.decode(body.tokens)})


def _tokenizer(request: Request) -> Tokenizer:
    service = service_of(request)
    service.policy(request.headers.get("authorization"))
    service.sources.check()
    if service.model.tokenizer is None:
        raise ApiError(404, "this model has no tokenizer", code="no_tokenizer")
    return service.model.tokenizer
