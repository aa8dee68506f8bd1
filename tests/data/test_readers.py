"""Every kind of file that text comes in, and what is wrong with single rows of them."""

import bz2
import gzip
import json
import lzma
import tracemalloc

import pyarrow as pa
import pyarrow.parquet
import pytest

from flexolmo_jax.data.groups import group_id
from flexolmo_jax.data.sources import Report, read_documents

TEXTS = ["The first note.", "Ein zweiter, mit Umlauten: äöü.", 'Third; "with"\nlines.']
COMPRESS = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pa.compress(data, codec="zstd", asbytes=True),
}
MARK = "\ufeff".encode()


def read(file, **options):
    """The texts of a file, and the bad rows by their places."""
    report = Report()
    texts = [document.text for document in read_documents(file, report=report, **options)]
    return texts, [bad.removeprefix(f"{file}") for bad in report.bad_rows]


def lines(texts=TEXTS):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


FORMS = {
    ".jsonl": lines(),
    ".NDJSON": lines(),
    ".json": lines(),
    "_array.json": json.dumps([{"text": text} for text in TEXTS]).encode(),
    "_indented.JSON": json.dumps([{"text": text} for text in TEXTS], indent=1).encode(),
    "_objects.json": "\n".join(json.dumps({"text": t}, indent=1) for t in TEXTS).encode(),
    ".csv": 'id,text\n1,The first note.\r\n\n2,"{}"\n3,"{}"\n'.format(
        TEXTS[1], TEXTS[2].replace('"', '""')
    ).encode(),
    ".tsv": 'text\tid\n{}\t1\n{}\t2\n"{}"\t3'.format(
        *TEXTS[:2], TEXTS[2].replace('"', '""')
    ).encode(),
}


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("mark", [b"", MARK], ids=["", "marked"])
@pytest.mark.parametrize("form", FORMS)
def test_the_same_texts_in_every_form(tmp_path, form, mark, compression):
    file = tmp_path / f"texts{form}{compression}"
    file.write_bytes(COMPRESS[compression](mark + FORMS[form]))
    assert read(file) == (TEXTS, [])


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("suffix", [".txt", ".md", ".text", ".MARKDOWN", ".rst", ".tex"])
def test_a_text_file_is_a_document_without_its_mark(tmp_path, suffix, compression):
    file = tmp_path / f"text{suffix}{compression.upper()}"
    file.write_bytes(COMPRESS[compression](MARK + TEXTS[2].encode()))
    assert read(file) == ([TEXTS[2]], [])


def test_one_object_is_one_document(tmp_path):
    file = tmp_path / "one.json"
    file.write_text(json.dumps({"text": TEXTS[0], "id": 1}, indent=2))
    assert read(file) == (TEXTS[:1], [])


def test_a_mark_within_a_value_is_no_text_either(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(MARK + lines(["\ufeffthe stone", "\ufeff"]) + MARK + lines(["a house"]))
    assert read(file) == (["the stone", "a house"], [":2: empty text"])


def test_several_compressed_streams_in_one_file_are_all_read(tmp_path):
    for compression, compress in COMPRESS.items():
        file = tmp_path / f"a.jsonl{compression}"
        file.write_bytes(compress(lines(TEXTS[:1])) + compress(lines(TEXTS[1:])))
        assert read(file) == (TEXTS, [])


@pytest.mark.parametrize("compression", [".gz", ".xz", ".zst", ".bz2"])
def test_a_compressed_file_that_breaks_off_is_read_up_to_there(tmp_path, compression):
    numbers = [f"document {n} of {n * 7919 % 1009}" for n in range(60_000)]
    whole = COMPRESS[compression](lines(numbers))
    file = tmp_path / f"a.jsonl{compression}"
    file.write_bytes(whole[: len(whole) * 9 // 10])
    texts, bad = read(file)
    assert 1000 < len(texts) < len(numbers) and texts == numbers[: len(texts)]
    assert len(bad) == 1 and bad[0].startswith(f":{len(texts) + 1}: the compressed file cannot be")


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.zst", "a.txt.xz", "a.csv.bz2", "a.json.gz"])
def test_what_is_not_compressed_as_its_name_says_is_a_bad_row(tmp_path, name):
    (tmp_path / name).write_bytes(lines())
    (tmp_path / "b.jsonl").write_bytes(lines())
    texts, bad = read(tmp_path)
    assert texts == TEXTS
    assert len(bad) == 1 and f"{name}:" in bad[0] and "cannot be read" in bad[0]


def test_json_that_is_nested_too_deeply_is_a_bad_row(tmp_path):
    deep = b'{"text": "x", "more": ' + b"[" * 200_000 + b"]" * 200_000 + b"}\n"
    for name in ("a.jsonl", "a.json"):
        (tmp_path / name).write_bytes(lines(TEXTS[:1]) + deep + lines(TEXTS[1:]))
        assert read(tmp_path / name) == (TEXTS, [":2: JSON that is nested too deeply"])
    (tmp_path / "b.json").write_bytes(deep + lines())
    assert read(tmp_path / "b.json") == (TEXTS, [":1: JSON that is nested too deeply"])


def test_an_array_in_one_line_needs_a_small_multiple_of_its_size(tmp_path):
    """It is not parsed as a line first, which would hold every item at once."""
    rows = [{"text": f"note {number}", "tags": [[], [], [], [], {}]} for number in range(40_000)]
    file = tmp_path / "a.json"
    file.write_text(json.dumps(rows))
    del rows
    documents = read_documents(file)
    tracemalloc.start()
    next(documents)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * file.stat().st_size


def test_an_array_that_breaks_off_is_read_up_to_there(tmp_path):
    file = tmp_path / "a.json"
    file.write_bytes(json.dumps([{"text": text} for text in TEXTS]).encode()[:-20])
    texts, bad = read(file)
    assert texts == TEXTS[:2]
    assert len(bad) == 1 and bad[0].startswith(":3: not JSON") and "the rest" in bad[0]


def test_items_of_an_array_that_are_no_objects_are_bad_rows(tmp_path):
    file = tmp_path / "a.json"
    file.write_text(json.dumps(["a", {"text": TEXTS[0]}, {"body": 1}, None]))
    texts, bad = read(file)
    assert texts == TEXTS[:1]
    assert [b.split(":")[1] for b in bad] == ["1", "3", "4"]


def test_rows_of_a_table_that_do_not_fit_or_are_not_utf8_are_bad_rows(tmp_path):
    file = tmp_path / "a.csv"
    file.write_bytes(
        b"text,group\n" + b"g" * 300_000 + b",1\nshort\n\xff\xfe,2\n,3\ngood,4\nthree,5,5\n"
        b'"x" y,6\n"never closed,7\n'
    )
    texts, bad = read(file)
    assert texts == ["g" * 300_000, "good"]
    assert [b.split(":")[1] for b in bad] == ["3", "4", "5", "7", "8", "9"]


def test_a_table_without_the_column_is_an_error_that_names_its_columns(tmp_path):
    (tmp_path / "a.csv").write_text("id,body\n1,x\n")
    with pytest.raises(ValueError, match=r"a.csv: no column 'text'; found id, body"):
        read(tmp_path / "a.csv")
    assert read(tmp_path / "a.csv", text_field="body")[0] == ["x"]


def test_a_table_with_two_columns_of_text_is_an_error(tmp_path):
    """Which of them holds the text cannot be known."""
    (tmp_path / "a.csv").write_text("text,id,text\nx,1,y\n")
    pa.parquet.write_table(pa.table([["x"], ["y"]], names=["text", "text"]), tmp_path / "a.parquet")
    for name in ("a.csv", "a.parquet"):
        with pytest.raises(ValueError, match=f"{name}: expected one column 'text', found 2"):
            read(tmp_path / name)


PARQUET = [
    pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(),
    pa.binary_view(), pa.dictionary(pa.int32(), pa.string()), pa.dictionary(pa.int8(), pa.binary()),
    pa.dictionary(pa.int32(), pa.large_string()),
]  # fmt: skip


@pytest.mark.parametrize("kind", PARQUET, ids=str)
def test_every_kind_of_text_column_in_parquet(tmp_path, kind):
    values = pa.array(TEXTS).cast(pa.binary() if "binary" in str(kind) else pa.string())
    if pa.types.is_dictionary(kind):
        indices = pa.array(range(3), kind.index_type)
        column = pa.DictionaryArray.from_arrays(indices, values.cast(kind.value_type))
    else:
        column = values.cast(kind)
    file = tmp_path / "a.parquet"
    pa.parquet.write_table(pa.table({"text": column, "group": column}), file)
    documents = list(read_documents(file))
    assert [d.text for d in documents] == TEXTS
    assert [d.group for d in documents] == [f"group:{group_id(text)}" for text in TEXTS]


def test_text_in_parquet_that_is_not_utf8_is_a_bad_row(tmp_path):
    values = pa.array([b"good", b"\xff\xfe", None, MARK + b"also good"], pa.binary())
    unchecked = pa.Array.from_buffers(pa.string(), 4, values.buffers())
    for name, column in (("a", values), ("b", unchecked)):
        pa.parquet.write_table(pa.table({"text": column}), tmp_path / f"{name}.parquet")
        texts, bad = read(tmp_path / f"{name}.parquet")
        assert texts == ["good", "also good"]
        assert [b.split(" (")[0] for b in bad] == [
            ":2: not UTF-8",
            ":3: expected text, found NoneType",
        ]


def test_a_parquet_column_that_is_no_text_is_an_error(tmp_path):
    pa.parquet.write_table(pa.table({"text": [1, 2]}), tmp_path / "a.parquet")
    with pytest.raises(
        ValueError, match=r"a.parquet: expected the column 'text' to be text, .*int64"
    ):
        read(tmp_path / "a.parquet")


def test_a_parquet_file_that_is_damaged_inside_is_read_around_that(tmp_path):
    file = tmp_path / "a.parquet"
    numbers = [f"document {n}" for n in range(3000)]
    pa.parquet.write_table(pa.table({"text": numbers}), file, row_group_size=1000)
    content = bytearray(file.read_bytes())
    place = pa.parquet.ParquetFile(file).metadata.row_group(1).column(0).data_page_offset
    content[place : place + 400] = bytes(400)
    file.write_bytes(content)
    texts, bad = read(file)
    assert texts == numbers[:1000] + numbers[2000:]
    assert len(bad) == 1 and bad[0].startswith(":1001: up to row 2000, the file cannot be read (")
