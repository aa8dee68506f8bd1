"""Stage 1: the public model, trained on public text by whoever hosts it."""

import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from flexolmo_jax.config import AnchorTraining, DataConfig
from flexolmo_jax.data.domain_embedding import domain_embedding, source_name
from flexolmo_jax.data.sources import Document, fingerprint, is_heldout, read_documents
from flexolmo_jax.data.tokenizer import Tokenizer
from flexolmo_jax.data.window_store import prepare
from flexolmo_jax.federation.anchor import LoadedAnchor, read_anchor, write_anchor
from flexolmo_jax.modeling.transformer import Anchor, init_anchor
from flexolmo_jax.parallel import placement
from flexolmo_jax.runtime.processes import on_main_process, one_process_at_a_time
from flexolmo_jax.storage.files import replace_file
from flexolmo_jax.training.loop import StandardSteps, mesh_of, train
from flexolmo_jax.training.run import (
    RUN_FILE,
    alone_in_its_run,
    check_run,
    describe_run,
    record_run,
)
from flexolmo_jax.training.stages.expert import check_room_for
from flexolmo_jax.training.step import AnchorLoss


@alone_in_its_run
def train_anchor(
    config: AnchorTraining,
    *,
    data: str,
    out: Path,
    run: Path,
    resume: bool = False,
    start: Path | None = None,
) -> None:
    """Trains an anchor and writes its package.

    Args:
      config: the stage's config.
      data: the public text, as `read_documents` takes it.
      out: the anchor package; must not exist.
      run: folder of the run: windows, checkpoints, metrics, plot.
      resume: go on from the newest checkpoint in `run`.
      start: an anchor package whose weights to start from, of the same sizes and tokenizer;
        default: random ones.

    Raises:
      ValueError, FloatingPointError, Interrupted, AlreadyDone: as the parts say.
    """
    given = None if start is None else read_anchor(start)
    mesh = mesh_of(config)
    made_from = {} if given is None else {"start": given.identity}
    wanted = describe_run(config, source=fingerprint(data), source_at=data, **made_from)
    check_run(run, wanted, resume, config, out)
    shapes = jax.eval_shape(lambda: init_anchor(config.model, jax.random.key(0)))
    check_room_for(config, data, out, run, shapes)
    tokenizer = one_process_at_a_time(lambda: _tokenizer(config, data, run))
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} ids, more than model.vocab_size="
            f"{config.model.vocab_size}; make the model's vocabulary at least as large"
        )
    if given is not None:
        _check_same(given, config, tokenizer)
    source, report = prepare(data, config.data, tokenizer, run / "data")
    report.tell()
    # Before the training, so that what is wrong with it shows now.
    shuffled = _shuffled_training_documents(data, config.data)
    public_text = _sample(shuffled, tokenizer, config.public_tokens)
    row = _public_row(config, shuffled)
    del shuffled
    record_run(run, wanted)
    if given is None:
        weights = placement.init_sharded(
            lambda: init_anchor(config.model, jax.random.key(config.seed)), mesh
        )
    else:
        weights = given.weights
    loss = AnchorLoss(config.computing(config.model), config.output_z_loss)
    weights = train(StandardSteps("anchor", config, loss, source), weights, None, run)
    if row is not None:
        weights = _with_public_row(weights, row)
    facts = {
        "tokens_seen": config.steps * config.data.batch_size * config.data.length,
        "domain_embedding": source_name(config.domain_embedding),
        "licence": config.licence,
        "contact": config.contact,
        "heldout": config.data.split(),
    }
    on_main_process(lambda: write_anchor(out, weights, config.model, tokenizer, public_text, facts))


def _public_row(config: AnchorTraining, documents: list[Document]) -> np.ndarray | None:
    """The public router row [D], where the config asks for an embedding of the public text."""
    if not config.domain_embedding:
        return None
    texts = [d.text for d in documents]
    return domain_embedding(config.domain_embedding, texts, config.model.width)


def _check_same(start: LoadedAnchor, config: AnchorTraining, tokenizer: Tokenizer) -> None:
    ours, theirs = config.model.architecture(), start.config.architecture()
    for field in ours:
        if ours[field] != theirs[field]:
            raise ValueError(
                f"cannot start from an anchor of another model: expected {field}={ours[field]}, "
                f"found {theirs[field]}"
            )
    if start.tokenizer is None or start.tokenizer.digest != tokenizer.digest:
        raise ValueError("cannot start from an anchor with another tokenizer: name its own")


def _tokenizer(config: AnchorTraining, data: str, run: Path) -> Tokenizer:
    """The one of the config; or a BPE trained on the public training documents, kept in `run`."""
    if config.tokenizer:
        return Tokenizer.load(config.tokenizer, config.separator)
    file = run / "tokenizer.json"
    if file.exists() and (run / RUN_FILE).exists():  # else it is of a run that never started
        return Tokenizer.load(file, config.separator)
    documents = _training_documents(data, config.data)
    texts = (d.text for d in documents)
    tokenizer = Tokenizer.train(texts, config.model.vocab_size, config.separator)
    run.mkdir(parents=True, exist_ok=True)
    replace_file(file, tokenizer.json)
    return tokenizer


def _training_documents(data: str, config: DataConfig):
    documents = read_documents(data, text_field=config.text_field, group_field=config.group_field)
    return (d for d in documents if not is_heldout(d, config.heldout))


def _shuffled_training_documents(data: str, config: DataConfig) -> list[Document]:
    """At most 10,000, from the start of the source, in an order that does not follow it."""
    documents = list(itertools.islice(_training_documents(data, config), 10_000))
    return [documents[i] for i in np.random.default_rng(0).permutation(len(documents))]


def _sample(documents: list[Document], tokenizer: Tokenizer, tokens: int) -> list[str]:
    """Whole documents, in turn, until there are so many tokens; long ones are cut at 2,000 bytes
    so that the sample is as broad as the text is."""
    texts: list[str] = []
    for document in documents:
        if tokens <= 0:
            break
        text = document.text.encode()[:2000].decode(errors="ignore")
        texts.append(text)
        tokens -= len(tokenizer.encode_documents([text])[0])
    return texts


def _with_public_row(weights: Anchor, row: np.ndarray) -> Anchor:
    """The anchor with the same public router row in every layer, as the paper has it (A.2)."""
    weights.public.router.row[...] = jnp.broadcast_to(
        jnp.asarray(row), weights.public.router.row.shape
    )
    return weights
