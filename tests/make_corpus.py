"""Makes the small corpus in `flexolmo_jax/corpus` from what `flexolmo data fetch` extracted.

    flexolmo data fetch RAW_DIR
    python tests/make_corpus.py RAW_DIR OUT_DIR

It takes only texts that may be passed on, a few pieces of many groups rather than many pieces of a
few, and leaves out what nearly repeats a text already taken. The same RAW_DIR gives the same files,
byte for byte. What each source is and what its licence asks for is in the corpus' LICENCES.md,
which is written by hand.
"""

import json
import random
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from flexolmo_jax.corpora.catalogue import PARTS
from flexolmo_jax.corpora.packages import limited, rows_file
from flexolmo_jax.corpora.rows import Row

SHINGLE = 8  # words
REPEATED = 0.2  # share of a row's shingles that other groups may already have
EVERYTHING = 1_000_000_000


@dataclass(frozen=True)
class Share:
    """`limit` bytes of one part of the fetched corpus, `per_group` rows of each group."""

    part: str
    limit: int
    per_group: int
    sources: str = ""  # a regular expression that the source must match


OWNERS = {
    "news": [Share("brown-news", 900_000, 9)],
    "creative": [Share("stories", 230_000, 2), Share("brown-creative", 650_000, 9)],
    "code": [Share("stdlib", 850_000, 2)],
    "math": [Share("metamath", 730_000, 20, "^set.mm/")],
    "academic": [Share("brown-academic", 900_000, 9)],
    "educational": [Share("postgresql-doc", 850_000, 3)],
}
PUBLIC = [
    # Encyclopedic, a little more than half
    Share("factbook", 260_000, 1),
    Share("jargon", 200_000, 1),
    Share("wordnet", 260_000, 1),
    # A slice of every kind of text that an owner has, from other sources
    Share("attrs", 30_000, 1),
    Share("click", 35_000, 1),
    Share("underscore", 25_000, 3),
    Share("acl2", 55_000, 1, "^acl2/(centaur|std)/"),
    Share("champ", 40_000, 1),
    Share("fiction", 100_000, 3, "gutenberg/(?!bible)"),
    Share("pmc", 95_000, 2),
    Share("sotu", 45_000, 1),
    Share("brown-public", 45_000, 1, "^brown/c[fg]"),
    Share("rust", 90_000, 1),
]


def own_copyright(row: Row) -> bool:
    """Whether a standard library file carries a copyright line that is not the PSF's."""
    lines = re.findall(r"(?i)^.*copyright.*$", row["text"], flags=re.MULTILINE)
    return any("Python Software Foundation" not in line for line in lines)


def candidates(raw: Path, share: Share) -> Iterator[Row]:
    """The rows a share may take, whole groups one after another in a fixed random order."""
    part = next(part for part in PARTS if part.name == share.part)
    text = rows_file(raw, part).read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.split("\n") if line]
    barred = {row["group"] for row in rows if share.part == "stdlib" and own_copyright(row)}
    taken: dict[str, int] = {}
    for row in limited(rows, EVERYTHING):
        if row["group"] in barred or not re.search(share.sources, row["source"]):
            continue
        if "\ufffd" in row["text"]:
            continue  # a character was lost before the text was packaged
        taken[row["group"]] = taken.get(row["group"], 0) + 1
        if taken[row["group"]] <= share.per_group:
            yield row


def shingles(text: str) -> set[int]:
    """Hashes of every run of `SHINGLE` words; they stay inside this process."""
    words = re.findall(r"\w+", text.lower())
    runs = (" ".join(words[i : i + SHINGLE]) for i in range(max(1, len(words) - SHINGLE + 1)))
    return {hash(run) for run in runs}


def take(raw: Path, share: Share, seen: dict[int, str]) -> list[Row]:
    """The rows of a share; `seen` names the group that first had each shingle, and grows."""
    rows: list[Row] = []
    total = 0
    for row in candidates(raw, share):
        own = shingles(row["text"])
        repeated = sum(seen.get(run, row["group"]) != row["group"] for run in own)
        if repeated > REPEATED * len(own):
            continue
        total += len(row["text"].encode())
        if total > share.limit:
            break
        for run in own:
            seen.setdefault(run, row["group"])
        rows.append(row)
    return rows


def main(raw: Path, out: Path) -> None:
    """Writes one file per domain and prints the table that LICENCES.md quotes."""
    out.mkdir(parents=True, exist_ok=True)
    seen: dict[int, str] = {}
    for domain, shares in {**OWNERS, "public": PUBLIC}.items():
        rows: list[Row] = []
        for share in shares:
            taken = take(raw, share, seen)
            size = sum(len(row["text"].encode()) for row in taken)
            print(f"{domain:<12} {share.part:<15} {len(taken):>5} rows {size:>9,} bytes")
            rows += taken
        random.Random(0).shuffle(rows)
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (out / f"{domain}.jsonl").write_text("".join(lines), encoding="utf-8", newline="\n")
        size = sum(len(row["text"].encode()) for row in rows)
        groups = len({row["group"] for row in rows})
        print(f"| {domain} | {len(rows):,} | {groups} | {size:,} |")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("expected: python tests/make_corpus.py RAW_DIR OUT_DIR")
    main(Path(sys.argv[1]), Path(sys.argv[2]))
