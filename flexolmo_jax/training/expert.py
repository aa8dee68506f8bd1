"""Stage 2: one owner's expert, trained by the owner alone, beside the frozen anchor."""

import itertools
from collections.abc import Iterable
from pathlib import Path

import jax
import jax.numpy as jnp

from flexolmo_jax import sharding
from flexolmo_jax.config import ExpertTraining
from flexolmo_jax.data.domain_embedding import DOCUMENTS, domain_embedding, source_name
from flexolmo_jax.data.flexmix import SourceWindows, prepare
from flexolmo_jax.data.loader import Batch, batches, stacked
from flexolmo_jax.data.sources import Document, is_heldout, named_source, read_documents
from flexolmo_jax.data.tokenizer import Tokenizer
from flexolmo_jax.data.windows import tokenized, windows
from flexolmo_jax.distributed import by_first
from flexolmo_jax.federation.anchor import LoadedAnchor, read_anchor
from flexolmo_jax.federation.merge import write_expert
from flexolmo_jax.federation.names import check_name
from flexolmo_jax.modeling.experts import Experts
from flexolmo_jax.privacy.canaries import canaries_of_run, check_they_are_read
from flexolmo_jax.training.loop import (
    OrdinarySteps,
    check_run,
    describe_run,
    mesh_of,
    record_run,
    train,
)
from flexolmo_jax.training.router_fit import fit_router
from flexolmo_jax.training.step import ExpertAloneLoss, ExpertPairLoss, with_parts


def train_expert(
    config: ExpertTraining,
    *,
    anchor: Path,
    data: str,
    name: str,
    out: Path,
    run: Path,
    public: str | None = None,
    canaries: int = 0,
    resume: bool = False,
) -> None:
    """Trains an expert and writes its package. Nothing else of the owner leaves the run folder.

    Args:
      config: the stage's config.
      anchor: an anchor package, or a Hugging Face directory of an OLMo 2 model.
      data: the owner's closed text, as `read_documents` takes it.
      name: what the expert will be called.
      out: the expert package; must not exist.
      run: folder of the run, which holds closed text (as tokens): windows, checkpoints, metrics.
      public: public text to fit the router rows against; default: what came with the anchor.
      canaries: N; of 2N made-up documents a coin puts each into the training text, for audits.
      resume: go on from the newest checkpoint in `run`.

    Raises:
      ValueError, FloatingPointError, Interrupted: as the parts say.
    """
    check_name(name)
    loaded, tokenizer = anchor_to_train_beside(anchor)
    public_text = public_text_of(loaded, public, anchor) if config.gating == "alone" else []
    wanted = describe_run(
        config, source=named_source(data), anchor=loaded.identity, canaries=canaries or None
    )
    check_run(run, wanted, resume)
    drawn = canaries_of_run(canaries, run, tokenizer)
    extra = drawn.inserted if drawn else []
    source, report = prepare(data, config.data, tokenizer, run / "data", extra)
    report.tell()
    if drawn:
        check_they_are_read(drawn, source.as_data_source("train"), tokenizer, config, units=None)
    record_run(run, wanted)

    facts = {
        "tokens_seen": config.steps * config.data.batch_size * config.data.length,
        "gating": config.gating,
        "router": config.router if config.gating == "alone" else None,
        "domain_embedding": source_name(config.domain_embedding),
        "licence": config.licence,
        "contact": config.contact,
        **(drawn.facts() if drawn else {}),
    }
    expert = jax.tree.map(jnp.array, loaded.weights.public)
    mesh = mesh_of(config)
    anchor_weights = sharding.place(loaded.weights, mesh)
    model = config.computing(loaded.config)
    title = f"expert {name}"
    if config.gating == "alone":
        loss = ExpertAloneLoss(model, config.output_z_loss)
        frozen = (anchor_weights, anchor_weights.public.router)
        steps = OrdinarySteps(title, config, loss, source)
        feed_forward = train(steps, expert.feed_forward, frozen, run)

        def finish() -> None:
            trained = with_parts(expert, feed_forward, expert.router)
            fitted = fit_rows(trained, loaded, source, public_text, config)
            write_expert(out, fitted, name, loaded, facts)

        by_first(finish)
    else:
        pair = model.replace(num_experts=2)
        if config.domain_embedding:
            expert = _with_initial_row(expert, config, data, loaded.config.width)
        pair_loss = ExpertPairLoss(pair, config.output_z_loss, config.router_z_loss)
        steps = OrdinarySteps(title, config, pair_loss, source)
        trained = train(steps, expert, anchor_weights, run)
        by_first(lambda: write_expert(out, trained, name, loaded, facts))


def fit_rows(
    expert: Experts,
    anchor: LoadedAnchor,
    source: SourceWindows,
    public_text: Iterable[str],
    config: ExpertTraining,
) -> Experts:
    """Fits the router rows of an expert to its own training text and to public text."""
    own = some_batch(source, config.fit_tokens, config.seed)
    assert anchor.tokenizer is not None
    length = config.data.length
    public = public_batch(public_text, anchor.tokenizer, length, config.fit_tokens // length)
    return fit_router(
        sharding.place(anchor.weights, None),  # on this process's first device
        expert,
        own,
        public,
        anchor.config,
        router=config.router,
        ridge=config.fit_ridge,
        prior=config.fit_prior,
    )


def some_batch(source: SourceWindows, tokens: int, seed: int) -> Batch:
    """Training windows of about so many tokens, drawn at random, as one batch."""
    count = -(-tokens // (source.data.batch_size * source.data.length))
    drawn = itertools.islice(batches(source, seed), count)
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *drawn)


def anchor_to_train_beside(path: Path) -> tuple[LoadedAnchor, Tokenizer]:
    """An anchor, its weights left on disk, and its tokenizer.

    Raises:
      ValueError: as `read_anchor`; it came without a tokenizer.
    """
    loaded = read_anchor(path, on_disk=True)
    if loaded.tokenizer is None:
        raise ValueError(f"{path}: there is no tokenizer.json, which training needs")
    return loaded, loaded.tokenizer


def public_text_of(anchor: LoadedAnchor, public: str | None, where: Path) -> Iterable[str]:
    """The public text to fit router rows against: named, or what came with the anchor.

    Raises:
      ValueError: there is none.
    """
    if public is not None:
        return (d.text for d in read_documents(public))
    if not anchor.public_text:
        raise ValueError(
            f"{where}: no public text came with this anchor, and the router rows are fitted "
            "against it; name some with --public"
        )
    return anchor.public_text


def public_batch(texts: Iterable[str], tokenizer: Tokenizer, length: int, count: int) -> Batch:
    """The first windows of public texts, at most `count` of `length` tokens, as one batch.

    Raises:
      ValueError: there is no text.
    """
    documents = (Document(text, text) for text in texts)
    cut = windows(tokenized(documents, tokenizer), length, tokenizer.separator)
    batch = next(stacked(itertools.islice(cut, count), count), None)
    if batch is None:
        raise ValueError("the public text to fit router rows against is empty; name some more")
    return batch


def _with_initial_row(expert: Experts, config: ExpertTraining, data: str, width: int) -> Experts:
    """The paper's form: the mean document embedding as the row of every layer (A.2)."""
    assert config.domain_embedding is not None
    documents = read_documents(
        data, text_field=config.data.text_field, group_field=config.data.group_field
    )
    own = (d.text for d in documents if not is_heldout(d, config.data.heldout))
    texts = list(itertools.islice(own, DOCUMENTS))
    row = domain_embedding(config.domain_embedding, texts, width)
    expert.router.row[...] = jnp.broadcast_to(jnp.asarray(row), expert.router.row.shape)
    return expert
