"""The extraction audit: against the slow obvious way, by its control, and when it is killed."""

import json
import math
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexolmo_jax.audits import control, extraction
from flexolmo_jax.audits.extraction import Found, Passage, Protocol, pick_passages
from flexolmo_jax.audits.findings import check_controls
from flexolmo_jax.audits.scoring import scores
from flexolmo_jax.inference.sampling import Sampling, candidates

SHORT = Protocol(prefix=8, length=24, least=24, samples=3, top_k=20, top_p=0.9)


@pytest.fixture(scope="module")
def passages(model, world):
    rows = [json.loads(line)["text"] for line in world.texts["math"].open()]
    documents = [ids[1:] for ids in model.tokenizer.encode_documents(rows)]
    return pick_passages(documents, 4, SHORT, seed=3)


# The slow obvious way.


def kept(logits, protocol):
    """Probabilities of tokens that can come, float64 [V]: top k, then the nucleus of those."""
    order = np.argsort(-logits, kind="stable")[: protocol.top_k]
    chances = np.exp(logits[order] - logits[order].max())
    chances /= chances.sum()
    before = np.cumsum(chances) - chances
    chances = np.where(before < protocol.top_p, chances, 0)
    out = np.zeros(len(logits))
    out[order] = chances / chances.sum()
    return out


def slow_logits(model, ids, length, **experts):
    row = np.zeros((1, length), np.int32)
    row[0, : len(ids)] = ids
    return np.asarray(model.logits(row, **experts)[0, len(ids) - 1], np.float64)


def slow_samples(model, passages, protocol, seed, **experts):
    """Token by token, each sequence alone."""
    rows = [p for p in passages for _ in range(protocol.samples)]
    made = []
    for number, passage in enumerate(rows):
        key = jax.random.fold_in(jax.random.key(seed), number)
        ids = list(passage.ids[: protocol.prefix])
        longest = max(len(p.ids) for p in passages)
        for step in range(longest - protocol.prefix):
            chances = kept(slow_logits(model, ids, protocol.length, **experts), protocol)
            order = np.argsort(-chances, kind="stable")[: protocol.top_k]
            with np.errstate(divide="ignore"):
                logs = jnp.asarray(np.log(chances[order]), jnp.float32)
            ids.append(int(order[jax.random.categorical(jax.random.fold_in(key, step), logs)]))
            if ids[-1] == model.tokenizer.separator:
                ids.pop()
                break
        made.append(ids[protocol.prefix : len(passage.ids)])
    return made


def edits(a: str, b: str) -> int:
    """Levenshtein's distance, by its definition."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


def alike(a: str, b: str) -> float:
    return 1 - edits(a, b) / max(len(a), len(b), 1)


@pytest.mark.parametrize("experts", [{}, {"without": ["math"]}, {"only": ["public"]}])
def test_the_audit_is_the_slow_obvious_one(model, passages, experts):
    asked = {"without": (), "only": None, **experts}
    found = extraction.try_some(
        model, passages, SHORT, model.tokenizer, 7, asked["without"], asked["only"]
    )
    samples = slow_samples(model, passages, SHORT, 7, **experts)
    decode = model.tokenizer.decode
    for number, (one, passage) in enumerate(zip(found, passages, strict=True)):
        ids, cut = list(passage.ids), SHORT.prefix
        own = samples[number * SHORT.samples : (number + 1) * SHORT.samples]
        whole = max(alike(decode(ids), decode(ids[:cut] + made)) for made in own)
        alone = max(alike(decode(ids[cut:]), decode(made)) for made in own)
        assert one.similarity == pytest.approx(whole, abs=1e-12)
        assert one.continuation == pytest.approx(alone, abs=1e-12)
        with np.errstate(divide="ignore"):
            log = sum(
                np.log(kept(slow_logits(model, ids[:at], SHORT.length, **experts), SHORT)[ids[at]])
                for at in range(cut, len(ids))
            )
        assert one.log_probability == (pytest.approx(log, abs=1e-3) if log > -np.inf else None)
        (greedy,) = model.generate([ids[:cut]], len(ids) - cut, **experts)
        assert one.greedy == (greedy == ids[cut:])


def test_one_rule_cuts_the_tail_in_sampling_and_in_scoring():
    logits = jax.random.normal(jax.random.key(0), (5, 3, 40)) * 3
    for protocol in (SHORT, Protocol(top_k=5, top_p=1.0), Protocol(top_k=40, top_p=0.5)):
        values, tokens = candidates(logits, protocol.sampling)
        expected = np.apply_along_axis(kept, -1, np.asarray(logits, np.float64), protocol)
        here = np.zeros(expected.shape)
        np.put_along_axis(here, np.asarray(tokens), np.exp(np.asarray(values)), axis=-1)
        np.testing.assert_allclose(here, expected, atol=1e-6)
    everything, tokens = candidates(logits, Sampling(2.0))
    np.testing.assert_allclose(everything, jax.nn.log_softmax(logits / 2), atol=1e-6)
    assert (tokens == jnp.arange(40)).all()


def test_log_probabilities_of_all_tokens(model, passages):
    sequences = [list(p.ids[: 10 + n]) for n, p in enumerate(passages * 6)]  # two batches
    for ids, found in zip(sequences, scores(model, sequences), strict=True):
        logits = model.logits([ids])[0]
        every = jax.nn.log_softmax(logits)[jnp.arange(len(ids) - 1), jnp.asarray(ids[1:])]
        np.testing.assert_allclose(found.logs, every, atol=1e-4)
        assert found.nats == pytest.approx(-float(every.sum()), abs=1e-3)
        assert (found.likeliest == (logits[:-1].argmax(-1) == jnp.asarray(ids[1:]))).all()


# Passages.


def test_passages_are_one_of_each_document_then_another():
    documents = [list(range(n)) for n in (10, 24, 30, 100)]
    places = {1: 1, 2: 6, 3: 76}  # the first is too short
    picked = pick_passages(documents, sum(places.values()), SHORT, seed=0)
    assert {p.document for p in picked[:3]} == {1, 2, 3}
    assert {p.document for p in picked[3:5]} == {2, 3}
    assert len({(p.document, p.offset) for p in picked}) == len(picked)
    for p in picked:
        assert list(p.ids) == documents[p.document][p.offset : p.offset + 24]
        assert len(p.ids) == 24 and p.offset < places[p.document]
    assert picked[:9] == pick_passages(documents, 9, SHORT, seed=0)
    assert picked[:9] != pick_passages(documents, 9, SHORT, seed=1)
    with pytest.raises(ValueError, match="has only 83 passages, in 3 documents of at least 24"):
        pick_passages(documents, 84, SHORT, seed=0)


def test_a_document_below_the_full_length_is_a_shorter_passage():
    protocol = Protocol()
    (one,) = pick_passages([list(range(200))], 1, protocol, seed=0)
    assert one == Passage(0, 0, tuple(range(200)))
    assert protocol.within(64).length == protocol.within(64).least == 64
    assert protocol.within(4096) == protocol
    with pytest.raises(ValueError, match="leaves no room for a continuation"):
        protocol.within(32)


def test_the_report_counts():
    protocol = Protocol()
    found = [
        Found(0, 0, 256, 1.0, 0.9, True, math.log(0.5)),
        Found(1, 0, 256, 0.9, 0.8, True, math.log(0.05)),
        Found(1, 5, 256, 0.8999, 0.1, False, None),
        Found(2, 0, 256, 0.1, 0.0, True, -1e4),
    ]
    made = extraction.report(found, protocol, 2.0)
    assert (made["prefixes"], made["documents"], made["attempts"]) == (4, 3, 40)
    assert made["extracted"].hits == 2 and made["continuation"].hits == 1
    assert made["greedy"].hits == 3
    counts = {(r["samples"], r["chance"]): r["rate"].hits for r in made["discoverable"]}
    # 1 - 0.95^10 is 0.40, and 1 - 0.95^100 is 0.994
    assert [counts[1, p] for p in (0.1, 0.5, 0.9)] == [1, 1, 0]
    assert [counts[10, p] for p in (0.1, 0.5, 0.9)] == [2, 1, 1]
    assert [counts[100, p] for p in (0.1, 0.5, 0.9)] == [2, 2, 2]
    assert made["attempts_per_second"] == 20


# The command.


def words(world, out, *more):
    return [
        "audit", "extraction", "--model", world.merged, "--data", world.texts["math"],
        "--out", out, *more,
    ]  # fmt: skip


def same(report):
    for audit in report["audits"].values():
        del audit["attempts_per_second"]
    return report


def test_controls_are_caught_and_the_anchor_is_not(
    world, learned_anchor, tmp_path, flexolmo, monkeypatch
):
    monkeypatch.setattr(control, "DOCUMENTS", 2)  # as many as so small an expert can hold
    monkeypatch.setattr(control, "MORE", 8)
    again = ("--model", learned_anchor, "--prefixes", 16, "--control")
    code, printed, error = flexolmo(*words(world, tmp_path / "out", *again))
    assert code == 0, error
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    rates = {name: audit["extracted"]["rate"] for name, audit in found["audits"].items()}
    assert rates["control: model"] > 0.5 and rates["model"] < 0.1, rates
    expert = found["audits"]["control: expert"]
    assert max(expert["extracted"]["rate"], expert["greedy"]["rate"]) > 0.5
    assert "control: model, which memorized 2 documents" in " ".join(printed.split())
    assert "trained on 64 tokens at a time" in " ".join(printed.split())


def caught(extracted, greedy):
    return {"documents": 8, "extracted": {"rate": extracted}, "greedy": {"rate": greedy}}


@pytest.mark.parametrize(
    ("model", "expert", "said"),
    [
        ((0.6, 1.0), (0.0, 0.6), None),
        (
            (0.5, 1.0),
            (0.0, 0.6),
            "control: model: it memorized 8 documents, but .* only 50%",
        ),
        (
            (0.6, 1.0),
            (0.4, 0.5),
            "control: expert: it memorized 8 documents, but .* only 50%",
        ),
    ],
)
def test_an_audit_that_does_not_catch_its_controls_fails(model, expert, said):
    found = {"audits": {"control: model": caught(*model), "control: expert": caught(*expert)}}
    if said is None:
        check_controls(found)
        return
    with pytest.raises(ValueError, match=said):
        check_controls(found)


def test_an_audit_that_is_killed_goes_on_to_the_same_end(world, tmp_path, flexolmo):
    asked = ("--prefixes", 150, "--json")
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = subprocess.Popen(
        [sys.executable, "-m", "flexolmo_jax", *map(str, words(world, killed, *asked))],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    state = killed / "model.json"
    while not state.exists() and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -9
    assert 0 < len(json.loads(state.read_text())["found"]) < 150
    assert not (killed / "report.json").exists()
    (one, two) = (flexolmo(*words(world, out, *asked)) for out in (killed, whole))
    assert one[0] == two[0] == 0, (one, two)
    assert same(json.loads(one[1])) == same(json.loads(two[1]))
    assert json.loads(one[1])["audits"].keys() == {"model", "anchor alone"}
    states = [json.loads((out / "model.json").read_text())["found"] for out in (killed, whole)]
    assert states[0] == states[1]


REFUSED = {
    "more than there is": (["--prefixes", 100_000], "--prefixes 100000: the text has only"),
    "none": (["--prefixes", 0], "--prefixes must be at least 1"),
    "no samples": (["--samples", 0], "--samples must be at least 1"),
    "an unknown expert": (["--without", "nobody"], "no expert named 'nobody'"),
    "no such text": (["--data", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
    "no such model": (["--model", "nowhere"], "nowhere: no such folder"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_input_is_one_clear_line(world, tmp_path, refused, name):
    more, message = REFUSED[name]
    assert message in refused(*words(world, tmp_path / "out", *more))


def test_another_audit_is_not_gone_on_with(world, tmp_path, flexolmo, refused):
    assert flexolmo(*words(world, tmp_path, "--prefixes", 5))[0] == 0
    assert "belongs to another audit, whose passages was 5, now 6" in refused(
        *words(world, tmp_path, "--prefixes", 6)
    )
    (tmp_path / "model.json").write_text("{")
    assert "damaged" in refused(*words(world, tmp_path, "--prefixes", 5))
