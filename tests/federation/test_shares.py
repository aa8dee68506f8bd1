"""What an expert takes of public text is said, and one that takes nearly all of it is refused."""

import json

import numpy as np
import pytest
from hostile.sealing import array_of, put

import flexolmo_jax as fo
from flexolmo_jax.data.sources import Document
from flexolmo_jax.federation import shares as sharing


@pytest.fixture
def greedy(copied):
    """The package `math` with rows along the mean input of each layer of the anchor."""
    from flexolmo_jax.federation.anchor import read_anchor
    from flexolmo_jax.training.public_data import public_batch
    from flexolmo_jax.training.router_fit.inputs import of_the_anchor, whitened_by

    anchor = read_anchor(copied.anchor)
    batch = public_batch(anchor.public_text, anchor.tokenizer, 32, 16)
    white = whitened_by(batch, anchor.weights, of_the_anchor(anchor.config))
    package = copied.experts["math"]
    rows = np.stack([one.constant for one in white])[:, None].astype(np.float32)
    put(package, "router.bias", array_of(package, "router.bias") * 0)
    put(package, "router.row", rows * 10)
    return package


def test_shares_are_those_of_the_merged_models_own_router(world, tmp_path):
    """In the first layer, whose inputs are the same in the anchor and in any merged model."""
    import jax.numpy as jnp

    from flexolmo_jax.modeling.router import route
    from flexolmo_jax.modeling.transformer import forward

    found = fo.merge(world.anchor, world.experts.values(), tmp_path / "merged", memory=None)
    model = fo.load(tmp_path / "merged")
    from flexolmo_jax.federation.anchor import read_anchor

    anchor = read_anchor(world.anchor)
    texts = (Document(text, text) for text in anchor.public_text)
    batch = sharing._first_batch(anchor, texts)
    out = forward(
        model.backbone, (model.experts,), batch.tokens, model.config, segments=batch.segments
    )
    logits = out.router_logits[0]
    weights = route(logits, jnp.ones((len(batch.tokens), 3), bool), 3, False)
    real = np.asarray(batch.segments) > 0
    expected = np.asarray(weights)[:, real].mean(axis=1)
    np.testing.assert_allclose(found.of_layers[0], expected, rtol=1e-4)
    assert found.names == ("public", "math", "code") and found.tokens == real.sum()
    np.testing.assert_allclose(found.of_layers.sum(axis=1), 1.0)


def test_an_expert_that_takes_nearly_all_public_text_is_refused(copied, greedy, tmp_path, flexolmo):
    others = (copied.experts["code"],)
    words = ("merge", "--anchor", copied.anchor, "--expert", greedy, *others, "--out")
    code, _, error = flexolmo(*words, tmp_path / "merged")
    assert code == 2 and "the expert 'math' takes" in error and "--allow-share" in error
    assert not (tmp_path / "merged").exists()
    code, printed, error = flexolmo(*words, tmp_path / "merged", "--allow-share")
    assert code == 0 and "warning: the expert 'math' takes" in error, error
    assert "shares of" in printed
    fo.merge(copied.anchor, others, tmp_path / "honest")
    before = (tmp_path / "honest" / "manifest.json").read_bytes()
    code, _, error = flexolmo("experts", "add", tmp_path / "honest", greedy)
    assert code == 2 and "the expert 'math' takes" in error
    assert (tmp_path / "honest" / "manifest.json").read_bytes() == before
    assert flexolmo("experts", "add", tmp_path / "honest", greedy, "--allow-share", 1)[0] == 0


def test_inspect_shows_the_shares(world, flexolmo):
    code, printed, _ = flexolmo("inspect", world.merged, "--json")
    assert code == 0
    rows = json.loads(printed)["shares"]
    assert [row["expert"] for row in rows] == ["public", "math", "code"]
    assert sum(row["mean"] for row in rows) == pytest.approx(1, abs=1e-3)
    assert "shares of" in flexolmo("inspect", world.merged)[1]


def test_an_anchor_without_public_text_is_said_to_have_none(world, flexolmo, tmp_path, make_expert):
    from flexolmo_jax.federation.anchor import read_anchor, write_anchor

    loaded = read_anchor(world.anchor)
    bare = tmp_path / "bare"
    write_anchor(bare, loaded.weights, loaded.config, loaded.tokenizer, [], {})
    code, printed, _ = flexolmo(
        "merge", "--anchor", bare, "--expert", world.experts["math"], "--out", tmp_path / "merged"
    )
    assert code == 0 and "the anchor came without public text" in " ".join(printed.split())
