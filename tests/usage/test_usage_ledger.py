"""A usage ledger: what was altered is found, and what a crash leaves can be continued."""

import json
import os
import random
import stat

import pytest

from flexolmo_jax.storage import hash_chain
from flexolmo_jax.usage import entries, excerpts, ledger, signing

OWNERS = ("public", "math", "code")


def mutated(data: bytes, draw: random.Random) -> bytes:
    """With one flipped bit, or a part cut, doubled, moved, or replaced."""
    while True:
        made = bytearray(data)
        at = draw.randrange(len(data))
        lines = data.splitlines(keepends=True)
        match draw.choice(["bit", "cut", "insert", "drop", "swap", "double", "digit"]):
            case "bit":
                made[at] ^= 1 << draw.randrange(8)
            case "cut":
                del made[at : at + draw.randint(1, 40)]
            case "insert":
                made[at:at] = draw.choice([b" ", b"\n", b"0", b"\x00", b"{}\n"])
            case "drop":
                del lines[draw.randrange(len(lines) - 1)]
                made = bytearray(b"".join(lines))
            case "swap":
                a, b = draw.sample(range(len(lines)), 2)
                lines[a], lines[b] = lines[b], lines[a]
                made = bytearray(b"".join(lines))
            case "double":
                one = draw.randrange(len(lines))
                made = bytearray(b"".join(lines[: one + 1] + lines[one:]))
            case "digit":
                places = [i for i, x in enumerate(data) if chr(x).isdigit()]
                made[draw.choice(places)] = ord(str(draw.randrange(10)))
        if made != data:
            return bytes(made)


def test_none_of_1000_damaged_ledgers_and_excerpts_is_accepted(filled, tmp_path):
    excerpt = tmp_path / "math.jsonl"
    excerpts.extract(filled.file, "math", excerpt)
    draw, key, bad = random.Random(0), filled.key, tmp_path / "bad"
    checks = {filled.file: excerpts.verify_ledger, excerpt: excerpts.verify_excerpt}
    for file, check in checks.items():
        check(file, key)
        for _ in range(500):
            bad.write_bytes(mutated(file.read_bytes(), draw))
            with pytest.raises(ValueError, match=r"bad"):
                check(bad, key)


def test_totals_are_those_of_the_lines(filled, tmp_path):
    records = filled.records(24)
    contents = excerpts.verify_ledger(filled.file, filled.key)
    assert contents.unsigned == 0 and set(contents.states) == set(OWNERS)
    for owner in OWNERS:
        uses = [x for x in records if x["kind"] == "use" and owner in x["mass"]]
        state = contents.states[owner]
        assert state.lines == sum(owner in x["mass"] for x in records)
        assert state.requests == len(uses) and state.tokens == sum(x["tokens"] for x in uses)
        assert abs(state.mass - sum(x["mass"][owner] for x in uses)) < 1e-6
        excerpt = excerpts.extract(filled.file, owner, tmp_path / owner)
        assert ledger.State(*(excerpt.statement[n] for n in ledger.State._fields)) == state


def test_totals_that_a_checkpoint_invents_are_refused(kept):
    """The coordinator's own key signs them, and an auditor still finds out."""
    opened = kept.open()
    opened.append(kept.records(3))
    state = opened.contents.states["code"]
    opened.contents.states["code"] = state._replace(mass=state.mass + 1)
    opened.checkpoint()
    opened.close()
    with pytest.raises(ValueError, match="other totals than the lines before it"):
        excerpts.verify_ledger(kept.file, kept.key)


def test_what_a_checkpoint_says_is_believed_only_if_the_own_key_signed_it(filled):
    """Nobody without the key can make the coordinator continue from other totals."""
    *lines, last = filled.file.read_bytes().splitlines(keepends=True)
    record = json.loads(last)
    record["owners"]["math"]["tokens"] += 1
    filled.file.write_bytes(b"".join([*lines, json.dumps(record).encode() + b"\n"]))
    with pytest.raises(ValueError, match=r"a signature is wrong \(math\)"):
        filled.open()
    del record["owners"]["math"]  # and its signature
    filled.file.write_bytes(b"".join([*lines, json.dumps(record).encode() + b"\n"]))
    with pytest.raises(ValueError, match="a checkpoint of other owners"):
        filled.open()


def test_no_line_says_when_within_the_hour_or_what(filled):
    lines = [json.loads(x) for x in filled.file.read_text().splitlines()]
    uses = [x for x in lines if x["kind"] in ("use", "sample")]
    assert len(uses) == 24 and all(x["time"].endswith(":00+00:00") for x in uses)
    assert {x for use in uses for x in use} == {
        "number", "time", "before", "kind", "model", "prompt_tokens", "tokens", "mass", "bits",
    }  # fmt: skip


@pytest.mark.parametrize("cut", [1, 40, 10_000])
def test_what_a_crash_left_of_a_line_is_cut_off_and_the_ledger_continued(kept, cut):
    first = kept.open()
    first.append(kept.records(4))
    first.close()  # killed before it signed
    whole = kept.file.read_bytes()
    start = whole[:-1].rfind(b"\n") + 1
    left = whole[: max(start + 1, len(whole) - cut)]
    kept.file.write_bytes(left)
    with pytest.warns(UserWarning, match="unfinished last line"):
        kept.add(*kept.records(2, seed=1))
    contents = excerpts.verify_ledger(kept.file, kept.key)
    assert contents.lines == 1 + 3 + 1 + 2 + 1  # the beginning, three uses, and the second opening


def test_a_full_disk_writes_nothing_and_changes_nothing(kept, monkeypatch):
    opened = kept.open()
    opened.append(kept.records(2))
    before, contents = kept.file.read_bytes(), opened.contents
    known = (contents.head, contents.lines, dict(contents.states))
    write, calls = os.write, []

    def full(descriptor, data):
        if len(data) < 200:
            return write(descriptor, data)
        calls.append(data)
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        return write(descriptor, bytes(data)[:100])

    with monkeypatch.context() as patch:
        patch.setattr(hash_chain.os, "write", full)
        with pytest.raises(OSError, match="No space"):
            opened.append(kept.records(2, seed=1))
    assert kept.file.read_bytes() == before
    assert (contents.head, contents.lines, contents.states) == known
    opened.append(kept.records(2, seed=1))
    opened.checkpoint()
    opened.close()
    excerpts.verify_ledger(kept.file, kept.key)


def test_one_process_writes_at_a_time(kept):
    opened = kept.open()
    with pytest.raises(ValueError, match=r"is writing usage\.jsonl; give each its own"):
        kept.open()
    opened.close()
    kept.open().close()


def test_another_key_is_refused_and_a_key_is_private(filled, tmp_path):
    public = signing.make_keys(tmp_path / "other")
    assert stat.S_IMODE((tmp_path / "other").stat().st_mode) == 0o600
    with pytest.raises(ValueError, match="signed with another key"):
        ledger.Ledger(filled.file, signing.read_private(tmp_path / "other"))
    with pytest.raises(ValueError, match="signed with another key"):
        excerpts.verify_ledger(filled.file, signing.read_public(public))
    filled.secret.chmod(0o640)
    with pytest.raises(ValueError, match="chmod 600"):
        filled.open()


@pytest.mark.parametrize("text", ["my shopping list", "a\nb\n", '{"number": 1}\n', ""])
def test_no_other_file_becomes_a_ledger(kept, text):
    kept.file.write_text(text)
    if text:
        with pytest.raises(ValueError, match=r"usage ledger|append-only log"):
            kept.open()
        assert kept.file.read_text() == text
    else:
        kept.add(*kept.records(1))


@pytest.mark.parametrize(
    "wrong",
    [
        {"tokens": 0}, {"tokens": True}, {"mass": {}}, {"mass": {"a": 0.0}}, {"mass": {"a": 1}},
        {"prompt": "text"}, {"asker": 3}, {"kind": "checkpoint"}, {"mass": {"a": float("nan")}},
        {"mass": {"a": 1.5, "b": 0.6}},
    ],
)  # fmt: skip
def test_an_impossible_line_is_not_written(kept, wrong):
    opened = kept.open()
    before = kept.file.read_bytes()
    with pytest.raises(ValueError, match="usage"):
        opened.append([{**entries.use("m", 1, 2, {"a": 1.5}), **wrong}])
    opened.close()
    assert kept.file.read_bytes() == before
