"""Bits per byte: how well a model predicts text, comparable across tokenizers."""

import functools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
from jax.sharding import PartitionSpec as P

from flexolmo_jax.config import DataConfig, ModelConfig
from flexolmo_jax.data.batches import Batch, stacked
from flexolmo_jax.data.sources import Document, Report, is_heldout, read_documents
from flexolmo_jax.data.tokenizer import Tokenizer
from flexolmo_jax.data.windows import tokenized, windows
from flexolmo_jax.evaluation.split import GROUP_FIELD, check_share
from flexolmo_jax.model import FlexOlmo
from flexolmo_jax.modeling.kernels.cross_entropy import cross_entropy
from flexolmo_jax.modeling.transformer import forward
from flexolmo_jax.parallel import collectives, placement
from flexolmo_jax.parallel.mesh import BATCH, specs_of

SEQUENCES = 16  # per batch


class Score(NamedTuple):
    """How a model predicts a source."""

    bits_per_byte: float
    documents: int
    bytes: int  # of UTF-8, as the tokenizer reads it


def bits_per_byte(
    model: FlexOlmo,
    source: str,
    *,
    without: Sequence[str] = (),
    only: Sequence[str] | None = None,
    heldout: float | None = None,
    group_field: str = GROUP_FIELD,
    length: int | None = None,
    text_field: str = "text",
    report: Report | None = None,
) -> Score:
    """Total cost of the text, over its bytes; the ends of documents are not counted.

    What spells a control token costs what its characters cost. Texts that the tokenizer cannot
    write whole are refused: the cost of what is lost would be missing.

    Args:
      model: with a tokenizer.
      source: as `read_documents` takes it.
      without, only: experts to switch off, or the only ones to use.
      heldout: score only the documents that training with this held-out share, in (0, 1), left
        out; None scores all.
      group_field: the field of a row that names its group; those of one are held out together.
      length: tokens a window; default: what the model was made for, at most 2,048.
      text_field: the field of a row that holds the text.
      report: is filled with counts and bad rows.

    Raises:
      ValueError: nothing to score; as `read_documents`, `FlexOlmo.allowed` and
        `Tokenizer.encode_documents`.
      FloatingPointError: the cost is no number.

    Examples:
      >>> import flexolmo_jax as fo
      >>> model = fo.load("ours")
      >>> score = fo.bits_per_byte(model, "math.jsonl", heldout=0.1, without=["code"])
      >>> score.documents > 0, 0 < score.bits_per_byte < 16
      (True, True)
    """
    _tokenizer(model)  # before the text is read
    if heldout is not None:
        check_share(heldout)
    documents = read_documents(
        source, text_field=text_field, group_field=group_field, report=report
    )
    chosen = [d for d in documents if heldout is None or is_heldout(d, heldout)]
    if not chosen:
        raise ValueError(f"{source}: no document is held out with a share of {heldout}")
    return score(model, chosen, without=without, only=only, length=length)


def heldout_documents(source: str, data: DataConfig, most_bytes: int = 40_000) -> list[Document]:
    """Documents that training with `data` left out, in the order of the source.

    Args:
      source: as `read_documents` takes it.
      data: says which documents are held out.
      most_bytes: once there is so much text, no further document is taken.
    """
    chosen: list[Document] = []
    if not data.heldout:
        return chosen  # without a reading of all of the source
    size = 0
    documents = read_documents(source, text_field=data.text_field, group_field=data.group_field)
    for document in documents:
        if size >= most_bytes:
            break
        if is_heldout(document, data.heldout):
            chosen.append(document)
            size += len(document.text.encode())
    return chosen


def score(
    model: FlexOlmo,
    documents: Iterable[Document],
    *,
    without: Sequence[str] = (),
    only: Sequence[str] | None = None,
    length: int | None = None,
) -> Score:
    """As `bits_per_byte`, of documents at hand."""
    tokenizer = _tokenizer(model)
    documents = list(documents)
    if not documents:
        raise ValueError("there is no document to score")
    size = SEQUENCES if model.mesh is None else -(-SEQUENCES // model.mesh.size) * model.mesh.size
    allowed = model.allowed(size, without, only)
    nats = 0.0
    length = length or min(model.config.max_length, 2048)
    cut = windows(tokenized(documents, tokenizer, whole=True), length, tokenizer.separator)
    for batch in stacked(cut, size):
        rows = placement.put_batch((batch, allowed), model.mesh)
        ends = tokenizer.separator
        with placement.use_mesh(model.mesh):
            nats += float(
                _cost(model.backbone, model.experts, *rows, ends, model.config, model.mesh)
            )
    if not math.isfinite(nats):
        raise FloatingPointError(
            f"the cost of this text is {nats}: a weight of this model is no number, or too large; "
            "switch experts off one by one (--without) to see whose"
        )
    num_bytes = sum(tokenizer.size(document.text) for document in documents)
    return Score(nats / math.log(2) / num_bytes, len(documents), num_bytes)


def _tokenizer(model: FlexOlmo) -> Tokenizer:
    if model.tokenizer is None:
        raise ValueError("this model came without a tokenizer.json, so text cannot be scored")
    return model.tokenizer


@functools.partial(jax.jit, static_argnames=("config", "mesh"))
def _cost(backbone, experts, batch: Batch, allowed, separator, config: ModelConfig, mesh):
    """Nats of all tokens of a batch that are text."""

    def local(backbone, experts, batch, allowed, separator):
        out = forward(
            backbone, (experts,), batch.tokens, config, segments=batch.segments, allowed=allowed
        )
        is_text = batch.weights * (batch.targets != separator)
        head = backbone.head_matrix(config)
        nats = cross_entropy(out.hidden, head, batch.targets, is_text, chunk=config.loss_chunk)[1]
        return collectives.psum_batch(nats)

    rows = BATCH
    weights = (backbone, experts)
    where = mesh and (*specs_of(weights, mesh), rows, rows, P())
    cost = placement.shard_map(local, mesh, where, P())
    return cost(*weights, batch, allowed, separator)
