"""Generation: the compiled loop against the slow obvious way; masks, ends, sampling."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flexolmo_jax as fo
from flexolmo_jax.inference import engine

GOLDEN = Path(__file__).parents[1] / "interop" / "golden"
PROMPTS = [[0, 300, 301], [0, 42], [0, 7, 8, 9, 260, 261, 300, 17, 18, 19]]
TEXTS = ["The theorem", "def main(", "A river in the north of"]


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


def test_a_model_with_grouped_expert_compute_generates_the_same(model):
    grouped = dataclasses.replace(model, config=model.config.replace(expert_compute="grouped"))
    assert grouped.generate(PROMPTS, 16) == model.generate(PROMPTS, 16)


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


@pytest.mark.parametrize("options", [{}, {"temperature": 0.8, "top_p": 0.9}])
def test_the_loop_of_accelerators_gives_the_same(model, monkeypatch, options):
    masks = np.array([[1, 1, 0, 0], [0, 0, 0, 1], [1, 0, 1, 1]], bool)
    layer_by_layer = model.generate(PROMPTS, 12, allowed=masks, **options)
    monkeypatch.setattr(fo.FlexOlmo, "_runs_layer_by_layer", lambda self: False)
    assert model.generate(PROMPTS, 12, allowed=masks, **options) == layer_by_layer


def test_more_prompts_than_run_at_a_time(model, monkeypatch):
    expected = model.generate(PROMPTS * 3, 12, until=["e"])
    monkeypatch.setattr(engine, "MAX_SLOTS", 2)
    assert model.generate(PROMPTS * 3, 12, until=["e"]) == expected
    texts = model.generate(TEXTS * 2, 24, until=["e"])
    assert texts == [model.generate([text], 24, until=["e"])[0] for text in TEXTS] * 2
    assert not any("e" in text for text in texts)


def test_texts_give_texts(model):
    made = model.generate(TEXTS, max_new_tokens=8)
    assert all(isinstance(text, str) for text in made)
    ids = [model.tokenizer.encode_prompt(text) for text in TEXTS]
    decoded = [model.tokenizer.decode(one) for one in model.generate(ids, max_new_tokens=8)]
    assert made == decoded
    assert isinstance(model.generate([""], max_new_tokens=2)[0], str)


@pytest.mark.parametrize("interval", [1, 5, 64])
def test_pieces_of_a_stream_are_what_generate_gives(model, interval):
    options = {"temperature": 1.0, "top_k": 20, "seed": 1, "without": ["loud"]}
    for prompt in (TEXTS[0], PROMPTS[2]):
        (whole,) = model.generate([prompt], 20, **options)
        pieces = list(model.stream(prompt, 20, **options, interval=interval))
        joined = "".join(pieces) if isinstance(prompt, str) else sum(pieces, [])
        assert joined == whole
    assert {len(piece) for piece in pieces[:-1]} <= {interval} and 1 <= len(pieces[-1]) <= interval


def test_a_stream_says_what_is_wrong_before_the_first_piece(model):
    for options, said in (
        ({"interval": 0}, "interval must be at least 1"),
        ({"without": ["nobody"]}, "nobody"),
        ({"top_p": 2.0}, "top_p"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
    ):
        with pytest.raises(ValueError, match=said):
            next(model.stream(TEXTS[0], **options))


def test_new_prompts_and_masks_compile_nothing(model):
    """Prompts, masks, seeds, lengths and the fill of a batch, within their buckets."""
    names = []
    model.generate(PROMPTS, max_new_tokens=12)
    model.generate([[0] * 20, [0, 8], [0, 3, 2]], max_new_tokens=20)  # the next bucket
    listener = lambda name, *_, **__: names.append(name)  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listener)
    model.generate([[0, 1], [0, 5, 6, 7], [0], [0, 9]], max_new_tokens=3, without=["loud"], seed=4)
    masks = np.array([[1, 0, 1, 1], [0, 1, 0, 0], [1, 1, 1, 0]], bool)
    model.generate([[0] * 30, [0, 8], [0, 3, 2]], max_new_tokens=30, allowed=masks)
    assert not [name for name in names if "compile" in name]
    model.generate(PROMPTS * 2, max_new_tokens=2)  # of another number of slots
    assert [name for name in names if "compile" in name]
    jax.monitoring.unregister_event_duration_listener(listener)


def test_a_text_ends_where_the_separator_is_the_likeliest_token(model):
    """A model whose separator and another token, which it likes, have changed their names."""
    separator = model.tokenizer.separator
    greedy = model.generate(PROMPTS, max_new_tokens=16)
    assert all(separator not in ids and len(ids) == 16 for ids in greedy)
    liked = greedy[0][5]
    head = np.array(model.backbone.head)
    head[:, [separator, liked]] = head[:, [liked, separator]]
    backbone = jax.tree.map(lambda leaf: leaf, model.backbone)
    backbone.head[...] = jnp.asarray(head)
    ending = dataclasses.replace(model, backbone=backbone).generate(PROMPTS, max_new_tokens=16)
    expected = [ids[: ids.index(liked)] if liked in ids else ids for ids in greedy]
    assert ending == expected and len(ending[0]) <= 5


def test_no_more_tokens_than_asked_for(model):
    for count in (1, 5):
        assert max(map(len, model.generate(PROMPTS, max_new_tokens=count))) == count


def test_sampling(model):
    def sampled(**options):
        return model.generate(PROMPTS, max_new_tokens=12, **options)

    greedy = sampled()
    assert sampled(temperature=1.0, top_k=1) == greedy
    assert sampled(temperature=1.0, top_p=1e-6) == greedy
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
