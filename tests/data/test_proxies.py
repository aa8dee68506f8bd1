"""Proxies are picked for likeness to what was read, and that is said."""

import json

from flexolmo_jax.data.proxies import pick_proxies
from flexolmo_jax.data.sources import read_documents


def test_what_was_read_of_both_texts_is_said(tmp_path, capsys):
    own = tmp_path / "own"
    own.mkdir()
    texts = [document.text for document in read_documents("corpus:math")][:12]
    (own / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (own / "b.docx").write_bytes(b"PK")
    pick_proxies(str(own), "corpus:public", tmp_path / "picked.jsonl")
    own_line, public_line = capsys.readouterr().err.splitlines()
    assert "own: 12 documents" in own_line and "not read: 1 file (b.docx)" in own_line
    assert public_line.startswith("corpus:public: ")
