"""Stage 2: one owner's expert, trained by the owner alone, beside the frozen anchor."""

import itertools
from pathlib import Path

import jax
import jax.numpy as jnp

from flexolmo_jax.config import ExpertTraining
from flexolmo_jax.data.batches import Batch
from flexolmo_jax.data.domain_embedding import DOCUMENTS, domain_embedding, source_name
from flexolmo_jax.data.order import batches
from flexolmo_jax.data.sources import is_heldout, read_documents
from flexolmo_jax.data.tokenizer import Tokenizer
from flexolmo_jax.data.window_store import SourceWindows, prepare
from flexolmo_jax.federation.anchor import LoadedAnchor
from flexolmo_jax.federation.expert import write_expert
from flexolmo_jax.federation.names import check_name
from flexolmo_jax.modeling.experts import Experts
from flexolmo_jax.parallel import placement
from flexolmo_jax.privacy.canaries import Canaries, canaries_of_run, check_they_are_read
from flexolmo_jax.runtime.processes import on_main_process
from flexolmo_jax.training.loop import StandardSteps, mesh_of, train
from flexolmo_jax.training.objectives import expert_parts, trained_expert
from flexolmo_jax.training.public_data import public_batch, public_text_of
from flexolmo_jax.training.router_fit.rows import fit_router
from flexolmo_jax.training.run import alone_in_its_run, check_run, record_run
from flexolmo_jax.training.starting_point import (
    anchor_to_train_beside,
    check_room_for,
    describe_expert_run,
    expert_facts,
    in_float32,
    initial_expert,
)


@alone_in_its_run
def train_expert(
    config: ExpertTraining,
    *,
    anchor: str | Path,
    data: str,
    name: str,
    out: str | Path,
    run: str | Path,
    public: str | None = None,
    canaries: int = 0,
    resume: bool = False,
    separator: str | None = None,
) -> None:
    """Trains an expert and writes its package; nothing else of the owner leaves the run folder.

    Args:
      config: the stage's config.
      anchor: an anchor package, or a Hugging Face directory of an OLMo 2 model.
      data: the owner's closed text, as `read_documents` takes it.
      name: of the expert.
      out: the expert package; must not exist.
      run: folder of the run, which holds closed text (as tokens): windows, checkpoints, metrics.
      public: public text to fit the router rows against; default: what came with the anchor.
      canaries: N; each of 2N generated documents is added to the training text with probability
        1/2, for audits.
      resume: continue from the newest checkpoint in `run`.
      separator: the end-of-document token, if the anchor is a Hugging Face directory that names
        none; the package then records it.

    Raises:
      ValueError: an argument or a file is wrong; the message says what to do.
      FloatingPointError: the training diverged.
      Interrupted: SIGINT or SIGTERM came; the state is saved.
      AlreadyDone: the package exists.

    Examples:
      >>> import flexolmo_jax as fo
      >>> config = fo.ExpertTraining(
      ...     data=fo.DataConfig(batch_size=4, length=32),
      ...     optimizer=fo.OptimizerConfig(learning_rate=3e-3),
      ...     steps=2,
      ...     fit_tokens=2048,
      ... )
      >>> fo.train_expert(
      ...     config, anchor="anchor", data="math.jsonl", name="mine",
      ...     out="mine", run="mine.run",
      ... )
      >>> fo.load("mine").expert_names
      ('public', 'mine')
    """
    anchor, out, run = Path(anchor), Path(out), Path(run)
    check_name(name)
    loaded, tokenizer = anchor_to_train_beside(anchor, config.data, separator)
    texts = public_text_of(loaded, public, anchor, config)
    # Read before the training, although needed after it, so that errors in it show now.
    length = config.data.length
    fits_rows = config.gating == "fixed"
    public_read = (
        public_batch(texts, tokenizer, length, config.fit_tokens // length) if fits_rows else None
    )
    mesh_of(config)  # raises if the batch cannot be divided among the devices
    wanted = describe_expert_run(
        config, loaded, name=name, data=data, public=public, canaries=canaries, separator=separator
    )
    check_run(run, wanted, resume, config, out)
    start = initial_expert(config, loaded.config, loaded.weights.public)
    parts = expert_parts(config, loaded.config, loaded.weights, start)
    check_room_for(config, data, out, run, parts.trainable, packaged=start)
    source, drawn = _own_windows(config, data, run, tokenizer, canaries)
    expert = in_float32(start)
    if not fits_rows and config.domain_embedding:
        expert = _with_initial_row(expert, config, data, loaded.config.width)
    record_run(run, wanted)

    loss, trainable, frozen = expert_parts(config, loaded.config, loaded.weights, expert)
    trained = train(StandardSteps(f"expert {name}", config, loss, source), trainable, frozen, run)
    facts = expert_facts(
        config, drawn, separator,
        router=config.router if fits_rows else None,
        domain_embedding=source_name(config.domain_embedding),
    )  # fmt: skip

    def finish() -> None:
        finished = trained_expert(config, expert, trained)
        if public_read is not None:
            finished = fit_rows(finished, loaded, source, public_read, config)
        write_expert(out, finished, name, loaded, facts)

    on_main_process(finish)


def _own_windows(
    config: ExpertTraining, data: str, run: Path, tokenizer: Tokenizer, canaries: int
) -> tuple[SourceWindows, Canaries | None]:
    """The owner's text as windows, with the canaries that were drawn into it."""
    drawn = canaries_of_run(canaries, run, tokenizer)
    extra = drawn.inserted if drawn else []
    source, report = prepare(data, config.data, tokenizer, run / "data", extra)
    report.tell()
    if drawn:
        check_they_are_read(drawn, source.as_data_source("train"), tokenizer, config, units=None)
    return source, drawn


def fit_rows(
    expert: Experts,
    anchor: LoadedAnchor,
    source: SourceWindows,
    public: Batch,
    config: ExpertTraining,
) -> Experts:
    """Fits the router rows of an expert to its own training text and to public text.

    Args:
      expert: the trained expert, a stack of one; its rows are replaced.
      anchor: the frozen anchor.
      source: the owner's windows.
      public: a batch of public text (`public_batch`).
      config: the stage's config.
    """
    own = _random_batch(source, config.fit_tokens, config.seed)
    return fit_router(
        placement.device_put(anchor.weights, None),  # on this process's first device
        expert,
        own,
        public,
        anchor.config,
        router=config.router,
        ridge=config.fit_ridge,
        prior=config.fit_prior,
    )


def _random_batch(source: SourceWindows, tokens: int, seed: int) -> Batch:
    """Random training windows of at least `tokens` tokens, as one batch."""
    count = -(-tokens // (source.data.batch_size * source.data.length))
    drawn = itertools.islice(batches(source, seed), count)
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *drawn)


def _with_initial_row(expert: Experts, config: ExpertTraining, data: str, width: int) -> Experts:
    """Sets the row of every layer to the mean document embedding, as the paper does (A.2)."""
    assert config.domain_embedding is not None
    documents = read_documents(
        data, text_field=config.data.text_field, group_field=config.data.group_field
    )
    own = (d.text for d in documents if not is_heldout(d, config.data.heldout))
    texts = list(itertools.islice(own, DOCUMENTS))
    row = domain_embedding(config.domain_embedding, texts, width)
    expert.router.row[...] = jnp.broadcast_to(jnp.asarray(row), expert.router.row.shape)
    return expert
