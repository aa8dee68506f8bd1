"""Stage 2: one owner's expert, trained by the owner alone, beside the frozen anchor."""

import itertools
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from flexolmo_jax.config import DataConfig, ExpertTraining, ModelConfig, Training
from flexolmo_jax.data.batches import Batch, batches, stacked
from flexolmo_jax.data.domain_embedding import DOCUMENTS, domain_embedding, source_name
from flexolmo_jax.data.sources import Document, bytes_of, fingerprint, is_heldout, read_documents
from flexolmo_jax.data.tokenizer import Tokenizer
from flexolmo_jax.data.window_store import SourceWindows, prepare
from flexolmo_jax.data.windows import tokenized, windows
from flexolmo_jax.federation.anchor import LoadedAnchor, read_anchor
from flexolmo_jax.federation.expert import write_expert
from flexolmo_jax.federation.names import check_name
from flexolmo_jax.modeling.experts import Experts
from flexolmo_jax.parallel import placement
from flexolmo_jax.privacy.canaries import canaries_of_run, check_they_are_read
from flexolmo_jax.runtime.processes import on_main_process
from flexolmo_jax.storage.outputs import check_room
from flexolmo_jax.training.loop import StandardSteps, mesh_of, train
from flexolmo_jax.training.router_fit.rows import fit_router
from flexolmo_jax.training.run import alone_in_its_run, check_run, describe_run, record_run
from flexolmo_jax.training.step import ExpertAloneLoss, ExpertPairLoss, with_parts


@alone_in_its_run
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
    separator: str | None = None,
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
      separator: the token that opens documents, where the anchor is a Hugging Face directory that
        names none; the package then says which.

    Raises:
      ValueError, FloatingPointError, Interrupted, AlreadyDone: as the parts say.
    """
    check_name(name)
    loaded, tokenizer = anchor_to_train_beside(anchor, config.data, separator)
    texts = public_text_of(loaded, public, anchor, config)
    # Read before the training that it is needed after, so that what is wrong with it shows now.
    length = config.data.length
    alone = config.gating == "fixed"
    read = public_batch(texts, tokenizer, length, config.fit_tokens // length) if alone else None
    mesh = mesh_of(config)
    start = loaded.weights.public
    wanted = describe_run(
        config,
        name=name,
        source=fingerprint(data),
        source_at=data,
        anchor=loaded.identity,
        public=fingerprint(public) if public else None,
        canaries=canaries or None,
        **({"separator": separator} if separator else {}),
    )
    check_run(run, wanted, resume, config, out)
    trains = start.feed_forward if alone else start
    check_room_for(config, data, out, run, trains, packaged=start)
    drawn = canaries_of_run(canaries, run, tokenizer)
    extra = drawn.inserted if drawn else []
    source, report = prepare(data, config.data, tokenizer, run / "data", extra)
    report.tell()
    if drawn:
        check_they_are_read(drawn, source.as_data_source("train"), tokenizer, config, units=None)
    expert = in_float32(start)
    if not alone and config.domain_embedding:
        expert = _with_initial_row(expert, config, data, loaded.config.width)
    record_run(run, wanted)

    facts = {
        "tokens_seen": config.steps * config.data.batch_size * config.data.length,
        "gating": config.gating,
        "router": config.router if config.gating == "fixed" else None,
        "domain_embedding": source_name(config.domain_embedding),
        "licence": config.licence,
        "contact": config.contact,
        "heldout": config.data.split(),
        **(drawn.facts() if drawn else {}),
        **({"separator": separator} if separator else {}),
    }
    anchor_weights = placement.device_put(loaded.weights, mesh)
    model = config.computing(loaded.config)
    title = f"expert {name}"
    if alone:
        loss = ExpertAloneLoss(model, config.output_z_loss)
        frozen = (anchor_weights, anchor_weights.public.router)
        steps = StandardSteps(title, config, loss, source)
        feed_forward = train(steps, expert.feed_forward, frozen, run)

        def finish() -> None:
            trained = with_parts(expert, feed_forward, expert.router)
            assert read is not None
            fitted = fit_rows(trained, loaded, source, read, config)
            write_expert(out, fitted, name, loaded, facts)

        on_main_process(finish)
    else:
        pair = model.replace(num_experts=2)
        pair_loss = ExpertPairLoss(pair, config.output_z_loss, config.router_z_loss)
        steps = StandardSteps(title, config, pair_loss, source)
        trained = train(steps, expert, anchor_weights, run)
        on_main_process(lambda: write_expert(out, trained, name, loaded, facts))


def fit_rows(
    expert: Experts,
    anchor: LoadedAnchor,
    source: SourceWindows,
    public: Batch,
    config: ExpertTraining,
) -> Experts:
    """Fits the router rows of an expert to its own training text and to public text.

    Args:
      expert: trained; a stack of one.
      anchor: that it stands beside.
      source: the owner's windows.
      public: of public text, as `public_batch` gives it.
      config: how.
    """
    own = some_batch(source, config.fit_tokens, config.seed)
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


def some_batch(source: SourceWindows, tokens: int, seed: int) -> Batch:
    """Training windows of about so many tokens, drawn at random, as one batch."""
    count = -(-tokens // (source.data.batch_size * source.data.length))
    drawn = itertools.islice(batches(source, seed), count)
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *drawn)


def in_float32(tree: Any) -> Any:
    """A copy in float32, in which everything is trained, and which packages of experts hold."""
    return jax.tree.map(lambda x: jnp.array(x, jnp.float32), tree)


def anchor_to_train_beside(
    path: Path, data: DataConfig, separator: str | None = None
) -> tuple[LoadedAnchor, Tokenizer]:
    """An anchor, its weights left on disk, and its tokenizer; `separator` as in `read_anchor`.

    Its weights stay in the dtype that they are stored in; what is computed, is in `config.dtype`.

    Raises:
      ValueError: as `read_anchor`; it came without a tokenizer; it was made for shorter windows.
    """
    loaded = read_anchor(path, on_disk=True, separator=separator)
    if loaded.tokenizer is None:
        raise ValueError(f"{path}: there is no tokenizer.json, which training needs")
    check_length(data, loaded.config, path)
    return loaded, loaded.tokenizer


def check_length(data: DataConfig, model: ModelConfig, where: Path) -> None:
    """Raises ValueError if training windows are longer than what a model was made for."""
    if data.length > model.max_length:
        raise ValueError(
            f"data.length={data.length} is longer than what {where} was made for, max_length="
            f"{model.max_length}; set data.length to {model.max_length} or less"
        )


def check_room_for(
    config: Training, data: str, out: Path, run: Path, trained: Any, packaged: Any = None
) -> None:
    """Raises ValueError if the disk has no room for a training (`check_room`).

    Args:
      config, data, out, run: of the training.
      trained: the weights, or their shapes.
      packaged: those that are written in the end; default: `trained`.
    """

    def count(tree: Any) -> int:
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))

    check_room(
        out, run, text=bytes_of(data), trained=count(trained),
        packaged=count(trained if packaged is None else packaged),
        saves=-(-config.steps // config.checkpoint_every),
    )  # fmt: skip


def public_text_of(
    anchor: LoadedAnchor, public: str | None, where: Path, config: ExpertTraining
) -> Iterable[str]:
    """The public text to fit router rows against: named, or what came with the anchor.

    Rows hold it in the field of the owner's own text; or in "text", as public text usually does.

    Raises:
      ValueError: there is none, and it is needed; what is named cannot be read.
    """
    if public is not None:
        field = _field_of(public, config.data.text_field)
        return (d.text for d in read_documents(public, text_field=field))
    if not anchor.public_text and config.gating == "fixed":
        raise ValueError(
            f"{where}: no public text came with this anchor, and the router rows are fitted "
            "against it; name some with --public"
        )
    return anchor.public_text


def _field_of(source: str, expected: str) -> str:
    """The field that holds a source's text: as expected, or "text"."""
    try:
        next(read_documents(source, text_field=expected))
    except ValueError as error:
        if expected == "text":
            raise
        try:
            next(read_documents(source))
        except ValueError:
            raise error from None
        return "text"
    return expected


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
