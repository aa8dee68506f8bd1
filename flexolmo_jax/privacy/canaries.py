"""Canaries: made-up documents, of which a coin puts half into an owner's training text.

Whoever can tell from the weights which ones were put in, has shown that the weights tell of single
documents. Texts and coins come from the operating system's entropy before training, from one
distribution, so that nothing but the training can tell them apart. They stay in the run folder;
the package's manifest holds how many there are, and a digest that binds the owner to them.
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
    """A made-up document; `inserted` is what its coin said."""

    text: str
    inserted: bool


class Canaries:
    """The candidates of a run, in the order in which they were drawn."""

    def __init__(self, candidates: Sequence[Canary]):
        self.candidates = tuple(candidates)

    @classmethod
    def draw(cls, count: int, tokenizer: Tokenizer) -> "Canaries":
        """2 * count candidates, of which each is put in with probability 1/2, on its own.

        A text is of random pieces of the vocabulary, all equally likely: no text is harder to
        guess, and none leaves more of a trace where it is learned.
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
        """Those of a run.

        Raises:
          ValueError: there are none, or the file was changed.
        """
        file = run / FILE
        if not file.exists():
            raise ValueError(
                f"{run}: no {FILE} there; name the run folder of an expert that was trained with "
                "--canaries N (default: OUT.run)"
            )
        try:
            there = json.loads(file.read_text(encoding="utf-8"))
            found = cls([Canary(str(one["text"]), one["inserted"]) for one in there["candidates"]])
            digest = there["commitment"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file}: damaged, not a list of canaries ({error!r})") from error
        if there.get("format") != FORMAT:
            raise ValueError(f"{file}: expected format {FORMAT}, found {there.get('format')}")
        if digest != found.commitment:
            raise ValueError(f"{file}: changed after it was written: its digest does not match")
        return found

    @property
    def commitment(self) -> str:
        """sha256 of all texts and coins; the texts are too random to be guessed from it."""
        return canonical_digest([one._asdict() for one in self.candidates])

    @property
    def inserted(self) -> list[Document]:
        """The documents to train on, each a group of its own."""
        return [
            Document(one.text, f"canary:{number}", f"canary {number}")
            for number, one in enumerate(self.candidates)
            if one.inserted
        ]

    @property
    def left_out(self) -> int:
        return len(self.candidates) - len(self.inserted)

    def write(self, run: Path) -> None:
        """Writes them into a run folder, all at once."""
        run.mkdir(parents=True, exist_ok=True)
        candidates = [one._asdict() for one in self.candidates]
        value = {"format": FORMAT, "commitment": self.commitment, "candidates": candidates}
        replace_file(run / FILE, json.dumps(value, indent=1) + "\n")

    def facts(self) -> dict[str, Any]:
        """What the package's manifest says of them."""
        return {"canaries": {"candidates": len(self.candidates), "commitment": self.commitment}}

    def ids(self, tokenizer: Tokenizer) -> list[list[int]]:
        """Of each candidate, as in training: opened by the separator."""
        documents = (Document(c.text, c.text) for c in self.candidates)
        return [ids.tolist() for ids in tokenized(documents, tokenizer)]


def canaries_of_run(count: int, run: Path, tokenizer: Tokenizer) -> Canaries | None:
    """The canaries of a run that starts or goes on, drawn if it has none yet.

    Args:
      count: N of --canaries; 2N candidates. 0: no canaries.
      run: its folder.
      tokenizer: of the anchor.

    Raises:
      ValueError: count is negative, or the run has others.
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
            f"for {2 * count}; give --canaries {len(found.candidates) // 2}, or take the file away"
        )
    return found


def check_they_are_read(
    canaries: Canaries, rows: Any, tokenizer: Tokenizer, config: ExpertTraining, units: int | None
) -> None:
    """The preflight: every canary that was put in receives loss, and is read often enough.

    Args:
      canaries: of the run.
      rows: the windows that training reads, with random access, canaries last.
      tokenizer: of the anchor.
      config: of the stage.
      units: of privacy, in a private run: each is read with probability batch_size / units in a
        step. None: windows are read in turn.

    Raises:
      ValueError: a canary is missing or cut short; or fewer than one read of each is to be
        expected, with the steps that it takes.
    """
    length = config.data.length
    documents = list(tokenized(canaries.inserted, tokenizer))
    last = sum(-(-len(ids) // length) + 1 for ids in documents)
    predicted = _predicted(rows[number] for number in range(max(0, len(rows) - last), len(rows)))
    for document, ids in zip(canaries.inserted, documents, strict=True):
        if not _holds(predicted, ids[1:]):
            raise ValueError(
                f"{document.where} is not in the training windows in full, so that an audit would "
                "miss it; is another version of the windows in the run folder? Take it away"
            )
    size = config.data.batch_size
    there, what = (len(rows), "windows") if units is None else (units, "units")
    if config.steps * size < there:
        raise ValueError(
            f"canaries need --steps {math.ceil(there / size)} at least: each must be expected to "
            f"be read once, and {config.steps} steps of {size} are fewer than the {there} {what}"
        )


def check_they_fit(canaries: Canaries, tokenizer: Tokenizer, length: int, most: int) -> None:
    """Raises ValueError if one has more windows than a private step reads of a unit, `most`."""
    for document in canaries.inserted:
        ids = tokenized([document], tokenizer)
        count = sum(1 for _ in windows(ids, length, tokenizer.separator))
        if count > most:
            raise ValueError(
                f"a canary has {count} windows of {length} tokens, and this run protects or reads "
                f"{most} at a time: with a larger data.length, or more --dp-windows, it fits"
            )


def _predicted(rows: Iterable[Any]) -> np.ndarray:
    """The tokens that receive loss, in order: int32."""
    parts = [row["tokens"][1:][row["segments"][1:] > 0] for row in rows]
    return np.concatenate(parts) if parts else np.zeros(0, np.int32)


def _holds(stream: np.ndarray, ids: np.ndarray) -> bool:
    """Whether ids come in a stream, one after the other."""
    wanted = np.asarray(ids, stream.dtype)
    starts = np.flatnonzero(stream[: len(stream) - len(wanted) + 1] == wanted[0])
    return any(np.array_equal(stream[s : s + len(wanted)], wanted) for s in starts)
