"""Marks that name the ledger of a text.

A ledger counts only the runs entered in it. To notice a second ledger for the same text, the first
leaves two marks: a file beside the text, and a file in the user's state directory named by the
text's fingerprint, which also recognizes a copy of the text. Neither holds text.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import NamedTuple

from flexolmo_jax.data.sources import read_documents
from flexolmo_jax.storage.files import replace_file

PUBLIC = "corpus:"  # texts bundled with the project; they have no owner


class Mark(NamedTuple):
    """A mark: the path and id of a ledger, and the file that records them."""

    ledger: Path
    id: str
    file: Path


def digest_of_documents(source: str | Path, text_field: str) -> str:
    """SHA-256 of the distinct documents of a source, independent of their files and order."""
    digests = {
        hashlib.sha256(document.text.strip().encode()).digest()
        for document in read_documents(source, text_field=text_field)
    }
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()


def read_marks(source: str | Path, text: str) -> list[Mark]:
    """The marks of a text; unreadable ones are skipped."""
    marks = []
    for file in _files(source, text):
        try:
            written = json.loads(file.read_text(encoding="utf-8"))
            marks.append(Mark(Path(written["ledger"]), str(written["id"]), file))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return marks


def write_marks(source: str | Path, text: str, ledger: Path, ledger_id: str) -> list[Path]:
    """Marks a text with its ledger; returns the files that could not be written."""
    failed = []
    for file in _files(source, text):
        if not file.is_absolute():
            failed.append(file)
            continue
        try:
            file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            replace_file(file, json.dumps({"ledger": str(ledger), "id": ledger_id}) + "\n")
        except OSError:
            failed.append(file)
    return failed


def _files(source: str | Path, text: str) -> list[Path]:
    if str(source).startswith(PUBLIC):
        return []
    # Without a home directory (in some containers) "~" is not expanded, and this mark is skipped.
    state = Path(os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state"))
    files = [state / "flexolmo_jax" / "ledgers" / f"{text}.json"]
    if not str(source).startswith("tfds:"):
        place = Path(source).resolve()
        files.insert(0, place.with_name(f".{place.name}.ledger"))
    return files
