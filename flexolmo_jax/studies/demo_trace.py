"""The demo's trace: an index of each owner's training text, and an answer traced in them."""

import importlib.util
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from flexolmo_jax.config import DataConfig
from flexolmo_jax.data.sources import Document, is_heldout, read_documents
from flexolmo_jax.model import FlexOlmo
from flexolmo_jax.runtime.console import tell, without_progress
from flexolmo_jax.storage.files import replace_file
from flexolmo_jax.tracing.build import build_index
from flexolmo_jax.tracing.index import Index
from flexolmo_jax.tracing.page import trace_page
from flexolmo_jax.tracing.table import counts, show_trace

TOKENS = 48  # of the answer


def trace_demo(
    model: FlexOlmo, owner: str, prompt: str, names: Sequence[str], data: DataConfig, out: Path
) -> dict[str, Any] | None:
    """Indexes what each owner trained on, and traces an answer with an owner on, and off.

    Args:
      owner: the one that is switched off.
      prompt: what the model answers, both times.
      names: of the parts of the bundled corpus; each gets an index in OUT/indexes/NAME.
      data: says which documents were held out; they are not indexed.
      out: the demo's folder, with an anchor; `trace.html` there shows the first trace.

    Returns:
      the prompt, and both traces as JSON values; None where the extra `trace` is not installed.
    """
    if importlib.util.find_spec("pydivsufsort") is None:
        tell("no answer is traced: that needs pip install 'flexolmo_jax[trace]'")
        return None
    file = out / "anchor" / "tokenizer.json"
    indexes = [index_training_text(name, data, file, out / "indexes" / name) for name in names]
    [answer] = model.generate([prompt], TOKENS)
    found = model.trace(str(answer), indexes, prompt=prompt)
    replace_file(out / "trace.html", trace_page(found, prompt))
    show_trace(found, prompt)
    off = str(model.generate([prompt], TOKENS, without=[owner])[0])
    without = model.trace(off, indexes, prompt=prompt, without=[owner])
    tell(f"\nWith {owner} off, none of its documents is named:")
    tell(f"  {off!r}")
    for words, said in {off[s.start : s.stop]: counts(s) for s in without.spans}.items():
        tell(f"  {words!r}: {said}")
    return {"prompt": prompt, "owner": owner, "on": found.to_json(), "off": without.to_json()}


def training_documents(name: str, data: DataConfig) -> Iterator[Document]:
    """The documents of `corpus:NAME` that training with `data` reads."""
    for document in read_documents(f"corpus:{name}", group_field=data.group_field):
        if not is_heldout(document, data.heldout):
            yield document


def index_training_text(name: str, data: DataConfig, tokenizer: Path, folder: Path) -> Index:
    """Makes and opens an index of `training_documents`; its owner is called NAME."""
    with tempfile.TemporaryDirectory() as scratch, without_progress():
        file = Path(scratch) / f"{name}.jsonl"
        with open(file, "w", encoding="utf-8") as opened:
            for document in training_documents(name, data):
                row = {"text": document.text, "source": document.source}
                more = {"licence": document.licence, "id": Path(document.where).name}
                opened.write(json.dumps(row | more) + "\n")
        build_index([str(file)], tokenizer, folder, owner=name)
    return Index.open(folder)
