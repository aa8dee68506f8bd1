"""The log of a registry: whatever is changed in it is found, and who may write it is checked."""

import datetime
import json
import os
import random
import shutil

import pytest

from flexolmo_jax.storage import hash_chain
from flexolmo_jax.trust import keys, log, registry_changes
from flexolmo_jax.trust.registry import Registry
from flexolmo_jax.trust.signers import make_signer, utc_now

NEWS, MATH = "ab" * 32, "cd" * 32


@pytest.fixture(scope="module")
def registry_folder(tmp_path_factory):
    """A registry with two coordinators, ann and bob, and an owner, olga, with their keys."""
    folder = tmp_path_factory.mktemp("trust")
    public = {
        name: keys.read_public(keys.make_keys(folder / name))
        for name in ("root", "ann", "bob", "olga")
    }
    root = keys.read_private(folder / "root")
    registry_changes.create(folder / "registry", [public["root"]], 1, root)
    begin, day = utc_now(), datetime.timedelta(days=1)
    for name, role, experts in (
        ("ann", "coordinator", ()),
        ("bob", "coordinator", ()),
        ("olga", "owner", ("news",)),
    ):
        signer = make_signer(
            name, public[name], role, experts, begin - day, begin + day, where="here"
        )
        registry_changes.add_signer(folder / "registry", signer, root)
    return folder


@pytest.fixture
def own(registry_folder, tmp_path):
    """A copy for one test; keys are in it by name."""
    shutil.copytree(registry_folder, tmp_path / "own")
    return tmp_path / "own"


def key(own, name):
    return keys.read_private(own / name)


def filled(own):
    """Six lines by two coordinators."""
    folder, ann, bob = own / "registry", key(own, "ann"), key(own, "bob")
    log.append(folder, ann, log.ADMITTED, expert="news", package=NEWS, report="ef" * 32)
    log.append(folder, ann, log.REJECTED, expert="math", package=MATH, reason="NaN in a row")
    log.append(folder, bob, log.REVOKED, package=NEWS, reason="its text was withdrawn")
    log.append(folder, ann, log.REVOKED, expert="math", reason="of a poisoner")
    log.append(folder, bob, log.REMOVED, expert="news", package=NEWS)
    log.append(folder, bob, log.REINSTATED, package=NEWS, reason="the wrong digest")
    return folder


def test_lines_come_back_with_who_signed_them(own):
    entries = log.read(Registry.open(filled(own)))
    assert [entry.number for entry in entries] == [1, 2, 3, 4, 5, 6]
    assert [entry.signer for entry in entries] == ["ann", "ann", "bob", "ann", "bob", "bob"]
    assert entries[0][3:8] == ("admitted", "news", NEWS, None, "ef" * 32)
    assert {x: e.reason for x, e in log.revocations(entries).items()} == {
        "expert math": "of a poisoner"
    }
    assert [entry.reason for entry in log.rejections(entries).values()] == ["NaN in a row"]


def test_an_empty_registry_has_an_empty_log(own):
    assert log.read(Registry.open(own / "registry")) == ()


def test_none_of_500_changed_logs_is_accepted(own):
    """Bits, lines and fields; with the chain computed again by one who has no key, too."""
    folder = filled(own)
    registry_changes.renew(folder, key(own, "root"))  # names the last line
    registry, file = Registry.open(folder), folder / "log.jsonl"
    good, draw = file.read_bytes(), random.Random(0)
    read = log.read(registry)
    for number in range(500):
        lines = good.splitlines(keepends=True)
        at, other = draw.randrange(6), draw.randrange(6)
        match number % 5:
            case 0:
                bad = bytearray(good)
                bad[draw.randrange(len(bad))] ^= 1 << draw.randrange(8)
                lines = [bytes(bad)]
            case 1:
                lines[at], lines[other] = lines[other], lines[at]
            case 2:
                del lines[at : at + draw.randrange(1, 4)]
            case 3:
                lines.insert(at, lines[other])
            case 4:
                records = [json.loads(line) for line in lines]
                name = draw.choice(sorted(records[at]))
                records[at][name] = draw.choice([records[other][name], None, 7, "x", ["x"], NEWS])
                lines = chained(records)
        bad = b"".join(lines)
        if bad == good:
            continue
        file.write_bytes(bad)
        with pytest.raises(ValueError) as error:
            log.read(registry)
        assert "\n" not in str(error.value)
    file.write_bytes(good)
    assert log.read(registry) == read


def chained(records):
    """Lines whose chain holds, whatever their signatures are worth."""
    before, lines = hash_chain.START, []
    for number, record in enumerate(records, 1):
        line = json.dumps({**record, "number": number, "before": before}).encode()
        before = hash_chain.hashlib.sha256(line).hexdigest()
        lines.append(line + b"\n")
    return lines


def test_a_second_signature_of_a_line_is_refused(own):
    """Of an ECDSA signature (r, s), anybody makes the valid (r, -s)."""
    folder = filled(own)
    file = folder / "log.jsonl"
    *before, last = file.read_text().splitlines(keepends=True)
    record = json.loads(last)
    r, s = record["signature"][:64], int(record["signature"][64:], 16)
    record["signature"] = r + f"{log._ORDER - s:064x}"
    file.write_text("".join(before) + json.dumps(record) + "\n")
    with pytest.raises(ValueError, match="the signature of bob is wrong"):
        log.read(Registry.open(folder))


def test_a_log_belongs_to_its_registry(own, tmp_path):
    """Even if the same coordinator has both."""
    first, second = filled(own), tmp_path / "second"
    root, signer = key(own, "root"), Registry.open(first).signers[0]
    registry_changes.create(second, [keys.public_of(root)], 1, root)
    registry_changes.add_signer(second, signer, root)
    shutil.copy(first / "log.jsonl", second)
    with pytest.raises(ValueError, match="line 1: the signature of ann is wrong"):
        log.read(Registry.open(second))


def test_the_end_cannot_be_cut_off_below_what_a_version_names(own):
    folder = filled(own)
    file = folder / "log.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:4]))
    assert len(log.read(Registry.open(folder))) == 4  # nothing names the other two
    file.write_bytes(b"".join(lines))
    registry_changes.renew(folder, key(own, "root"))
    for kept in (b"".join(lines[:4]), b"", None):
        file.unlink() if kept is None else file.write_bytes(kept)
        with pytest.raises(ValueError, match="expected at least 6 lines, as version 5"):
            log.read(Registry.open(folder))
    log_of_another_history = own / "other"
    shutil.copytree(folder, log_of_another_history)
    for version in (4, 5):
        (log_of_another_history / f"{version}.json").unlink()
    for _ in range(6):
        log.append(log_of_another_history, key(own, "ann"), log.ADMITTED, expert="a", package=NEWS)
    shutil.copy(log_of_another_history / "log.jsonl", file)
    with pytest.raises(ValueError, match="line 6: another line than version 5"):
        log.read(Registry.open(folder))


def test_who_may_write(own):
    folder = filled(own)
    before = (folder / "log.jsonl").read_bytes()
    given = {"expert": "news", "reason": "because"}
    with pytest.raises(ValueError, match="that of an owner, expected that of a coordinator"):
        log.append(folder, key(own, "olga"), log.REVOKED, **given)
    with pytest.raises(ValueError, match="is not in the registry"):
        log.append(folder, key(own, "root"), log.REVOKED, **given)
    registry_changes.revoke_signer(folder, "bob", "his laptop was stolen", key(own, "root"))
    with pytest.raises(ValueError, match="his laptop was stolen"):
        log.append(folder, key(own, "bob"), log.REVOKED, **given)
    assert (folder / "log.jsonl").read_bytes() == before
    assert len(log.read(Registry.open(folder))) == 6  # bob's lines of before are named by a version


def test_lines_that_a_revoked_key_signs_later_are_refused(own):
    """However they are dated."""
    folder = filled(own)
    copy = shutil.copytree(folder, own / "copy")
    registry_changes.revoke_signer(folder, "bob", "his laptop was stolen", key(own, "root"))
    log.append(copy, key(own, "bob"), log.REINSTATED, expert="math", reason="trust me")
    shutil.copy(copy / "log.jsonl", folder)
    with pytest.raises(ValueError, match="line 7: bob's key .* was revoked"):
        log.read(Registry.open(folder))


def test_a_key_counts_while_it_is_valid(own, monkeypatch):
    folder = filled(own)
    late = utc_now() + datetime.timedelta(days=2)
    assert len(log.read(Registry.open(folder, late))) == 6
    monkeypatch.setattr(log, "utc_now", lambda: late)
    with pytest.raises(ValueError, match="not valid since"):
        log.append(folder, key(own, "ann"), log.ADMITTED, expert="a", package=NEWS)
    assert len(log.read(Registry.open(folder))) == 6


@pytest.mark.parametrize(
    "event, given, said",
    [
        ("revoked", {"expert": "news"}, "needs reason"),
        ("revoked", {"reason": "because"}, "the name of an expert, or a package's digest"),
        ("revoked", {"expert": "news", "reason": "two\nlines"}, "on one line of text"),
        ("revoked", {"expert": "news", "reason": " "}, "on one line of text"),
        ("revoked", {"expert": "public", "reason": "because"}, "cannot be an expert's name"),
        ("revoked", {"package": "abc", "reason": "because"}, "expected a sha256 as package"),
        ("revoked", {"expert": "Math", "reason": "again"}, "is revoked since .* of a poisoner"),
        ("reinstated", {"package": NEWS, "reason": "again"}, "what is: expert 'math'"),
        ("admitted", {"expert": "news"}, "needs package"),
        ("promoted", {"expert": "news", "reason": "because"}, "found 'promoted'"),
    ],
)
def test_an_impossible_line_is_not_written(own, event, given, said):
    folder = filled(own)
    before = (folder / "log.jsonl").read_bytes()
    with pytest.raises(ValueError, match=said):
        log.append(folder, key(own, "ann"), event, **given)
    assert (folder / "log.jsonl").read_bytes() == before


def test_what_is_no_file_is_refused_and_a_torn_line_is_cut_off(own):
    folder = filled(own)
    file = folder / "log.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole + whole[:100])
    with pytest.raises(ValueError, match="line 7: .* its writer was killed, or writes it now"):
        log.read(Registry.open(folder))
    with pytest.warns(UserWarning, match="cut off 100 bytes"):
        log.append(folder, key(own, "ann"), log.ADMITTED, expert="a", package=NEWS)
    assert len(log.read(Registry.open(folder))) == 7
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(ValueError, match="a named pipe"):
        log.read(Registry.open(folder))
