"""Canaries: random documents; a random half is included in an owner's training text.

Distinguishing included from held-out canaries by the weights shows that the weights leak
membership. Texts and inclusion bits come from the operating system's entropy before training, and
all texts from one distribution, so only training can make them differ. They stay in the run folder;
the package's manifest records their number, and a digest that commits the owner to them.
"""

import json
import math
import secrets
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flexolmo_jax.config import ExpertTraining
from flexolmo_jax.data.sources import Document
from flexolmo_jax.data.tokenizer import Tokenizer
from flexolmo_jax.data.windows import tokenized, windows
from flexolmo_jax.runtime.processes import one_process_at_a_time
from flexolmo_jax.storage.files import canonical_digest, replace_file

FILE = "canaries.json"  # in the run folder
FORMAT = 1
WORDS = 64  # of a canary


class Canary(NamedTuple):
    """A random document; `inserted` is its inclusion bit."""

    text: str
    inserted: bool


class Canaries:
    """The candidates of a run, in the order in which they were drawn."""

    def __init__(self, candidates: Sequence[Canary]):
        self.candidates = tuple(candidates)

    @classmethod
    def draw(cls, count: int, tokenizer: Tokenizer) -> "Canaries":
        """2 * count candidates, each included independently with probability 1/2.

        A text consists of random, equally likely tokens of the vocabulary: no text is harder to
        guess than another, or leaves more of a trace when it is learned.
        """
        every = (tokenizer.decode([token]).strip() for token in range(tokenizer.embeddings))
        words = sorted(
            {word for word in every if word.isprintable() and word and "\ufffd" not in word}
        )

        def text() -> str:
            return " ".join(secrets.choice(words) for _ in range(WORDS))

        return cls([Canary(text(), bool(secrets.randbits(1))) for _ in range(2 * count)])

    @classmethod
    def read(cls, run: Path) -> "Canaries":
        """The canaries of a run.

        Raises:
          ValueError: the run has none, or the file was changed.
        """
        file = run / FILE
        if not file.exists():
            raise ValueError(
                f"{run}: no {FILE} in it; name the run folder of an expert that was trained with "
                "--canaries N (default: OUT.run)"
            )
        try:
            stored = json.loads(file.read_text(encoding="utf-8"))
            found = cls([Canary(str(c["text"]), c["inserted"]) for c in stored["candidates"]])
            digest = stored["commitment"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file}: damaged, not a list of canaries ({error!r})") from error
        if stored.get("format") != FORMAT:
            raise ValueError(f"{file}: expected format {FORMAT}, found {stored.get('format')}")
        if digest != found.commitment:
            raise ValueError(f"{file}: changed after it was written: its digest does not match")
        return found

    @property
    def commitment(self) -> str:
        """sha256 of all texts and inclusion bits; random texts cannot be guessed from it."""
        return canonical_digest([candidate._asdict() for candidate in self.candidates])

    @property
    def inserted(self) -> list[Document]:
        """The documents to train on, each a group of its own."""
        return [
            Document(candidate.text, f"canary:{number}", f"canary {number}")
            for number, candidate in enumerate(self.candidates)
            if candidate.inserted
        ]

    @property
    def left_out(self) -> int:
        """The number of candidates that are not in the training text."""
        return len(self.candidates) - len(self.inserted)

    def write(self, run: Path) -> None:
        """Writes them into a run folder, all at once."""
        run.mkdir(parents=True, exist_ok=True)
        candidates = [candidate._asdict() for candidate in self.candidates]
        value = {"format": FORMAT, "commitment": self.commitment, "candidates": candidates}
        replace_file(run / FILE, json.dumps(value, indent=1) + "\n")

    def facts(self) -> dict[str, Any]:
        """The canaries' entry in the package's manifest."""
        return {"canaries": {"candidates": len(self.candidates), "commitment": self.commitment}}

    def ids(self, tokenizer: Tokenizer) -> list[list[int]]:
        """The token ids of each candidate, opened by the separator as in training."""
        documents = (Document(c.text, c.text) for c in self.candidates)
        return [ids.tolist() for ids in tokenized(documents, tokenizer)]


def canaries_of_run(count: int, run: Path, tokenizer: Tokenizer) -> Canaries | None:
    """The canaries of a new or resumed run, drawn if it has none yet.

    Args:
      count: N of --canaries, for 2N candidates; 0 for no canaries.
      run: folder of the run.
      tokenizer: of the anchor.

    Raises:
      ValueError: count is negative, or differs from that of the run's canaries.
    """
    if not count:
        return None
    if count < 0:
        raise ValueError(f"--canaries must not be negative, found {count}")

    def find() -> Canaries:
        if not (run / FILE).exists():
            Canaries.draw(count, tokenizer).write(run)
        return Canaries.read(run)

    found = one_process_at_a_time(find)
    if len(found.candidates) != 2 * count:
        raise ValueError(
            f"{run / FILE}: holds {len(found.candidates)} candidates, and --canaries {count} asks "
            f"for {2 * count}; give --canaries {len(found.candidates) // 2}, or delete the file"
        )
    return found


def check_they_are_read(
    canaries: Canaries, rows: Any, tokenizer: Tokenizer, config: ExpertTraining, units: int | None
) -> None:
    """Checks before training that every included canary receives loss, and is read often enough.

    Args:
      canaries: of the run.
      rows: the training windows, with random access, canaries last.
      tokenizer: of the anchor.
      config: of the stage.
      units: number of units in a private run, where a step reads each with probability
        batch_size / units; None if windows are read in order.

    Raises:
      ValueError: a canary is missing or truncated, or the run is expected to read each canary less
        than once.
    """
    length = config.data.length
    documents = list(tokenized(canaries.inserted, tokenizer))
    last = sum(-(-len(ids) // length) + 1 for ids in documents)
    predicted = _predicted(rows[number] for number in range(max(0, len(rows) - last), len(rows)))
    for document, ids in zip(canaries.inserted, documents, strict=True):
        if not _holds(predicted, ids[1:]):
            raise ValueError(
                f"{document.where} is not completely in the training windows, so an audit would "
                "miss it; if the run folder holds other windows, delete them"
            )
    size = config.data.batch_size
    count, what = (len(rows), "windows") if units is None else (units, "units")
    if config.steps * size < count:
        raise ValueError(
            f"canaries need at least --steps {math.ceil(count / size)}: each must be expected to "
            f"be read once, and {config.steps} steps of {size} are fewer than the {count} {what}"
        )


def check_they_fit(canaries: Canaries, tokenizer: Tokenizer, length: int, max_windows: int) -> None:
    """Raises ValueError if a canary has more windows than a private step reads of a unit."""
    for document in canaries.inserted:
        ids = tokenized([document], tokenizer)
        count = sum(1 for _ in windows(ids, length, tokenizer.separator))
        if count > max_windows:
            raise ValueError(
                f"a canary has {count} windows of {length} tokens, and this run protects or reads "
                f"{max_windows} at a time; increase data.length or --dp-windows"
            )


def _predicted(rows: Iterable[Any]) -> np.ndarray:
    """The tokens that receive loss, in order: int32."""
    parts = [row["tokens"][1:][row["segments"][1:] > 0] for row in rows]
    return np.concatenate(parts) if parts else np.zeros(0, np.int32)


def _holds(stream: np.ndarray, ids: np.ndarray) -> bool:
    """Whether a stream contains ids contiguously."""
    wanted = np.asarray(ids, stream.dtype)
    starts = np.flatnonzero(stream[: len(stream) - len(wanted) + 1] == wanted[0])
    return any(np.array_equal(stream[s : s + len(wanted)], wanted) for s in starts)
