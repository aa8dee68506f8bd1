"""What an owner can verify of its own lines, without seeing the others'."""

import json

import pytest

from flexolmo_jax.usage import excerpts
from flexolmo_jax.usage.ledger import replay
from flexolmo_jax.usage.signing import canonical, make_keys, read_private, sign


@pytest.fixture
def excerpt(filled, tmp_path):
    out = tmp_path / "math.jsonl"
    excerpts.extract(filled.file, "math", out)
    return out


def lines_of(file):
    return file.read_bytes().splitlines(keepends=True)


def test_an_excerpt_has_the_owners_lines_and_nothing_of_others(filled, excerpt):
    seen = []
    replay(filled.file, seen.append)
    own = [x for x in seen if "math" in x["mass"]]
    made = excerpts.verify_excerpt(excerpt, filled.key, "math")
    assert [x["mass"] for x in made.lines] == [x["mass"]["math"] for x in own]
    assert [x.get("bits") for x in made.lines] == [x.get("bits", {}).get("math") for x in own]
    assert b"code" not in excerpt.read_bytes() and b"public" not in excerpt.read_bytes()


def test_months_add_up_to_the_statement(filled, excerpt):
    made = excerpts.verify_excerpt(excerpt, filled.key)
    rows = excerpts.months(made)
    for name in ("requests", "tokens", "mass"):
        assert round(sum(row[name] for row in rows), 4) == made.statement[name]


def test_askers_stay_with_the_coordinator(kept, tmp_path):
    kept.add(*[{**x, "asker": "clinic"} for x in kept.records(3)])
    excerpts.extract(kept.file, "math", tmp_path / "out")
    assert b"clinic" in kept.file.read_bytes() and b"clinic" not in (tmp_path / "out").read_bytes()


def test_every_dropped_altered_moved_or_foreign_line_is_found(filled, excerpt, tmp_path):
    lines, bad = lines_of(excerpt), tmp_path / "bad"
    other = tmp_path / "other"
    excerpts.extract(filled.file, "code", other)
    foreign = lines_of(other)[1]
    changed = []
    for number in range(1, len(lines)):
        line = json.loads(lines[number])
        more = canonical({**line, "mass": round(line["mass"] + 0.1, 4)}) + b"\n"
        changed += [
            lines[:number] + lines[number + 1 :],
            [*lines[:number], more, *lines[number + 1 :]],
            [*lines[:number], foreign, *lines[number:]],
        ]
    changed += [[lines[0], *reversed(lines[1:])], lines + lines[-1:], [*lines, foreign]]
    for own in changed:
        bad.write_bytes(b"".join(own))
        with pytest.raises(ValueError, match="dropped, altered, moved or added"):
            excerpts.verify_excerpt(bad, filled.key)


def test_a_statement_is_for_one_owner_and_of_one_key(filled, excerpt, tmp_path):
    with pytest.raises(ValueError, match="expected lines of 'code', found 'math'"):
        excerpts.verify_excerpt(excerpt, filled.key, "code")
    make_keys(tmp_path / "other")
    other = read_private(tmp_path / "other")
    first, *rest = lines_of(excerpt)
    statement = json.loads(first)["statement"]
    forged = {"statement": statement, "signature": sign(other, statement)}
    (tmp_path / "bad").write_bytes(b"".join([canonical(forged) + b"\n", *rest]))
    with pytest.raises(ValueError, match="not signed with this key"):
        excerpts.verify_excerpt(tmp_path / "bad", filled.key)


def test_a_later_excerpt_continues_the_earlier_one(filled, excerpt, tmp_path):
    earlier = excerpts.verify_excerpt(excerpt, filled.key)
    filled.add(*filled.records(8, seed=1))
    later = excerpts.extract(filled.file, "math", tmp_path / "later")
    excerpts.check_follows(tmp_path / "later", later, earlier)
    excerpts.check_contains(filled.file, earlier)
    assert later.lines[: len(earlier.lines)] == earlier.lines
    with pytest.raises(ValueError, match="ends before the earlier one"):
        excerpts.check_follows(excerpt, earlier, later)


def test_a_rewritten_history_is_found_by_whoever_kept_an_excerpt(filled, excerpt, tmp_path):
    """All signatures are the coordinator's own; only the kept excerpt tells."""
    earlier = excerpts.verify_excerpt(excerpt, filled.key)
    lines = filled.file.read_bytes().splitlines(keepends=True)
    filled.file.write_bytes(b"".join(lines[:8]))  # all since then is forgotten
    filled.add(*filled.records(40, seed=2))
    later = excerpts.extract(filled.file, "math", tmp_path / "later")
    with pytest.raises(ValueError, match="history was rewritten"):
        excerpts.check_follows(tmp_path / "later", later, earlier)
    with pytest.raises(ValueError, match="history was rewritten"):
        excerpts.check_contains(filled.file, earlier)
    filled.file.unlink()
    filled.add(*filled.records(60, seed=2))
    newer = excerpts.extract(filled.file, "math", tmp_path / "newer")
    with pytest.raises(ValueError, match="of another ledger"):
        excerpts.check_follows(tmp_path / "newer", newer, earlier)


def test_lines_that_are_not_signed_yet_are_in_no_excerpt(filled, excerpt, tmp_path):
    opened = filled.open()
    opened.append(filled.records(5, seed=3))
    opened.close()
    made = excerpts.extract(filled.file, "math", tmp_path / "again")
    assert made.lines == excerpts.verify_excerpt(excerpt, filled.key).lines
    with pytest.raises(ValueError, match="intact and signed, the 5 after that not yet"):
        excerpts.verify_ledger(filled.file, filled.key)


def test_the_commands_extract_and_verify(filled, flexolmo, refused, tmp_path):
    out, first = tmp_path / "out.jsonl", tmp_path / "first.jsonl"
    extract = ("usage", "extract", filled.file, "--owner", "math", "--out")
    verify = ("--key", filled.public, "--owner", "math")
    assert flexolmo(*extract, first)[0] == 0
    filled.add(*filled.records(4, seed=1))
    code, printed, _ = flexolmo(*extract, out)
    assert code == 0 and "math" in printed
    code, printed, _ = flexolmo("usage", "verify", out, *verify, "--earlier", first)
    assert code == 0 and "verified" in printed
    assert max(map(len, printed.splitlines())) <= 80
    code, printed, _ = flexolmo("usage", "verify", out, *verify, "--json")
    assert json.loads(printed)["owner"] == "math"
    code, printed, _ = flexolmo("usage", "verify", filled.file, "--key", filled.public)
    assert code == 0 and "code" in printed
    assert flexolmo("usage", "verify", filled.file, *verify, "--earlier", out)[0] == 0
    assert "already there" in refused(*extract, out)
    assert "no signed line of 'news'; there are those of code, math, public" in refused(
        "usage", "extract", filled.file, "--owner", "news", "--out", tmp_path / "news"
    )
    assert "swap them" in refused("usage", "verify", first, *verify, "--earlier", out)
    assert "expected a public key" in refused("usage", "verify", out, "--key", filled.secret)
    assert "whole ledger" in refused("usage", "verify", filled.file, *verify)
    out.write_bytes(out.read_bytes().replace(b'"tokens":', b'"tokens": ', 1))
    assert "damaged" in refused("usage", "verify", out, *verify)
    assert "No such file" in refused("usage", "verify", tmp_path / "none", *verify)
    assert "append-only log" in refused("usage", "verify", filled.public, *verify[:2])


def test_the_command_makes_keys_once(flexolmo, refused, tmp_path):
    file = tmp_path / "c.key"
    assert flexolmo("usage", "keygen", file)[0] == 0
    assert b"PUBLIC KEY" in (tmp_path / "c.key.pub").read_bytes()
    assert "already there" in refused("usage", "keygen", file)
    assert "no such folder" in refused("usage", "keygen", tmp_path / "none" / "key")
