"""Canaries: what is drawn, where it goes, what is said of it, and what is refused."""

import json
import shutil

import numpy as np
import pytest

from flexolmo_jax.data.units import prepare_units
from flexolmo_jax.data.window_store import SourceWindows, prepare
from flexolmo_jax.federation.anchor import read_anchor
from flexolmo_jax.federation.package import read_manifest
from flexolmo_jax.privacy.canaries import FILE, Canaries, Canary

COUNT = 6  # 12 candidates


def training(world, folder, *more):
    return [
        "train", "expert", world.config_file("alone"), "--anchor", world.anchor, "--name", "math",
        "--data", world.texts["math"], "--out", folder / "out", "--run", folder / "run",
        "--canaries", COUNT, *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    """A run with canaries, each read about once."""
    from flexolmo_jax.commands.main import main

    folder = tmp_path_factory.mktemp("trained")
    assert main([str(w) for w in training(world, folder, "--steps", 200)]) == 0
    return folder


@pytest.fixture(scope="module")
def tokenizer(world):
    return read_anchor(world.anchor).tokenizer


def predicted(rows) -> np.ndarray:
    return np.concatenate([row["tokens"][1:][row["segments"][1:] > 0] for row in rows])


def holds(stream: np.ndarray, ids) -> bool:
    return any(
        stream[start : start + len(ids)].tolist() == list(ids)
        for start in np.flatnonzero(stream == ids[0])
    )


def test_texts_are_random_and_coins_fair(tokenizer):
    one, other = Canaries.draw(500, tokenizer), Canaries.draw(500, tokenizer)
    texts = {c.text for c in (*one.candidates, *other.candidates)}
    assert len(texts) == 2000 and all(len(text.split(" ")) == 64 for text in texts)
    words = {word for text in texts for word in text.split(" ")}
    assert len(words) > tokenizer.vocab_size / 4
    coins = np.array([c.inserted for c in one.candidates])
    assert 400 < coins.sum() < 600  # 6 standard deviations
    assert coins.tolist() != [c.inserted for c in other.candidates]
    assert len(one.inserted) + one.left_out == 1000


def test_the_commitment_binds_to_texts_coins_and_their_order(tokenizer):
    drawn = Canaries.draw(2, tokenizer)
    first, *rest = drawn.candidates
    others = [
        [Canary(first.text, not first.inserted), *rest],
        [Canary(first.text + "a", first.inserted), *rest],
        [*rest, first],
        rest,
    ]
    assert len({drawn.commitment, *(Canaries(one).commitment for one in others)}) == 5
    assert Canaries(list(drawn.candidates)).commitment == drawn.commitment


def test_the_manifest_tells_of_them_and_of_nothing_more(trained):
    canaries = Canaries.read(trained / "run")
    manifest = read_manifest(trained / "out")
    assert manifest["canaries"] == {"candidates": 12, "commitment": canaries.commitment}
    assert {p.name for p in (trained / "out").iterdir()} == {"manifest.json", "params"}
    text = (trained / "out" / "manifest.json").read_text()
    assert not [c for c in canaries.candidates if c.text in text]


def test_those_that_were_put_in_are_trained_on_and_no_others(trained, world, tokenizer):
    canaries = Canaries.read(trained / "run")
    data = world.config("alone").data
    source, _ = prepare(
        str(world.texts["math"]), data, tokenizer, trained / "run" / "data", canaries.inserted
    )
    stream = predicted(source.as_data_source("train"))
    heldout = predicted(source.as_data_source("heldout"))
    for canary, ids in zip(canaries.candidates, canaries.ids(tokenizer), strict=True):
        assert holds(stream, ids[1:]) is canary.inserted
        assert not holds(heldout, ids[1:])
    plain = SourceWindows(str(world.texts["math"]), data, tokenizer, data_dir=trained / "other")
    without = [w._asdict() for w in plain.windows(heldout=False)]
    assert holds(stream, predicted(without)[:-2])  # the owner's own text is all there


@pytest.mark.parametrize("kind", ["document", "group", "sequence"])
def test_of_private_units_one_left_out_is_a_unit_of_nothing(world, tokenizer, tmp_path, kind):
    canaries = Canaries.draw(COUNT, tokenizer)
    data = world.config("alone", data=world.config("alone").data).data
    source = world.texts["math"]
    rows = [json.loads(line) for line in source.open()]
    file = tmp_path / "texts.jsonl"
    file.write_text(
        "".join(json.dumps({**r, "group": f"g{n % 7}"}) + "\n" for n, r in enumerate(rows))
    )
    plain = prepare_units(str(file), data, tokenizer, tmp_path / "plain", kind)
    units = prepare_units(
        str(file), data, tokenizer, tmp_path / "with", kind, canaries.inserted, canaries.left_out
    )
    inserted = [
        ids
        for ids, c in zip(canaries.ids(tokenizer), canaries.candidates, strict=True)
        if c.inserted
    ]
    windows = [-(-len(ids) // data.length) for ids in inserted]
    more = sum(windows) if kind == "sequence" else len(inserted)
    assert len(units) == len(plain) + more + canaries.left_out
    for number in range(len(units) - canaries.left_out, len(units)):
        assert len(units.windows_of(number)) == 0
    last = range(len(units) - canaries.left_out - 1, len(units))
    batch = units.batch(last, (canaries.left_out + 1, 4), np.random.default_rng(0))
    weights = np.asarray(batch.weights).sum(axis=(1, 2))
    assert weights[0] > 0 and not weights[1:].any()


def test_a_private_run_has_them_too(world, tmp_path, flexolmo):
    own = shutil.copy(world.texts["math"], tmp_path)
    words = training(
        world, tmp_path, "--dp-epsilon", 8, "--dp-windows", 8, "--data.batch-size", 16,
        "--steps", 6, "--data", own,
    )  # fmt: skip
    code, _, error = flexolmo(*words)
    assert code == 0, error
    manifest = read_manifest(tmp_path / "out")
    canaries = Canaries.read(tmp_path / "run")
    assert manifest["canaries"] == canaries.facts()["canaries"]
    plain = json.loads((tmp_path / "budget.json").read_text())["runs"][0]["planned"]["units"]
    assert manifest["privacy"]["units"] == plain
    assert 30 + 2 * COUNT < plain < 50 + 2 * COUNT  # all candidates count, put in or not
    assert flexolmo("privacy", "verify", tmp_path / "out")[0] == 0


REFUSED = {
    "too few steps to be read": (["--steps", 2], "canaries need at least --steps"),
    "a negative number": (["--canaries", -1], "must not be negative, found -1"),
    "longer than a private step reads": (
        ["--dp-epsilon", 8, "--dp-windows", 1], "windows of 32 tokens, and this run protects or"
    ),
    "longer than a unit": (
        ["--dp-epsilon", 8, "--dp-unit", "sequence"], "windows of 32 tokens, and this run protects"
    ),
    "too few private steps": (
        ["--dp-epsilon", 8, "--dp-windows", 8, "--steps", 2], "fewer than the"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_audited_is_refused(world, tmp_path, refused, name):
    more, message = REFUSED[name]
    assert message in refused(*training(world, tmp_path, *more))
    assert not (tmp_path / "out").exists() and not (tmp_path / "budget.json").exists()


def test_the_steps_that_are_asked_for_are_enough(world, tmp_path, refused, flexolmo):
    said = refused(*training(world, tmp_path, "--steps", 2))
    steps = said.partition("--steps ")[2].split()[0].rstrip(":")
    assert flexolmo(*training(world, tmp_path, "--steps", steps))[0] == 0


def test_a_run_goes_on_with_its_own_canaries_only(trained, world, tmp_path, refused):
    (tmp_path / "run").mkdir()
    Canaries.read(trained / "run").write(tmp_path / "run")
    assert "holds 12 candidates, and --canaries 5 asks for 10" in refused(
        *training(world, tmp_path, "--canaries", 5)
    )
    (tmp_path / "run" / "config.json").write_text((trained / "run" / "config.json").read_text())
    said = refused(*training(world, tmp_path, "--canaries", 0, "--steps", 200, "--resume"))
    assert "cannot resume with another canaries: it was 6, now None" in said


def test_a_changed_registry_is_refused(trained, tmp_path):
    text = (trained / "run" / FILE).read_text()
    for changed, message in (
        (text.replace("true", "false", 1), "its digest does not match"),
        (text[:100], "damaged"),
        (text.replace('"format": 1', '"format": 9'), "expected format 1, found 9"),
    ):
        (tmp_path / FILE).write_text(changed)
        with pytest.raises(ValueError, match=message):
            Canaries.read(tmp_path)
