"""Bits per byte: how well a model predicts text, comparable across tokenizers."""

import functools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from flexolmo_jax.config import DataConfig, ModelConfig
from flexolmo_jax.data.batches import Batch, stacked
from flexolmo_jax.data.sources import Document, Report, first_bytes, is_heldout, read_documents
from flexolmo_jax.data.tokenizer import Tokenizer
from flexolmo_jax.data.windows import tokenized, windows
from flexolmo_jax.evaluation.split import GROUP_FIELD, check_share
from flexolmo_jax.model import FlexOlmo
from flexolmo_jax.modeling.kernels.cross_entropy import cross_entropy, nats_of_chunks
from flexolmo_jax.modeling.transformer import forward, output_logits
from flexolmo_jax.parallel import collectives, placement
from flexolmo_jax.parallel.mesh import BATCH, specs_of

BATCH_SEQUENCES = 16


class Score(NamedTuple):
    """How well a model predicts a source."""

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
    """The negative log-likelihood of the text in bits, divided by its bytes.

    Tokens that end documents are not counted. A control token spelled in the text is scored as its
    characters. Texts that the tokenizer cannot encode completely are refused, because the loss of
    the missing part would be missing too.

    Args:
      model: with a tokenizer.
      source: as in `read_documents`.
      without, only: experts to switch off, or the only ones to use.
      heldout: score only the documents that training with this held-out share, in (0, 1), does not
        read; None scores all.
      group_field: the field of a row that names its group; a group is held out as a whole.
      length: tokens per window; default: the model's maximum length, at most 2,048.
      text_field: the field of a row that holds the text.
      report: receives counts and skipped rows.

    Raises:
      ValueError: nothing to score; as `read_documents`, `FlexOlmo.allowed` and
        `Tokenizer.encode_documents`.
      FloatingPointError: the loss is not finite.

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


def heldout_documents(source: str, data: DataConfig, max_bytes: int = 40_000) -> list[Document]:
    """The documents that training with `data` holds out, in the order of the source.

    Args:
      source: as in `read_documents`.
      data: defines which documents are held out.
      max_bytes: stop after the document that reaches this size.
    """
    if not data.heldout:
        return []  # without reading the source
    documents = read_documents(source, text_field=data.text_field, group_field=data.group_field)
    return first_bytes((x for x in documents if is_heldout(x, data.heldout)), max_bytes)


def score(
    model: FlexOlmo,
    documents: Iterable[Document],
    *,
    without: Sequence[str] = (),
    only: Sequence[str] | None = None,
    length: int | None = None,
) -> Score:
    """As `bits_per_byte`, for documents in memory."""
    tokenizer = _tokenizer(model)
    documents = list(documents)
    if not documents:
        raise ValueError("there is no document to score")
    num_devices = 1 if model.mesh is None else model.mesh.size
    size = -(-BATCH_SEQUENCES // num_devices) * num_devices
    allowed = model.allowed(size, without, only)
    nats = 0.0
    length = length or min(model.config.max_length, 2048)
    rows = windows(tokenized(documents, tokenizer, whole=True), length, tokenizer.separator)
    for batch in stacked(rows, size):
        arrays = (*placement.put_batch((batch, allowed), model.mesh), tokenizer.separator)
        with placement.use_mesh(model.mesh):
            nats += float(_nats(model.backbone, model.experts, *arrays, model.config, model.mesh))
    if not math.isfinite(nats):
        raise FloatingPointError(
            f"the loss of this text is {nats}: a weight of this model is NaN or too large; switch "
            "experts off one by one (--without) to find the expert"
        )
    num_bytes = sum(tokenizer.size(document.text) for document in documents)
    return Score(nats / math.log(2) / num_bytes, len(documents), num_bytes)


def _tokenizer(model: FlexOlmo) -> Tokenizer:
    if model.tokenizer is None:
        raise ValueError("this model came without a tokenizer.json, so text cannot be scored")
    return model.tokenizer


@functools.partial(jax.jit, static_argnames=("config", "mesh"))
def _nats(backbone, experts, batch: Batch, allowed, separator, config: ModelConfig, mesh):
    """Negative log-likelihood of all text tokens of a batch.

    A sum on the devices, packed documents included: `log_likelihoods` would move every token's to
    the host and sum them in another order, which changes the last bits.
    """

    def local(backbone, experts, batch, allowed, separator):
        out = forward(
            backbone, (experts,), batch.tokens, config, segments=batch.segments, allowed=allowed
        )
        is_text = batch.weights * (batch.targets != separator)
        if hasattr(experts, "head"):

            def logits_of(hidden, weights):
                weights = jnp.moveaxis(weights, -1, 0)
                return output_logits(backbone, (experts,), hidden, weights, config)

            inputs = (out.hidden, jnp.moveaxis(out.weights, 0, -1))
            nats = nats_of_chunks(logits_of, inputs, batch.targets, is_text, config.loss_chunk)
        else:
            head, chunk = backbone.head_matrix(config), config.loss_chunk
            nats = cross_entropy(out.hidden, head, batch.targets, is_text, chunk=chunk)[1]
        return collectives.psum_batch(nats)

    weights = (backbone, experts)
    specs = mesh and (*specs_of(weights, mesh), BATCH, BATCH, P())
    run = placement.shard_map(local, mesh, specs, P())
    return run(*weights, batch, allowed, separator)
