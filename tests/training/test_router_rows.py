"""Router rows that an owner fits alone, and the bias, from training to the loaded model."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

import flexolmo_jax as fo
from flexolmo_jax.data.batches import stacked
from flexolmo_jax.data.sources import Document, is_heldout, read_documents
from flexolmo_jax.data.windows import tokenized, windows
from flexolmo_jax.federation.loading import load_model
from flexolmo_jax.federation.merge import merge
from flexolmo_jax.federation.package import read_manifest
from flexolmo_jax.modeling.transformer import forward
from flexolmo_jax.training.router_fit.rows import discriminate, separate
from flexolmo_jax.training.stages.expert import train_expert


def trained(world, out, public=None, **changes):
    """An expert of the math owner after two steps, beside the world's anchor."""
    places = {"out": out, "run": out.with_name(f"{out.name}.run"), "anchor": world.anchor}
    places |= {"data": str(world.texts["math"]), "name": "math", "public": public}
    train_expert(world.config("alone", steps=2, **changes), **places)


def router_logits(model, texts, layer):
    """The last expert's logit over the public one's, averaged over each text."""
    found = []
    for text in texts:
        ids = tokenized([Document(text, text)], model.tokenizer)
        cut = windows(ids, 32, model.tokenizer.separator)
        batch = next(stacked(itertools.islice(cut, 8), 8))
        logits = _router_logits(model.backbone, model.experts, batch, model.config)
        difference = np.asarray(logits[layer, -1] - logits[layer, 0])
        found.append(difference[np.asarray(batch.segments) > 0].mean())
    return np.array(found)


@functools.partial(jax.jit, static_argnames="config")
def _router_logits(backbone, experts, batch, config):
    out = forward(backbone, (experts,), batch.tokens, config, segments=batch.segments)
    return out.router_logits


def heldout_texts(world, name):
    documents = read_documents(str(world.texts[name]))
    return [d.text for d in documents if is_heldout(d, 0.1)]


def test_fitted_rows_tell_the_owners_unseen_text_from_public_text(world):
    pair = load_model(world.experts["math"], world.anchor)
    own, public = (heldout_texts(world, name) for name in ("math", "public"))
    assert min(len(own), len(public)) >= 3
    labels = [1] * len(own) + [0] * len(public)
    for layer in range(2):
        scores = router_logits(pair, own + public, layer)
        assert roc_auc_score(labels, scores) > 0.8
        even = math.log(0.3 / 0.7)  # fit_prior: where own and public text are alike
        assert scores[: len(own)].mean() > even > scores[len(own) :].mean()


def test_discriminants_fitted_apart_are_those_fitted_together():
    """Of three owners with a common covariance: the rows of one joint discriminant analysis."""
    rng = np.random.default_rng(0)
    mixing = rng.standard_normal((5, 5))
    means = 2 * rng.standard_normal((4, 5)) + 5
    texts = [rng.standard_normal((40_000, 5)) @ mixing + mean for mean in means]
    inverse = np.linalg.inv(np.cov(np.concatenate([t - t.mean(0) for t in texts]), rowvar=False))
    for own in texts[1:]:
        both = np.concatenate([own, texts[0]])
        is_own = np.arange(len(both)) < len(own)
        row, bias = discriminate(both, is_own, prior=0.5)
        joint = inverse @ (own.mean(0) - texts[0].mean(0))
        middle = (own.mean(0) + texts[0].mean(0)) / 2
        found, expected = both @ row + bias, (both - middle) @ joint
        assert np.corrcoef(found, expected)[0, 1] > 0.98
        assert ((found > 0) == (expected > 0)).mean() > 0.97


def test_an_owner_may_fit_a_discriminant(world, tmp_path):
    trained(world, tmp_path / "lda", router="lda")
    assert read_manifest(tmp_path / "lda")["router"] == "lda"
    assert read_manifest(world.experts["math"])["router"] == "logistic"
    assert read_manifest(world.experts["code"])["router"] is None  # gating="softmax"
    pair = load_model(tmp_path / "lda", world.anchor)
    own, public = (heldout_texts(world, name) for name in ("math", "public"))
    for layer in range(2):
        scores = router_logits(pair, own + public, layer)
        assert roc_auc_score([1] * len(own) + [0] * len(public), scores) > 0.8


def test_fitted_biases_only_hold_back(world):
    expert = load_model(world.experts["math"], world.anchor).experts
    assert bool(jnp.all(expert.router.bias[...] <= 0))
    assert not bool(jnp.any(expert.router.bias[:, 0]))


@pytest.mark.parametrize("fit", [functools.partial(separate, ridge=1e-6), discriminate])
@pytest.mark.parametrize("offset", [-3.0, 3.0])
def test_a_fit_gives_log_odds_whatever_the_sign_of_the_intercept(offset, fit):
    """Of two Gaussians of one covariance, whose log odds are known."""
    rng = np.random.default_rng(0)
    direction, mean = np.eye(6)[0], np.array([offset, 10, 0, 0, 0, 0])
    is_own = np.arange(10_000) < 5_000
    inputs = rng.standard_normal((10_000, 6)) + mean + is_own[:, None] * direction
    row, bias = fit(inputs, is_own, prior=0.3)
    assert bias < 0 if offset > 0 else bias == 0
    exact = (inputs - mean) @ direction - 0.5 + math.log(0.3 / 0.7)
    found = inputs @ row + bias
    assert np.corrcoef(exact, found)[0, 1] > 0.95
    assert abs(found.mean() - exact.mean()) < 0.1
    assert roc_auc_score(is_own, found) > 0.98 * roc_auc_score(is_own, exact)


def test_public_text_pays_little_for_a_fitted_expert(world):
    """At this size nothing is certain, but a row that swamps public text would show."""
    alone, pair = fo.load(world.anchor), fo.load(world.experts["math"])
    source = str(world.texts["public"])
    before, after = (fo.bits_per_byte(m, source, heldout=0.1).bits_per_byte for m in (alone, pair))
    assert after < 1.02 * before


def test_public_text_may_be_the_owners_choice(world, tmp_path):
    trained(world, tmp_path / "a")
    trained(world, tmp_path / "b", public=str(world.texts["code"]))
    some, other = (read_manifest(tmp_path / name)["tensors"] for name in "ab")
    changed = {name for name in some if some[name]["sha256"] != other[name]["sha256"]}
    assert "router.row" in changed and changed <= {"router.row", "router.bias"}


# The bias, from training to the loaded model.


def test_a_negative_bias_survives_packaging_merging_and_loading(world, make_expert, tmp_path):
    package = make_expert(tmp_path / "package", "shy", bias=-1.25)
    merge(world.anchor, [world.experts["math"], package], tmp_path / "merged")
    bias = np.asarray(fo.load(tmp_path / "merged").experts.router.bias)
    assert (bias[:, 2] == -1.25).all() and not bias[:, 0].any()


def test_a_positive_bias_has_no_effect(world, make_expert, tmp_path):
    tokens = np.arange(24).reshape(2, 12) + 300
    found = {}
    for bias in (-1.0, 0.0, 5.0):
        package = make_expert(tmp_path / f"bias {bias}", "pushy", bias=bias)
        found[bias] = np.asarray(fo.load(package, anchor=world.anchor).logits(tokens))
    np.testing.assert_array_equal(found[5.0], found[0.0])
    assert np.abs(found[-1.0] - found[0.0]).max() > 1e-3
