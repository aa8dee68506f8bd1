"""Token files of OLMo-core: decoded to the texts that they were made of, or refused by name."""

import gzip
import json

import numpy as np
import pytest

from flexolmo_jax.data.tokenizer import Tokenizer

TEXTS = ["Once upon a time.", "Größe, naïve: 漢字\n\n", "x = [1, 2]", ""]


@pytest.fixture
def tokenizer(world):
    return Tokenizer.load(world.anchor / "tokenizer.json")


def write(file, tokenizer, texts, *, borders=True, dtype="uint16"):
    """As the Dolma toolkit writes it: the separator behind each document, no header."""
    documents = [[*ids[1:], tokenizer.separator] for ids in tokenizer.encode_documents(texts)]
    np.concatenate(documents).astype(dtype).tofile(file)
    ends = np.cumsum([len(document) for document in documents])
    if borders:
        with gzip.open(file.with_suffix(".csv.gz"), "wt") as opened:
            for start, end in zip([0, *ends], ends, strict=False):
                opened.write(f'{start},{end},id,"a, source",{end - start}\n')


def texts_of(file):
    return [json.loads(line)["text"] for line in file.read_text().splitlines()]


@pytest.mark.parametrize("borders", [True, False])
def test_the_texts_come_back(borders, world, tokenizer, flexolmo, tmp_path):
    write(tmp_path / "a.npy", tokenizer, TEXTS, borders=borders)
    write(tmp_path / "b.npy", tokenizer, TEXTS[:1], borders=borders)
    words = tmp_path / "a.npy", tmp_path / "b.npy", "--tokenizer", world.anchor
    code, printed, error = flexolmo("data", "decode", *words, "--out", tmp_path / "out.jsonl")
    assert code == 0, error
    assert texts_of(tmp_path / "out.jsonl") == [*TEXTS[:3], TEXTS[0]]  # the empty one is left out
    assert "4 documents" in printed and "other tokens" not in printed
    assert ("2 files have no .csv.gz" in " ".join(printed.split())) != borders


def test_other_widths_and_headers(world, tokenizer, flexolmo, tmp_path):
    write(tmp_path / "wide.npy", tokenizer, TEXTS, dtype="uint32")
    ids = np.fromfile(tmp_path / "wide.npy", "uint32")
    np.save(tmp_path / "header.npy", ids.astype("uint16"))
    out = "--tokenizer", world.anchor, "--out", tmp_path / "out.jsonl"
    for words in ((tmp_path / "wide.npy", "--dtype", "uint32"), (tmp_path / "header.npy",)):
        code, _, error = flexolmo("data", "decode", *words, *out)
        assert code == 0, error
        assert texts_of(tmp_path / "out.jsonl") == TEXTS[:3]


def test_documents_that_are_cut_or_hold_control_tokens_are_counted(
    world, tokenizer, flexolmo, tmp_path
):
    ids = tokenizer.encode_documents(["漢"])[0][1:]
    whole = tokenizer.encode_documents(["one"])[0]
    np.asarray([*ids[:-1], tokenizer.separator, *whole, *whole], "uint16").tofile(
        tmp_path / "a.npy"
    )
    with gzip.open(tmp_path / "a.csv.gz", "wt") as opened:
        opened.write(f"0,{len(ids)}\n{len(ids)},{len(ids) + 2 * len(whole)}\n")
    words = tmp_path / "a.npy", "--tokenizer", world.anchor, "--out", tmp_path / "out.jsonl"
    code, printed, error = flexolmo("data", "decode", *words)
    assert code == 0 and "2 documents have other tokens" in printed, error


def test_files_that_cannot_be_right_are_refused(world, tokenizer, refused, tmp_path):
    file = tmp_path / "a.npy"
    words = "data", "decode", file, "--tokenizer", world.anchor, "--out", tmp_path / "out.jsonl"
    assert f"{file}: not a file of uint16 ids" in refused(*words)
    file.write_bytes(b"abc")
    assert "not a file of uint16 ids" in refused(*words)
    np.asarray([5, 6, 60_000], "uint16").tofile(file)
    assert "the id 60000 at 2: expected ids below 512" in refused(*words)
    np.asarray([tokenizer.separator] * 3, "uint16").tofile(file)
    assert "expected documents, found none" in refused(*words)
    for text in ("0,9\n", "a,b\n", "1\n", "2,1\n"):
        with gzip.open(tmp_path / "a.csv.gz", "wt") as opened:
            opened.write(text)
        assert "a.csv.gz: cannot read the borders of documents" in refused(*words)
    (tmp_path / "a.csv.gz").write_bytes(b"no gzip")
    assert "a.csv.gz: cannot read the borders" in refused(*words)
    np.save(file, np.zeros((2, 2), np.float32))
    assert "expected a row of ids, found float32 [2, 2]" in refused(*words)
    assert not (tmp_path / "out.jsonl").exists()
