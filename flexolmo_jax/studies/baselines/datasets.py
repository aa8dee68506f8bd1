"""The texts of a study, in the form that its stages read: files, and sequences to score."""

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer

from flexolmo_jax.data.domain_embedding import DOCUMENTS
from flexolmo_jax.data.sources import Document, is_heldout, read_documents
from flexolmo_jax.data.tokenizer import Tokenizer
from flexolmo_jax.data.windows import tokenized, windows
from flexolmo_jax.storage.files import canonical_digest, file_digest, new_file, replace_file
from flexolmo_jax.studies.baselines.config import StudyConfig

SPLITS = ("train", "tune", "heldout")
MIXED = "mixed"  # beside the domains' names: sequences that change their domain
CORPUS = "corpus"
TOKENIZER = "tokenizer.json"


class Sequences(NamedTuple):
    """Sequences to score: of one document each, or (mixed) of two halves of two domains.

    Attributes:
      tokens: int32 [N, S + 1]; the first S are read, the last S are predicted.
      sizes: int32 [N, S], bytes of each predicted token; 0 for padding and ends of documents.
      document: int32 [N], the index of the document, or group of documents (a book), of each.
    """

    tokens: np.ndarray
    sizes: np.ndarray
    document: np.ndarray


def find_texts(config: StudyConfig, domain: str) -> dict[str, str]:
    """The sources of a domain by split.

    Raises:
      ValueError: a file is missing.
    """
    if config.texts == CORPUS:
        return {split: f"corpus:{domain}" for split in SPLITS}
    files = {}
    for split in SPLITS:
        file = Path(config.texts) / domain / f"{split}.jsonl"
        if not file.is_file():
            raise ValueError(
                f"{file}: missing; expected texts to be {CORPUS!r}, or a folder that `flexolmo "
                "data flexmix` wrote: set it with --texts FOLDER"
            )
        files[split] = str(file)
    return files


def digest_of_texts(config: StudyConfig, domain: str) -> str:
    """A digest of all texts of a domain: of the sources, not of what is cut from them."""
    digest = hashlib.sha256()
    for split, source in find_texts(config, domain).items():
        digest.update(split.encode())
        if config.texts == CORPUS:
            for document in read_documents(source):
                digest.update(canonical_digest([document.text, document.group]).encode())
        else:
            digest.update(bytes.fromhex(file_digest(Path(source))))
    return digest.hexdigest()


def write_texts(config: StudyConfig, domain: str, folder: Path) -> None:
    """Writes train.jsonl, tune.jsonl and heldout.jsonl of a domain.

    Documents come in the order of their digests. An owner's training text is cut at `owner_bytes`.
    """
    for split, source in find_texts(config, domain).items():
        documents = [d for d in read_documents(source) if _belongs(d, split, config)]
        documents.sort(key=lambda d: hashlib.sha256(d.text.encode()).digest())
        if not documents:
            raise ValueError(
                f"{source}: no document belongs to the split {split!r}; give more documents, or "
                "hold out another share"
            )
        if split == "train" and domain != "public":
            documents = list(_first_bytes(documents, config.owner_bytes))
        write_documents(folder / f"{split}.jsonl", documents)


def write_pool(texts: Mapping[str, Path], max_bytes: int, file: Path) -> None:
    """Writes the training text of all domains into one file, at most `max_bytes` of each."""
    pool: list[Document] = []
    for folder in texts.values():
        pool += _first_bytes(read_documents(folder / "train.jsonl"), max_bytes)
    write_documents(file, pool)


def _belongs(document: Document, split: str, config: StudyConfig) -> bool:
    if config.texts != CORPUS:
        return True
    if is_heldout(document, config.heldout / 3):
        return split == "tune"
    return split == ("heldout" if is_heldout(document, config.heldout) else "train")


def _first_bytes(documents: Iterable[Document], max_bytes: int) -> Iterator[Document]:
    """Documents until there are `max_bytes` bytes; the last one is cut."""
    left = max_bytes
    for document in documents:
        if left <= 0:
            return
        text = document.text.encode()[:left].decode(errors="ignore")
        left -= len(document.text.encode())
        yield document._replace(text=text)


def write_documents(file: Path, documents: Iterable[Document]) -> None:
    """Writes documents as JSON Lines, with their groups."""
    rows = (
        {"text": d.text, "group": d.group.removeprefix("group:") if d.group != d.text else None}
        for d in documents
    )
    replace_file(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def training_texts(folder: Path) -> list[str]:
    """The texts of a train.jsonl that `write_texts` wrote."""
    return [d.text for d in read_documents(folder / "train.jsonl")]


def write_tokenizer(public: Path, vocab_size: int, folder: Path) -> None:
    """Trains a BPE on the public training text; it is the same for all seeds."""
    tokenizer = Tokenizer.train(training_texts(public), vocab_size)
    replace_file(folder / TOKENIZER, tokenizer.json)


def write_embedding(own: Path, public: Path, file: Path) -> None:
    """Writes the domain embedding of an owner's documents, as a .npy file.

    The paper uses an embedding model; this one is hashed words and word pairs, weighted by how rare
    they are in public text (TF-IDF). It needs no download, and nothing of other owners.
    """
    hashed = HashingVectorizer(n_features=4096, ngram_range=(1, 2), alternate_sign=False)
    rarity = TfidfTransformer(sublinear_tf=True)
    rarity.fit(hashed.transform(training_texts(public)[:DOCUMENTS]))
    weighted = rarity.transform(hashed.transform(training_texts(own)[:DOCUMENTS]))
    np.save(file, np.asarray(weighted.mean(axis=0), np.float32).reshape(-1))


def write_public_sample(public: Path, share: float, file: Path) -> None:
    """Writes the public documents that router tuning reads beside the owners' proxies."""
    documents = list(read_documents(public / "train.jsonl"))  # in the order of their digests
    write_documents(file, documents[: max(1, round(share * len(documents)))])


def write_sequences(
    config: StudyConfig, texts: Mapping[str, Path], tokenizer: Tokenizer, file: Path
) -> None:
    """Writes all sequences to score, by "SPLIT.DOMAIN" and "SPLIT.mixed", to one .npz file."""
    sizes = token_sizes(tokenizer)
    named: dict[str, Sequences] = {}
    for split, count in (("tune", config.tune_sequences), ("heldout", config.test_sequences)):
        for domain in config.domains:
            documents = read_documents(texts[domain] / f"{split}.jsonl")
            named[f"{split}.{domain}"] = cut_sequences(
                documents, tokenizer, config.length, config.document_windows, count
            )
        mixed = config.mixed_sequences if split == "heldout" else -(-config.mixed_sequences // 2)
        alone = {domain: named[f"{split}.{domain}"] for domain in config.domains}
        named[f"{split}.{MIXED}"] = mix_sequences(alone, sizes, mixed)
    arrays = {
        f"{name}.{field}": getattr(sequences, field)
        for name, sequences in named.items()
        for field in Sequences._fields
    }
    with new_file(file, "wb") as opened:
        np.savez(opened, **arrays)


def read_sequences(file: Path) -> dict[str, Sequences]:
    """What `write_sequences` wrote."""
    with np.load(file) as arrays:
        names = sorted({name.rpartition(".")[0] for name in arrays})
        return {n: Sequences(*(arrays[f"{n}.{f}"] for f in Sequences._fields)) for n in names}


def token_sizes(tokenizer: Tokenizer) -> np.ndarray:
    """Bytes of text of each token, int32 [V]; 0 for the end-of-document token.

    In a byte-level BPE, each character of a token's name stands for a byte.
    """
    sizes = np.asarray([len(name) for name in tokenizer.names()], np.int32)
    sizes[tokenizer.separator] = 0
    return sizes


def cut_sequences(
    documents: Iterable[Document], tokenizer: Tokenizer, length: int, of_document: int, count: int
) -> Sequences:
    """The first `of_document` sequences of each document, until there are `count`."""
    sizes = token_sizes(tokenizer)
    tokens: list[np.ndarray] = []
    predicted, group = [], []
    numbers: dict[str, int] = {}
    chosen, again = itertools.tee(documents)
    for document, ids in zip(chosen, tokenized(again, tokenizer), strict=True):
        cut = windows([ids], length, tokenizer.separator)
        for window in itertools.islice(cut, of_document):
            size = sizes[window.tokens[1:]] * (window.segments[1:] == 1)
            if len(tokens) < count and size.any():
                tokens.append(window.tokens)
                predicted.append(size)
                group.append(numbers.setdefault(document.group, len(numbers)))
        if len(tokens) == count:
            break
    return Sequences(np.stack(tokens), np.stack(predicted), np.asarray(group, np.int32))


def mix_sequences(alone: dict[str, Sequences], sizes: np.ndarray, count: int) -> Sequences:
    """Joins half a sequence of one domain and half of another, read as one document.

    The token in the middle is the last input of the first half, so that S / 2 + 1 of the predicted
    tokens are of the second domain. Sequences with less text than that are not used.
    """
    half = next(iter(alone.values())).sizes.shape[1] // 2
    full = {d: s.tokens[(s.sizes[:, : half + 1] > 0).all(axis=1)] for d, s in alone.items()}
    domains = [domain for domain, tokens in full.items() if len(tokens)]
    pairs = list(itertools.permutations(domains, 2))
    if not pairs:
        raise ValueError(
            f"no two domains have documents of {half + 2} tokens to mix; set a smaller length"
        )
    random = np.random.default_rng(0)
    order = {domain: itertools.cycle(random.permutation(len(full[domain]))) for domain in domains}
    tokens = []
    for number in range(count):
        first, second = pairs[number % len(pairs)]
        before = full[first][next(order[first])]
        after = full[second][next(order[second])]
        tokens.append(np.concatenate([before[:half], after[1 : half + 2]]))
    stacked = np.stack(tokens).astype(np.int32)
    return Sequences(stacked, sizes[stacked[:, 1:]], np.arange(count, dtype=np.int32))


def first(sequences: Sequences, count: int) -> Sequences:
    """The first `count` sequences."""
    return Sequences(*(array[:count] for array in sequences))
