"""Builds an index from an owner's documents, shard by shard."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from flexolmo_jax.data.sources import Document, read_documents
from flexolmo_jax.data.tokenizer import as_used
from flexolmo_jax.storage.files import new_directory
from flexolmo_jax.tracing.layout import DTYPES, FORMAT, TOKENIZER, entry, write_index
from flexolmo_jax.tracing.suffixes import SEPARATOR, sort

SHARD_TOKENS = 2**26
_BATCH = 64


def build_index(
    sources: Sequence[str], tokenizer: Path, out: Path, owner: str, shard_tokens: int = SHARD_TOKENS
) -> dict[str, Any]:
    """Indexes documents.

    Args:
      sources: as `read_documents`.
      tokenizer: a tokenizer.json, or a folder with one.
      out: the folder of the index.
      owner: whose documents they are.
      shard_tokens: tokens of a shard, about.

    Returns:
      what `index.json` holds.

    Raises:
      ValueError: a source holds no document, or the tokenizer is none.
    """
    file = tokenizer / TOKENIZER if tokenizer.is_dir() else tokenizer
    text = as_used(file.read_text(encoding="utf-8"))
    encoder = tokenizers.Tokenizer.from_str(text)
    encoder.encode_special_tokens = True
    vocabulary = 1 + max(encoder.get_vocab().values())
    with new_directory(out) as folder:
        (folder / TOKENIZER).write_text(text, encoding="utf-8")
        files: dict[str, Any] = {TOKENIZER: entry(folder / TOKENIZER)}
        shards: list[str] = []
        for part in _parts(_documents(sources), encoder, shard_tokens):
            name = f"{len(shards):05d}"
            (folder / name).mkdir()
            files |= _write_shard(folder, name, part, vocabulary)
            shards.append(name)
        index = {
            "format": FORMAT,
            "owner": owner,
            "tokenizer": hashlib.sha256(text.encode()).hexdigest(),
            "vocabulary_size": vocabulary,
            "shards": shards,
            "files": files,
        }
        write_index(folder, index)
    return index


def _documents(sources: Iterable[str]) -> Iterable[Document]:
    for source in sources:
        yield from read_documents(source)


def _parts(documents, encoder, shard_tokens):
    part, size = [], 0
    batch = []

    def encoded():
        for document, one in zip(
            batch,
            encoder.encode_batch_fast([d.text for d in batch], add_special_tokens=False),
            strict=True,
        ):
            yield document, np.array([*one.ids, SEPARATOR], np.uint32)

    for document in documents:
        batch.append(document)
        if len(batch) == _BATCH:
            part += encoded()
            size = sum(len(ids) for _, ids in part)
            batch = []
            if size >= shard_tokens:
                yield part
                part = []
    part += encoded()
    if part:
        yield part


def _write_shard(folder: Path, name: str, part, vocabulary: int) -> dict[str, Any]:
    tokens = np.concatenate([ids for _, ids in part])
    counts = np.bincount(tokens[tokens != SEPARATOR], minlength=vocabulary)
    records = [
        json.dumps(
            {
                "id": d.id or Path(d.where).name,
                "group": "" if d.group == d.text else d.group.removeprefix("group:"),
                "source": d.source,
                "licence": d.licence,
                "where": d.where,
            }
        ).encode()
        for d, _ in part
    ]
    arrays: dict[str, np.ndarray] = {
        "tokens": tokens,
        "order": sort(tokens, counts),
        "counts": counts,
        "starts": np.cumsum([0, *(len(ids) for _, ids in part)]),
        "lines": np.cumsum([0, *map(len, records)]),
        "records": np.frombuffer(b"".join(records), "u1"),
        "digests": np.frombuffer(
            b"".join(hashlib.sha256(d.text.encode()).digest() for d, _ in part), "V32"
        ),
    }
    for kind, array in arrays.items():
        array.astype(DTYPES[kind], copy=False).tofile(folder / name / kind)
    return {f"{name}/{kind}": entry(folder / name / kind) for kind in arrays}
