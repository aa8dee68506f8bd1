"""A loaded model: logits, switching experts off, generation."""

import shutil
from pathlib import Path

import numpy as np
import pytest

import flexolmo_jax as fo

GOLDEN = Path(__file__).parent / "interop" / "golden"
PROMPTS = [[0, 300, 301], [0, 42], [0, 7, 8, 9, 260, 261, 300, 17, 18, 19]]
TEXTS = ["The theorem", "def main(", "A river in the north of"]


@pytest.fixture(scope="module")
def model(world, make_expert, tmp_path_factory):
    """Three trained or made-up experts beside the public one."""
    folder = tmp_path_factory.mktemp("model")
    packages = [*world.experts.values(), make_expert(folder / "loud", "loud", seed=5)]
    fo.merge(world.anchor, packages, folder / "merged")
    return fo.load(folder / "merged")


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


# Generation.


def rollout(model, prompt, count, **masks):
    """The slow obvious way: the whole text again for each new token, nothing cached."""
    ids = list(prompt)
    padded = np.zeros((1, 32), int)  # one shape; what comes later cannot be seen
    for _ in range(count):
        padded[0, : len(ids)] = ids
        best = int(np.argmax(model.logits(padded, **masks)[0, len(ids) - 1]))
        if best == model.tokenizer.separator:
            break
        ids.append(best)
    return ids[len(prompt) :]


def test_greedy_equals_a_rollout_without_cache(model):
    made = model.generate(PROMPTS, max_new_tokens=16)
    assert made == [rollout(model, prompt, 16) for prompt in PROMPTS]
    assert all(made)


def test_masks_hold_in_generation(model):
    masks = np.array([[1, 1, 0, 0], [0, 0, 0, 1], [1, 0, 1, 1]], bool)
    made = model.generate(PROMPTS, max_new_tokens=12, allowed=masks)
    assert made == [
        rollout(model, prompt, 12, allowed=mask)
        for prompt, mask in zip(PROMPTS, masks, strict=True)
    ]
    without = model.generate(PROMPTS, max_new_tokens=12, without=["loud"])
    assert without == [rollout(model, prompt, 12, without=["loud"]) for prompt in PROMPTS]
    assert without != model.generate(PROMPTS, max_new_tokens=12)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 3}])
def test_a_prompt_does_not_depend_on_its_neighbours(model, options):
    together = model.generate(PROMPTS, max_new_tokens=12, **options)
    assert together[0] == model.generate(PROMPTS[:1], max_new_tokens=12, **options)[0]
    if not options:  # a random choice also depends on the place in the batch
        alone = [model.generate([p], max_new_tokens=12)[0] for p in PROMPTS]
        assert together == alone


def test_texts_give_texts(model):
    made = model.generate(TEXTS, max_new_tokens=8)
    assert all(isinstance(text, str) for text in made)
    ids = [model.tokenizer.encode_prompt(text) for text in TEXTS]
    decoded = [model.tokenizer.decode(one) for one in model.generate(ids, max_new_tokens=8)]
    assert made == decoded
    assert isinstance(model.generate([""], max_new_tokens=2)[0], str)


def test_a_text_ends_at_the_separator(model):
    """A head that says "the text ends" more loudly than anything else, sooner or later."""
    separator = model.tokenizer.separator
    free = model.generate(PROMPTS, max_new_tokens=16, temperature=1.0, seed=1)
    lengths = {len(one) for one in free}
    assert all(separator not in one for one in free)
    import dataclasses

    import jax

    backbone = jax.tree.map(lambda x: x, model.backbone)
    head = np.array(backbone.head[...])
    stop_at = free[0][2]
    head[:, [separator, stop_at]] = head[:, [stop_at, separator]]
    backbone.head[...] = jax.numpy.asarray(head)
    swapped = dataclasses.replace(model, backbone=backbone)
    greedy = model.generate(PROMPTS[:1], max_new_tokens=16)[0]
    ending = swapped.generate(PROMPTS[:1], max_new_tokens=16)[0]
    if stop_at in greedy:
        assert ending == greedy[: greedy.index(stop_at)]
    assert lengths


def test_no_more_tokens_than_asked_for(model):
    for count in (1, 5):
        assert max(map(len, model.generate(PROMPTS, max_new_tokens=count))) == count


def test_sampling(model):
    def sampled(**options):
        return model.generate(PROMPTS, max_new_tokens=12, **options)

    greedy = sampled()
    assert sampled(temperature=1.0, top_k=1) == greedy
    assert sampled(temperature=1.0, top_p=1e-6) == greedy
    assert sampled(temperature=1e-4) == greedy
    hot = sampled(temperature=1.5, seed=1)
    assert hot == sampled(temperature=1.5, seed=1)
    assert hot != sampled(temperature=1.5, seed=2)
    assert hot != greedy
    assert sampled(temperature=1.5, seed=1, top_k=512, top_p=1.0) == hot


@pytest.mark.parametrize("cut", [{"top_k": 3}, {"top_p": 0.2}])
def test_a_cut_tail_is_never_sampled(model, cut):
    prompt = [PROMPTS[0]] * 64
    first = {ids[0] for ids in model.generate(prompt, 1, temperature=1.0, **cut) if ids}
    logits = np.asarray(model.logits([PROMPTS[0]])[0, -1], np.float64)
    order = np.argsort(-logits)
    probabilities = np.exp(logits - logits.max())[order]
    before = np.cumsum(probabilities / probabilities.sum()) - probabilities / probabilities.sum()
    kept = order[:3] if "top_k" in cut else order[before < cut["top_p"]]
    assert first <= set(kept.tolist())
    assert len(first) > 1
    everything = {ids[0] for ids in model.generate(prompt, 1, temperature=1.0) if ids}
    assert not everything <= set(kept.tolist())


def test_wrong_wishes_are_one_clear_error(model):
    for prompts, options, message in (
        ([], {}, "at least one prompt"),
        ("a text", {}, "must be a list"),
        (TEXTS, {"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        (TEXTS, {"temperature": -1}, "temperature must be at least 0"),
        (TEXTS, {"temperature": 1.0, "top_k": 0}, "top_k must be at least 1"),
        (TEXTS, {"temperature": 1.0, "top_p": 0.0}, r"top_p must be in \(0, 1\]"),
        (TEXTS, {"without": ["maths"]}, "no expert named 'maths'"),
        ([[1, 600]], {}, r"tokens must be in \[0, 512\)"),
        ([[1], []], {}, "at least one token"),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate(prompts, **options)


def test_going_beyond_the_models_length_is_said(model):
    with pytest.warns(UserWarning, match="more than the 64 that the model was made for"):
        model.generate(PROMPTS, max_new_tokens=60)


# Loading.


def test_a_model_without_a_tokenizer_takes_and_gives_ids():
    model = fo.load(GOLDEN / "flex_olmo_top2")
    assert model.tokenizer is None and model.expert_names[:2] == ("public", "expert_1")
    made = model.generate([[1, 2, 3], [4]], max_new_tokens=4)
    assert [len(ids) for ids in made] == [4, 4]
    assert all(0 <= i < model.config.vocab_size for ids in made for i in ids)
    assert model.generate([[1, 2, 3]], 4, without=["expert_1"])
    with pytest.raises(ValueError, match="without a tokenizer.json; give token ids instead"):
        model.generate(["a text"])
    with pytest.raises(ValueError, match="without a tokenizer.json, so text cannot be scored"):
        fo.bits_per_byte(model, "corpus:math")


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
        logits = np.asarray(model.logits([ids])[0], np.float64)
        logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
        nats -= sum(logits[i, token] for i, token in enumerate(ids[1:]))
    size = sum(len(text.encode()) for text in texts)
    found = fo.bits_per_byte(model, str(tmp_path))
    assert (found.documents, found.bytes) == (3, size)
    assert found.bits_per_byte == pytest.approx(nats / np.log(2) / size, rel=1e-5)


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
