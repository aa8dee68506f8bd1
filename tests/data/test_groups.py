"""One patient is one unit of privacy, however a file spells the id."""

import datetime
import decimal
import json

import pytest

from flexolmo_jax.data.groups import group_id
from flexolmo_jax.data.sources import read_documents

SAME = [
    (17, 17.0, "17", " 17 ", "17.0", "017", "\uff11\uff17", decimal.Decimal("17.0"), b"17"),
    ("p1", "p1 ", "P1", "p1\u200b", "\tp1\n", "p1\u00a0"),
    ("M\u00fcller", "mu\u0308ller", "M\u00dcLLER  "),
    (datetime.date(2020, 1, 2), "2020-01-02"),
]


@pytest.mark.parametrize("spelled", SAME)
def test_spellings_of_one_id_are_one(spelled):
    assert len({group_id(value) for value in spelled}) == 1


def test_different_ids_stay_different():
    ids = ["p1", "p2", 1, 2, -1, 1.5, "1-5", "p 1", "p10"]
    assert len({group_id(value) for value in ids}) == len(ids)


@pytest.mark.parametrize("value", [None, float("nan"), "", " \t", "\u200b", "NaN", "NA", "null"])
def test_what_names_no_group_is_none(value):
    assert group_id(value) is None


@pytest.mark.parametrize("value", [["p1"], {"id": 1}, True, False, float("inf")])
def test_what_cannot_name_a_group_is_refused(value, tmp_path):
    with pytest.raises(ValueError, match="names"):
        group_id(value)
    file = tmp_path / "own.jsonl"
    rows = [{"text": "one", "patient": "p1"}, {"text": "two", "patient": value}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=r"own.jsonl:2: patient: .*names"):
        list(read_documents(file, group_field="patient", distinct="group"))
