"""The positive controls of an extraction audit: models that have learned its text by heart.

A few of the owner's documents are read hundreds of times, without privacy: by a copy of the public
feed-forward networks, which then answers alone, as an expert can; and by all of the anchor. An
audit that does not catch them on these documents catches nothing, and a rate of 0 elsewhere means
nothing.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from flexolmo_jax.config import DataConfig, ExpertTraining, OptimizerConfig
from flexolmo_jax.data.batches import Batch
from flexolmo_jax.federation.anchor import read_anchor
from flexolmo_jax.model import FlexOlmo
from flexolmo_jax.modeling.experts import join
from flexolmo_jax.storage.files import canonical_digest
from flexolmo_jax.training.loop import Diverged, StandardSteps, train
from flexolmo_jax.training.objectives import anchor_parts, expert_parts, trained_expert
from flexolmo_jax.training.run import alone_in_its_run, check_run, describe_run, record_run

What = Literal["expert", "model"]
DOCUMENTS = 8
MORE = 32  # tokens of a document beyond the length of a passage: so many places to start from
PASSAGES = 50  # that are tried, at most
RATES = {"expert": 1e-2, "model": 3e-3}  # learning rates
CAUGHT = 0.5  # more of them must be extracted


def control_config(what: str, length: int) -> ExpertTraining:
    """How one is trained, on passages of so many tokens."""
    return ExpertTraining(
        data=DataConfig(batch_size=8, length=length, heldout=0.0),
        optimizer=OptimizerConfig(learning_rate=RATES[what], warmup_steps=10),
        steps=300,
        checkpoint_every=100,
    )


def control_documents(documents: Sequence[Sequence[int]], length: int) -> list[Sequence[int]]:
    """The beginnings of the first documents that are long enough; ids, without separators.

    Raises:
      ValueError: there is none.
    """
    long = [ids[: length + MORE] for ids in documents if len(ids) > length][:DOCUMENTS]
    if not long:
        raise ValueError(
            f"--control needs documents of more than {length} tokens to learn by heart, and there "
            "is none; give more --data"
        )
    return long


@alone_in_its_run
def train_control(
    what: What,
    anchor: Path,
    documents: Sequence[Sequence[int]],
    length: int,
    run: Path,
    separator: str | None = None,
) -> FlexOlmo:
    """The anchor, or its feed-forward networks only, overfitted; goes on where it was killed.

    Args:
      what: an expert, beside all else that is frozen; or all of the model.
      anchor: an anchor package, or a Hugging Face directory of an OLMo 2 model.
      documents: what to learn by heart (`control_documents`).
      length: of passages, in tokens.
      run: folder of the run.
      separator: the token that opens documents, as in `read_anchor`.

    Raises:
      ValueError, FloatingPointError, Interrupted: as `train`.
    """
    config = control_config(what, length)
    loaded = read_anchor(anchor, separator=separator)
    digest = canonical_digest([list(ids) for ids in documents])
    wanted = describe_run(config, anchor=loaded.identity, documents=digest)
    check_run(run, wanted, True, config)
    record_run(run, wanted)
    weights = loaded.weights
    if what == "expert":
        start = jax.tree.map(jnp.array, weights.public)  # a copy, because training donates it
        parts = expert_parts(config, loaded.config, weights, start)
    else:
        parts = anchor_parts(config, loaded.config, jax.tree.map(jnp.array, weights))
    steps = _Crops(f"{what} that memorizes", config, parts.loss, documents)
    trained = train(steps, parts.trainable, parts.frozen, run)
    if what == "expert":
        weights = weights._replace(public=trained_expert(config, weights.public, trained))
    else:
        weights = trained
    experts = join(weights.public)
    return FlexOlmo(weights.backbone, experts, loaded.config, ("control",), loaded.tokenizer)


class _Crops(StandardSteps):
    """Steps on passages that begin at random places of documents."""

    def __init__(self, title, config, loss, documents: Sequence[Sequence[int]]):
        super().__init__(title, config, loss, source=None)  # type: ignore[arg-type]
        self.documents = documents

    def batches(self, start: int) -> Iterator[Batch]:
        length = self.training.data.length
        shape = (self.training.data.batch_size, length + 1)
        for step in range(start, self.training.steps):
            generator = np.random.default_rng([self.training.seed, step])
            tokens, segments = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
            for row in range(len(tokens)):
                ids = self.documents[int(generator.integers(len(self.documents)))]
                first = int(generator.integers(max(len(ids) - length, 1)))
                crop = ids[first : first + length + 1]
                tokens[row, : len(crop)], segments[row, : len(crop)] = crop, 1
            yield Batch.of(tokens, segments)

    def divergence(self, step: int, metrics: dict[str, float], run: Path) -> Diverged | None:
        if np.isfinite(metrics["loss"] + metrics["grad_norm"]):
            return None  # near 0, a loss has spikes that mean nothing
        return Diverged("the loss or its gradient is not finite", "The audit has no control")
