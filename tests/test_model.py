"""A loaded model: logits, switching experts off, bits per byte."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest

import flexolmo_jax as fo

pytestmark = pytest.mark.usefixtures("optimized")

GOLDEN = Path(__file__).parent / "interop" / "golden"


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, 512, (3, 16))


def equal(some, other):
    return np.array_equal(np.asarray(some), np.asarray(other))


# Logits and masks.


def test_logits_are_float32_of_every_token(model, tokens):
    logits = model.logits(tokens)
    assert logits.shape == (3, 16, 512) and logits.dtype == np.float32
    assert np.isfinite(logits).all()
    assert equal(model.logits(tokens.tolist()), logits)


def test_names_and_masks_say_the_same(model, tokens):
    assert model.expert_names == ("public", "math", "code", "loud")
    without = model.logits(tokens, without=["math"])
    mask = np.array([True, False, True, True])
    assert equal(model.logits(tokens, allowed=mask), without)
    assert equal(model.logits(tokens, allowed=np.tile(mask, (3, 1))), without)
    assert equal(model.logits(tokens, only=["public", "loud", "code"]), without)
    assert equal(model.logits(tokens, without="math"), without)
    both = model.logits(tokens, without=["loud"], allowed=mask)
    assert equal(both, model.logits(tokens, only=["public", "code"]))
    assert not equal(without, model.logits(tokens))


def test_each_sequence_may_have_a_mask_of_its_own(model, tokens):
    masks = np.array([[1, 1, 0, 0], [1, 0, 1, 1], [0, 0, 0, 1]], bool)
    together = model.logits(tokens, allowed=masks)
    for row, mask in enumerate(masks):
        assert equal(together[row], model.logits(tokens, allowed=mask)[row])


@pytest.mark.parametrize("kept", [["math"], ["code"], ["loud"], ["math", "loud"], []])
@pytest.mark.parametrize("active", [None, 2])
def test_switched_off_equals_never_merged_bit_for_bit(
    world, make_expert, tmp_path, tokens, kept, active
):
    packages = {**world.experts, "loud": make_expert(tmp_path / "loud", "loud", seed=5)}
    fo.merge(world.anchor, list(packages.values()), tmp_path / "all", active_experts=active)
    some = [packages[name] for name in kept]
    fo.merge(world.anchor, some, tmp_path / "some", active_experts=active)
    whole, part = fo.load(tmp_path / "all"), fo.load(tmp_path / "some")
    off = [name for name in packages if name not in kept]
    assert equal(whole.logits(tokens, without=off), part.logits(tokens))
    assert equal(whole.logits(tokens, only=["public", *kept]), part.logits(tokens))


def test_only_public_equals_the_anchor_bit_for_bit(world, model, tokens):
    assert equal(model.logits(tokens, only=["public"]), fo.load(world.anchor).logits(tokens))


def test_an_owners_pair_equals_the_merged_model_of_both(world, model, tokens):
    pair = fo.load(world.experts["math"])
    assert pair.expert_names == ("public", "math")
    model = dataclasses.replace(model, config=model.config.replace(memory=None))  # as the pair
    assert equal(pair.logits(tokens), model.logits(tokens, only=["public", "math"]))


def test_fewer_active_experts_is_another_model_where_there_are_more(
    world, make_expert, tmp_path, tokens, model
):
    packages = [*world.experts.values(), make_expert(tmp_path / "loud", "loud", seed=5)]
    fo.merge(world.anchor, packages, tmp_path / "two", active_experts=2)
    fo.merge(world.anchor, packages, tmp_path / "nine", active_experts=9)
    assert not equal(fo.load(tmp_path / "two").logits(tokens), model.logits(tokens))
    assert equal(fo.load(tmp_path / "nine").logits(tokens), model.logits(tokens))


def test_bfloat16_is_near(world, tokens):
    exact = np.asarray(fo.load(world.merged).logits(tokens))
    rough = fo.load(world.merged, dtype="bfloat16")
    assert rough.backbone.embed[...].dtype == "bfloat16"
    logits = rough.logits(tokens)
    assert logits.dtype == np.float32
    assert np.abs(np.asarray(logits) - exact).max() < 0.05 * np.abs(exact).max()


def test_wrong_arguments_are_one_clear_error(model, tokens):
    for arguments, message in (
        ({"without": ["maths"]}, "no expert named 'maths'; there are public, math, code, loud"),
        ({"only": ["maths"]}, "no expert named 'maths'"),
        ({"without": list(model.expert_names)}, "all experts are switched off; leave at least one"),
        ({"only": []}, "all experts are switched off"),
        ({"allowed": np.array([[1, 1, 1, 1]] * 2 + [[0] * 4], bool)}, "all experts are switched"),
        (
            {"allowed": np.ones(3, bool)},
            r"allowed must be bool \[4\] or \[3, 4\], found bool \[3\]",
        ),
        ({"allowed": np.ones(4)}, "allowed must be bool"),
    ):
        with pytest.raises(ValueError, match=message):
            model.logits(tokens, **arguments)
    for wrong, message in (
        ([[1, 512]], r"tokens must be in \[0, 512\), the vocabulary; found 512"),
        ([[1, -1]], "found -1"),
        ([1, 2], r"integers of shape \[B, S\]"),
        ([[]], "with at least one token"),
        ([[1.0]], "tokens must be integers"),
    ):
        with pytest.raises(ValueError, match=message):
            model.logits(np.array(wrong))


# Loading.


def test_a_hugging_face_directory_may_be_the_anchor_of_a_merged_model(tmp_path):
    shutil.copytree(GOLDEN / "olmo2", tmp_path / "hf")
    fo.merge(tmp_path / "hf", [], tmp_path / "merged")
    tokens = [[1, 2, 3]]
    assert equal(
        fo.load(tmp_path / "merged").logits(tokens), fo.load(tmp_path / "hf").logits(tokens)
    )


def test_what_is_no_model_is_one_clear_error(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        fo.load(tmp_path / "nothing")
    with pytest.raises(ValueError, match="no manifest.json there"):
        fo.load(tmp_path)


# Bits per byte.


def test_bits_per_byte_is_the_cost_of_the_text_over_its_bytes(world, tmp_path):
    """By hand: every token but the ends of documents, each document on its own."""
    model = fo.load(world.merged)
    texts = ["One sümmer day.", "x = f(y) + 1\n", "Rivers of the north"]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text, encoding="utf-8")
    nats = 0.0
    for ids in model.tokenizer.encode_documents(texts):
        padded = np.zeros((1, 32), int)  # what comes later cannot be seen
        padded[0, : len(ids)] = ids
        logits = np.asarray(model.logits(padded)[0], np.float64)
        logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
        nats -= sum(logits[i, token] for i, token in enumerate(ids[1:]))
    size = sum(len(text.encode()) for text in texts)
    found = fo.bits_per_byte(model, str(tmp_path))
    assert (found.documents, found.bytes) == (3, size)
    assert found.bits_per_byte == pytest.approx(nats / np.log(2) / size, rel=1e-5)


def test_a_text_of_separators_costs_what_its_characters_cost(world, tmp_path):
    """As text that anyone may write: it ends no document, in scoring or in a prompt."""
    model = fo.load(world.merged)
    spelled = model.tokenizer.separator_text
    (tmp_path / "markers.txt").write_text(spelled * 20)
    (tmp_path / "like_it.txt").write_text(spelled.replace("<", "[") * 20)
    costs = [
        fo.bits_per_byte(model, str(tmp_path / f"{name}.txt")) for name in ("markers", "like_it")
    ]
    assert costs[0].bytes == costs[1].bytes == 20 * len(spelled)
    assert costs[0].bits_per_byte > 0.5 * costs[1].bits_per_byte
    ids = model.tokenizer.encode_prompt(f"The{spelled} theorem")
    expected = model.tokenizer.decode(model.generate([ids], 8)[0])
    assert ids.count(model.tokenizer.separator) == 1
    assert model.generate([f"The{spelled} theorem"], 8) == [expected]


def test_bits_per_byte_knows_masks_and_the_held_out_split(world):
    model, source = fo.load(world.merged), str(world.texts["math"])
    everything = fo.bits_per_byte(model, source)
    heldout = fo.bits_per_byte(model, source, heldout=0.1)
    assert 0 < heldout.documents < everything.documents == 50
    without = fo.bits_per_byte(model, source, heldout=0.1, only=["public"])
    anchor = fo.bits_per_byte(fo.load(world.anchor), source, heldout=0.1)
    assert without == anchor
    with pytest.raises(ValueError, match="no document is held out with a share of 1e-09"):
        fo.bits_per_byte(model, source, heldout=1e-9)


def test_more_new_tokens_than_fit_into_memory_are_refused_at_once(model):
    with pytest.raises(ValueError, match="max_new_tokens=1000000000000 needs .* GB for keys"):
        model.generate([[1, 2]], 10**12)
