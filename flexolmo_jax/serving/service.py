"""The state of a server: its model, who may use it, and what it has to do now."""

import asyncio
import dataclasses
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
from starlette.requests import Request

from flexolmo_jax.federation.package import MANIFEST, read_manifest
from flexolmo_jax.model import FlexOlmo, load
from flexolmo_jax.parallel.mesh import make_mesh
from flexolmo_jax.serving.chat import find_template, parse_template
from flexolmo_jax.serving.keys import KEYS, OPEN, Policy
from flexolmo_jax.serving.metrics import Metrics
from flexolmo_jax.serving.runner import Runner
from flexolmo_jax.serving.signed import GRACE, Followed
from flexolmo_jax.serving.sources import Sources
from flexolmo_jax.serving.traces import Traces
from flexolmo_jax.serving.usage import Usage, digest_of
from flexolmo_jax.trust.signatures import signature_file
from flexolmo_jax.usage.ledger import Ledger
from flexolmo_jax.usage.signing import read_private
from flexolmo_jax.web.errors import ApiError
from flexolmo_jax.web.followed import state
from flexolmo_jax.web.keys import Meter, holder_of

WATCH_SECONDS = 1.0
log = logging.getLogger("flexolmo_jax.serving")


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a model is served.

    Attributes:
      path: of the model.
      name: under which clients know it.
      anchor, dtype, separator: as in `load`.
      slots: how many requests run at a time.
      length: the most tokens of a prompt and its answer; None: what the model was made for.
      waiting: how many requests may wait for a slot.
      seconds: that a request may take.
      body: bytes of a request, at most.
      keys: a file of keys; None: anybody may do anything.
      expert_parallel: how many devices share the experts of a model that is spread over all of
        them; None: one device, if there is one process.
      profiles: further names of the model, each with the experts that it stands for.
      usage: a ledger of what every expert did; None: none is kept.
      usage_key: the private key that signs it.
      usage_askers: name the keys in it.
      counterfactual: the share of answers that are scored again without each expert.
      trace_owners: a file of owners who answer traces; None: answers are not traced.
      chat_template: a Jinja template; None: that of a Hugging Face directory, if it has one.
      require_signed: the registry that says who may sign the model's packages; None: nobody need.
    """

    path: Path
    name: str
    anchor: Path | None = None
    dtype: str | None = None
    separator: str | None = None
    slots: int = 16
    length: int | None = None
    waiting: int = 256
    seconds: float = 300.0
    body: int = 1 << 20
    keys: Path | None = None
    expert_parallel: int | None = None
    profiles: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    usage: Path | None = None
    usage_key: Path | None = None
    usage_askers: bool = False
    counterfactual: float = 0.0
    trace_owners: Path | None = None
    chat_template: str | None = None
    require_signed: Path | None = None


class Service:
    """A model that is served.

    Args:
      settings: how.
      model: that `settings.path` holds.

    Raises:
      ValueError: the file of keys, the chat template, the ledger or the registry is damaged; a
        profile names an expert that the model has not.

    Attributes:
      sources: the experts, and who may use them.
      runner: of the engine.
      is_draining: no new requests are taken.
      template: of chats, or None; `chat_template` is its text.
      usage: tells the ledger, if there is one.
      traces: of answers, or None.
      created: when it began, in seconds since 1970.
    """

    def __init__(self, settings: Settings, model: FlexOlmo):
        self.settings, self.metrics, self.is_draining = settings, Metrics(), False
        self.created = int(time.time())
        stray = {x for own in settings.profiles.values() for x in own} - set(model.expert_names)
        if stray:
            raise ValueError(
                f"a profile names {', '.join(sorted(stray))}; the model's experts are "
                f"{', '.join(model.expert_names)}"
            )
        self.chat_template = settings.chat_template or find_template(settings.path)
        self.template = None
        if self.chat_template:
            self.template = parse_template(self.chat_template, str(settings.path))
        self.sources = Sources(settings.name, model.expert_names, profiles=settings.profiles)
        self.traces = None if settings.trace_owners is None else Traces(settings.trace_owners)
        self._policies = {policy.sha256: policy for policy in self._read_keys()}
        length = settings.length or model.config.max_length
        self.runner = Runner(model, settings.slots, length)
        self._meters: dict[str, Meter] = {}
        self._seen_keys = state(settings.keys)
        self._seen_model = self._state_of_model()
        self._entries: frozenset[str] | None = None  # names in a manifest that has changed
        self._has_changed = asyncio.Event()
        self._failed: dict[str, str] = {}  # what could not be followed, and why
        self.usage = self._open_usage()
        required = settings.require_signed
        self._registry = None if required is None else Followed(required)
        self._apply_registry()

    @property
    def model(self) -> FlexOlmo:
        return self.runner.model

    def policy(self, authorization: str | None) -> Policy:
        """Whose key a request has.

        Raises:
          ApiError: 401, it has none that is known.
        """
        if self.settings.keys is None:
            return OPEN
        return holder_of(authorization, self._policies)

    def check_room(self, policy: Policy, requests: int, tokens: int) -> None:
        """Raises ApiError if the server, or the key's policy, has no room for requests now.

        Args:
          requests: of the engine.
          tokens: of their prompts and answers, at most.
        """
        if self.is_draining:
            raise ApiError(503, "the server is shutting down", code="shutdown")
        waiting = self.runner.count - self.settings.slots
        if waiting + requests > self.settings.waiting:
            raise ApiError(
                503,
                f"{self.runner.count} requests run or wait already; try again later",
                code="overloaded",
                headers={"Retry-After": "5"},
            )
        meter = self.meter(policy)
        if policy.concurrency is not None and meter.running >= policy.concurrency:
            raise ApiError(
                429,
                f"this key may have {policy.concurrency} requests at a time",
                code="concurrency",
                headers={"Retry-After": "1"},
            )
        if policy.tokens_per_minute is not None:
            self._check_rate(policy.tokens_per_minute, tokens, meter)

    def length_for(self, policy: Policy) -> int:
        """The most tokens of a prompt and its answer."""
        return min(self.runner.length, policy.tokens_per_minute or self.runner.length)

    def _check_rate(self, per_minute: int, tokens: int, meter: Meter) -> None:
        if tokens > per_minute:
            raise ApiError(
                400,
                f"prompts and answers may have {tokens} tokens, and this key {per_minute} a minute",
                "max_tokens",
                "rate_limit_exceeded",
            )
        wait = meter.seconds_until(tokens, per_minute)
        if wait > 0:
            raise ApiError(
                429,
                f"this key may use {per_minute} tokens a minute; {tokens} more are possible in "
                f"{wait:.0f} seconds",
                code="rate_limit_exceeded",
                headers={"Retry-After": str(int(wait) + 1)},
            )

    def meter(self, policy: Policy) -> Meter:
        """What a key has used."""
        return self._meters.setdefault(policy.name, Meter())

    async def watch(self) -> None:
        """Follows the merged model's manifest and the file of keys, until it is cancelled."""
        tasks = [asyncio.create_task(self._load_changes())]
        if self._registry is not None:
            tasks.append(asyncio.create_task(self._follow_registry(self._registry)))
        if self.usage is not None:
            tasks.append(asyncio.create_task(self.usage.watch()))
        try:
            while True:
                await asyncio.sleep(WATCH_SECONDS)
                self._try("keys", self._follow_keys)
                self._try("model", self._follow_manifest)
        finally:
            for task in tasks:
                task.cancel()

    def _try(self, what: str, follow: Callable[[], None]) -> None:
        """What cannot be read changes nothing, is logged once, and is tried again."""
        try:
            follow()
            self._failed.pop(what, None)
        except Exception as error:
            if self._failed.get(what) != str(error):
                self._failed[what] = str(error)
                log.warning("the %s stay as they are: %s", what, error)

    def _follow_keys(self) -> None:
        seen = state(self.settings.keys)
        if seen == self._seen_keys:
            return
        self._policies = {policy.sha256: policy for policy in self._read_keys()}
        self._seen_keys = seen
        log.info("the keys were read again: %d", len(self._policies))

    def _follow_manifest(self) -> None:
        """Takes experts off that are gone, at once: masks do it bit for bit, before any load."""
        seen = self._state_of_model()
        if seen == self._seen_model:
            return
        manifest = read_manifest(self.settings.path)
        self._seen_model = seen
        if manifest["kind"] == "merged":
            self._entries = frozenset(entry["name"] for entry in manifest["experts"])
            gone = set(self.sources.names[1:]) - self._entries
            withdrawn = self.sources.withdrawn | gone
            self.sources = dataclasses.replace(self.sources, withdrawn=withdrawn)
            self.runner.withdraw(sorted(gone))
        self._has_changed.set()

    def _state_of_model(self) -> tuple[object, ...]:
        """A signature comes after the manifest that it signs, so that both are followed."""
        path, is_signed = self.settings.path, self.settings.require_signed is not None
        return state(path / MANIFEST), state(signature_file(path)) if is_signed else None

    async def _follow_registry(self, registry: Followed) -> None:
        """Whatever is revoked is not used any more from the next second on."""
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            try:
                await asyncio.to_thread(registry.follow)
                self._failed.pop("registry", None)
            except Exception as error:
                if self._failed.get("registry") != str(error):
                    self._failed["registry"] = str(error)
                    log.error("in %d s nothing is served: %s", GRACE, error)
            self._apply_registry()

    def _apply_registry(self) -> None:
        """Ends requests that use what may not be used now, and admits no more of them."""
        if self._registry is None:
            return
        before, now = self.sources, self._registry.standing(self.model.signed)
        self.sources = dataclasses.replace(before, revoked=now.revoked, refused=now.refused)
        for name in now.revoked.keys() - before.revoked.keys():
            log.error("the expert %s is not used any more: %s", name, now.revoked[name])
        for name in before.revoked.keys() - now.revoked.keys():
            log.info("the expert %s is no longer revoked", name)
        self.runner.withdraw(sorted(now.revoked))
        if now.refused is not None:
            self.runner.withdraw(self.model.expert_names)
        if now.refused != before.refused:
            said = "is served again" if now.refused is None else f"is not served: {now.refused}"
            log.error("the model %s", said)

    async def _load_changes(self) -> None:
        while True:
            await self._has_changed.wait()
            self._has_changed.clear()
            try:
                await self._load()
            except Exception as error:
                log.warning("the model stays as it is, less what was withdrawn: %s", error)

    async def _load(self) -> None:
        begun = time.monotonic()
        digest = digest_of(self.settings.path)
        model = await self.runner.replace(lambda: load_served(self.settings))
        if self.usage is not None:
            self.usage.digest = digest
        names, known = model.expert_names, {*self.sources.names[1:], *model.expert_names[1:]}
        # Of what is in memory, an expert may have gone again while it was loaded.
        present = set(names) if self._entries is None else set(names) & self._entries
        withdrawn = (self.sources.withdrawn | known) - present
        self.sources = dataclasses.replace(self.sources, names=names, withdrawn=withdrawn)
        self._apply_registry()  # what was revoked meanwhile, too
        seconds = time.monotonic() - begun
        log.info("now serving %s (%.1f s)", ", ".join(self.sources.served), seconds)

    def _open_usage(self) -> Usage | None:
        own = self.settings
        if own.usage is None or own.usage_key is None:
            return None
        digest, ledger = digest_of(own.path), Ledger(own.usage, read_private(own.usage_key))
        sampled = (own.counterfactual, own.usage_askers)
        return Usage(ledger, self.runner, lambda: self.sources, digest, *sampled)

    def _read_keys(self) -> list[Policy]:
        return [] if self.settings.keys is None else KEYS.read(self.settings.keys)


def service_of(request: Request) -> Service:
    """The service of the application that a request is for."""
    return request.app.state.service


def load_served(settings: Settings) -> FlexOlmo:
    """The model that is served, from its files."""
    share = settings.expert_parallel
    if share is None and jax.process_count() > 1:
        share = 1
    return load(
        settings.path,
        anchor=settings.anchor,
        dtype=settings.dtype,
        separator=settings.separator,
        mesh=None if share is None else make_mesh(share),
        keys=settings.require_signed,
    )
