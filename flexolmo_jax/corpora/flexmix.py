"""FlexMix-mini: eight domains of real text for studies, split, without near-duplicates.

Made of what `flexolmo data fetch` builds, and a function of those bytes alone: what is taken and
where it goes follows from hashes of the documents, so the same corpus gives the same files on every
machine, in whatever order its rows stand.

1. Near-duplicates: documents are visited domain by domain, in the order of their hashes, and one
   whose runs of five words are mostly those of a document already taken is left out, whichever
   domain that is in. Owners' domains come first, so that what public and closed text share stays
   with the owner, and no split of any domain repeats another.
2. The cap: a domain takes no more documents once it has reached its number of bytes.
3. The splits: of each source in a domain (a package's texts), whole groups (a book, an article, a
   thread, a block of theorems) go to `heldout`, then to `tune`, until each has its share of bytes.

The public domain is broad by the way the corpus is fetched (data/fetch.py): a slice of every kind
of text, from sources that no owner has.
"""

import hashlib
import importlib.util
import json
import zlib
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from flexolmo_jax.corpora.catalogue import DOMAINS, PARTS
from flexolmo_jax.corpora.rows import Row
from flexolmo_jax.data.window_store import prepared
from flexolmo_jax.runtime import console
from flexolmo_jax.storage.files import file_digest, new_directory
from flexolmo_jax.storage.outputs import check_new_folder

SPLITS = ("train", "tune", "heldout")
CAP = 12_000_000  # bytes of text that a domain has at most
SHARE = 0.05  # of a source's bytes, held out; as much again to tune on
WORDS = 5  # in a run
ALIKE = 0.8  # near-duplicates: so much of the runs of either are the runs of both
PERMUTATIONS = 128  # of MinHash, which estimates that share
BANDS = (16, 8)  # of the index: at 0.8 it finds 95% of the pairs, at 0.9 all but 1 in 10,000


class FlexmixMini(tfds.core.GeneratorBasedBuilder):
    """The documents of one domain as a TFDS dataset: text, source, group; three splits."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [
        tfds.core.BuilderConfig(name=domain, description=f"The domain {domain}.")
        for domain in DOMAINS
    ]

    def __init__(self, *, folder: Path | None = None, **kwargs: Any):
        """`folder` holds DOMAIN/SPLIT.jsonl; it is needed to build, not to read."""
        self.folder = folder
        super().__init__(file_format="array_record", **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict({"text": text, "source": text, "group": text}),
            disable_shuffling=True,  # the files are in the order of hashes
        )

    def _split_generators(self, dl_manager):
        if self.folder is None:
            raise ValueError("build this dataset with `flexolmo data flexmix`")
        folder = self.folder / self.builder_config.name
        return {split: self._generate_examples(folder / f"{split}.jsonl") for split in SPLITS}

    def _generate_examples(self, file: Path):
        yield from enumerate(_read(file))


def make_flexmix(
    fetched: Path, out: Path, *, cap: int = CAP, progress: bool = True
) -> dict[str, Any]:
    """Writes OUT/DOMAIN/SPLIT.jsonl, the same as TFDS in OUT/tfds, and OUT/card.json and .md.

    Args:
      fetched: what `flexolmo data fetch` built, with all eight domains.
      out: a new folder.
      cap: bytes of text that each domain has at most.
      progress: whether to show a bar.

    Returns:
      the card: for each domain its splits (documents, groups, bytes, sha256), the bytes from each
      source, what was left out, and its packages; for each package its version and licence.

    Raises:
      ValueError: a domain is missing, too small to be split, or not a file of `data fetch`;
        `out` exists; the package datasketch is missing.
    """
    if importlib.util.find_spec("datasketch") is None:
        raise ValueError(
            "finding near-duplicates needs the package datasketch: in a clone of flexolmo_jax, "
            "run pip install -e '.[study]'"
        )
    check_new_folder(out, [fetched])
    about = _fetched_card(fetched)
    domains = (*(name for name in DOMAINS if name != "public"), "public")
    seen = Seen()
    card: dict[str, Any] = {
        "format": 1,
        "cap": cap,
        "share": SHARE,
        "near_duplicates": {"words": WORDS, "alike": ALIKE, "permutations": PERMUTATIONS},
        "domains": {},
        "packages": {},
        "not_fetched": about["skipped"],
    }
    total = cap * len(domains)
    shown = console.progress("domains", total, unit="byte", quiet=not progress)
    with new_directory(out) as folder, shown as bar:
        for number, domain in enumerate(domains):
            bar.update(cap * number, domain)
            rows = sorted(_read(fetched / f"{domain}.jsonl"), key=_order)
            taken, repeated = _take(rows, cap, seen, bar)
            card["domains"][domain] = {
                "of": file_digest(fetched / f"{domain}.jsonl"),
                **_write_splits(folder / domain, split(taken)),
                "near_duplicates": repeated,
                "over_the_cap": len(rows) - len(taken) - repeated,
                "packages": _packages_of(domain, about),
            }
        bar.update(total, "as TFDS")
        card["domains"] = {name: card["domains"][name] for name in DOMAINS}
        used = {name for entry in card["domains"].values() for name in entry["packages"]}
        card["packages"] = {name: about["packages"][name] for name in sorted(used)}
        for domain in DOMAINS:
            prepared(partial(FlexmixMini, folder=folder, config=domain, data_dir=folder / "tfds"))
        (folder / "card.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
        (folder / "card.md").write_text(describe(card), encoding="utf-8")
    return card


class Seen:
    """The documents that were taken, to be asked whether another is nearly one of them."""

    def __init__(self) -> None:
        import datasketch  # of the extra `study`

        self._empty = datasketch.MinHash(PERMUTATIONS, hashfunc=zlib.crc32)
        self._index = datasketch.MinHashLSH(num_perm=PERMUTATIONS, params=BANDS)
        self._sketches: list[Any] = []

    def repeats(self, text: str) -> bool:
        """Whether a text is a near-duplicate of one before; if not, it counts from now on."""
        sketch = self._empty.copy()
        sketch.update_batch(runs(text))
        for number in self._index.query(sketch):
            if self._sketches[number].jaccard(sketch) >= ALIKE:
                return True
        self._index.insert(len(self._sketches), sketch)
        self._sketches.append(sketch)
        return False


def _take(rows: list[Row], cap: int, seen: Seen, bar: console.Bar) -> tuple[list[Row], int]:
    """The rows that fit into `cap` bytes and repeat nothing, and the number of repeats."""
    taken, repeated, size = [], 0, 0
    for row in rows:
        more = size + _size([row])
        if more > cap:
            continue
        if seen.repeats(row["text"]):
            repeated += 1
            continue
        taken.append(row)
        bar.advance(more - size, bar.notes)
        size = more
    return taken, repeated


def runs(text: str) -> list[bytes]:
    """All runs of five words, in lower case; of a shorter text, itself."""
    words = text.lower().encode().split()
    ends = range(WORDS, max(WORDS, len(words)) + 1)
    return [b" ".join(words[end - WORDS : end]) for end in ends]


def split(rows: list[Row], share: float = SHARE) -> dict[str, list[Row]]:
    """Divides documents: of each source whole groups to heldout and tune, the rest to train.

    Groups are visited in the order of their hashes; one goes to a split where that brings the split
    nearer to its share of the source's bytes.
    """
    sizes: dict[str, dict[str, int]] = {}
    for row in rows:
        groups = sizes.setdefault(_source(row), {})
        groups[row["group"]] = groups.get(row["group"], 0) + len(row["text"].encode())
    place: dict[tuple[str, str], str] = {}
    for source, groups in sizes.items():
        budget = share * sum(groups.values())
        for name in ("heldout", "tune"):
            used = 0
            for group in sorted(groups, key=_digest):
                if (source, group) not in place and used + groups[group] / 2 <= budget:
                    place[source, group] = name
                    used += groups[group]
    divided: dict[str, list[Row]] = {name: [] for name in SPLITS}
    for row in rows:
        divided[place.get((_source(row), row["group"]), "train")].append(row)
    return divided


def describe(card: dict[str, Any]) -> str:
    """The card as Markdown."""
    lines = [
        "# FlexMix-mini",
        "",
        f"Eight domains of real text, at most {card['cap'] / 1e6:g} MB each. `heldout` and `tune` "
        f"have {card['share']:.0%} of the bytes of each source, in whole groups: a book, an "
        "article, a thread, a block of theorems is in one split. No document nearly repeats "
        f"another, in any split of any domain: of the runs of {card['near_duplicates']['words']} "
        f"words of two, less than {card['near_duplicates']['alike']:.0%} are in both, as MinHash "
        "estimates it. "
        "`public` is broad: a slice of every kind of text, from sources that no owner has.",
        "",
        "The texts keep their owners' licences, named below; several may be used but not passed "
        "on, so these files stay on the machine that made them.",
        "",
        "| domain | split | documents | groups | MB | sha256 |",
        "| --- | --- | ---: | ---: | ---: | --- |",
    ]
    for domain, entry in card["domains"].items():
        for name, split in entry["splits"].items():
            lines.append(
                f"| {domain} | {name} | {split['documents']:,} | {split['groups']:,} | "
                f"{split['bytes'] / 1e6:.2f} | `{split['sha256']}` |"
            )
    lines += [
        "",
        "| domain | MB of each source | near-duplicates | over the cap | made of |",
        "| --- | --- | ---: | ---: | --- |",
    ]
    for domain, entry in card["domains"].items():
        sources = ", ".join(f"{name} {size / 1e6:.2f}" for name, size in entry["sources"].items())
        lines.append(
            f"| {domain} | {sources} | {entry['near_duplicates']:,} | "
            f"{entry['over_the_cap']:,} | `{entry['of']}` |"
        )
    lines += ["", "| package | version | licence | domains |", "| --- | --- | --- | --- |"]
    for name, package in card["packages"].items():
        used = ", ".join(d for d, entry in card["domains"].items() if name in entry["packages"])
        lines.append(f"| {name} | {package['version']} | {package['licence']} | {used} |")
    if card["not_fetched"]:
        lines += ["", "Unavailable when the corpus was fetched:", ""]
        lines += [f"- {line}" for line in card["not_fetched"]]
    return "\n".join(lines) + "\n"


def _fetched_card(fetched: Path) -> dict[str, Any]:
    missing = [name for name in DOMAINS if not (fetched / f"{name}.jsonl").is_file()]
    file = fetched / "card.json"
    if missing or not file.is_file():
        raise ValueError(
            f"{fetched}: expected what `flexolmo data fetch` builds, but there is no "
            f"{f'{missing[0]}.jsonl' if missing else file.name}; run `flexolmo data fetch "
            f"{fetched}` and see what it skips"
        )
    return json.loads(file.read_text(encoding="utf-8"))


def _read(file: Path) -> Iterator[Row]:
    with open(file, encoding="utf-8", newline="\n") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                yield {name: row[name] for name in ("text", "source", "group")}
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{file}:{number}: expected an object with text, source and group, as `flexolmo"
                    f" data fetch` writes it ({type(error).__name__}: {error})"
                ) from error


def _write_splits(folder: Path, divided: dict[str, list[Row]]) -> dict[str, Any]:
    """Writes the files of a domain; returns what the card says of them."""
    folder.mkdir()
    splits: dict[str, Any] = {}
    sources: dict[str, int] = {}
    for name, rows in divided.items():
        if not rows:
            raise ValueError(
                f"{folder.name}: nothing is left for {name}; there are too few groups to hold out "
                f"{SHARE:.0%} of any source: fetch more of it, or raise the cap"
            )
        file = folder / f"{name}.jsonl"
        with open(file, "w", encoding="utf-8", newline="\n") as opened:
            opened.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        splits[name] = {
            "documents": len(rows),
            "groups": len({row["group"] for row in rows}),
            "bytes": _size(rows),
            "sha256": file_digest(file),
        }
        for row in rows:
            sources[_source(row)] = sources.get(_source(row), 0) + _size([row])
    return {"splits": splits, "sources": dict(sorted(sources.items()))}


def _packages_of(domain: str, about: dict[str, Any]) -> list[str]:
    used = about["domains"][domain]["parts"]
    parts = (part for part in PARTS if part.domain == domain and used.get(part.name))
    return sorted({part.package.name for part in parts})


def _size(rows: Iterable[Row]) -> int:
    return sum(len(row["text"].encode()) for row in rows)


def _source(row: Row) -> str:
    return row["source"].partition("/")[0]


def _order(row: Row) -> tuple[bytes, str, str]:
    return _digest(row["text"]), row["source"], row["group"]


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
