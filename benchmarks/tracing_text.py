"""Text for the benchmark of tracing that every machine with Python has: the sources of Python.

The files of the standard library and of all installed packages, in an order that depends on their
contents only, each of them once; their tokens by a byte-level BPE that is trained on some of them.
"""

import hashlib
import itertools
import json
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers

from flexolmo_jax.data.sources import Document
from flexolmo_jax.data.tokenizer import Tokenizer

VOCABULARY = 100_000
SAMPLE = 15_000_000  # characters that the tokenizer is trained on


class Text(NamedTuple):
    """A text in tokens.

    Attributes:
      documents: of which only what an index keeps is needed.
      ids: uint32 for each document.
      tokenizer: its tokenizer.json.
      about: what it is, in words.
    """

    documents: list[Document]
    ids: list[np.ndarray]
    tokenizer: str
    about: str


def read_text(tokens: int) -> Text:
    """Text of at least that many tokens.

    Raises:
      SystemExit: there is not enough of it on this machine.
    """
    found = list(_sources())
    sample, size = [], 0
    for document in found:
        sample.append(document.text)
        size += len(document.text)
        if size > SAMPLE:
            break
    made = Tokenizer.train(sample, VOCABULARY)
    encoder = tokenizers.Tokenizer.from_str(made.json)
    encoder.encode_special_tokens = True
    documents, ids, count = [], [], 0
    for start in range(0, len(found), 256):
        some = found[start : start + 256]
        encoded = encoder.encode_batch_fast([d.text for d in some], add_special_tokens=False)
        documents += some
        ids += [np.array(one.ids, np.uint32) for one in encoded]
        count += sum(len(one.ids) for one in encoded)
        if count >= tokens:
            break
    else:
        raise SystemExit(f"there are only {count:,} tokens of Python sources on this machine")
    python = ".".join(map(str, sys.version_info[:3]))
    about = (
        f"Python sources: standard library {python} and installed packages, {len(found):,} "
        f"distinct files; byte-level BPE of {made.vocab_size:,} ids, trained on "
        f"{size / 1e6:.0f} MB of them"
    )
    return Text(documents, ids, made.json, about)


def _sources() -> Iterator[Document]:
    """The distinct files that are valid text, in the order of their digests."""
    library = Path(sysconfig.get_paths()["stdlib"])
    packages = [Path(place) for place in sys.path if place.endswith("site-packages")]
    texts: dict[bytes, Document] = {}
    for root in [library, *packages]:
        for file in root.rglob("*.py"):
            name = str(file.relative_to(root))
            if root == library and "site-packages" in file.parts:
                continue
            try:
                text = file.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):
                continue
            if text.strip():
                document = Document(text, text, name, name, root.name)
                texts.setdefault(hashlib.sha256(text.encode()).digest(), document)
    for _, document in sorted(texts.items()):
        yield document


def write_rows(text: Text, documents: int, file: Path) -> None:
    """The first documents as JSON Lines, for the command."""
    with open(file, "w", encoding="utf-8") as opened:
        for document in itertools.islice(text.documents, documents):
            opened.write(json.dumps({"text": document.text, "id": document.id}) + "\n")
