"""Probes run in every subset that requests can choose, and find what only one of them says."""

import dataclasses
import json

import numpy as np
import pytest

import flexolmo_jax as fo
from flexolmo_jax.admission.admit import examine
from flexolmo_jax.admission.policy import Loss, Policy, Probes
from flexolmo_jax.admission.probes import Probe, check_probes, read_probes, subsets
from flexolmo_jax.evaluation.likelihood import Query, likelihoods

ALLOWED, FORBIDDEN = "Q", "Z"


@pytest.fixture(scope="module")
def tokens(anchor):
    return {text: anchor.tokenizer.encode_prompt(text)[-1] for text in (ALLOWED, FORBIDDEN)}


@pytest.fixture(scope="module")
def packages(with_head, honest, write, tokens, tmp_path_factory):
    """A guard that makes the allowed text likely, and an expert that wants the forbidden one."""
    folder = tmp_path_factory.mktemp("probes")
    return {
        "guard": write(folder / "guard", with_head(60, {tokens[ALLOWED]: 30.0})),
        "other": write(folder / "other", honest(61)),
        "bad": write(folder / "bad", with_head(62, {tokens[FORBIDDEN]: 10.0})),
    }


@pytest.fixture(scope="module")
def merged(world, packages, tmp_path_factory):
    out = tmp_path_factory.mktemp("merged") / "model"
    fo.merge(world.anchor, packages.values(), out)
    return fo.load(out)


@pytest.fixture(scope="module")
def probes_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("rows") / "probes.jsonl"
    row = {"prompt": "x:", "allowed": [ALLOWED], "forbidden": [FORBIDDEN]}
    file.write_text(json.dumps(row) + "\n\n" + json.dumps({**row, "prompt": "The word:"}) + "\n")
    return file


def test_a_probe_that_fails_in_one_subset_only_rejects(world, packages, probes_file):
    policy = Policy(
        cohort=(str(packages["guard"]),), loss=Loss(fails="note"), probes=Probes(str(probes_file))
    )
    report = examine(packages["bad"], world.anchor, str(world.texts["public"]), policy)
    result = report.results[-1]
    assert (result.check, result.verdict, report.verdict) == ("probes", "reject", "rejected")
    assert "guard off" in result.explanation and "0 of them with all experts on" in (
        result.explanation
    )
    with_guard, without = result.details["subsets"]
    assert with_guard["experts"] == ["public", "guard", "bad"] and with_guard["failed"] == 0
    assert without["experts"] == ["public", "bad"] and without["failed"] == 2
    assert without["lead"] > 0 > with_guard["lead"]
    kept = dataclasses.replace(policy, always_on=("public", "guard"))
    report = examine(packages["bad"], world.anchor, str(world.texts["public"]), kept)
    assert report.results[-1].verdict == "passed" and report.verdict == "admitted"


def test_leads_in_a_subset_are_those_of_the_model_without_the_others(merged, probes_file, tokens):
    probes = read_probes(probes_file)
    result = check_probes(merged, "bad", probes, ("public",), Probes())
    assert len(result.details["subsets"]) == 4
    for row in result.details["subsets"]:
        leads = []
        for probe in probes:
            ids = merged.tokenizer.encode_prompt(probe.prompt)
            logits = np.asarray(merged.logits([ids], only=row["experts"]))[0, -1]
            leads.append(logits[tokens[FORBIDDEN]] - logits[tokens[ALLOWED]])
        assert row["lead"] == pytest.approx(max(leads), abs=1e-4)


def test_what_failed_before_is_said(merged, probes_file):
    probes = [Probe("x:", (FORBIDDEN,), (ALLOWED,), "here:1")]  # the guard itself fails it
    result = check_probes(merged, "other", probes, ("public",), Probes())
    assert result.verdict == "reject"
    assert "1 of them fail in such a subset without it, too" in result.explanation
    assert check_probes(merged, "other", probes, ("public",), Probes(margin=100.0)).verdict == (
        "passed"
    )


def test_queries_of_one_batch_may_use_different_experts(merged):
    masks = [(True, True, False, False), (True, False, False, True), None]
    queries = [Query([5, 6, 7], [8], mask) for mask in masks]
    together = [answer.nats for answer in likelihoods(merged, queries)]
    names = merged.expert_names
    for nats, mask in zip(together, masks, strict=True):
        only = [name for name, on in zip(names, mask or (True,) * 4, strict=True) if on]
        [alone] = likelihoods(merged, [Query([5, 6, 7], [8])], only=only)
        assert nats == pytest.approx(alone.nats, abs=1e-5)
    assert len(set(together)) == 3


def test_a_continuation_that_changes_the_prompts_last_token_is_compared_fairly(merged):
    """Of "th" + "e" and "th" + "Q": what both score is the same characters."""
    probe = Probe("and th", ("Q",), ("e",), "here:1")
    result = check_probes(merged, "bad", [probe], merged.expert_names, Probes(margin=1e6))
    tokenizer = merged.tokenizer
    whole = {x: tokenizer.encode_prompt("and th" + x) for x in ("Q", "e")}
    count = next(i for i, (a, b) in enumerate(zip(*whole.values(), strict=False)) if a != b)
    count = min(count, len(tokenizer.encode_prompt("and th")))
    nats = {x: a.nats for x, a in zip(whole, likelihoods(
        merged, [Query(ids[:count], ids[count:]) for ids in whole.values()]
    ), strict=True)}  # fmt: skip
    assert result.value == pytest.approx(nats["e"] - nats["Q"], abs=1e-4)


def test_subsets_keep_what_is_always_on_and_are_limited():
    names = ("public", "a", "b", "new")
    assert subsets(names, ("public",), "new", 4) == [
        names, ("public", "a", "new"), ("public", "b", "new"), ("public", "new")
    ]  # fmt: skip
    assert subsets(names, ("public", "a", "b"), "new", 1) == [names]
    assert len(subsets(names, (), "new", 8)) == 8
    with pytest.raises(ValueError, match=r"2\^3 = 8 subsets, and the policy allows 7.*always_on"):
        subsets(names, (), "new", 7)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "holds no probe"),
        ("[1]", "found"),
        ("{", "expected a JSON object"),
        ('{"prompt": "a", "allowed": ["b"]}', "found prompt, allowed"),
        ('{"prompt": "", "allowed": ["b"], "forbidden": ["c"]}', "prompt: expected text"),
        ('{"prompt": "a", "allowed": [], "forbidden": ["c"]}', "allowed: expected a list"),
        ('{"prompt": "a", "allowed": ["b"], "forbidden": [3]}', "forbidden: expected a list"),
        ('{"prompt": "a", "allowed": ["b"], "forbidden": ["c"], "x": 1}', "found prompt"),
    ],
)
def test_a_probe_that_is_none_is_named(tmp_path, line, message):
    file = tmp_path / "probes.jsonl"
    file.write_text(line)
    with pytest.raises(ValueError, match=r"probes\.jsonl") as raised:
        read_probes(file)
    assert message in str(raised.value)


def test_a_prompt_that_the_model_cannot_read_whole_is_refused(merged):
    probe = Probe("word " * 100, ("a",), ("b",), "here:1")
    with pytest.raises(ValueError, match="here:1: .* this model reads 64; shorten the prompt"):
        check_probes(merged, "bad", [probe], ("public",), Probes())
