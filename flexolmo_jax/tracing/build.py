"""Builds an index from an owner's documents, or adds documents to one; resumes after a kill."""

import contextlib
import dataclasses
import hashlib
import itertools
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers

from flexolmo_jax.data.sources import Document, Report, read_documents
from flexolmo_jax.data.tokenizer import as_used
from flexolmo_jax.runtime.console import Bar, log, progress
from flexolmo_jax.storage.files import is_partial, replace_file
from flexolmo_jax.storage.locks import locked, private_folder
from flexolmo_jax.storage.outputs import check_kept_folder
from flexolmo_jax.tracing.layout import (
    FORMAT,
    INDEX,
    LOCK,
    TOKENIZER,
    digests,
    entry,
    new_shard,
    read_index,
    read_tokenizer,
    write_index,
)
from flexolmo_jax.tracing.shard_writer import MOST_TOKENS, ShardWriter, digest_of, encoded
from flexolmo_jax.tracing.verified import open_files

SHARD_TOKENS = 2**26  # sorting needs 15 bytes of memory for each


class Built(NamedTuple):
    """What was added to an index.

    Attributes:
      documents, tokens: how many.
      shards: how many the index has now.
    """

    documents: int
    tokens: int
    shards: int


@dataclasses.dataclass(frozen=True)
class _Work:
    """What is asked for; `index` is the content of `index.json`, and says how far it is."""

    folder: Path
    index: dict[str, Any]
    sources: Sequence[str]
    shard_tokens: int


def build_index(
    sources: Sequence[str],
    tokenizer: Path,
    out: Path,
    owner: str | None = None,
    *,
    update: bool = False,
    shard_tokens: int = SHARD_TOKENS,
) -> Built:
    """Indexes documents: each distinct text once, with what its row says of it.

    A build that was killed continues where its last complete shard ends, if it is called again
    with the same arguments.

    Args:
      sources: as `read_documents`.
      tokenizer: a tokenizer.json, or a folder with one.
      out: the folder of the index.
      owner: whose documents they are (default: the name of the folder).
      update: add the documents that are not in the index yet, and were not withdrawn from it, as
        further shards. Readers use the index as it was until all are added.
      shard_tokens: tokens of a shard. Memory is at most 20 bytes for each, and about 200 bytes for
        each document of all sources.

    Raises:
      ValueError: there is an index already (or none to update); the tokenizer, the owner or
        unfinished work is another; a source holds no usable document.
    """
    if not 1 <= shard_tokens <= MOST_TOKENS:
        raise ValueError(f"--shard-tokens: expected 1 to {MOST_TOKENS:,}, found {shard_tokens:,}")
    check_kept_folder(out, sources, holding=(INDEX,))
    text, encoder = _read(tokenizer)
    if update and not (out / INDEX).exists():
        raise ValueError(f"{out}: there is no index to update; make one without --update")
    private_folder(out)  # it will hold the documents
    try:
        with locked(out / LOCK, "is changing this index", "try again when it has ended"):
            index = _begin(out, text, owner, update)
            return _build(_Work(out, index, sources, shard_tokens), encoder, text)
    finally:
        with contextlib.suppress(OSError):
            out.rmdir()  # if nothing was written


def _read(file: Path) -> tuple[str, tokenizers.Tokenizer]:
    file = file / TOKENIZER if file.is_dir() else file
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: cannot read the tokenizer ({error})") from error
    read_tokenizer(text, file)
    text = as_used(text)
    return text, read_tokenizer(text, file)[0]


def _begin(out: Path, tokenizer: str, owner: str | None, update: bool) -> dict[str, Any]:
    """The `index.json` to begin with: a new one, that of unfinished work, or the one to add to."""
    _, vocabulary, digest = read_tokenizer(tokenizer, out)
    if not (out / INDEX).exists():
        return {
            "format": FORMAT,
            "owner": owner or out.resolve().name,
            "tokenizer": digest,
            "vocabulary_size": vocabulary,
            "shards": [],
            "unused": [],
            "building": None,
            "files": {},
        }
    index = read_index(out)
    if index["shards"] and not update:
        raise ValueError(
            f"{out}: already an index; add documents to it with --update, or choose another --out"
        )
    if digest != index["tokenizer"]:
        raise ValueError(
            f"{out}: made with another tokenizer (expected sha256 {index['tokenizer'][:12]}..., "
            f"found {digest[:12]}...); use that one, {out / TOKENIZER}"
        )
    if owner not in (None, index["owner"]):
        raise ValueError(f"{out}: the index of {index['owner']!r}, not of {owner!r}")
    if index["shards"]:
        open_files(out)  # nothing is added to what is damaged
    return index


def _build(work: _Work, encoder: tokenizers.Tokenizer, json_text: str) -> Built:
    index = work.index
    asked, characters, count = _survey(work)
    building = _unfinished(work, asked)
    if not count:
        return Built(0, 0, len(index["shards"]))
    if not index["shards"]:
        replace_file(work.folder / TOKENIZER, json_text)
        index["files"][TOKENIZER] = entry(work.folder / TOKENIZER)
    clean(work.folder, index)
    documents = itertools.islice(_new_documents(work), building["documents"], None)
    with progress("index", characters, building["characters"], "character") as bar:
        for shard in _shards(work, encoded(documents, encoder, json_text), bar):
            index["unused"] = []
            building["shards"].append(shard.folder.name)
            building["files"] |= shard.close()
            building["documents"] += shard.documents
            building["tokens"] += shard.tokens
            building["characters"] = bar.done
            write_index(work.folder, index)
    index["shards"] += building["shards"]
    index["files"] |= building["files"]
    index["building"] = None
    write_index(work.folder, index)
    tokens = building["tokens"] - building["documents"]  # without separators
    return Built(building["documents"], tokens, len(index["shards"]))


def _unfinished(work: _Work, asked: str) -> dict[str, Any]:
    """The record of unfinished work of the same kind, or a new one; it is a part of the index."""
    index, found = work.index, work.index["building"]
    if found:
        places = {work.folder / name: expected for name, expected in found["files"].items()}
        is_intact = all(file.is_file() and entry(file) == x for file, x in places.items())
        if found["of"] == asked and is_intact:
            return found
        if found["of"] != asked and not index["shards"]:
            raise ValueError(
                f"{work.folder}: an unfinished index of other documents, or of shards of another "
                "size; continue it with the arguments that it was begun with, or delete the folder"
            )
        what = "is of other documents" if is_intact else "is damaged"
        log(f"{work.folder}: what an interrupted run has left {what}, and is discarded")
        index["unused"] += found["shards"]
    new = {"of": asked, "documents": 0, "tokens": 0, "characters": 0, "shards": [], "files": {}}
    index["building"] = new
    return new


def _survey(work: _Work) -> tuple[str, int, int]:
    """Reads all that will be added once: a digest of it, its characters, and how many documents.

    That takes a small part of the time of the tokenizer, and all errors of the sources come before
    any work; the time that is left is known; and unfinished work is known to be the same.
    """
    about = f"{work.shard_tokens} {work.index['shards']}"
    digest, characters, count = hashlib.sha256(about.encode()), 0, 0
    for document in _new_documents(work, tell=True):
        digest.update(digest_of(document))
        characters += len(document.text)
        count += 1
    return digest.hexdigest(), characters, count


def _new_documents(work: _Work, tell: bool = False) -> Iterator[Document]:
    """The distinct documents of all sources that the index never had, in a fixed order."""
    known = set(digests(work.folder, work.index["shards"]))
    for source in work.sources:
        report = Report()
        for document in read_documents(source, report=report):
            digest = digest_of(document)
            if digest not in known:
                known.add(digest)
                yield document._replace(id=document.id or _place(document.where, source))
        if tell:
            report.tell()


def _place(where: str, source: str) -> str:
    """The file:row of a document without an id, below the source: no place of this machine."""
    if source.startswith("tfds:"):
        return where
    below = where.removeprefix(f"{source.rstrip('/')}/")
    return below if below != where else Path(where).name


def _shards(work: _Work, documents, bar: Bar) -> Iterator[ShardWriter]:
    """Shards with all of their documents, ready to be sorted."""
    shard, begun, tokens = None, time.monotonic(), 0

    def note(what: str = "") -> None:
        rate = tokens / max(time.monotonic() - begun, 1e-9)
        bar.update(bar.done, what, f"{rate:,.0f} tokens a second")

    def full() -> ShardWriter:
        assert shard is not None
        note(f"sorting {shard.tokens:,} tokens")
        return shard

    try:
        for document, ids in documents:
            if len(ids) >= MOST_TOKENS:
                raise ValueError(
                    f"{document.where}: expected a document of fewer than {MOST_TOKENS:,} tokens, "
                    f"found {len(ids):,}; divide it"
                )
            if shard and shard.tokens + len(ids) >= work.shard_tokens:
                yield full()
                shard = None
            if shard is None:
                name = new_shard(work.index)
                work.index["unused"] = [name]
                write_index(work.folder, work.index)
                shard = ShardWriter(work.folder / name, work.index["vocabulary_size"])
            shard.add(document, ids)
            tokens += len(ids)
            bar.done += len(document.text)
            note()
        if shard:
            yield full()
    finally:
        if shard:
            shard.abandon()


def clean(folder: Path, index: dict[str, Any]) -> None:
    """Removes what does not belong to an index: what a killed writer left, or replaced."""
    for file in folder.iterdir():
        if is_partial(file.name, of=INDEX) or is_partial(file.name, of=TOKENIZER):
            file.unlink()
    for name in index["unused"]:
        shutil.rmtree(folder / name, ignore_errors=True)
        if (folder / name).exists():
            raise ValueError(f"{folder / name}: cannot be deleted; delete it, and try again")
    index["unused"] = []
    write_index(folder, index)
