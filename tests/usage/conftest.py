"""A ledger of three owners, and its keys."""

import random
from pathlib import Path
from typing import NamedTuple

import pytest

from flexolmo_jax.usage import entries
from flexolmo_jax.usage.ledger import Ledger
from flexolmo_jax.usage.signing import make_keys, read_private, read_public

OWNERS = ("public", "math", "code")


class Kept(NamedTuple):
    """A ledger, and its keys."""

    file: Path
    secret: Path
    public: Path

    @staticmethod
    def records(count: int, seed: int = 0) -> list[dict]:
        """Uses of one to three owners; each fourth is a sample."""
        draw = random.Random(seed)
        made = []
        for number in range(count):
            owners = draw.sample(OWNERS, draw.randint(1, 3))
            mass = {owner: round(draw.uniform(0.01, 5), 4) for owner in owners}
            if number % 4 == 3:
                bits = {owner: draw.uniform(-1, 1) for owner in owners}
                made.append(entries.sample("ab" * 32, 16, mass, bits))
            else:
                made.append(entries.use("ab" * 32, 5, draw.randint(15, 40), mass))
        return made

    @property
    def key(self) -> str:
        return read_public(self.public)

    def open(self) -> Ledger:
        return Ledger(self.file, read_private(self.secret))

    def add(self, *records) -> None:
        """Appends records, signed."""
        ledger = self.open()
        ledger.append(records)
        ledger.checkpoint()
        ledger.close()


@pytest.fixture
def kept(tmp_path) -> Kept:
    secret = tmp_path / "coordinator.key"
    return Kept(tmp_path / "usage.jsonl", secret, make_keys(secret))


@pytest.fixture
def filled(kept) -> Kept:
    """With 24 lines between two checkpoints."""
    records = kept.records(24)
    kept.add(*records[:10])
    kept.add(*records[10:])
    return kept
