"""Append-only logs: what was changed, dropped or moved is found."""

import concurrent.futures
import json
import random
import subprocess
import sys
import warnings

import pytest

from flexolmo_jax.storage import hash_chain


@pytest.fixture
def log(tmp_path):
    file = tmp_path / "log.jsonl"
    for n in range(6):
        hash_chain.append(file, [{"asked": f"Frage {n}", "spans": n}])
    return file


def test_records_come_back_in_their_order(log):
    records = list(hash_chain.read(log))
    assert [record["spans"] for record in records] == list(range(6))
    assert [record["number"] for record in records] == list(range(1, 7))
    assert records[0]["before"] == hash_chain.START
    assert [x["digest"] for x in records[:-1]] == [x["before"] for x in records[1:]]


def test_append_returns_the_last_digest(log):
    last = hash_chain.append(log, [{"a": 1}, {"a": "x" * 10_000}])
    assert [record["digest"] for record in hash_chain.read(log)][-1] == last
    assert hash_chain.append(log, [{"a": 2}]) != last  # after a line longer than one read
    assert len(list(hash_chain.read(log))) == 9


def test_only_its_owner_reads_a_log(log):
    assert log.stat().st_mode & 0o077 == 0


def test_every_changed_byte_but_of_the_last_line_is_found(log):
    good = log.read_bytes()
    draw = random.Random(0)
    inner = good[: good[:-1].rfind(b"\n")]
    for _ in range(200):
        at = draw.randrange(len(inner))
        bad = bytearray(good)
        bad[at] ^= 1 << draw.randrange(8)
        log.write_bytes(bytes(bad))
        with pytest.raises(ValueError, match="line"):
            list(hash_chain.read(log))


@pytest.mark.parametrize("change", ["drop", "swap", "cut", "repeat"])
def test_lines_cannot_be_dropped_or_moved(log, change):
    lines = log.read_bytes().splitlines(keepends=True)
    match change:
        case "drop":
            del lines[2]
        case "swap":
            lines[1], lines[2] = lines[2], lines[1]
        case "cut":
            lines[-1] = lines[-1][:-5]
        case "repeat":
            lines.insert(3, lines[2])
    log.write_bytes(b"".join(lines))
    with pytest.raises(ValueError, match="line"):
        list(hash_chain.read(log))


def test_nothing_is_appended_to_what_is_no_log(tmp_path):
    file = tmp_path / "log.jsonl"
    file.write_text("my shopping list")
    with pytest.raises(ValueError, match="last line: expected a line of an append-only log"):
        hash_chain.append(file, [{"a": 1}])
    assert file.read_text() == "my shopping list"


@pytest.mark.parametrize("whole", [0, 1, 6])
def test_a_torn_last_line_is_cut_off_by_the_next_writer(log, whole):
    """Wherever its writer was killed."""
    lines = log.read_bytes().splitlines(keepends=True)
    kept, torn = b"".join(lines[:whole]), lines[whole - 1 if whole == 6 else whole]
    for size in (1, 14, 40, len(torn) - 1):
        for write in (hash_chain.mend, lambda file: hash_chain.append(file, [{"a": 1}])):
            log.write_bytes(kept + torn[:size])
            with pytest.raises(ValueError, match="its writer was killed, or writes it now"):
                list(hash_chain.read(log))
            with pytest.warns(UserWarning, match=f"cut off {size} bytes of an unfinished"):
                write(log)
            assert log.read_bytes().startswith(kept)
            assert len(list(hash_chain.read(log))) == whole + (write is not hash_chain.mend)


def test_nothing_is_cut_off_what_is_no_log(tmp_path):
    file = tmp_path / "notes"
    for text in ("my shopping list", "milk\nbread\neg"):
        file.write_text(text)
        for write in (hash_chain.mend, lambda file: hash_chain.append(file, [{"a": 1}])):
            with pytest.raises(ValueError, match="last line: expected a line of an append-only"):
                write(file)
        assert file.read_text() == text


def test_a_killed_writer_leaves_a_log_that_others_continue(tmp_path):
    file = tmp_path / "log.jsonl"
    code = (
        "import pathlib, sys; from flexolmo_jax.storage import hash_chain\n"
        "while True: hash_chain.append(pathlib.Path(sys.argv[1]), [{'a': 'x' * 50_000}] * 20)"
    )
    for _ in range(3):
        writer = subprocess.Popen([sys.executable, "-c", code, file])
        size = file.stat().st_size if file.exists() else 0
        while not file.exists() or file.stat().st_size <= size:
            assert writer.poll() is None
        writer.kill()
        writer.wait()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it may have been killed between two lines
            hash_chain.append(file, [{"a": "mine"}])
        assert [x["a"] for x in hash_chain.read(file)][-1] == "mine"


def test_a_signature_is_part_of_its_line(log):
    """The chain covers it, and it covers the chain."""
    signed = []

    def sign(line):
        signed.append(dict(line))
        return f"signed {line['number']}"

    last = hash_chain.append(log, [{"a": 1}, {"a": 2}], sign=sign)
    *_, one, two = hash_chain.read(log)
    assert [one["signature"], two["signature"]] == ["signed 7", "signed 8"]
    assert two["before"] == one["digest"] and two["digest"] == last
    for line, given in zip((one, two), signed, strict=True):
        assert {n: x for n, x in line.items() if n not in ("signature", "digest")} == given
    with pytest.raises(ValueError, match="may not have a field 'signature'"):
        hash_chain.append(log, [{"signature": "x"}], sign=sign)


def test_a_record_has_no_field_of_the_chain(tmp_path):
    file = tmp_path / "log.jsonl"
    with pytest.raises(ValueError, match="may not have a field 'before'"):
        hash_chain.append(file, [{"before": "x"}])
    with pytest.raises(ValueError):
        hash_chain.append(file, [{"a": float("nan")}])
    assert not file.exists()


def test_many_threads_append_to_one_chain(log):
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: hash_chain.append(log, [{"n": n}]), range(24)))
    own = [record["n"] for record in hash_chain.read(log) if "n" in record]
    assert sorted(own) == list(range(24))


def test_a_log_is_jsonl_that_others_read(log):
    assert [json.loads(line)["asked"] for line in log.read_text().splitlines()][0] == "Frage 0"
