"""An index that is damaged, or of somebody else, is refused in one line, and never answers."""

import hashlib
import json
import os
import random
import shutil

import pytest

from flexolmo_jax.storage.files import canonical_digest
from flexolmo_jax.tracing.index import Index
from flexolmo_jax.tracing.layout import DTYPES, INDEX, TOKENIZER

DOCUMENTS = [[1, 2, 3, 4], [2, 3, 4, 5, 6], [7, 7, 7], [1], [8, 9, 10, 11, 2, 3]]


@pytest.fixture
def intact(index_numbers):
    """An index of two shards, and another one of the same tokenizer and the same sizes."""
    foreign = index_numbers(
        [[d + 1 for d in ids] for ids in DOCUMENTS[:4]] + [[0, 1, 2, 3, 4, 5]], "b"
    )
    return index_numbers(DOCUMENTS, "a", shard_tokens=15, owner="a"), foreign


def refused(folder):
    with pytest.raises(ValueError) as caught:
        Index.open(folder)
    message = str(caught.value)
    assert message.startswith(str(folder)) and "\n" not in message and len(message) < 400
    return message


def sealed(folder, change):
    """Changes `index.json` as somebody would who knows how it is sealed."""
    index = json.loads((folder / INDEX).read_text())
    change(index)
    del index["digest"]
    index["digest"] = canonical_digest(index)
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")


def damage(data, others, random):
    """What becomes of a file: other bytes, or the name of another way to spoil it."""
    kind = random.choice(["bit", "bits", "cut", "longer", "zeros", "swap", "gone", "link", "extra"])
    changed = bytearray(data)
    if kind in ("bit", "bits"):
        for place in random.sample(range(len(data)), 1 if kind == "bit" else min(9, len(data))):
            changed[place] ^= 1 << random.randrange(8)
    elif kind == "cut":
        del changed[random.randrange(len(data)) :]
    elif kind == "longer":
        changed += random.choice([b"\0", b"\n", data[-8:]])
    elif kind == "zeros":
        start = random.randrange(len(data))
        changed[start:] = b"\0" * (len(data) - start)
    elif kind == "swap":
        changed = random.choice(others)
    else:
        return kind
    return bytes(changed)


def test_a_thousand_damaged_and_foreign_indexes_are_refused(intact):
    folder, foreign = intact
    files = {file: file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}
    others = [
        *files.values(),
        *(file.read_bytes() for file in foreign.rglob("*") if file.is_file()),
    ]
    done = 0
    for seed in range(1100):
        chance = random.Random(seed)
        file = chance.choice(list(files))
        changed = damage(files[file], others, chance)
        if changed == files[file]:  # swapped with its like
            continue
        done += 1
        place = file if changed != "extra" else file.with_name(f"{file.name}.more")
        place.unlink(missing_ok=True)
        if changed == "link":
            place.symlink_to(foreign / INDEX)
        elif changed != "gone":
            place.write_bytes(files[file] if changed == "extra" else changed)
        refused(folder)
        place.unlink(missing_ok=True)
        file.write_bytes(files[file])
    assert done >= 1000
    assert Index.open(folder).num_documents == len(DOCUMENTS)


@pytest.mark.parametrize("kind", sorted(DTYPES))
def test_a_file_of_another_index_is_refused(intact, kind):
    folder, foreign = intact
    shutil.copyfile(foreign / "00000" / kind, folder / "00001" / kind)
    assert f"00001/{kind}: " in refused(folder)


def test_the_index_of_another_tokenizer_is_refused(intact):
    folder, _ = intact
    text = (
        (folder / TOKENIZER).read_text().replace('"11": 11', '"x": 11').replace('"11":11', '"x":11')
    )
    (folder / TOKENIZER).write_text(text)
    assert "tokenizer.json" in refused(folder)
    digest = hashlib.sha256(text.encode()).hexdigest()
    entry = {"bytes": len(text.encode()), "sha256": digest}
    sealed(folder, lambda index: index["files"].update({TOKENIZER: entry}))
    assert "another tokenizer" in refused(folder)


WRONG = {
    "no owner": lambda index: index.pop("owner"),
    "an owner that is no name": lambda index: index.update(owner=7),
    "a shard twice": lambda index: index.update(shards=["00000", "00000"]),
    "a shard outside": lambda index: index.update(shards=["../b/00000", "00001"]),
    "a shard less": lambda index: index.update(shards=["00000"]),
    "another order of shards and no files": lambda index: index.update(files={}),
    "a file outside": lambda index: index["files"].update({"../b/index.json": {}}),
    "no size": lambda index: index["files"]["00000/order"].pop("bytes"),
    "another format": lambda index: index.update(format=2),
    "another vocabulary": lambda index: index.update(vocabulary_size=13),
    "no list": lambda index: index.update(unused="00000"),
    "a shard that is not used": lambda index: index.update(unused=["00001"]),
    "an odd build": lambda index: index.update(building={"of": 1}),
}


@pytest.mark.parametrize("what", WRONG)
def test_an_index_json_that_says_nonsense_is_refused(intact, what):
    sealed(intact[0], WRONG[what])
    refused(intact[0])


@pytest.mark.parametrize("kind", ["tokens", "order", "starts", "lines", "counts", "digests"])
def test_files_that_do_not_belong_together_are_refused(intact, kind):
    """Even if index.json lists them, an array of another length is never read."""
    folder, _ = intact
    data = (folder / "00000" / kind).read_bytes()
    for changed in (data[:-1], data[: -DTYPES[kind].itemsize], b"", data * 2):
        (folder / "00000" / kind).write_bytes(changed)
        digest = hashlib.sha256(changed).hexdigest()
        entry = {"bytes": len(changed), "sha256": digest}
        sealed(folder, lambda index, e=entry: index["files"].update({f"00000/{kind}": e}))
        refused(folder)


def test_a_pipe_or_a_link_among_the_files_is_refused(intact, tmp_path):
    folder, foreign = intact
    os.mkfifo(folder / "pipe")
    assert "a named pipe" in refused(folder)
    (folder / "pipe").unlink()
    (folder / "00001").rename(tmp_path / "elsewhere")
    (folder / "00001").symlink_to(tmp_path / "elsewhere")
    assert "a link" in refused(folder)
    (folder / INDEX).unlink()
    (folder / INDEX).symlink_to(foreign / INDEX)
    assert "a link" in refused(folder)


def test_what_is_no_index_is_refused(tmp_path):
    assert "found no folder" in refused(tmp_path / "nothing")
    assert "found no index.json" in refused(tmp_path)
    (tmp_path / INDEX).write_text("[1, 2]")
    assert "no description of an index" in refused(tmp_path)
    (tmp_path / INDEX).write_text("[" * 100_000)
    assert "no description of an index" in refused(tmp_path)
