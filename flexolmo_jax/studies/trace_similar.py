"""How often a passage that was changed is found by the second tier of a trace: its recall.

flexolmo demo
flexolmo study trace-similar flexolmo_demo

Passages of the demo's training texts are changed, and looked for among all documents of all owners.
With `--wordnet`, words are also replaced by synonyms; Debian's package wordnet-base has them:

apt-get download wordnet-base && dpkg -x wordnet-base_*.deb wordnet
flexolmo study trace-similar flexolmo_demo --wordnet wordnet/usr/share/wordnet
"""

import argparse
import datetime
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from flexolmo_jax.studies.demo import OWNERS
from flexolmo_jax.studies.engine.report import add_page_argument, machine, table, write_part
from flexolmo_jax.tracing.bm25 import bm25
from flexolmo_jax.tracing.index import Index
from flexolmo_jax.tracing.results import Passage
from flexolmo_jax.tracing.similar import CANDIDATES, fused, nearest_passages

PASSAGES = 40  # of each owner
WORDS = 40  # of a passage
RANKS = (1, 5, 10)


def half_dropped(words: list[str], random: np.random.Generator) -> list[str]:
    """Of every two words one, at random."""
    return [words[i + int(random.integers(2))] for i in range(0, len(words) - 1, 2)]


def shuffled(words: list[str], random: np.random.Generator) -> list[str]:
    """All words in another order."""
    return [words[i] for i in random.permutation(len(words))]


def quarter_kept(words: list[str], random: np.random.Generator) -> list[str]:
    """A quarter of the words, in another order."""
    return [words[i] for i in random.permutation(len(words))[: len(words) // 4]]


Change = Callable[[list[str], np.random.Generator], list[str]]
CHANGES: dict[str, Change] = {
    "every second word dropped": half_dropped,
    "words in random order": shuffled,
    "a quarter of the words, in random order": quarter_kept,
}


def read_synonyms(wordnet: Path) -> dict[str, list[str]]:
    """Other words for the commonest meaning of a word that has any, from WordNet's files."""
    synonyms: dict[str, list[str]] = {}
    for kind in ("noun", "verb", "adj", "adv"):
        sets = {}
        for line in (wordnet / f"data.{kind}").read_text(encoding="utf-8").splitlines():
            if not line.startswith(" "):  # the licence
                fields = line.split(" | ")[0].split()
                own = fields[4 : 4 + 2 * int(fields[3], 16) : 2]
                sets[fields[0]] = [word.split("(")[0].replace("_", " ") for word in own]
        for line in (wordnet / f"index.{kind}").read_text(encoding="utf-8").splitlines():
            if not line.startswith(" "):
                fields = line.split()
                meanings = fields[-int(fields[2]) :]  # the commonest first
                others = [w for m in meanings for w in sets[m] if w.lower() != fields[0]]
                if others:
                    synonyms.setdefault(fields[0], others[:1])
    return synonyms


def with_synonyms(synonyms: dict[str, list[str]], alone: bool) -> Change:
    """Replaces words of four and more letters that have a synonym; `alone`: drops all others."""

    def change(words: list[str], random: np.random.Generator) -> list[str]:
        changed = []
        for word in words:
            known = word.lower().strip(".,;:!?()\"'")
            is_plural = known.endswith("s") and known not in synonyms
            found = synonyms.get(known[:-1] if is_plural else known) if len(known) > 3 else None
            if found:
                changed.append(found[0] + "s" * is_plural)
            elif not alone:
                changed.append(word)
        return changed

    return change


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `flexolmo study trace-similar`."""
    parser.add_argument("demo", type=Path, help="the folder of a demo, or one with its indexes")
    parser.add_argument("--wordnet", type=Path, metavar="DIR", help="the folder of its data.noun")
    add_page_argument(parser, "tracing.md")


def run(args: argparse.Namespace) -> None:
    """Picks and changes passages, looks for them, and writes the part of the page."""
    names = ("public", *OWNERS)
    indexes = [Index.open(args.demo / "indexes" / name) for name in names]
    passages = [found for index in indexes for found in pick_passages(index, PASSAGES)]
    changes = dict(CHANGES)
    if args.wordnet is not None:
        synonyms = read_synonyms(args.wordnet)
        changes |= {
            "synonyms where there are any": with_synonyms(synonyms, alone=False),
            "only synonyms, no word of the passage": with_synonyms(synonyms, alone=True),
        }
    rows, started = [], time.monotonic()
    for change, changed in changes.items():
        random = np.random.default_rng(0)
        texts = [" ".join(changed(text.split(), random)) for _, text in passages]
        pairs = zip(passages, texts, strict=True)
        kept = np.mean([share_kept(before, after) for (_, before), after in pairs])
        nearest = nearest_passages(texts, indexes)
        orders: dict[str, list[list[Passage]]] = {
            "word vectors": nearest,
            "their candidates by BM25": [
                [own[i] for i in np.argsort(-bm25(text, [p.match for p in own]), kind="stable")]
                for text, own in zip(texts, nearest, strict=True)
            ],
            "both": [fused(own, text, ()) for text, own in zip(texts, nearest, strict=True)],
        }
        for order, found in orders.items():
            recalls = [recall(passages, found, rank) for rank in RANKS]
            rows.append([change, f"{kept:.0%}", order, *(f"{share:.0%}" for share in recalls)])
    seconds = (time.monotonic() - started) / len(changes)
    tokens = sum(index.num_tokens for index in indexes)
    head = ["change", "words kept", "ordered by", *(f"recall@{rank}" for rank in RANKS)]
    write_part(args.page, "similar", [
        f"`flexolmo study trace-similar flexolmo_demo`, {datetime.date.today()}, {machine()}: "
        f"{len(passages)} passages of {WORDS} words, {PASSAGES} of each of {len(indexes)} owners, "
        f"are changed and looked for among {sum(i.num_documents for i in indexes):,} documents "
        f"({tokens:,} tokens). *Words kept*: of a passage's, those that the changed one has. The "
        "share whose document is among the first 1, 5 and 10, ordered by "
        f"word vectors, by BM25 among the {CANDIDATES} nearest, and by both, as `--similar` does:",
        "", *table(head, rows, "lrlr"),
        "", f"One pass over all documents, for all passages together: {seconds:.0f} seconds.",
    ])  # fmt: skip


def pick_passages(index: Index, count: int) -> list[tuple[tuple[str, str], str]]:
    """Passages of `WORDS` words from documents that are picked at random.

    Returns:
      of each: its owner and document, and its text.
    """
    random = np.random.default_rng(0)
    picked = []
    for number in random.permutation(list(index.numbers())).tolist():
        record = index.document(number)
        words = index.tokenizer.decode(index.read(number, 0, record.tokens).tolist()).split()
        if len(words) > WORDS:
            start = int(random.integers(len(words) - WORDS))
            picked.append(((index.owner, record.id), " ".join(words[start : start + WORDS])))
        if len(picked) == count:
            break
    return picked


def share_kept(before: str, after: str) -> float:
    """Of a passage's words, the share that another text has, too."""
    words = before.split()
    return (Counter(words) & Counter(after.split())).total() / len(words)


def recall(
    passages: Sequence[tuple[tuple[str, str], str]], found: Sequence[list[Passage]], rank: int
) -> float:
    """The share of passages whose document is among the first `rank` different ones."""
    hits = 0
    for (document, _), own in zip(passages, found, strict=True):
        hits += document in list(dict.fromkeys((p.owner, p.document) for p in own))[:rank]
    return hits / len(passages)
