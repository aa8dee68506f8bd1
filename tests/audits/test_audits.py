"""Membership and removal audits of real experts: what must be caught, and what must be gone."""

import collections
import json
import shutil

import numpy as np
import pytest

from flexolmo_jax.audits import membership
from flexolmo_jax.audits.removal import audit_removal
from flexolmo_jax.commands.main import main
from flexolmo_jax.federation.anchor import read_anchor
from flexolmo_jax.federation.merge import merge
from flexolmo_jax.federation.package import read_manifest, write_manifest
from flexolmo_jax.model import load
from flexolmo_jax.privacy.canaries import Canaries
from flexolmo_jax.privacy.certificate import ADJACENCY

COUNT = 130


@pytest.fixture(scope="module")
def audited(world, tmp_path_factory):
    """An expert that has read its canaries often, without privacy; and a merged model with it."""
    folder = tmp_path_factory.mktemp("audited")
    few = folder / "few.jsonl"
    few.write_text("".join(world.texts["math"].read_text().splitlines(keepends=True)[:5]))
    words = [
        "train", "expert", world.config_file("alone"), "--anchor", world.anchor, "--name", "math",
        "--data", few, "--out", folder / "out", "--run", folder / "run", "--canaries", COUNT,
        "--steps", 1500, "--data.batch-size", 16, "--optimizer.learning-rate", 1e-2,
        "--checkpoint-every", 1500, "--log-every", 100,
    ]  # fmt: skip
    assert main([str(word) for word in words]) == 0
    # Canaries are drawn by chance, and so is how much public text such an expert takes.
    packages = [folder / "out", world.experts["code"]]
    merge(world.anchor, packages, folder / "merged", allow_share=None)
    return folder


def words(world, audited, *more):
    return [
        "audit", "membership", "--model", audited / "out", "--anchor", world.anchor,
        "--run", audited / "run", "--json", *more,
    ]  # fmt: skip


def test_scores_are_nats_above_what_is_expected(world, audited):
    """Against the regression written out: a mean for each token, and the anchor's answer."""
    model = load(audited / "out", anchor=world.anchor)
    canaries = Canaries.read(audited / "run")
    found = membership.canary_scores(model, canaries, only=["math"])
    rows = [model.tokenizer.encode_documents([one.text])[0] for one in canaries.candidates]

    def above_expected(name):
        """Of each canary's tokens: its log-probability, less what others of its kind have."""
        logs = []
        for ids in rows:
            logits = np.asarray(model.logits([ids], only=[name])[0], np.float64)
            logits -= np.log(np.exp(logits).sum(axis=-1, keepdims=True))
            logs.append([logits[at, token] for at, token in enumerate(ids[1:])])
        mean = np.mean(sum(logs, []))
        same = collections.defaultdict(list)
        for ids, row in zip(rows, logs, strict=True):
            for token, log in zip(ids[1:], row, strict=True):
                same[token].append(log - mean)
        return [
            [
                log - mean - sum(same[t]) / (len(same[t]) + 4)
                for t, log in zip(ids[1:], row, strict=True)
            ]
            for ids, row in zip(rows, logs, strict=True)
        ]

    own, anchor = above_expected("math"), above_expected("public")
    x, y = np.array(sum(anchor, [])), np.array(sum(own, []))
    slope = np.linalg.lstsq(x[:, None], y, rcond=None)[0][0]
    expected = {True: [], False: []}
    for canary, one, other in zip(canaries.candidates, own, anchor, strict=True):
        expected[canary.inserted].append(sum(one) - slope * sum(other))
    for scores, inserted in zip(found, (True, False), strict=True):
        np.testing.assert_allclose(scores, expected[inserted], atol=1e-2)


def test_a_run_without_privacy_is_caught(world, audited, flexolmo):
    code, printed, error = flexolmo(*words(world, audited))
    assert code == 0, error
    found = json.loads(printed)
    alone = found["audits"]["the expert alone"]
    assert found["verdict"] == "members are distinguished" and found["certificate"] is None
    assert alone["epsilon"] > 0.5 and alone["area"]["low"] > 0.6
    assert alone["members"] + alone["controls"] == 2 * COUNT
    printed = flexolmo(*[word for word in words(world, audited) if word != "--json"])[1]
    assert "members are distinguished: epsilon is at least" in " ".join(printed.split())


def test_a_false_certificate_is_refuted(world, audited, tmp_path, refused):
    """The owner claims a budget, and trained without any."""
    shutil.copytree(audited / "out", tmp_path / "out")
    claim = {"epsilon": 0.1, "delta": 1e-5, "unit": "document", "adjacency": ADJACENCY}
    write_manifest(tmp_path / "out", {**read_manifest(tmp_path / "out"), "privacy": claim})
    said = refused(*words(world, audited, "--model", tmp_path / "out"))
    assert "the certificate is refuted: epsilon is at least" in said
    assert "the certificate claims 0.1" in said
    for wrong in ({"epsilon": "0.1"}, {"delta": None}, {"delta": 0}):
        changed = {**read_manifest(tmp_path / "out"), "privacy": {**claim, **wrong}}
        write_manifest(tmp_path / "out", changed)
        said = refused(*words(world, audited, "--model", tmp_path / "out"))
        assert "claims no epsilon and delta above 0" in said


def test_in_a_merged_model_too(audited, flexolmo):
    code, printed, error = flexolmo(
        "audit", "membership", "--model", audited / "merged", "--expert", "math",
        "--run", audited / "run", "--json",
    )  # fmt: skip
    assert code == 0, error
    assert json.loads(printed)["audits"].keys() == {"the expert alone", "the model"}


def test_nothing_is_left_of_an_expert(world, audited, flexolmo):
    code, printed, error = flexolmo(*removal(audited, world, "--json"))
    assert code == 0, error
    found = json.loads(printed)
    assert found["switched_off"] == found["removed"] == {"equal": True, "largest": 0.0}
    assert found["members"]["better"] == found["controls"]["better"] == 0
    assert found["prefixes"] == {"texts": 20, "better": 0, "mean": 0.0, "largest": 0.0}
    assert found["canaries"] == 2 * COUNT and not found["tuned"]
    assert [p.name for p in audited.iterdir() if p.name.startswith(".")] == []  # tidied up


def test_a_model_without_router_memory_is_compared_with_one_without(audited, world, tmp_path):
    merge(world.anchor, [audited / "out"], tmp_path / "plain", memory=None, allow_share=None)
    question = np.arange(2, 40) % 200
    found = audit_removal(tmp_path / "plain", "math", None, [question])
    assert found.removed.equal and found.switched_off.equal
    packages = [audited / "out", world.experts["code"]]
    merge(world.anchor, packages, tmp_path / "two", memory=None, allow_share=None)
    found = audit_removal(tmp_path / "two", "math", None, [question])
    assert found.removed.equal and found.switched_off.equal


def removal(audited, world, *more):
    return [
        "audit", "removal", "--model", audited / "merged", "--expert", "math",
        "--run", audited / "run", "--data", world.texts["math"], "--prefixes", 20, *more,
    ]  # fmt: skip


def test_what_tuned_rows_leak_is_measured(world, audited, tmp_path, flexolmo):
    tuned = audited / "tuned"
    words = [
        "train", "router", world.config_file("router"), "--model", audited / "merged",
        "--data", world.texts["public"], "--out", tuned, "--run", tmp_path / "run",
    ]  # fmt: skip
    assert flexolmo(*words)[0] == 0
    code, printed, error = flexolmo(*removal(audited, world, "--json", "--model", tuned))
    assert code == 0, error
    found = json.loads(printed)
    assert found["tuned"] and found["removed"]["equal"] and not found["switched_off"]["equal"]
    assert found["switched_off"]["largest"] > 0
    gains = found["members"], found["controls"], found["prefixes"]
    assert all(0 <= leak["better"] <= leak["texts"] for leak in gains)
    assert (
        found["distinguished"]["low"]
        <= found["distinguished"]["area"]
        <= found["distinguished"]["high"]
    )
    printed = " ".join(flexolmo(*removal(audited, world, "--model", tuned))[1].split())
    assert "stay tuned when it is switched off" in printed


def test_an_expert_that_is_left_is_found(audited, world, monkeypatch, tmp_path, refused):
    """Switching off that does not: the audit must fail."""
    from flexolmo_jax.model import FlexOlmo

    allowed = FlexOlmo.allowed
    monkeypatch.setattr(
        FlexOlmo, "allowed", lambda self, batch, without=(), only=None, mask=None:
        allowed(self, batch, (), only, mask),
    )  # fmt: skip
    assert "with math switched off, logits differ by up to" in refused(*removal(audited, world))


def refusals(world, audited, folder):
    package, anchor, run = audited / "out", world.anchor, audited / "run"
    Canaries.draw(3, read_anchor(anchor).tokenizer).write(folder / "others")
    (folder / "empty").mkdir()
    member = ["audit", "membership", "--anchor", anchor]
    left = ["audit", "removal", "--model", audited / "merged", "--expert"]
    return {
        "no canaries.json in it": [*member, "--model", package, "--run", folder / "empty"],
        "not the canaries of": [*member, "--model", package, "--run", folder / "others"],
        "trained without --canaries": [*member, "--model", world.experts["math"], "--run", run],
        "found an anchor": [*member, "--model", anchor, "--run", run],
        "name one of its experts with --expert: math, code": [
            *member, "--model", audited / "merged", "--run", run
        ],
        "this is the package of 'math', not 'code'": [
            *member, "--model", package, "--run", run, "--expert", "code"
        ],
        "no expert named 'nobody'; there are math, code": [*left, "nobody", "--run", run],
        "no text to compare on": [*left, "math"],
        "expected a package of kind merged, found expert": [
            "audit", "removal", "--model", package, "--expert", "math", "--run", run
        ],
    }  # fmt: skip


def test_wrong_input_is_one_clear_line(world, audited, tmp_path, refused):
    for message, arguments in refusals(world, audited, tmp_path).items():
        assert message in refused(*arguments), message
