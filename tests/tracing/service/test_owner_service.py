"""An owner's service over a real socket: what it says at each level, to whom, and how much."""

import concurrent.futures
import json
import os
import time

import httpx
import pytest

from flexolmo_jax.storage import hash_chain
from flexolmo_jax.tracing.service import revealed
from flexolmo_jax.tracing.service.askers import KEYS, Asker


def error(answer):
    fields = answer.json()["error"]
    return answer.status_code, fields["code"] or fields["param"]


def test_levels(serve, common):
    question = f"I read that {common} today."
    with serve(level="counts", snippet_characters=12) as owner:
        [(said, span)] = owner.spans(question).items()
        assert said == common and span["count"] == 5 and span["passages"] == []
        assert owner.post(question).json()["owner"] == "clinic"
        span = owner.says(level="ids").spans(question)[common]
        assert [p["document"] for p in span["passages"]] == ["d0", "d1", "d2", "d3", "d4"]
        assert {p["licence"] for p in span["passages"]} == {"CC0-1.0"}
        assert not any(p["before"] or p["after"] for p in span["passages"])
        owner.says(level="snippets", snippet_characters=12)
        passages = owner.spans(question)[common]["passages"]
        assert passages[1]["before"] == "Report one: " and passages[1]["after"] == " and slept w"
        assert error(owner.says(level="off").post(question)) == (403, "off")


def test_what_few_documents_hold_is_not_said(serve, common, secret):
    """Neither it, nor, by the absence of its common part, that it is there."""
    absent = secret.replace("Ratched", "Nobody")
    with serve(level="snippets", minimum_documents=2) as owner:
        for text in (secret, absent):
            assert list(owner.spans(text)) == [common]
        assert list(owner.says(minimum_documents=1).spans(secret)) == [secret]
        assert owner.says(minimum_documents=6).spans(secret) == {}
        assert owner.says(minimum_tokens=99).spans(common) == {}


def test_repeated_words_are_said_everywhere_and_shown_once(serve, common):
    text = f"{common}. " * 3
    with serve(level="snippets", snippet_characters=10, characters_per_day=100) as owner:
        spans = owner.post(text).json()["spans"]
    assert [s["start"] for s in spans] == [i * (len(common) + 2) for i in range(3)]
    assert all(p["before"] for s in spans for p in s["passages"])


def test_documents_of_one_group_count_once(serve, indexed):
    index = indexed([f"{i}: the same words again and again" for i in range(3)], group="patient 7")
    with serve(index=index, minimum_documents=2) as owner:
        assert owner.spans("the same words again and again") == {}
        assert owner.says(minimum_documents=1).spans("the same words again and again")


def test_askers_have_keys(serve, common, tmp_path):
    keys = tmp_path / "keys.json"
    first, second = (KEYS.add(keys, Asker(name)) for name in ("first", "second"))
    with serve(keys=keys) as owner:
        assert error(owner.post(common)) == (401, "invalid_api_key")
        assert error(owner.post(common, key="fo-wrong")) == (401, "invalid_api_key")
        assert owner.spans(common, key=first) and owner.spans(common, key=second)
        lines = list(hash_chain.read(owner.folder / "log"))
        assert [line["asker"] for line in lines] == ["first", "second"]
        KEYS.remove(keys, "first")
        assert owner.post(common, key=first).status_code == 401
        assert owner.post(common, key=second).status_code == 200


def test_the_rate_is_limited(serve, common):
    with serve(requests_per_minute=2) as owner:
        answers = [owner.post(common) for _ in range(3)]
        assert [a.status_code for a in answers] == [200, 200, 429]
        assert 1 <= int(answers[2].headers["retry-after"]) <= 31


def test_a_budget_survives_a_restart(serve, common, monkeypatch):
    with serve(log=True, level="snippets", snippet_characters=10, characters_per_day=150) as owner:
        first = owner.spans(common)[common]["passages"]
        shown = [len(p["before"]) + len(p["after"]) for p in first]
        assert shown == [20] * 5
        second = owner.spans(common)[common]["passages"]
        assert [bool(p["before"]) for p in second] == [True, True, False, False, False]
        assert owner.spans(common)[common]["passages"][0]["document"] == "d0"
        log = owner.folder / "log"
        tokens = owner.post(common).json()["tokens"]
        owner.says(tokens_per_day=4 * tokens)
        late = owner.post(common)
        assert error(late) == (429, "budget") and int(late.headers["retry-after"]) > 0
    again = revealed.Revealed(log).used("anybody")
    assert again == (4, 4 * tokens, 4, 140)
    monkeypatch.setattr(revealed, "today", lambda: "2999-01-01")
    assert revealed.Revealed(log).used("anybody") == (0, 0, 0, 0)


def test_many_askers_at_once_spend_one_budget(serve, common):
    with serve(level="snippets", snippet_characters=10, characters_per_day=70) as owner:
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda _: owner.spans(common), range(8)))
        shown = [p["before"] + p["after"] for f in found for p in f[common]["passages"]]
        assert sum(map(len, shown)) == 60


def test_the_log_says_what_was_revealed_and_not_what_was_asked(serve, common, flexolmo, refused):
    with serve(level="snippets", snippet_characters=10) as owner:
        receipts = [owner.post(text).json()["receipt"] for text in (common, "nothing of it")]
        owner.says(level="ids", keep_texts=True).post("a kept text")
    log = owner.folder / "log"
    assert os.stat(log).st_mode & 0o077 == 0
    assert "aspirin" not in log.read_text() and "a kept text" in log.read_text()
    lines = list(hash_chain.read(log))
    assert [line["digest"] for line in lines[:2]] == receipts
    [span] = lines[0]["spans"]
    assert span["count"] == 5 and span["documents"] == dict.fromkeys(
        ["d0", "d1", "d2", "d3", "d4"], 20
    )
    code, shown, _ = flexolmo("trace", "log", log, "--json")
    [row] = json.loads(shown)["days"]
    assert code == 0 and (row["asker"], row["requests"], row["characters"]) == ("anybody", 3, 100)
    assert "(--receipt)" in flexolmo("trace", "log", log)[1]
    assert flexolmo("trace", "log", log, "--receipt", *receipts)[0] == 0
    cut = log.with_name("cut")
    cut.write_text("".join(log.read_text().splitlines(keepends=True)[:1]))
    assert flexolmo("trace", "log", cut)[0] == 0  # a log whose end is missing is a log
    assert receipts[1] in refused("trace", "log", cut, "--receipt", *receipts)
    log.write_text(log.read_text().replace('"count": 5', '"count": 1'))
    assert "line 2: the chain is broken" in refused("trace", "log", log)
    refused("trace", "serve", "--index", owner.folder / "index", "--policy",
            owner.folder / "policy.toml", "--log", log, "--port", 0)  # fmt: skip


def test_nothing_is_said_that_cannot_be_written_down(serve, common):
    with serve() as owner:
        assert owner.spans(common)
        log = owner.folder / "log"
        log.write_text(log.read_text()[:-5] + "\n")
        assert error(owner.post(common)) == (503, "log")


def test_a_line_that_a_crash_tore_stops_neither_a_service_nor_its_restart(serve, common):
    with serve() as owner:
        assert owner.spans(common)
        log = owner.folder / "log"
        whole = log.read_text()
        with pytest.warns(UserWarning, match="an unfinished last line"):
            log.write_text(whole + whole[:5])
            assert owner.spans(common)
            log.write_text(log.read_text()[:-5])
            assert revealed.Revealed(log).used("anybody").requests == 1
    assert log.read_text() == whole


def test_a_withdrawn_document_is_gone_from_the_next_answer(serve, common):
    from flexolmo_jax.tracing.withdraw import withdraw

    with serve(level="ids") as owner:
        assert owner.spans(common)[common]["count"] == 5
        withdraw(owner.folder / "index", ["d1"])
        span = owner.spans(common)[common]
        assert span["count"] == 4 and "d1" not in [p["document"] for p in span["passages"]]
        manifest = owner.folder / "index" / "index.json"
        manifest.write_text(manifest.read_text().replace("clinic", "hospice"))
        assert error(owner.post(common)) == (503, "damaged")


def test_a_damaged_policy_says_nothing(serve, common):
    with serve() as owner:
        policy = owner.folder / "policy.toml"
        policy.write_text("level = 'all'")
        assert error(owner.post(common)) == (503, "damaged")
        assert owner.says(level="counts").spans(common)


def test_questions_are_bounded(serve, common):
    with serve(maximum_characters=100) as owner:
        assert error(owner.post("x" * 101)) == (400, "text")
        assert error(owner.post("x" * (1 << 23))) == (413, None)
        assert error(owner.post("a \ud800 b")) == (400, "invalid_value")
        assert error(owner.post(common, level="snippets")) == (400, "invalid_value")
        without = httpx.post(f"{owner.url}/v1/trace", content='{"text": "a"}')
        assert "Content-Type: application/json" in without.json()["error"]["message"]
        for text in ("", " \n", "\x00", "🙂" * 50):
            assert owner.spans(text) == {}
    with serve(seconds=1) as owner:
        begun = time.monotonic()
        text = (common + ". ") * 400
        assert owner.post(text).status_code in (200, 503) and time.monotonic() - begun < 5


@pytest.mark.parametrize("fields, named", [
    ("", "level"),
    ("level = 'all'", "counts"),
    ("level = 'ids'\nminimum_documents = 0", "minimum_documents"),
    ("level = 'ids'\nminimum_tokens = true", "minimum_tokens"),
    ("level = 'ids'\nminimum_document = 3", "minimum_document"),
    ("level = ids", "policy.toml"),
    ("level = 'ids'\nkeep_texts = 1", "keep_texts"),
])  # fmt: skip
def test_a_wrong_policy_is_refused(refused, clinic, tmp_path, fields, named):
    file = tmp_path / "policy.toml"
    file.write_text(fields)
    assert named in refused("trace", "serve", "--index", clinic, "--policy", file, "--port", 0)


def test_the_example_is_the_default_policy(flexolmo, tmp_path):
    from flexolmo_jax.tracing.service.policy import Policy, read_policy

    code, text, _ = flexolmo("trace", "policy")
    (tmp_path / "policy.toml").write_text(text)
    assert code == 0 and read_policy(tmp_path / "policy.toml") == Policy("counts")
