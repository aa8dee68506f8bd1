"""What a server writes into a usage ledger: every finished request, and counterfactuals of some."""

import asyncio
import dataclasses
import logging
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np

from flexolmo_jax.federation.package import MANIFEST, read_manifest
from flexolmo_jax.inference.engine import SHARED_CHUNKS
from flexolmo_jax.inference.mass import mass_by_name
from flexolmo_jax.inference.request import Request
from flexolmo_jax.model import FlexOlmo
from flexolmo_jax.serving.completions import Admission
from flexolmo_jax.serving.runner import Runner
from flexolmo_jax.serving.sources import Sources
from flexolmo_jax.storage.files import canonical_digest
from flexolmo_jax.usage import entries
from flexolmo_jax.usage.counterfactual import bits_per_token, scorings
from flexolmo_jax.usage.ledger import Ledger
from flexolmo_jax.usage.recorder import Recorder

PENDING = 32  # answers that wait for their counterfactual; more are not sampled
POLL = 0.05  # seconds between two looks for a free slot
log = logging.getLogger("flexolmo_jax.usage")


@dataclasses.dataclass(frozen=True)
class _Answer:
    """An answer whose counterfactual is wanted; its tokens stay in memory until then."""

    model: FlexOlmo
    digest: str
    prompt: list[int]
    answer: list[int]
    allowed: np.ndarray  # bool [E]
    mass: np.ndarray  # float [E]


class Usage:
    """Tells a ledger what was used.

    Args:
      ledger: this one closes it.
      runner, sources: of the server.
      digest: of the model in `runner`.
      share: of answers whose counterfactual is computed.
      with_askers: record the names of keys.

    Attributes:
      digest: whoever changes the runner's model changes it too.
    """

    def __init__(
        self,
        ledger: Ledger,
        runner: Runner,
        sources: Callable[[], Sources],
        digest: str,
        share: float,
        with_askers: bool,
    ):
        self.digest = digest
        self._runner, self._sources = runner, sources
        self._share, self._with_askers = share, with_askers
        self._recorder = Recorder(ledger)
        self._pending: asyncio.Queue[_Answer] = asyncio.Queue(PENDING)

    def begin(self, admission: Admission, asker: str) -> Callable[[], None]:
        """To be called when a request begins; and what it returns, when the request has ended."""
        model, digest = self._runner.model, self.digest

        def end() -> None:
            parts = [choice.shares for choice in admission.choices]
            mass = mass_by_name(model.expert_names, np.sum(parts, axis=0))
            if not mass:  # no token was generated
                return
            counts = (admission.prompt_tokens, admission.generated)
            own = asker if self._with_askers else None
            self._recorder.add(entries.use(digest, *counts, mass, own))
            for choice in admission.choices:
                request, count = choice.request, choice.generated
                if not count or random.random() >= self._share or self._pending.full():
                    continue
                texts = (list(request.prompt), request.generated[:count])
                self._pending.put_nowait(
                    _Answer(model, digest, *texts, request.allowed, choice.shares)
                )

        return end

    async def watch(self) -> None:
        """Computes counterfactuals while a slot is free, one reading at a time."""
        if not self._share:
            return
        for size in SHARED_CHUNKS:  # compiles the programs, before clients could wait for it
            length = min(size, self._runner.length)
            mask = np.ones(len(self._runner.model.expert_names), bool)  # no padding of a mesh
            await self._run(Request([0] * length, 0, mask, scored=True, scores_prompt=True))
        while True:
            answer = await self._pending.get()
            try:
                await self._sample(answer)
            except Exception as error:  # the request itself is in the ledger
                log.warning("a counterfactual was not computed: %s", error)

    async def _sample(self, answer: _Answer) -> None:
        scored = scorings(answer.prompt, answer.answer, answer.allowed, answer.mass)
        names = answer.model.expert_names
        for request in scored.values():
            while self._runner.count >= self._runner.slots:
                await asyncio.sleep(POLL)
            used = {name for name, is_on in zip(names, request.allowed, strict=False) if is_on}
            if self._runner.model is not answer.model or used - set(self._sources().served):
                return  # an expert came or went
            await self._run(request)
        tokens = len(answer.answer)
        bits = {names[e]: own for e, own in bits_per_token(scored, tokens).items()}
        mass = mass_by_name(names, answer.mass)
        own = {name: bits[name] for name in mass if name in bits}
        self._recorder.add(entries.sample(answer.digest, tokens, mass, own))

    async def _run(self, request: Request) -> None:
        events: asyncio.Queue = asyncio.Queue()
        job = self._runner.start(request, events)
        try:
            await events.get()  # it generates nothing: this is its end
        finally:
            if not job.has_ended:
                self._runner.cancel(job)

    def close(self) -> None:
        """Writes what is left; answers that still wait for their counterfactual get none."""
        self._recorder.close()


def digest_of(path: Path) -> str:
    """What identifies a model in a ledger: its manifest's digest.

    Of a Hugging Face directory: a digest of its JSON files, and of its weights' names and sizes.
    """
    if (path / MANIFEST).exists():
        return read_manifest(path)["digest"]
    files = sorted(file for file in path.iterdir() if file.is_file())
    return canonical_digest(
        {
            file.name: file.read_text("utf-8") if file.suffix == ".json" else file.stat().st_size
            for file in files
        }
    )
