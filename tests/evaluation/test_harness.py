"""Tasks through lm-evaluation-harness: its own adapter's answers, ours, masks, what is refused."""

import functools
import json
import shutil
import sys
from pathlib import Path

import pytest
from lm_eval.api.instance import Instance
from lm_eval.evaluator import evaluate

from flexolmo_jax.evaluation import harness, harness_tasks
from flexolmo_jax.evaluation.harness import HarnessModel, evaluate_tasks
from flexolmo_jax.evaluation.harness_tasks import load_tasks
from flexolmo_jax.model import load

TEXTS = [
    "The river runs north.",
    "Whether 2 + 2 = 4 or not, the café stays open until ten; nobody minds.\n\n" * 12,
    "<|endoftext|>Once more.",
    " ",
    "Q: What is it?\nA: A theorem.",
]
PAIRS = [
    ("", "The river"),
    ("", "<|endoftext|>The"),
    ("The river runs ", "north"),
    ("The river runs   ", " south"),
    ("<|endoftext|>The river", " runs"),
    ("Question: how many?\nAnswer:", " A"),
    ("Question: how many?\nAnswer:", " B"),
    ("Question: how many?\nAnswer:", " forty-two of them"),
    ("long " * 300, "and the end"),
    ("caf", "é"),
]
TASKS = {
    "choice": """
        output_type: multiple_choice
        test_split: test
        fewshot_split: train
        doc_to_text: "Question: {{question}}\\nAnswer:"
        doc_to_choice: "{{choices}}"
        doc_to_target: answer
        num_fewshot: 2
        metric_list: [{metric: acc}, {metric: acc_norm}, {metric: brier_score}]
    """,
    "letters": """
        output_type: multiple_choice
        test_split: test
        doc_to_text: "{{question}}\\nA. {{choices[0]}}\\nB. {{choices[1]}}\\nC. {{choices[2]}}\\n:"
        doc_to_choice: ["A", "B", "C"]
        doc_to_target: answer
        metric_list: [{metric: acc}]
    """,
    "last_word": """
        output_type: loglikelihood
        test_split: test
        doc_to_text: "{{text.split(' ')[:-1]|join(' ')}}"
        doc_to_target: "{{' ' + text.split(' ')[-1]}}"
        metric_list: [{metric: perplexity}, {metric: acc}]
    """,
    "whole_text": """
        output_type: loglikelihood_rolling
        test_split: test
        doc_to_text: ""
        doc_to_target: "{{text}}"
        metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
    """,
    "answer": """
        output_type: generate_until
        test_split: test
        fewshot_split: train
        doc_to_text: "Q: {{question}}\\nA:"
        doc_to_target: "{{choices[answer]}}"
        num_fewshot: 1
        generation_kwargs: {until: ["\\n", "e"], max_gen_toks: 20, do_sample: false}
        metric_list: [{metric: exact_match, ignore_case: true}, {metric: bleu}]
    """,
}
DOCUMENTS = """
import datasets

WORDS = "river theorem north ten minds open café nobody stays four".split()


def documents(**kwargs):
    rows = [
        {
            "question": " ".join(WORDS[(i * k) % 10] for k in range(1, 4 + i % 5)) + "?",
            "choices": [WORDS[i % 10], WORDS[(i + 3) % 10] + " and more", WORDS[(i + 7) % 10]],
            "answer": i % 3,
            "text": " ".join(WORDS[(i * k + k) % 10] for k in range(1, 12 + 20 * (i % 4))),
        }
        for i in range(1, 13)
    ]
    made = datasets.Dataset.from_list(rows)
    return datasets.DatasetDict({"test": made.select(range(8)), "train": made.select(range(8, 12))})
"""


@pytest.fixture(scope="module")
def own_tasks(tmp_path_factory):
    """YAML files of tasks that cover what a task may ask, with documents of their own."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "made_up.py").write_text(DOCUMENTS)
    for name, body in TASKS.items():
        lines = [f"task: {name}", "custom_dataset: !function made_up.documents"]
        lines += [line.strip() for line in body.splitlines() if line.strip()]
        (folder / f"{name}.yaml").write_text("\n".join(lines) + "\n")
    return [str(folder / f"{name}.yaml") for name in TASKS]


@pytest.fixture(autouse=True)
def own_tasks_only(monkeypatch):
    """The harness's own take seconds to list."""
    none = harness_tasks.TaskManager(include_defaults=False)
    monkeypatch.setattr(harness_tasks, "task_manager", lambda: none)


def instances(kind, *arguments):
    return [Instance(kind, {}, one, i, ("made_up", i, 1)) for i, one in enumerate(arguments)]


def test_answers_are_those_of_the_hugging_face_adapter(folder, theirs):
    ours = HarnessModel(load(folder))
    asked = instances("loglikelihood", *PAIRS)
    for found, expected in zip(ours.loglikelihood(asked), theirs.loglikelihood(asked), strict=True):
        assert found[0] == pytest.approx(expected[0], rel=1e-5, abs=1e-4)
        assert found[1] == expected[1]
    asked = instances("loglikelihood_rolling", *((text,) for text in TEXTS))
    expected = theirs.loglikelihood_rolling(asked)
    assert ours.loglikelihood_rolling(asked) == pytest.approx(expected, rel=1e-5)
    how = [
        {"until": ["\n", "."], "max_gen_toks": 24},
        {"until": "e", "max_new_tokens": 9, "do_sample": False, "temperature": 0.7},
        {"max_gen_toks": 33},
    ]
    prompts = [text for text in (*TEXTS, "long " * 300, "caf") if text]
    asked = instances("generate_until", *((text, one) for text in prompts for one in how))
    found = ours.generate_until(asked)
    assert found == theirs.generate_until(asked)
    assert sum(map(len, found)) > 100 and len(set(found)) > len(how)


def test_scores_are_those_of_the_hugging_face_adapter(folder, theirs, own_tasks):
    found = evaluate_tasks(load(folder), own_tasks)["results"]
    asked = load_tasks(own_tasks, None)
    expected = evaluate(theirs, asked, bootstrap_iters=harness.BOOTSTRAP)["results"]
    assert list(found) == list(expected) == list(TASKS)
    for task, scores in expected.items():
        numbers = {key: value for key, value in scores.items() if isinstance(value, int | float)}
        assert len(numbers) > 1, task
        assert {key: found[task][key] for key in numbers} == pytest.approx(numbers, rel=1e-4), task
        for key in numbers:
            if key.startswith(("acc", "exact_match", "bleu", "sample_len")):
                assert found[task][key] == numbers[key]


def test_masks_hold_in_tasks(model, own_tasks):
    run = functools.partial(evaluate_tasks, model, [own_tasks[0], own_tasks[-1]], limit=4)
    whole = run()["results"]
    without, alone = run(without=["math", "code", "loud"]), run(only=["public"])
    without, alone = without["results"], alone["results"]
    assert json.dumps(without) == json.dumps(alone) != json.dumps(whole)
    assert whole["choice"]["sample_len"] == 4


def test_numbers_of_examples(model, own_tasks):
    choice, letters = own_tasks[:2]
    shots = evaluate_tasks(model, own_tasks[:2], limit=2)["n-shot"]
    assert shots == {"choice": 2, "letters": 0}
    shots = evaluate_tasks(model, own_tasks[:2], limit=2, shots={choice: 1})["n-shot"]
    assert shots == {"choice": 1, "letters": 0}


def test_until_ends_a_continuation(model):
    prompts = ["The theorem", "def main("]
    (whole, other) = model.generate(prompts, 40)
    end = whole[5:7]
    assert model.generate(prompts, 40, until=[end])[0] == whole.split(end)[0]
    assert model.generate(prompts, 40, until=[end])[1] == other.split(end)[0]
    assert model.generate(prompts, 40, until="not there") == [whole, other]
    ids = model.generate([model.tokenizer.encode_prompt(prompts[0])] * 2, 40, until=end)[0]
    assert len(ids) < 40 and end in model.tokenizer.decode(ids)
    with pytest.raises(ValueError, match="must not contain an empty text"):
        model.generate(prompts, 4, until=["x", ""])


def test_what_cannot_be_asked_is_refused(model, own_tasks):
    ours = HarnessModel(model)
    for how, said in (
        ({"num_beams": 4}, "made_up: the generation option 'num_beams' is not known"),
        ({"max_gen_toks": 64}, "made_up: answers of 64 tokens do not fit into the 64 tokens"),
    ):
        with pytest.raises(ValueError, match=said):
            ours.generate_until(instances("generate_until", ("A", how)))
    with pytest.raises(ValueError, match="no expert named 'nobody'"):
        evaluate_tasks(model, own_tasks, without=["nobody"])


# The command line


def test_the_command_shows_a_table_or_json(world, flexolmo, own_tasks):
    command = ("evaluate", "--model", world.merged, "--harness", *own_tasks[:2], "--limit", 2)
    code, out, _ = flexolmo(*command)
    assert code == 0 and "choice" in out and "letters" in out and "acc_norm" in out
    code, out, _ = flexolmo(*command, "--json", "--without", "math")
    found = json.loads(out)
    assert code == 0 and list(found["results"]) == ["choice", "letters"]
    assert found["without"] == ["math"] and found["n-samples"]["choice"]["effective"] == 2


def test_wrong_input_ends_in_one_line(world, refused, own_tasks, tmp_path):
    model = ("evaluate", "--model", world.merged)
    said = refused(*model, "--harness", own_tasks[0], "nowhere.yaml")
    assert "no task of lm_eval is called 'nowhere.yaml'" in said
    broken = tmp_path / "broken.yaml"
    broken.write_text("task: broken\noutput_type: guess\n")
    assert "broken.yaml: cannot be set up: " in refused(*model, "--harness", broken)
    assert "NewsG needs a judge" in refused(*model, "--harness", "NewsG")
    assert "--heldout is for --data" in refused(*model, "--harness", "x", "--heldout", "0.1")
    assert "--limit is for --harness" in refused(*model, "--data", "a=b", "--limit", "3")


def test_without_the_extra(world, refused, own_tasks, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "flexolmo_jax.evaluation.harness")
    said = refused("evaluate", "--model", world.merged, "--harness", own_tasks[0])
    assert "pip install -e '.[harness]'" in said


def test_a_model_without_a_tokenizer_is_refused(tmp_path, refused, own_tasks):
    golden = Path(__file__).parents[1] / "interop" / "golden" / "flex_olmo_top2"
    folder = shutil.copytree(golden, tmp_path / "model")
    said = refused("evaluate", "--model", folder, "--harness", own_tasks[0])
    assert "came without a tokenizer.json" in said
