"""Withdrawal: the text leaves the disk, readers keep what they have open, nothing breaks midway."""

import json
import threading

import numpy as np
import pytest

from flexolmo_jax.tracing import withdraw as module
from flexolmo_jax.tracing.build import build_index
from flexolmo_jax.tracing.index import Index
from flexolmo_jax.tracing.layout import LOCK
from flexolmo_jax.tracing.shard_writer import ShardWriter
from flexolmo_jax.tracing.withdraw import withdraw

SECRET = [10, 11, 10, 11, 11]
DOCUMENTS = [[1, 2, 3], [4, *SECRET], [5, 6], [7, 8, 9], [1, *SECRET, 1]]


def names(folder):
    return sorted(str(f.relative_to(folder)) for f in folder.rglob("*"))


def occurrences(folder, ids=SECRET):
    return Index.open(folder).find(np.array(ids, np.uint32))[0]


@pytest.fixture
def folder(index_numbers):
    return index_numbers(DOCUMENTS, shard_tokens=9)  # documents 0 to 1, 2 to 3, 4


def test_a_withdrawn_text_leaves_the_disk(folder):
    assert withdraw(folder, ["1", "4"]) == (2, 13)
    secret = np.array(SECRET, "<u4").tobytes()
    assert not any(secret in file.read_bytes() for file in folder.rglob("*") if file.is_file())
    assert not any(b'"id": "4"' in f.read_bytes() for f in folder.rglob("records"))
    index = Index.open(folder)
    assert list(index.numbers()) == [0, 2, 3]
    assert index.read(3, 0, 9).tolist() == [7, 8, 9]
    for ask in (lambda: index.document(1), lambda: index.read(4, 0, 3)):
        with pytest.raises(ValueError, match=r"document [14] was withdrawn"):
            ask()


def test_whoever_has_the_index_open_keeps_it(folder):
    before = Index.open(folder)
    withdraw(folder, ["1"])
    asked = np.array(SECRET, np.uint32)
    assert before.find(asked)[0] == 2
    assert before.longest_matches(asked)[0] == 5
    assert before.read(1, 1, 9).tolist() == SECRET
    assert occurrences(folder) == 1


def test_all_documents_of_a_group_are_withdrawn(tmp_path, numbers_tokenizer):
    file = tmp_path / "a.jsonl"
    groups = ("Ada ", "ada", "bob", 17, "017")
    rows = [{"text": f"{n} 9", "group": group} for n, group in enumerate(groups)]
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    build_index([str(file)], numbers_tokenizer, tmp_path / "index")
    assert withdraw(tmp_path / "index", groups=["ADA"]) == (2, 4)
    assert withdraw(tmp_path / "index", groups=["17.0"]) == (2, 4)
    assert list(Index.open(tmp_path / "index").numbers()) == [2]


def test_an_update_does_not_bring_a_withdrawn_document_back(folder, index_numbers):
    withdraw(folder, ["4"])
    index_numbers([*DOCUMENTS, [6, 6]], update=True)
    index = Index.open(folder)
    assert list(index.numbers()) == [0, 1, 2, 3, 5]
    assert index.read(5, 0, 9).tolist() == [6, 6]


def test_everything_can_be_withdrawn(folder):
    assert withdraw(folder, list("01234")).documents == 5
    index = Index.open(folder)
    assert index.num_documents == index.num_tokens == index.counts.sum() == 0
    assert index.longest_matches(np.array(SECRET, np.uint32)).tolist() == [0] * 5
    assert index.find(np.array(SECRET, np.uint32), most=3) == (0, [])


@pytest.mark.parametrize("write", range(5))
def test_a_killed_withdrawal_leaves_an_index_and_can_be_repeated(folder, monkeypatch, write):
    """Killed before each change of index.json, of which there are as many as `write` counts."""
    expected = None
    written, write_index = [], module.write_index

    def write_or_stop(*args):
        if len(written) == write:
            raise KeyboardInterrupt
        written.append(args)
        write_index(*args)

    with monkeypatch.context() as patched:
        patched.setattr(module, "write_index", write_or_stop)
        patched.setattr("flexolmo_jax.tracing.build.write_index", write_or_stop)
        try:
            withdraw(folder, ["1", "4"])
        except KeyboardInterrupt:
            expected = occurrences(folder)
    assert expected == {0: 2, 1: 2, 2: 2, 3: 0}.get(write)
    if expected == 2:
        withdraw(folder, ["1", "4"])
    else:  # they are withdrawn; the next change cleans up
        withdraw(folder, ["0"])
    assert occurrences(folder) == 0
    index = Index.open(folder)
    assert len([path for path in folder.iterdir() if path.is_dir()]) == len(index.shards)
    assert not (folder / LOCK).exists()


def test_a_killed_withdrawal_that_is_repeated_leaves_no_text(folder, monkeypatch):
    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(module.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            withdraw(folder, ["1", "4"])
    with pytest.raises(ValueError, match="or withdrawn before"):
        withdraw(folder, ["1", "4"])
    secret = np.array(SECRET, "<u4").tobytes()
    assert not any(secret in file.read_bytes() for file in folder.rglob("*") if file.is_file())


def test_an_index_can_be_opened_at_any_moment_of_a_withdrawal(folder):
    seen, stop = [], threading.Event()

    def read():
        while not stop.is_set():
            seen.append(occurrences(folder))

    threads = [threading.Thread(target=read) for _ in range(2)]
    failed = []
    hook, threading.excepthook = threading.excepthook, lambda found: failed.append(found.exc_value)
    try:
        for thread in threads:
            thread.start()
        for number in "3", "1", "0", "4", "2":
            withdraw(folder, [number])
        stop.set()
        for thread in threads:
            thread.join()
    finally:
        threading.excepthook = hook
    assert not failed
    assert set(seen) <= {2, 1, 0}
    assert occurrences(folder) == 0


def test_an_unfinished_update_is_discarded(folder, index_numbers, monkeypatch):
    def stop(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(ShardWriter, "close", stop)
        with pytest.raises(KeyboardInterrupt):
            index_numbers([SECRET], update=True)
    withdraw(folder, ["1", "4"])
    secret = np.array(SECRET, "<u4").tobytes()
    assert not any(secret in file.read_bytes() for file in folder.rglob("*") if file.is_file())


def test_a_wrong_request_withdraws_nothing(folder, tmp_path):
    before = {name: (folder / name).read_bytes() for name in names(folder) if "/" in name}

    def refused(match, *given, folder=folder):
        with pytest.raises(ValueError, match=match):
            withdraw(folder, *given)

    refused("no document '9' .*nothing was withdrawn", ["1", "9"])
    refused("no group 'x'", ["1"], ["x"])
    refused("found none", [])
    refused("found an empty one", [], [""])  # which documents of no group have
    refused("found no folder", ["1"], folder=tmp_path / "none")
    refused("found no index.json", ["1"], folder=tmp_path)
    assert {name: (folder / name).read_bytes() for name in names(folder) if "/" in name} == before
    (folder / "00000" / "tokens").write_bytes(b"\0" * 44)
    refused("00000/tokens", ["1"])
