"""Building an index: what it keeps of documents, resuming, adding, and what is refused."""

import json
import os
import signal
import subprocess
import sys
import time

import pyarrow
import pyarrow.parquet
import pytest

from flexolmo_jax.commands.main import main
from flexolmo_jax.tracing import build
from flexolmo_jax.tracing.build import build_index
from flexolmo_jax.tracing.index import Index
from flexolmo_jax.tracing.layout import INDEX, TOKENIZER
from flexolmo_jax.tracing.shard_writer import ShardWriter

ROW = {"text": "1 2 3", "id": "d-7", "source": "a book", "licence": "CC0-1.0", "group": "Shelf 1"}


def contents(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def stop_after(monkeypatch, shards):
    """Lets the build end like one that is killed: before the shard after `shards` is complete."""
    close, closed = ShardWriter.close, []

    def close_or_stop(self):
        if len(closed) == shards:
            raise KeyboardInterrupt
        closed.append(self.folder.name)
        return close(self)

    monkeypatch.setattr(ShardWriter, "close", close_or_stop)
    return closed


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_what_a_row_says_of_its_document_is_kept(kind, tmp_path, numbers_tokenizer):
    rows = [ROW, {**dict.fromkeys(ROW, None), "text": "4"}]
    file = tmp_path / "texts" / f"some.{kind}"
    file.parent.mkdir()
    if kind == "jsonl":
        file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    elif kind == "csv":
        lines = [",".join(ROW), *(",".join(x or "" for x in row.values()) for row in rows)]
        file.write_text("\n".join(lines))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    build_index([str(file.parent)], numbers_tokenizer, tmp_path / "index")
    first, second = map(Index.open(tmp_path / "index").document, (0, 1))
    assert first[:4] == ("d-7", "shelf 1", "a book", "CC0-1.0") and first.tokens == 3
    line = {"jsonl": 2, "csv": 3, "parquet": 2}[kind]
    assert second[:4] == (f"some.{kind}:{line}", "", "", "")
    assert second.where == f"{file}:{line}"


def test_fields_have_the_names_that_data_sets_use(tmp_path, numbers_tokenizer):
    file = tmp_path / "some.jsonl"
    file.write_text('{"text": "1", "id": 17, "url": "https://a.b/c", "license": "MIT"}\n')
    build_index([str(file)], numbers_tokenizer, tmp_path / "index", "Ada")
    index = Index.open(tmp_path / "index")
    assert index.owner == "Ada"
    assert index.document(0)[:4] == ("17", "", "https://a.b/c", "MIT")


def test_a_text_is_indexed_once_whatever_source_it_is_in(
    index_numbers, tmp_path, numbers_tokenizer
):
    index_numbers([[1, 2], [3], [1, 2]], "a")
    index_numbers([[3], [4]], "b")
    sources = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    assert build_index(sources, numbers_tokenizer, tmp_path / "both") == (3, 4, 1)


@pytest.mark.parametrize("after", [0, 1, 3])
def test_an_interrupted_build_keeps_its_shards_and_ends_the_same(
    after, index_numbers, tmp_path, numbers_tokenizer, monkeypatch
):
    documents = [[n, 1, 2, n] for n in range(10)]
    whole = contents(index_numbers(documents, "whole", shard_tokens=10, owner="me"))
    source = str(tmp_path / "whole.jsonl")

    def run():
        return build_index([source], numbers_tokenizer, tmp_path / "part", "me", shard_tokens=10)

    with monkeypatch.context() as patched:
        stop_after(patched, after)
        with pytest.raises(KeyboardInterrupt):
            run()
    with pytest.raises(ValueError, match="half-built.*again with the same arguments"):
        Index.open(tmp_path / "part")
    closed = stop_after(monkeypatch, 99)
    assert run() == (10, 40, 5)
    assert len(closed) == 5 - after
    assert contents(tmp_path / "part") == whole


def test_a_killed_build_continues(index_numbers, tmp_path, numbers_tokenizer):
    documents = [[n % 12, n // 12 % 12, n // 144] for n in range(1200)]
    whole = contents(index_numbers(documents, "whole", shard_tokens=40, owner="me"))
    program = "import sys; from flexolmo_jax.tracing.build import build_index as b; "
    program += "from pathlib import Path; b([sys.argv[1]], Path(sys.argv[2]), Path(sys.argv[3]), "
    program += "'me', shard_tokens=40)"
    words = [sys.executable, "-c", program, tmp_path / "whole.jsonl", numbers_tokenizer]
    folder = tmp_path / "part"
    process = subprocess.Popen([*words, folder], stderr=subprocess.DEVNULL)
    while not (folder / "00002").exists():
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with pytest.raises(ValueError, match="half-built"):
        Index.open(folder)
    inode = os.stat(folder / "00000" / "tokens").st_ino
    source = [str(tmp_path / "whole.jsonl")]
    build_index(source, numbers_tokenizer, folder, "me", shard_tokens=40)
    assert contents(folder) == whole
    assert os.stat(folder / "00000" / "tokens").st_ino == inode


@pytest.mark.parametrize("name", [INDEX, TOKENIZER])
def test_a_file_that_a_killed_process_was_writing_is_removed(
    index_numbers, tmp_path, monkeypatch, name
):
    with monkeypatch.context() as patched:
        stop_after(patched, 1)
        with pytest.raises(KeyboardInterrupt):
            index_numbers([[1, 2], [3]], shard_tokens=2)
    folder = tmp_path / "index"
    (folder / f".{name}.{'0' * 32}.partial").write_text("half")
    index_numbers([[1, 2], [3]], shard_tokens=2)
    assert Index.open(folder).num_documents == 2
    assert not list(folder.glob(".*"))


def test_an_unfinished_build_is_not_continued_with_other_documents(
    index_numbers, tmp_path, monkeypatch
):
    with monkeypatch.context() as patched:
        stop_after(patched, 1)
        with pytest.raises(KeyboardInterrupt):
            index_numbers([[1, 2], [3, 4]], shard_tokens=3)
    for documents, shard_tokens in (([[1, 2], [3, 5]], 3), ([[1, 2], [3, 4]], 4)):
        with pytest.raises(ValueError, match="an unfinished index of other documents"):
            index_numbers(documents, shard_tokens=shard_tokens)


def test_an_update_adds_what_is_new(index_numbers):
    folder = index_numbers([[1, 2], [3]])
    before = contents(folder / "00000")
    index_numbers([[1, 2], [4, 5], [3]], update=True)
    assert contents(folder / "00000") == before
    index = Index.open(folder)
    assert [index.read(n, 0, 9).tolist() for n in index.numbers()] == [[1, 2], [3], [4, 5]]
    sealed = (folder / INDEX).read_bytes()
    index_numbers([[1, 2], [3]], update=True)
    assert (folder / INDEX).read_bytes() == sealed


def test_an_interrupted_update_leaves_the_index_usable_and_continues(index_numbers, monkeypatch):
    folder = index_numbers([[1, 2], [3]])
    with monkeypatch.context() as patched:
        stop_after(patched, 1)
        with pytest.raises(KeyboardInterrupt):
            index_numbers([[4, 5], [6], [7]], update=True, shard_tokens=2)
    assert Index.open(folder).num_documents == 2
    closed = stop_after(monkeypatch, 99)
    index_numbers([[4, 5], [6], [7]], update=True, shard_tokens=2)
    assert len(closed) == 2
    assert Index.open(folder).num_documents == 5


def test_an_unfinished_update_gives_way_to_one_of_other_documents(index_numbers, monkeypatch):
    folder = index_numbers([[1, 2], [3]])
    with monkeypatch.context() as patched:
        stop_after(patched, 1)
        with pytest.raises(KeyboardInterrupt):
            index_numbers([[4, 5], [6], [7]], update=True, shard_tokens=2)
    index_numbers([[8, 9]], update=True)
    index = Index.open(folder)
    assert [index.read(n, 0, 9).tolist() for n in index.numbers()] == [[1, 2], [3], [8, 9]]
    assert len([path for path in folder.iterdir() if path.is_dir()]) == 2


def test_an_unfinished_build_that_is_damaged_is_made_again(index_numbers, tmp_path, monkeypatch):
    documents = [[1, 2], [3, 4], [5, 6]]
    with monkeypatch.context() as patched:
        stop_after(patched, 2)
        with pytest.raises(KeyboardInterrupt):
            index_numbers(documents, "part", shard_tokens=3, owner="me")
    (tmp_path / "part" / "00001" / "order").write_bytes(b"")
    (tmp_path / "part" / TOKENIZER).write_text("")
    closed = stop_after(monkeypatch, 99)
    index_numbers(documents, "part", shard_tokens=3, owner="me")
    assert len(closed) == 3
    index = Index.open(tmp_path / "part")
    assert [index.read(n, 0, 9).tolist() for n in index.numbers()] == documents


def test_nothing_is_added_to_a_damaged_index(index_numbers):
    folder = index_numbers([[1, 2]])
    (folder / "00000" / "order").write_bytes(bytes(8))
    with pytest.raises(ValueError, match="00000/order: not the file that was indexed"):
        index_numbers([[3, 4]], update=True)


def test_only_its_owner_may_read_an_index(index_numbers):
    assert index_numbers([[1, 2]]).stat().st_mode & 0o777 == 0o700


def test_what_does_not_fit_an_index_is_refused(index_numbers, tmp_path, numbers_tokenizer):
    folder = index_numbers([[1, 2]], owner="me")
    before = contents(folder)
    source = [str(tmp_path / "index.jsonl")]

    def refused(match, tokenizer=numbers_tokenizer, out=folder, **options):
        with pytest.raises(ValueError, match=match):
            build_index(source, tokenizer, out, **options)

    refused("already an index; add documents to it with --update")
    refused("the index of 'me', not of 'you'", owner="you", update=True)
    refused("there is no index to update", out=tmp_path / "new", update=True)
    refused("expected 1 to", shard_tokens=0)
    refused("expected 1 to", shard_tokens=2**31)
    other = tmp_path / "other.json"
    other.write_text(numbers_tokenizer.read_text().replace('"11"', '"x"'))
    refused("made with another tokenizer", tokenizer=other, update=True)
    refused("cannot read the tokenizer", tokenizer=tmp_path / "none.json", out=tmp_path / "new")
    other.write_text("{}")
    refused("not a tokenizer.json", tokenizer=other, out=tmp_path / "new")
    refused("already there", out=tmp_path)
    source = [str(tmp_path / "none.jsonl")]
    refused("none.jsonl", out=tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert contents(folder) == before


def test_a_document_longer_than_a_shard_may_be_is_refused(index_numbers, monkeypatch):
    monkeypatch.setattr(build, "MOST_TOKENS", 4)
    with pytest.raises(ValueError, match="index.jsonl:2: expected a document of fewer than 4"):
        index_numbers([[1], [1, 2, 3, 4, 5]], shard_tokens=3)


def test_only_one_process_changes_an_index_at_a_time(index_numbers, monkeypatch):
    close = ShardWriter.close

    def close_while_another_begins(self):
        with pytest.raises(ValueError, match="is changing this index"):
            index_numbers([[1]])
        return close(self)

    monkeypatch.setattr(ShardWriter, "close", close_while_another_begins)
    assert Index.open(index_numbers([[1]])).num_documents == 1


def test_the_commands_index_and_withdraw(tmp_path, numbers_tokenizer, capsys):
    model = tmp_path / "merged"
    (tmp_path / "anchor").mkdir()
    model.mkdir()
    (model / "manifest.json").write_text('{"anchor": {"path": "../anchor"}}')
    words = ["trace", "index", "--data", str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "out")]
    words += ["--tokenizer", str(model), "--owner", "Ada"]
    (tmp_path / "a.jsonl").write_text('{"text": "1 2"}\n{"text": "3 4 5"}\n')
    assert main(words) == 2
    assert "expected a tokenizer.json there" in capsys.readouterr().err
    (tmp_path / "anchor" / TOKENIZER).write_text(numbers_tokenizer.read_text())
    assert main([*words[:-1], "a/b c"]) == 2  # no expert can have this name
    assert "--owner: 'a/b c' cannot be" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(words) == 0
    out, err = capsys.readouterr()
    assert "indexed 2 documents of 5 tokens" in " ".join(out.split())
    assert "tokens a second" in err
    assert main([*words, "--update", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"documents": 0, "tokens": 0, "shards": 1}
    withdraw = ["trace", "withdraw", str(tmp_path / "out"), "--document"]
    assert main([*withdraw, "a.jsonl:2"]) == 0
    assert "withdrew 1 document of 3 tokens" in " ".join(capsys.readouterr().out.split())
    assert main([*withdraw, "a.jsonl:2"]) == 2
    assert "nothing was withdrawn" in capsys.readouterr().err
