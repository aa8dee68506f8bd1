"""The bundled corpus is what its makers promise: sized, grouped, without repeats, attributed."""

import importlib.util
import json
from collections import Counter
from pathlib import Path

import pytest

import flexolmo_jax

CORPUS = Path(flexolmo_jax.__file__).parent / "corpus"
OWNERS = ("news", "creative", "code", "math", "academic", "educational")
DOMAINS = ("public", *OWNERS)


def load(domain: str) -> list[dict[str, str]]:
    with open(CORPUS / f"{domain}.jsonl", encoding="utf-8", newline="") as stream:
        return [json.loads(line) for line in stream]


@pytest.fixture(scope="module")
def rows() -> dict[str, list[dict[str, str]]]:
    return {domain: load(domain) for domain in DOMAINS}


@pytest.mark.parametrize("domain", DOMAINS)
def test_a_file_has_the_promised_size_and_ends_with_a_newline(domain):
    data = (CORPUS / f"{domain}.jsonl").read_bytes()
    least, most = (1_000_000, 1_400_000) if domain == "public" else (300_000, 1_000_000)
    assert least <= len(data) <= most
    assert data.endswith(b"\n") and b"\r" not in data


@pytest.mark.parametrize("domain", DOMAINS)
def test_rows_have_three_strings_and_documents_are_neither_stubs_nor_books(rows, domain):
    for row in rows[domain]:
        assert list(row) == ["text", "source", "group"]
        assert all(isinstance(value, str) and value for value in row.values())
        assert len(row["text"].strip()) >= 120, row["source"]
        assert len(row["text"].encode()) <= 8_000, row["source"]
        assert "\ufffd" not in row["text"], row["source"]


@pytest.mark.parametrize("domain", DOMAINS)
def test_a_held_out_split_by_group_is_fair(rows, domain):
    sizes: Counter[str] = Counter()
    for row in rows[domain]:
        sizes[row["group"]] += len(row["text"])
    assert len(sizes) >= 60
    assert max(sizes.values()) < 0.05 * sum(sizes.values())


@pytest.mark.parametrize("domain", DOMAINS)
def test_rows_are_shuffled(rows, domain):
    """A reader that takes the first half gets most groups, and every large source."""
    half = rows[domain][: len(rows[domain]) // 2]
    prefixes = Counter(row["source"].split("/")[0] for row in rows[domain])
    seen = {row["source"].split("/")[0] for row in half}
    assert seen >= {prefix for prefix, count in prefixes.items() if count >= 10}


def test_no_text_is_in_the_corpus_twice(rows):
    texts = Counter(row["text"] for domain in DOMAINS for row in rows[domain])
    assert [text[:80] for text, count in texts.items() if count > 1] == []


def test_no_group_is_in_two_domains(rows):
    groups = Counter(group for domain in DOMAINS for group in {r["group"] for r in rows[domain]})
    assert [group for group, count in groups.items() if count > 1] == []


def test_groups_do_not_repeat_each_other(rows):
    """Few runs of thirteen words are in two groups, within a domain or across domains."""
    first: dict[int, str] = {}
    for domain in DOMAINS:
        runs = repeated = 0
        for row in rows[domain]:
            words = row["text"].lower().split()
            for start in range(0, len(words) - 12, 13):
                runs += 1
                key = hash(" ".join(words[start : start + 13]))
                repeated += first.setdefault(key, row["group"]) != row["group"]
        assert repeated <= 0.01 * runs, domain


def test_the_licence_file_names_every_source_and_the_counts(rows):
    text = (CORPUS / "LICENCES.md").read_text(encoding="utf-8")
    for domain in DOMAINS:
        for prefix in {row["source"].split("/")[0] for row in rows[domain]}:
            assert f"`{prefix}/" in text, f"{prefix} of {domain} is not attributed"
        size = sum(len(row["text"].encode()) for row in rows[domain])
        groups = len({row["group"] for row in rows[domain]})
        assert f"| {domain} | {len(rows[domain]):,} | {groups} | {size:,} |" in text


def test_the_maker_takes_no_row_that_nearly_repeats_another_group(tmp_path):
    """The maker's filter, on a source made here."""
    path = Path(__file__).parents[1] / "make_corpus.py"
    spec = importlib.util.spec_from_file_location("make_corpus", path)
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    words = " ".join(f"word{number}" for number in range(100))
    texts = {"a": words, "b": words.replace("word50", "other"), "c": words[::-1]}
    made = [{"text": text, "source": f"x/{k}", "group": k} for k, text in texts.items()]
    part = next(part for part in make.PARTS if part.name == "factbook")
    make.rows_file(tmp_path, part).parent.mkdir()
    make.rows_file(tmp_path, part).write_text("".join(json.dumps(row) + "\n" for row in made))
    taken = make.take(tmp_path, make.Share("factbook", 10_000, 1), {})
    assert sorted(row["group"] for row in taken) in (["a", "c"], ["b", "c"])
