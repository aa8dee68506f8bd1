"""What a source may be, what happens to rows that cannot be used, and what is held out."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import tensorflow_datasets as tfds

from flexolmo_jax.data.sources import (
    Report,
    fingerprint,
    first_bytes,
    is_heldout,
    read_documents,
)

TEXTS = ["The first note.", "Ein zweiter, mit Umlauten: äöü.", "Third; with\nlines."]


def texts(source, **options):
    return [document.text for document in read_documents(source, **options)]


def jsonl(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def test_jsonl(tmp_path):
    assert texts(jsonl(tmp_path / "a.jsonl", [{"text": t} for t in TEXTS])) == TEXTS


def test_another_field_may_hold_the_text(tmp_path):
    file = jsonl(tmp_path / "a.jsonl", [{"body": t, "text": "not this"} for t in TEXTS])
    assert texts(file, text_field="body") == TEXTS


def test_parquet(tmp_path):
    pa.parquet.write_table(pa.table({"text": TEXTS, "id": [1, 2, 3]}), tmp_path / "a.parquet")
    assert texts(tmp_path / "a.parquet") == TEXTS


def test_a_text_file_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_text(TEXTS[2], encoding="utf-8")
    assert texts(tmp_path / "a.txt") == [TEXTS[2]]


def test_a_folder_is_read_in_depth_and_in_the_order_of_names(tmp_path):
    (tmp_path / "b" / "c").mkdir(parents=True)
    jsonl(tmp_path / "b" / "c" / "rows.jsonl", [{"text": TEXTS[1]}])
    (tmp_path / "a.md").write_text(TEXTS[0])
    pa.parquet.write_table(pa.table({"text": TEXTS[2:]}), tmp_path / "z.parquet")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    assert texts(tmp_path) == TEXTS


def test_the_corpus_that_comes_with_the_project():
    found = list(read_documents("corpus:math"))
    assert len(found) > 100
    assert all(document.group.startswith("group:") for document in found)


class Notes(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A dataset as its owner would prepare it; random access, no TensorFlow."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="short")]
    name = "owners_notes"

    def _info(self):
        features = {"text": tfds.features.Text(), "group": tfds.features.Text()}
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, dl_manager):
        return {
            "train": self._generate_examples(TEXTS[:2]),
            "test": self._generate_examples(["", TEXTS[2]]),
        }

    def _generate_examples(self, made):
        for index, text in enumerate(made):
            yield index, {"text": text, "group": f"patient {index}"}


@pytest.fixture
def notes(tmp_path):
    """A prepared dataset in a folder that TFDS looks into."""
    Notes(data_dir=tmp_path, config="short", file_format="array_record").download_and_prepare()
    tfds.core.add_data_dir(tmp_path)
    yield "tfds:owners_notes/short"
    tfds.core.utils.file_utils.clear_registered_data_dirs()


def test_tfds(notes, tmp_path):
    report = Report()
    found = list(read_documents(notes, report=report))
    assert [document.text for document in found] == TEXTS
    assert found[0].group == read_group(tmp_path, TEXTS[0], "patient 0")
    assert report.bad_rows == [f"{notes}[test]:0: empty text"]


def read_group(folder, text, group):
    """The group of a document that came from JSONL, which other sources must agree with."""
    (document,) = read_documents(jsonl(folder / "one.jsonl", [{"text": text, "group": group}]))
    return document.group


def test_tfds_errors_say_what_to_do(notes):
    with pytest.raises(ValueError, match="no feature 'body'; found .*text"):
        texts(notes, text_field="body")
    with pytest.raises(ValueError, match="tfds:no_such_notes: .*tfds build no_such_notes"):
        texts("tfds:no_such_notes")


def test_bad_rows_are_counted_and_named_by_file_and_line(tmp_path):
    file = tmp_path / "rows.jsonl"
    lines = ['{"text": "good"}', "{not json", "[1]", '{"body": "x"}', '{"text": "  "}']
    lines += ['{"text": 3}', '{"text": null}', "", '{"text": "\\ud800"}', '{"text": "also good"}']
    file.write_bytes("\n".join(lines).encode() + b'\n{"text": "\xff"}\n')
    report = Report()
    assert texts(file, report=report) == ["good", "also good"]
    assert report.documents == 2
    where = [row.removeprefix(f"{file}:").split(":")[0] for row in report.bad_rows]
    assert where == ["2", "3", "4", "5", "6", "7", "9", "11"]
    assert "no field 'text'" in report.bad_rows[2]
    told = report.lines()
    assert told[0] == f"{file}: 2 documents, 13 characters; 8 bad rows skipped"
    assert len(told) == 7 and told[1].startswith(f"skipped {file}:2: not JSON")
    assert told[-1] == "... 8 bad rows were skipped in all"


def test_bad_rows_of_other_files_are_named_too(tmp_path):
    table = pa.table({"text": pa.array(["good", None, ""])})
    pa.parquet.write_table(table, tmp_path / "a.parquet")
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\xfd")
    (tmp_path / "c.txt").write_text(" \n")
    report = Report()
    assert texts(tmp_path, report=report) == ["good"]
    assert [row.split(": ")[0] for row in report.bad_rows] == [
        f"{tmp_path}/a.parquet:2",
        f"{tmp_path}/a.parquet:3",
        f"{tmp_path}/b.txt",
        f"{tmp_path}/c.txt",
    ]


def test_exact_duplicates_are_dropped_across_files(tmp_path):
    jsonl(tmp_path / "a.jsonl", [{"text": "one"}, {"text": "two"}, {"text": "one"}])
    (tmp_path / "b.txt").write_text("two")
    report = Report()
    assert texts(tmp_path, report=report) == ["one", "two"]
    assert (report.documents, report.duplicates) == (2, 2)


def test_a_source_without_a_usable_document_is_an_error(tmp_path):
    (tmp_path / "empty").mkdir()
    cases = {
        jsonl(tmp_path / "nothing.jsonl", []): "no usable document",
        jsonl(tmp_path / "bad.jsonl", [{"body": "x"}]): "1 bad row, the first: .*bad.jsonl:1",
        tmp_path / "missing.jsonl": "no such file or folder",
        tmp_path / "empty": "holds no file that can be read; expected names ending in .jsonl",
        "corpus:nothing": "there are .*math",
    }
    (tmp_path / "a.docx").write_text("x")
    cases[tmp_path / "a.docx"] = "cannot read files ending in '.docx'"
    (tmp_path / "a.parquet").write_text("x")
    cases[tmp_path / "a.parquet"] = "not a readable Parquet file"
    pa.parquet.write_table(pa.table({"body": ["x"]}), tmp_path / "b.parquet")
    cases[tmp_path / "b.parquet"] = "no column 'text'; found body"
    for source, message in cases.items():
        with pytest.raises(ValueError, match=message):
            texts(source)


def test_held_out_is_a_property_of_the_document_not_of_its_place(tmp_path):
    rows = [{"text": f"document {i}"} for i in range(300)]
    shuffled = [rows[i] for i in np.random.default_rng(0).permutation(300)]

    def heldout(rows, share):
        documents = read_documents(jsonl(tmp_path / "a.jsonl", rows))
        return {d.text for d in documents if is_heldout(d, share)}

    assert heldout(rows, 0.1) == heldout(shuffled, 0.1)
    assert heldout(rows[:50], 0.1) <= heldout(rows, 0.1) <= heldout(rows, 0.3)
    assert 15 <= len(heldout(rows, 0.1)) <= 45
    assert heldout(rows, 0) == set()


def test_a_group_stays_on_one_side(tmp_path):
    rows = [{"text": f"{i} of {i % 20}", "book": f"book {i % 20}"} for i in range(200)]
    documents = read_documents(jsonl(tmp_path / "a.jsonl", rows), group_field="book")
    sides = {}
    for document in documents:
        sides.setdefault(document.group, set()).add(is_heldout(document, 0.5))
    assert len(sides) == 20
    assert all(len(side) == 1 for side in sides.values())
    assert {True, False} == set.union(*sides.values())


def test_a_fingerprint_is_of_the_content_in_reading_order(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    one, two = (jsonl(folder / f"{n}.jsonl", [{"text": f"document {n}"}]) for n in (1, 2))
    before = fingerprint(folder)
    copy = shutil.copytree(folder, tmp_path / "elsewhere")
    (copy / "1.jsonl").rename(copy / "01.jsonl")
    (copy / "notes.pdf").write_bytes(b"not text")  # is not read
    assert fingerprint(copy) == before != fingerprint(one)
    (copy / "01.jsonl").rename(copy / "3.jsonl")  # read after the other one now
    assert fingerprint(copy) != before
    shutil.copyfile(one, tmp_path / "1.txt")  # read in another way
    assert fingerprint(tmp_path / "1.txt") != fingerprint(one)
    with pytest.raises(ValueError, match="no such file"):
        fingerprint(tmp_path / "none.jsonl")


def test_the_first_documents_reach_the_size_that_is_asked_for():
    documents = first_bytes(read_documents("corpus:public"), 3000)
    sizes = [len(d.text.encode()) for d in documents]
    assert sum(sizes) >= 3000 > sum(sizes[:-1])
