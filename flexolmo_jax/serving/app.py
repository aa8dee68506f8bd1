"""The routes of the server."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import fastapi
import numpy as np
from starlette.requests import Request
from starlette.responses import FileResponse, Response, StreamingResponse
from starlette.staticfiles import StaticFiles

from flexolmo_jax.inference.mass import shares_by_name
from flexolmo_jax.model import FlexOlmo
from flexolmo_jax.serving import answers, tokens
from flexolmo_jax.serving.chat import as_text
from flexolmo_jax.serving.completions import Admission, Part, admit, usage
from flexolmo_jax.serving.keys import Policy
from flexolmo_jax.serving.protocol import MAX_CHOICES, Chat, Common, Completion, TraceOf
from flexolmo_jax.serving.service import Service, Settings, service_of
from flexolmo_jax.version import __version__
from flexolmo_jax.web.errors import ApiError, Json
from flexolmo_jax.web.guard import Guard
from flexolmo_jax.web.handlers import add_handlers

LONG_PROMPT = 20_000  # characters; others are answered while longer ones become tokens
STATIC = Path(__file__).with_name("static")
ERRORS: Any = {
    status: {"description": text}
    for status, text in {
        400: "a parameter is wrong", 401: "no known key", 403: "the key does not permit it",
        404: "no such model", 410: "the expert was withdrawn or revoked",
        413: "the body is too large", 429: "the key's limit is reached",
        503: "no room, shutting down, or the model may not be used",
    }.items()
}  # fmt: skip
log = logging.getLogger("flexolmo_jax.serving")


def make_app(settings: Settings, model: FlexOlmo) -> fastapi.FastAPI:
    """The server's application, for uvicorn or any other ASGI server.

    Raises:
      ValueError: as `Service`.
    """
    service = Service(settings, model)

    @contextlib.asynccontextmanager
    async def lifespan(app: fastapi.FastAPI) -> AsyncIterator[None]:
        service.runner.open()
        watching = asyncio.create_task(service.watch())
        yield
        watching.cancel()
        await service.runner.close()
        if service.usage is not None:
            await asyncio.to_thread(service.usage.close)

    app = fastapi.FastAPI(
        title="flexolmo serve",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,  # these pages would load scripts from another site
        redoc_url=None,
    )
    app.state.service = service
    app.include_router(routes)
    app.include_router(tokens.routes)
    app.mount("/static", StaticFiles(directory=STATIC), name="static")
    app.add_middleware(
        Guard,
        most=settings.body,
        seconds=settings.seconds,
        answered=service.metrics.answered,
    )
    add_handlers(app)
    return app


routes = fastapi.APIRouter()


@routes.get("/", include_in_schema=False)
async def page() -> Response:
    return FileResponse(STATIC / "index.html")


@routes.get("/health")
async def health(request: Request) -> Response:
    """The process answers, its engine works, and its model may be used."""
    service = service_of(request)
    if service.runner.is_broken:
        return Json({"status": "broken"}, 503)
    if service.sources.refused is not None:
        return Json({"status": "refused", "reason": service.sources.refused}, 503)
    return Json({"status": "ok"})


@routes.get("/ready")
async def ready(request: Request) -> Response:
    """New requests are taken."""
    service = service_of(request)
    if service.is_draining:
        return Json({"status": "draining"}, 503)
    service.sources.check()
    return Json({"status": "ready"})


@routes.get("/metrics")
async def metrics(request: Request) -> Response:
    """For Prometheus. With keys it needs one; the experts are shown to a key for all of them."""
    service = service_of(request)
    policy = service.policy(request.headers.get("authorization"))
    text = service.metrics.text(
        service.runner.count, service.sources, with_experts=policy.experts is None
    )
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


@routes.get("/v1/models", responses=ERRORS)
async def models(request: Request) -> Response:
    """The model, and its names that stand for some of its experts."""
    own = _models(request)
    return Json({"object": "list", "data": list(own.values())})


@routes.get("/v1/models/{name}", responses=ERRORS)
async def one_model(request: Request, name: str) -> Response:
    own = _models(request)
    if name not in own:
        raise ApiError(404, f"no model named {name!r}", "model", "model_not_found")
    return Json(own[name])


@routes.post("/v1/completions", responses=ERRORS)
async def completions(request: Request, body: Completion) -> Response:
    prompt: Any = body.prompt
    is_one = isinstance(prompt, str) or isinstance(prompt[0], int)
    prompts = [prompt] if is_one else prompt
    return await _complete(request, body, prompts)


@routes.post("/v1/chat/completions", responses=ERRORS)
async def chat(request: Request, body: Chat) -> Response:
    service = service_of(request)
    template, tokenizer = service.template, service.model.tokenizer
    if template is None or tokenizer is None:
        raise ApiError(
            400,
            "this model has no chat template; use /v1/completions, or start the server with "
            "--chat-template FILE",
            "messages",
            "no_chat_template",
        )
    return await _complete(
        request, body, [as_text(template, body.messages, tokenizer.separator_text)]
    )


@routes.post("/v1/trace", responses=ERRORS)
async def trace(request: Request, body: TraceOf) -> Response:
    """Where the words of an answer stand in owners' documents, as far as the owners say it."""
    service = service_of(request)
    policy = service.policy(request.headers.get("authorization"))
    request.scope["flexolmo"] = {"key": policy.name}
    if service.traces is None:
        raise ApiError(
            404, "this server traces no answers (it has no --trace-owners)", code="no_traces"
        )
    service.sources.check()
    permitted = service.sources.permitted(policy)
    return Json(await service.traces.trace(body.id, policy, permitted))


def _models(request: Request) -> dict[str, dict[str, Any]]:
    service = service_of(request)
    policy = service.policy(request.headers.get("authorization"))
    service.sources.check()
    own = service.sources.models(policy)
    always_on = [name for name in service.sources.permitted(policy) if name in policy.always_on]
    return {
        name: {
            "id": name,
            "object": "model",
            "created": service.created,
            "owned_by": "flexolmo_jax",
            "parent": None if name == service.settings.name else service.settings.name,
            "experts": list(experts),
            "always_on": always_on,
            "max_length": service.runner.length,
            "expert_mass": policy.expert_mass,
            "traces": [] if service.traces is None else service.traces.names(experts),
        }
        for name, experts in own.items()
    }


async def _admit(
    service: Service, body: Completion | Chat, prompts: list[Any], policy: Policy
) -> tuple[np.ndarray, Admission]:
    """The experts that a body may use, bool [E], and its requests."""
    while True:
        sources, model = service.sources, service.model
        mask = sources.mask(body.model, body.experts, policy)
        given = (body, prompts, model, mask, service.length_for(policy))
        if sum(map(len, prompts)) < LONG_PROMPT:
            return mask, admit(*given)
        admission = await asyncio.to_thread(admit, *given)
        # Experts may have come or gone meanwhile; then the mask is of others.
        if service.sources is sources and service.model is model:
            return mask, admission


async def _complete(request: Request, body: Completion | Chat, prompts: list[Any]) -> Response:
    service = service_of(request)
    policy = service.policy(request.headers.get("authorization"))
    _check_mass(body, policy)
    count = len(prompts) * (body.n or 1)
    if count > MAX_CHOICES:
        raise ApiError(400, f"expected at most {MAX_CHOICES} choices, found {count}", "n")
    if body.trace:
        _check_trace(service, count)
    mask, admission = await _admit(service, body, prompts, policy)
    service.check_room(policy, count, admission.tokens)
    request.scope["flexolmo"] = {"key": policy.name, "model": body.model}
    form = answers.Form(body, service.model.expert_names, service.model.tokenizer)
    running = _Running(service, policy, admission, request)
    prompt = prompts[0] if isinstance(prompts[0], str) else ""
    experts = [name for name, on in zip(service.sources.names, mask, strict=True) if on]
    answer = _Answer(running, form, body, prompt, experts)
    if body.stream:
        return _Events(running, answer.events())
    with running:
        whole = asyncio.create_task(answer.whole())
        gone = asyncio.create_task(_disconnected(request))
        try:
            await asyncio.wait((whole, gone), return_when=asyncio.FIRST_COMPLETED)
            if not whole.done():  # nobody will read it
                return Response(status_code=499)
            return Json(whole.result())
        finally:
            whole.cancel()
            gone.cancel()


def _check_trace(service: Service, count: int) -> None:
    if service.traces is None:
        raise ApiError(
            400, "this server traces no answers (it has no --trace-owners)", "trace", "no_traces"
        )
    if count != 1:
        raise ApiError(400, f"trace: expected one choice, found {count}", "trace")


def _check_mass(body: Common, policy: Policy) -> None:
    allowed = {"token": ("token", "request"), "request": ("request",), "none": ()}
    if body.expert_mass is not None and body.expert_mass not in allowed[policy.expert_mass]:
        raise ApiError(
            403,
            f"this key may not see the experts' shares of each {body.expert_mass}",
            "expert_mass",
            "not_permitted",
        )


class _Running(contextlib.AbstractContextManager):
    """A request that runs from now on: counted, and at its end cancelled if it still runs."""

    def __init__(self, service: Service, policy: Policy, admission: Admission, request: Request):
        self.service, self.policy = service, policy
        self.admission, self.request = admission, request
        self._arrived, self._has_begun = time.monotonic(), False
        self._names = service.model.expert_names
        self._meter = service.meter(policy)
        self._meter.begin(admission.tokens)
        usage_log = service.usage
        self._record = None if usage_log is None else usage_log.begin(admission, policy.name)
        try:
            admission.start(service.runner)
        except BaseException:
            self.__exit__()
            raise

    async def parts(self) -> AsyncIterator[Part | None]:
        """As `Admission.parts`; what failed in the engine is an ApiError."""
        service = self.service
        async for part in self.admission.parts(service.runner, service.settings.seconds):
            if part is not None and part.pieces and not self._has_begun:
                service.metrics.first_token(time.monotonic() - self._arrived)
                self._has_begun = True
            if part is not None and part.ended == "error":
                raise ApiError(500, "the engine failed; see the server's log", code="engine_error")
            yield part

    def __exit__(self, *_: Any) -> None:
        admission, metrics = self.admission, self.service.metrics
        admission.cancel(self.service.runner)
        used = usage(admission)
        self._meter.end(admission.tokens, used.pop("total_tokens"))
        self.request.scope["flexolmo"] |= used
        metrics.read(admission.prompt_tokens)
        for choice in admission.choices:
            metrics.generated(choice.generated, shares_by_name(self._names, choice.shares))
        if self._record is not None:
            self._record()


class _Answer:
    """The answer to one body, whole or as events; it is traced at its end, where that is asked for.

    Args:
      running: the request.
      form: how it is answered.
      body, prompt: what was asked.
      experts: that may take part in it.
    """

    def __init__(
        self,
        running: _Running,
        form: answers.Form,
        body: Common,
        prompt: str,
        experts: Sequence[str],
    ):
        self._running, self._form, self._body = running, form, body
        self._prompt, self._experts, self._text = prompt, experts, ""

    async def whole(self) -> dict[str, Any]:
        parts = [part async for part in self._parts() if part is not None]
        made = self._form.whole(self._running.admission, parts)
        trace = await self._trace()
        return made if trace is None else {**made, "trace": trace}

    async def events(self) -> AsyncIterator[bytes]:
        admission = self._running.admission
        try:
            async for part in self._parts():
                if part is None:
                    yield answers.KEEP_ALIVE
                    continue
                for chunk in self._form.events(admission, part):
                    yield chunk
            for chunk in self._form.usage_events(admission):
                yield chunk
            trace = await self._trace()
            if trace is not None:
                yield self._form.trace_event(trace)
        except ApiError as error:
            yield answers.event(error.body())
        yield answers.DONE

    async def _parts(self) -> AsyncIterator[Part | None]:
        async for part in self._running.parts():
            if part is not None:  # without the prompt's pieces, which `echo` puts first
                self._text += "".join(x.text for x in part.pieces if x.shares is not None)
            yield part

    async def _trace(self) -> dict[str, Any] | None:
        """Where the owners say that the answer's words stand; or why that is not known."""
        service, policy = self._running.service, self._running.policy
        if service.traces is None or len(self._running.admission.choices) != 1:
            return None
        service.traces.keep(self._form.id, policy, self._prompt, self._text, self._experts)
        if not self._body.trace:
            return None
        try:
            permitted = service.sources.permitted(policy)
            return await service.traces.trace(self._form.id, policy, permitted)
        except ApiError as error:  # the answer itself is there
            return error.body()


class _Events(StreamingResponse):
    """The answer as server-sent events; a client that vanishes frees its slots."""

    def __init__(self, running: _Running, events: AsyncIterator[bytes]):
        self._running = running
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # no proxy holds it back
        super().__init__(events, media_type="text/event-stream", headers=headers)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        with self._running:
            await super().__call__(scope, receive, send)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
