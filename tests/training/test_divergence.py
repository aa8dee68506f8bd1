"""A diverging loss: what counts as one, and which documents are named."""

import json
import math

import numpy as np
import pytest

from flexolmo_jax.data.order import batches
from flexolmo_jax.data.sources import read_documents
from flexolmo_jax.data.window_store import prepare
from flexolmo_jax.federation.anchor import read_anchor
from flexolmo_jax.training.divergence import RECENT_LOSSES, LossMonitor, record_divergence


def monitored(losses):
    """What is said of the last of some losses; nothing may be said of the others."""
    monitor = LossMonitor()
    for loss in losses[:-1]:
        assert monitor.divergence(loss, 1.0) is None
    return monitor.divergence(losses[-1], 1.0)


NOISY = list(3 + 0.1 * np.random.default_rng(0).standard_normal(RECENT_LOSSES))


def test_a_spike_is_told_from_noise_and_from_the_start():
    assert "the loss is 9, after a mean of 3" in monitored([*NOISY, 9.0])
    assert monitored([*NOISY, 4.0]) is None  # ten deviations, but not by half
    assert monitored([*NOISY[1:], 9.0]) is None  # too early to say
    falling = list(np.linspace(12, 3, 3 * RECENT_LOSSES))
    assert monitored([*falling, 2.9]) is None
    assert "the loss is 20" in monitored([*falling, 20.0])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_a_divergence_at_once(bad):
    assert "not finite" in LossMonitor().divergence(bad, 1.0)
    assert "not finite" in LossMonitor().divergence(1.0, bad)


def test_the_documents_of_a_step_are_named(world, tmp_path):
    """Where they are, so that the owner can look at them; all of the batch's text is in them."""
    anchor, training = read_anchor(world.anchor), world.config("alone")
    tokenizer = anchor.tokenizer
    source, _ = prepare(
        str(world.texts["math"]), training.data, tokenizer, world.run("math") / "data"
    )
    record_divergence(tmp_path / "divergence.json", source, seed=0, step=3, why="it broke")
    found = json.loads((tmp_path / "divergence.json").read_text())
    assert found["step"] == 3 and found["why"] == "it broke"
    texts = {d.where: d.text for d in read_documents(str(world.texts["math"]))}
    named = [texts[where] for where in found["documents"]]
    assert 0 < len(named) < len(texts)
    *_, batch = (one for one, _ in zip(batches(source, 0), range(3), strict=False))
    used = set()
    for row, segments in zip(np.asarray(batch.tokens), np.asarray(batch.segments), strict=True):
        for segment in set(segments[segments > 0]):
            ids = [i for i in row[segments == segment] if i != tokenizer.separator]
            piece = tokenizer.decode([int(i) for i in ids]).strip("\ufffd ")
            holders = [i for i, text in enumerate(named) if piece in text]
            assert holders, piece
            used.update(holders)
    assert len(used) >= len(named) - len(batch.tokens)  # a target's document may be one more
