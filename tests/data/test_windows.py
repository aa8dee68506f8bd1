"""Documents to windows to batches; tokenizers."""

import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from flexolmo_jax.config import DataConfig
from flexolmo_jax.data.batches import Batch, stacked
from flexolmo_jax.data.order import batches, window_numbers
from flexolmo_jax.data.sources import Document, is_heldout, read_documents
from flexolmo_jax.data.tokenizer import Tokenizer
from flexolmo_jax.data.units import prepare_units
from flexolmo_jax.data.window_store import prepare
from flexolmo_jax.data.windows import tokenized, windows
from flexolmo_jax.evaluation.bits_per_byte import heldout_documents

SEPARATOR = 0


def documents_of(lengths):
    """Each opened by the separator; no other two tokens are the same."""
    fresh = itertools.count(1)
    return [[SEPARATOR, *itertools.islice(fresh, n - 1)] for n in lengths]


def cut(documents, length):
    return list(windows(iter(documents), length, SEPARATOR))


@pytest.mark.parametrize("lengths", [[5], [9], [8], [3, 4, 2, 17], [1, 1, 1], [40], [2] * 20])
def test_every_token_is_predicted_exactly_once_and_only_the_last_window_is_padded(lengths):
    documents = documents_of(lengths)
    made = cut(documents, 8)
    stream = [*itertools.chain(*documents), SEPARATOR]
    predicted = [t for w in made for t, s in zip(w.tokens[1:], w.segments[1:], strict=True) if s]
    assert predicted == stream[1:]
    assert all((w.segments > 0).all() for w in made[:-1])
    assert all(w.tokens.shape == w.segments.shape == (9,) for w in made)
    assert len(made) == -(-(len(stream) - 1) // 8)


def test_a_window_starts_with_the_token_the_one_before_ended_with():
    made = cut(documents_of([30, 11]), 8)
    for before, after in itertools.pairwise(made):
        assert before.tokens[-1] == after.tokens[0]


def test_segments_number_the_documents_of_a_window_from_1():
    made = cut(documents_of([3, 4, 20]), 8)
    assert made[0].segments.tolist() == [1, 1, 1, 2, 2, 2, 2, 3, 3]
    assert made[1].segments.tolist() == [1] * 9
    last = made[-1]
    starts = (last.tokens == SEPARATOR) & (last.segments > 0)
    assert last.segments[starts].tolist() == [2]  # the stream is closed by a separator of its own


def test_nothing_in_nothing_out():
    assert cut([], 8) == []


def test_a_batch_reads_s_tokens_and_predicts_the_next_ones_but_no_padding():
    made = cut(documents_of([3, 4, 6]), 8)
    batch = next(stacked(iter(made), 4))
    assert batch.tokens.shape == (4, 8)
    for row, window in enumerate(made):
        np.testing.assert_array_equal(batch.tokens[row], window.tokens[:-1])
        np.testing.assert_array_equal(batch.targets[row], window.tokens[1:])
        np.testing.assert_array_equal(batch.segments[row], window.segments[:-1])
        np.testing.assert_array_equal(batch.weights[row], window.segments[1:] > 0)
    assert float(batch.weights.sum()) == 13
    assert not batch.weights[len(made) :].any()


@pytest.fixture(scope="module")
def own(world):
    """Windows on disk of an owner of the world, and what they were made from."""
    tokenizer = Tokenizer.load(world.anchor / "tokenizer.json")
    data = world.config("alone").data
    source, _ = prepare(str(world.texts["math"]), data, tokenizer, world.run("math") / "data")
    return source, tokenizer, data


def take(source, count, seed=0, start=0):
    return [
        jax.tree.map(np.asarray, b) for b in itertools.islice(batches(source, seed, start), count)
    ]


def assert_same(some, other):
    jax.tree.map(np.testing.assert_array_equal, some, other)


def test_the_windows_on_disk_are_those_of_the_training_documents(own, world):
    source, tokenizer, data = own
    documents = list(read_documents(str(world.texts["math"])))
    for split, side in (("train", False), ("heldout", True)):
        chosen = [d for d in documents if is_heldout(d, data.heldout) == side]
        expected = list(windows(tokenized(chosen, tokenizer), data.length, tokenizer.separator))
        stored = source.as_data_source(split)
        assert len(stored) == len(expected) > 0
        for index, window in enumerate(expected):
            np.testing.assert_array_equal(stored[index]["tokens"], window.tokens)
            np.testing.assert_array_equal(stored[index]["segments"], window.segments)


def test_no_held_out_text_reaches_a_batch(own):
    source, tokenizer, data = own
    epoch = -(-len(source.as_data_source("train")) // data.batch_size)
    trained = {row.tobytes() for b in take(source, epoch) for row in b.tokens}
    heldout = {w.tokens[:-1].tobytes() for w in source.windows(heldout=True)}
    assert heldout and not trained & heldout


def test_batch_i_is_a_function_of_seed_and_i_alone(own):
    source, *_ = own
    straight = take(source, 12)
    assert_same(take(source, 5, start=7), straight[7:])
    assert_same(take(source, 12), straight)


def test_another_seed_is_another_order(own):
    source, *_ = own
    some, other = take(source, 4, seed=0), take(source, 4, seed=1)
    assert not np.array_equal(some[0].tokens, other[0].tokens)


def epochs(source, seed, count):
    """The windows of the first epochs of a seed, each as the rows of its batches, in order."""
    windows = len(source.as_data_source("train"))
    batches_needed = -(-count * windows // source.data.batch_size)
    rows = [row.tobytes() for b in take(source, batches_needed, seed) for row in b.tokens]
    return [rows[n * windows : (n + 1) * windows] for n in range(count)]


def test_no_two_epochs_of_neighbouring_seeds_have_the_same_order(own):
    source, *_ = own
    orders = [epoch for seed in range(4) for epoch in epochs(source, seed, 4)]
    assert len({tuple(order) for order in orders}) == len(orders)
    assert all(sorted(order) == sorted(orders[0]) for order in orders)
    # Not the same order from another place on, either.
    starts = {tuple(order[:3]) for order in orders}
    assert len(starts) == len(orders)


def test_the_windows_of_a_step_are_those_that_its_batch_holds(own, world):
    _, tokenizer, data = own
    data = dataclasses.replace(data, batch_size=5)
    source, _ = prepare(str(world.texts["math"]), data, tokenizer, world.run("math") / "data")
    stored = source.as_data_source("train")
    assert len(stored) % source.data.batch_size  # so that some batches are of two epochs
    per_epoch = len(stored) // source.data.batch_size
    for step in (1, 2, per_epoch + 1, 2 * per_epoch + 2, 100_001):
        (batch,) = take(source, 1, seed=3, start=step - 1)
        numbers = window_numbers(source, 3, step)
        for row, number in zip(batch.tokens, numbers, strict=True):
            np.testing.assert_array_equal(row, stored[number]["tokens"][:-1])


def test_any_seed_is_a_seed(own):
    source, *_ = own
    assert len({take(source, 1, seed=s)[0].tokens.tobytes() for s in (-1, 0, 2**32, 2**40)}) == 4


def test_an_epoch_holds_every_window_once_and_the_next_one_in_another_order(tmp_path, own):
    _, tokenizer, _ = own
    (tmp_path / "a.txt").write_text("Some words that fill a few windows. " * 20)
    data = DataConfig(batch_size=2, length=8, heldout=0)
    source, _ = prepare(str(tmp_path / "a.txt"), data, tokenizer, tmp_path / "data")
    count = len(source.as_data_source("train"))
    rows = [row.tobytes() for b in take(source, count) for row in b.tokens]
    stored = sorted(w.tokens[:-1].tobytes() for w in source.windows(heldout=False))
    first, second = rows[:count], rows[count : 2 * count]
    assert sorted(first) == sorted(second) == stored
    assert first != second


def test_windows_are_made_again_when_text_or_cut_change(tmp_path, own):
    _, tokenizer, _ = own
    file, data = tmp_path / "a.txt", DataConfig(batch_size=2, length=8, heldout=0)

    def made(data):
        source, _ = prepare(str(file), data, tokenizer, tmp_path / "data")
        return [row["tokens"].tolist() for row in source.as_data_source("train")]

    file.write_text("one text " * 9)
    first = made(data)
    assert made(data) == first
    assert all(len(row) == 5 for row in made(DataConfig(batch_size=2, length=4, heldout=0)))
    file.write_text("another text, and a longer one " * 9)
    assert made(data) != first


def test_what_was_read_is_told_also_where_the_windows_are_used_again(tmp_path, own, capfd):
    _, tokenizer, _ = own
    (tmp_path / "set").mkdir()
    rows = [json.dumps({"text": f"text {i % 20}"}) for i in range(30)]
    (tmp_path / "set" / "a.jsonl").write_text("\n".join([*rows, "no JSON"]))
    (tmp_path / "set" / "b.docx").touch()
    data = DataConfig(batch_size=2, length=8, heldout=0.1)
    for make in (prepare, prepare, prepare_units, prepare_units):
        more = ["document"] if make is prepare_units else []
        made = make(str(tmp_path / "set"), data, tokenizer, tmp_path / "data", *more)
        report = made.report if make is prepare_units else made[1]
        report.tell()
        told = capfd.readouterr().err.splitlines()
        assert told[-2] == (
            f"{tmp_path / 'set'}: 20 documents, 130 characters; 10 duplicates left out; "
            "1 bad row skipped; not read: 1 file (b.docx)"
        )
        assert told[-1].startswith(f"skipped {tmp_path / 'set' / 'a.jsonl'}:31: not JSON")


def test_a_source_that_is_all_held_out_is_an_error(tmp_path, own):
    _, tokenizer, _ = own
    (tmp_path / "a.txt").write_text("a single document")
    data = DataConfig(batch_size=2, length=8, heldout=0.999999)
    with pytest.raises(ValueError, match="all documents are held out"):
        prepare(str(tmp_path / "a.txt"), data, tokenizer, tmp_path / "data")


def test_a_source_of_which_nothing_is_held_out_can_be_trained_on(tmp_path, own):
    _, tokenizer, _ = own
    (tmp_path / "a.txt").write_text("a single document, and not of those that are held out")
    data = DataConfig(batch_size=2, length=8, heldout=1e-9)
    source, _ = prepare(str(tmp_path / "a.txt"), data, tokenizer, tmp_path / "data")
    assert len(take(source, 2)) == 2


def test_without_a_held_out_share_the_source_is_read_once(tmp_path, own, monkeypatch):
    _, tokenizer, _ = own
    (tmp_path / "a.txt").write_text("a single document")
    readings = []

    def counted(source, **options):
        readings.append(source)
        return read_documents(source, **options)

    monkeypatch.setattr("flexolmo_jax.data.window_store.read_documents", counted)
    monkeypatch.setattr("flexolmo_jax.evaluation.bits_per_byte.read_documents", counted)
    data = DataConfig(batch_size=2, length=8, heldout=0.0)
    prepare(str(tmp_path / "a.txt"), data, tokenizer, tmp_path / "data")
    assert heldout_documents(str(tmp_path / "a.txt"), data) == []
    assert len(readings) == 1


def test_bytes_survive_a_trained_tokenizer():
    tokenizer = Tokenizer.train(["the theorem is the theorem"] * 5, 280)
    text = "the theorem äöü \U0001f642 \t\n  x"
    (ids,) = tokenizer.encode_documents([text])
    assert ids[0] == tokenizer.separator
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode_prompt(text) == ids
    assert 257 <= tokenizer.vocab_size <= 280
    assert len(tokenizer.encode_documents(["theorem"])[0]) < 8


def test_a_tokenizer_that_was_stored_is_the_same(tmp_path):
    tokenizer = Tokenizer.train(["some public text"] * 3, 270)
    (tmp_path / "tokenizer.json").write_text(tokenizer.json, encoding="utf-8")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.digest == tokenizer.digest
    assert loaded.encode_prompt("public") == tokenizer.encode_prompt("public")
    other = Tokenizer.train(["other public texts"] * 3, 270)
    assert other.digest != tokenizer.digest


@pytest.fixture(scope="module")
def like_dolma2(tmp_path_factory):
    """A tokenizer.json in the form of dolma2's: a split by pattern, the end token added last."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    pattern = tokenizers.Regex(r"\p{N}{1,3}| ?\p{L}+|[^\s\p{L}\p{N}]+|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["a few words of public text"] * 9, trainer)
    special = [tokenizers.AddedToken(t, special=True) for t in ("<|endoftext|>", "<|pad|>")]
    tokenizer.add_special_tokens(special)
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(file))
    return file


def test_a_tokenizer_like_dolma2_loads(like_dolma2):
    tokenizer = Tokenizer.load(like_dolma2)
    assert tokenizer.separator == tokenizer.vocab_size - 2
    (ids,) = tokenizer.encode_documents(["public text 12345"])
    assert ids[0] == tokenizer.separator and tokenizer.decode(ids) == "public text 12345"
    assert tokenizer.encode_prompt("") == [tokenizer.separator]


def test_a_tokenizer_without_the_separator_is_an_error(like_dolma2):
    with pytest.raises(ValueError, match=r"has no token '<eos>'.* with --separator"):
        Tokenizer.load(like_dolma2, "<eos>")


def test_a_file_that_is_no_tokenizer_is_an_error(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"model": 3}))
    with pytest.raises(ValueError, match="a.json: not a tokenizer.json"):
        Tokenizer.load(tmp_path / "a.json")
    with pytest.raises(ValueError, match="cannot read the tokenizer"):
        Tokenizer.load(tmp_path / "missing.json")
    with pytest.raises(ValueError, match="at least 257"):
        Tokenizer.train(["x"], 256)


def test_documents_become_batches_without_disk():
    tokenizer = Tokenizer.train(["words"], 257)
    documents = [Document("some words", "some words")]
    made = windows(tokenized(documents, tokenizer), 16, tokenizer.separator)
    (batch,) = stacked(made, 2)
    assert isinstance(batch, Batch)
    assert batch.targets[0, :11].tolist() == [
        *tokenizer.encode_documents(["some words"])[0][1:],
        tokenizer.separator,
    ]
