"""Whole models trained on: an anchor that starts from another, and the unrestricted mixture."""

import dataclasses

import jax
import numpy as np
import pytest

from flexolmo_jax.federation.anchor import read_anchor
from flexolmo_jax.model import load
from flexolmo_jax.training.stages.anchor import train_anchor
from flexolmo_jax.training.stages.joint import train_jointly


@pytest.fixture
def training(world):
    """The world's anchor training, with the anchor's own tokenizer."""
    return world.config("anchor", tokenizer=str(world.anchor / "tokenizer.json"), steps=3)


def distance(one, other) -> float:
    leaves = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return max(float(np.abs(a - b).max()) for a, b in leaves)


def test_an_anchor_goes_on_from_another(world, training, tmp_path):
    slow = dataclasses.replace(
        training, optimizer=dataclasses.replace(training.optimizer, learning_rate=1e-5)
    )
    where = {"data": str(world.texts["math"]), "out": tmp_path / "out", "run": tmp_path / "run"}
    train_anchor(slow, **where, start=world.anchor)
    start, end = (read_anchor(path).weights for path in (world.anchor, tmp_path / "out"))
    assert 0 < distance(start, end) < 1e-4


def test_it_starts_from_nothing_that_does_not_fit(world, training, tmp_path):
    where = {"data": str(world.texts["math"]), "out": tmp_path / "out", "run": tmp_path / "run"}
    wider = dataclasses.replace(training, model=training.model.replace(ffn_width=64))
    with pytest.raises(ValueError, match="expected ffn_width=64, found 48"):
        train_anchor(wider, **where, start=world.anchor)
    new = dataclasses.replace(training, tokenizer=None)
    with pytest.raises(ValueError, match="another tokenizer"):
        train_anchor(new, **where, start=world.anchor)


def test_an_unrestricted_mixture_trains_everything(world, training, tmp_path):
    mixture = training.model.replace(num_experts=3, active_experts=2, expert_compute="grouped")
    config = dataclasses.replace(training, model=mixture)
    where = {"data": str(world.texts["math"]), "out": tmp_path / "out", "run": tmp_path / "run"}
    train_jointly(config, anchor=world.anchor, **where)
    made, anchor = load(tmp_path / "out" / "merged"), read_anchor(world.anchor).weights
    assert made.expert_names == ("public", "expert_1", "expert_2")
    assert (made.config.active_experts, made.config.memory) == (2, None)
    assert distance(made.backbone, anchor.backbone) > 0
    gates = made.experts.feed_forward.gate[...]  # [L, 3, D, F]
    start = anchor.public.feed_forward.gate[...]
    for expert in range(3):
        assert float(np.abs(gates[:, expert] - start[:, 0]).max()) > 0
    assert float(np.abs(gates[:, 0] - gates[:, 1]).max()) > 0
    assert float(np.abs(made.experts.router.row[...]).max()) > 0
