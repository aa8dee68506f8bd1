"""The positive controls of an extraction audit: models that have memorized its text.

Two models are trained hundreds of times on a few of the owner's documents, without privacy: an
expert, a copy of the public one with a head if the audited ones have any, which is then used alone;
and the whole anchor. If an audit does not extract these documents from them, its rate of 0
elsewhere means nothing.
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
from flexolmo_jax.modeling.experts import join, with_parts
from flexolmo_jax.storage.files import canonical_digest
from flexolmo_jax.training.loop import Diverged, StandardSteps, train
from flexolmo_jax.training.objectives import anchor_parts, expert_parts, trained_expert
from flexolmo_jax.training.run import alone_in_its_run, check_run, describe_run, record_run
from flexolmo_jax.training.starting_point import initial_expert

What = Literal["expert", "model"]
DOCUMENTS = 8  # to memorize
MORE = 32  # tokens kept of a document beyond one passage; each adds a possible start of a passage
PASSAGES = 50  # maximum to try
LEARNING_RATES = {"expert": 1e-2, "model": 3e-3}
CAUGHT = 0.5  # true positive rate that a valid audit exceeds on a control


def control_config(what: str, length: int, head_rank: int = 0) -> ExpertTraining:
    """The training of a control on passages of `length` tokens; arguments as in `train_control`."""
    return ExpertTraining(
        data=DataConfig(batch_size=8, length=length, heldout=0.0),
        optimizer=OptimizerConfig(learning_rate=LEARNING_RATES[what], warmup_steps=10),
        steps=300,
        checkpoint_every=100,
        head_rank=head_rank,
    )


def control_documents(documents: Sequence[Sequence[int]], length: int) -> list[Sequence[int]]:
    """The beginnings of the first documents longer than a passage: ids, without separators.

    Args:
      documents: ids, without separators.
      length: of a passage, in tokens.

    Raises:
      ValueError: no document is long enough.
    """
    long = [ids[: length + MORE] for ids in documents if len(ids) > length][:DOCUMENTS]
    if not long:
        raise ValueError(
            f"--control needs documents of more than {length} tokens to memorize, and found none; "
            "give more --data"
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
    head_rank: int = 0,
) -> FlexOlmo:
    """Overfits the anchor, or an expert beside it; resumes an interrupted run.

    Args:
      what: an expert, with everything else frozen; or the whole model.
      anchor: an anchor package, or a Hugging Face directory of an OLMo 2 model.
      documents: to memorize (`control_documents`).
      length: of a passage, in tokens.
      run: folder of the run.
      separator: the token that opens documents, as in `read_anchor`.
      head_rank: of the head of an expert, as the audited experts have; 0: none.

    Returns:
      the trained model, with the single expert "control".

    Raises:
      ValueError, FloatingPointError, Interrupted: as `train`.
    """
    config = control_config(what, length, head_rank)
    loaded = read_anchor(anchor, separator=separator)
    digest = canonical_digest([list(ids) for ids in documents])
    wanted = describe_run(config, anchor=loaded.identity, documents=digest)
    check_run(run, wanted, True, config)
    record_run(run, wanted)
    public = with_parts(loaded.weights.public, evidence=None)  # nobody routes to a control
    weights = loaded.weights._replace(public=public)
    if what == "expert":
        start = initial_expert(config, loaded.config, weights.public)
        start = jax.tree.map(jnp.array, start)  # a copy, because training donates it
        parts = expert_parts(config, loaded.config, weights, start)
    else:
        parts = anchor_parts(config, loaded.config, jax.tree.map(jnp.array, weights))
    steps = _Crops(f"{what} that memorizes", config, parts.loss, documents)
    trained = train(steps, parts.trainable, parts.frozen, run)
    if what == "expert":
        weights = weights._replace(public=trained_expert(config, start, trained))
    else:
        weights = trained
    experts = join(weights.public)
    return FlexOlmo(weights.backbone, experts, loaded.config, ("control",), loaded.tokenizer)


class _Crops(StandardSteps):
    """Steps on passages that start at random offsets of documents."""

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
            return None  # spikes of a loss near 0 are harmless
        return Diverged("the loss or its gradient is not finite", "The audit has no control")
