"""Units of privacy: no window mixes two of them, and one's windows do not depend on others."""

import json
from collections import defaultdict

import numpy as np
import pytest

from flexolmo_jax.config import DataConfig
from flexolmo_jax.data.sources import is_heldout, read_documents
from flexolmo_jax.data.tokenizer import Tokenizer
from flexolmo_jax.data.units import prepare_units

LENGTH = 16
DATA = DataConfig(batch_size=4, length=LENGTH, heldout=0.2, group_field="who")


@pytest.fixture(scope="module")
def rows():
    """Real documents of nine people; some have the same text as another one."""
    texts = [d.text[:300] for d, _ in zip(read_documents("corpus:math"), range(40), strict=False)]
    rows = [{"text": text, "who": f"p{n % 9}"} for n, text in enumerate(texts)]
    return rows + [{"text": texts[0], "who": "p1"}, {"text": texts[0], "who": "p0"}]


@pytest.fixture(scope="module")
def tokenizer(rows):
    return Tokenizer.train([row["text"] for row in rows], 300)


@pytest.fixture
def prepared(tmp_path, tokenizer):
    def make(rows, kind, data=DATA):
        file = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return prepare_units(str(file), data, tokenizer, file.with_suffix(""), kind)

    return make


def texts_of(units, tokenizer):
    """The text of each unit, put together again from its windows."""
    found = []
    for number in range(len(units)):
        tokens = []
        for window in units.windows_of(number):
            row = units.windows[int(window)]
            real = row["tokens"][1:][row["segments"][1:] > 0]
            tokens += real.tolist()
        found.append(tokenizer.decode(tokens))
    return found


def training(rows):
    seen = {}
    for row in rows:
        if not is_heldout(document(row), DATA.heldout):
            seen.setdefault(row["text"], row)
    return list(seen.values())


def document(row):
    from flexolmo_jax.data.sources import Document

    return Document(row["text"], f"group:{row['who']}")


def test_a_document_is_a_unit_of_windows_of_its_own(prepared, rows, tokenizer):
    units = prepared(rows, "document")
    assert texts_of(units, tokenizer) == [row["text"] for row in training(rows)]
    windows = units.windows
    for number in range(len(windows)):
        segments = windows[number]["segments"]
        # One document, and at its very end the separator.
        assert set(segments.tolist()) <= {0, 1, 2} and (segments == 2).sum() <= 1


def test_a_group_is_a_unit_with_all_of_its_documents(prepared, rows, tokenizer):
    units = prepared(rows, "group")
    expected = defaultdict(list)
    for row in rows:
        same = expected[row["who"]]
        if not is_heldout(document(row), DATA.heldout) and row["text"] not in same:
            same.append(row["text"])
    found = texts_of(units, tokenizer)
    assert found == ["".join(texts) for texts in expected.values() if texts]
    assert 3 < len(found) < 9


def test_a_sequence_is_one_window(prepared, rows):
    units = prepared(rows, "sequence")
    assert len(units) == len(units.windows)
    assert all(len(units.windows_of(n)) == 1 for n in range(len(units)))


def test_a_group_that_is_taken_away_changes_no_other(prepared, rows, tokenizer):
    """Although it was the first to have a text that another one has too."""
    kept = sorted({row["who"] for row in rows if not is_heldout(document(row), DATA.heldout)})
    gone = rows[0]["who"] if rows[0]["who"] in kept else kept[0]
    with_all = texts_of(prepared(rows, "group"), tokenizer)
    without = texts_of(prepared([r for r in rows if r["who"] != gone], "group"), tokenizer)
    assert len(without) == len(with_all) - 1
    assert [text for text in with_all if text in without] == without


def test_a_row_without_its_group_is_refused(prepared, rows):
    with pytest.raises(ValueError, match="jsonl:41: no field 'who', or nothing in it, which says"):
        prepared([*rows[:40], {"text": "nobody's"}], "group")


def test_a_batch_holds_each_unit_in_a_row_of_its_own(prepared, rows):
    units = prepared(rows, "document")
    counts = [len(units.windows_of(n)) for n in range(len(units))]
    most = sorted(counts)[-2]
    long = int(np.argmax(counts))
    assert counts[long] > most
    batch = units.batch([long, 1, 2], (8, most), np.random.default_rng(0), ways=2)
    assert batch.tokens.shape == (8, most, LENGTH)
    filled = np.asarray(batch.weights > 0).any(axis=2).sum(axis=1)
    expected = [most, counts[2], 0, 0, counts[1], 0, 0, 0]  # dealt out to two halves
    assert filled.tolist() == expected
    np.testing.assert_allclose(np.unique(batch.weights), [0, 1 / (most * LENGTH)])
    assert int((np.asarray(batch.weights) > 0).sum()) <= sum(expected) * LENGTH


def test_of_a_long_unit_other_windows_are_drawn_each_time(prepared, rows):
    units = prepared(rows, "group")
    generator = np.random.default_rng(0)
    seen = set()
    for _ in range(600):
        batch = units.batch([0], (1, 1), generator)
        seen.add(np.asarray(batch.tokens).tobytes())
    assert len(seen) == len(units.windows_of(0)) > 2
