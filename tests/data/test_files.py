"""Which files of a folder are read, and that all others are named."""

import json
import os

import pytest

from flexolmo_jax.data.files import find_files
from flexolmo_jax.data.sources import Report, read_documents


def row(text):
    return json.dumps({"text": text}) + "\n"


def read(source):
    """The texts of a source, and what is told of it in one line."""
    report = Report()
    texts = [document.text for document in read_documents(source, report=report)]
    return texts, report.lines()[0]


def test_what_is_not_read_is_counted_and_named(tmp_path):
    (tmp_path / "a.jsonl").write_text(row("the text"))
    for name in ("b.docx", "model.parquet.crc", "part-0", "set.tar.gz", "table.parquet.gz"):
        (tmp_path / name).write_bytes(b"x")
    texts, told = read(tmp_path)
    assert texts == ["the text"]
    assert told == (
        f"{tmp_path}: 1 document, 8 characters; not read: 5 files "
        "(b.docx, model.parquet.crc, part-0, set.tar.gz, table.parquet.gz)"
    )


def test_of_many_files_that_are_not_read_the_first_are_named(tmp_path):
    (tmp_path / "a.jsonl").write_text(row("the text"))
    for number in range(1200):
        (tmp_path / f"{number:04}.png").touch()
    assert "not read: 1,200 files (0000.png, 0001.png, " in read(tmp_path)[1]
    assert len(read(tmp_path)[1]) < 250


def test_what_is_about_the_data_is_not_the_data(tmp_path):
    (tmp_path / "a.jsonl").write_text(row("the text"))
    (tmp_path / "notes.txt").write_text("a note")
    (tmp_path / "README.md").write_text("# Our data set")
    (tmp_path / "LICENSE.txt").write_text("to be agreed")
    texts, told = read(tmp_path)
    assert texts == ["the text", "a note"]
    assert "not read: 2 files (LICENSE.txt: about the data, README.md: about the data)" in told


def test_among_text_files_a_readme_is_text(tmp_path):
    (tmp_path / "README.md").write_text("# How to begin")
    (tmp_path / "guide.md").write_text("# How to continue")
    (tmp_path / "LICENSE").write_text("free")
    assert read(tmp_path)[0] == ["# How to begin", "# How to continue"]


def test_a_readme_beside_what_cannot_be_read_is_not_the_text_in_its_place(tmp_path):
    (tmp_path / "README.md").write_text("# Our data set")
    (tmp_path / "set.zip").touch()
    with pytest.raises(ValueError, match=r"it holds 2 files \(README.md: about the data, set.zip"):
        read(tmp_path)


def test_hidden_files_and_folders_are_left_out(tmp_path):
    (tmp_path / "a.jsonl").write_text(row("the text"))
    (tmp_path / "._a.jsonl").write_bytes(b"\0\5\26\7")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "b.jsonl").write_text(row("what a tool left"))
    texts, told = read(tmp_path)
    assert texts == ["the text"] and told == f"{tmp_path}: 1 document, 8 characters"


def test_a_hidden_folder_that_is_named_is_read(tmp_path):
    (tmp_path / ".mine").mkdir()
    (tmp_path / ".mine" / "a.jsonl").write_text(row("the text"))
    assert read(tmp_path / ".mine")[0] == ["the text"]


def test_links_to_files_and_folders_are_followed_once(tmp_path):
    source, elsewhere = tmp_path / "set", tmp_path / "elsewhere"
    source.mkdir()
    elsewhere.mkdir()
    (source / "a.jsonl").write_text(row("here"))
    (elsewhere / "b.jsonl").write_text(row("elsewhere"))
    (source / "linked").symlink_to(elsewhere)
    (source / "linked_again").symlink_to(elsewhere)
    (source / "one.jsonl").symlink_to(elsewhere / "b.jsonl")
    (source / "nowhere.jsonl").symlink_to(tmp_path / "missing.jsonl")
    texts, told = read(source)
    assert sorted(texts) == ["elsewhere", "here"]
    for named in ("linked_again: ", "one.jsonl: the same file again", "nowhere.jsonl: a link"):
        assert named in told
    assert "duplicate" not in told


@pytest.mark.parametrize("target", ["..", ".", "../../..", "/"])
def test_a_link_in_a_circle_ends_and_is_named(tmp_path, target):
    deep = tmp_path / "set" / "deep"
    deep.mkdir(parents=True)
    (deep / "a.jsonl").write_text(row("here"))
    (tmp_path / "outside.jsonl").write_text(row("not of the set"))
    (deep / "around").symlink_to(target)
    texts, told = read(tmp_path / "set")
    assert texts == ["here"] and "1 file (deep/around: a link to a folder" in told


def test_two_folders_that_link_to_each_other_are_each_read_once(tmp_path):
    for name, other in (("a", "b"), ("b", "a")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rows.jsonl").write_text(row(f"of {name}"))
        (tmp_path / name / "other").symlink_to(tmp_path / other)
    assert sorted(read(tmp_path)[0]) == ["of a", "of b"]
    assert sorted(read(tmp_path / "a")[0]) == ["of a", "of b"]


def test_a_pipe_is_refused_and_in_a_folder_named(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(ValueError, match=r"pipe.jsonl: expected a file or a folder, found a pipe"):
        read(tmp_path / "pipe.jsonl")
    with pytest.raises(ValueError, match="found a device"):
        read("/dev/zero")
    with pytest.raises(ValueError, match=r"no file that can be read; it holds 1 file \(pipe.jsonl"):
        read(tmp_path)
    (tmp_path / "a.jsonl").write_text(row("here"))
    (tmp_path / "zeros.txt").symlink_to("/dev/zero")
    texts, told = read(tmp_path)
    assert texts == ["here"]
    assert "pipe.jsonl: a pipe, a device or a socket, zeros.txt: a pipe" in told


def test_a_folder_of_other_kinds_is_refused_by_what_it_holds(tmp_path):
    for name in ("a.docx", "b.pdf"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=r"it holds 2 files \(a.docx, b.pdf\); expected .*.jsonl"):
        read(tmp_path)


def test_files_come_in_the_order_of_their_names_whatever_they_are(tmp_path):
    names = ["B.JSONL", "a.json.gz", "c/d.txt.xz", "c/e.PARQUET", "f.tsv", "g.ndjson.zst"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = find_files(tmp_path)
    assert [str(file.relative_to(tmp_path)) for file in found.files] == names
    assert not found.passed_over
