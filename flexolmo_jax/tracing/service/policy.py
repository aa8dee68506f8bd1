"""An owner's policy: what its index may say, to whom, and how much of it."""

import dataclasses
from pathlib import Path
from typing import Literal, get_args

from flexolmo_jax.storage.files import read_toml

Level = Literal["off", "counts", "ids", "snippets"]
LEVELS: tuple[Level, ...] = get_args(Level)

EXAMPLE = """\
# What `flexolmo trace serve` may say of an index. Every line may be left out but the first.

# off: nothing. counts: which words of a text occur, and how often. ids: also in which documents,
# with their sources and licences. snippets: also the text around the words.
level = "counts"

# Characters of a document that are shown on each side of a span, at the level snippets.
snippet_characters = 80

# A span of fewer tokens is not said: short ones occur by chance, and are cheap to guess.
minimum_tokens = 8

# A span is said only if that many documents hold it (of different groups, where the index knows
# groups). With 1, whoever has a document can ask whether it is here.
minimum_documents = 5

# What one asker may do; a day is one of UTC. Shown characters are those of snippets.
requests_per_minute = 60
tokens_per_day = 100000
characters_per_day = 50000

# The longest text that may be asked about, and how long a search may take.
maximum_characters = 20000
seconds = 10

# Whether the log keeps the texts that were asked about, and not their SHA-256 only.
keep_texts = false
"""

# Field: the least and the most that it may be.
_RANGES = {
    "snippet_characters": (1, 1000),
    "minimum_tokens": (1, 1000),
    "minimum_documents": (1, 1_000_000),
    "requests_per_minute": (1, 1_000_000),
    "tokens_per_day": (1, 10**12),
    "characters_per_day": (0, 10**12),
    "maximum_characters": (1, 1_000_000),
    "seconds": (1, 600),
}


@dataclasses.dataclass(frozen=True)
class Policy:
    """What an index may say; `EXAMPLE` explains each field.

    Raises:
      ValueError: a field has an impossible value; the text names it.
    """

    level: Level
    snippet_characters: int = 80
    minimum_tokens: int = 8
    minimum_documents: int = 5
    requests_per_minute: int = 60
    tokens_per_day: int = 100_000
    characters_per_day: int = 50_000
    maximum_characters: int = 20_000
    seconds: int = 10
    keep_texts: bool = False

    def __post_init__(self):
        if self.level not in LEVELS:
            raise ValueError(f"level: expected {', '.join(LEVELS)}, found {self.level!r}")
        for name, (least, most) in _RANGES.items():
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= most:
                raise ValueError(
                    f"{name}: expected a whole number of {least} to {most}, found {value!r}"
                )
        if type(self.keep_texts) is not bool:
            raise ValueError(f"keep_texts: expected true or false, found {self.keep_texts!r}")

    @property
    def context(self) -> int:
        """Characters of a document on each side of a span that may be shown."""
        return self.snippet_characters if self.level == "snippets" else 0


def read_policy(file: Path) -> Policy:
    """Reads a policy.

    Raises:
      ValueError: it is missing, not TOML, has an unknown field or an impossible value.
    """
    fields = read_toml(file, "a policy; `flexolmo trace policy` prints one to begin with")
    known = [field.name for field in dataclasses.fields(Policy)]
    if stray := sorted(set(fields) - set(known)):
        raise ValueError(f"{file}: unknown {', '.join(stray)}; expected {', '.join(known)}")
    if "level" not in fields:
        raise ValueError(f"{file}: expected level = one of {', '.join(LEVELS)}, found none")
    try:
        return Policy(**fields)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
