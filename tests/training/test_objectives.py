"""Weights are put together by their names, whatever the order in which a tree has them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flexolmo_jax.config import ModelConfig
from flexolmo_jax.modeling.experts import Experts
from flexolmo_jax.training.objectives import RouterRows, with_parts

CONFIG = ModelConfig(vocab_size=8, width=4, num_layers=2, num_heads=2, ffn_width=6)


class OtherRouter(NamedTuple):
    """A router whose leaves come in another order: those of a module come by the alphabet."""

    row: Any
    bias: Any


class OtherExperts(NamedTuple):
    """Experts whose parts come in another order."""

    router: Any
    feed_forward: Any


def stack(count: int) -> Experts:
    return Experts(CONFIG, count, jax.random.key(count))


def test_parts_are_put_in_place_by_name():
    new, like = stack(1), stack(2)
    before = like.router.row[...]
    found = with_parts(like, feed_forward=new.feed_forward, router=new.router)
    assert type(found) is Experts
    assert found.feed_forward.gate[...] is new.feed_forward.gate[...]
    assert found.feed_forward.down[...] is new.feed_forward.down[...]
    assert found.router.row[...] is new.router.row[...]
    assert like.router.row[...] is before
    assert not hasattr(with_parts(found, feed_forward=None), "feed_forward")


def test_router_rows_are_put_in_place_by_name():
    rows = RouterRows(jnp.ones((2, 3, 4)), jnp.full((2, 2), -1.0))
    for like in (stack(3).router, OtherRouter(jnp.zeros((2, 3, 4)), jnp.zeros((2, 3)))):
        found = rows.router(like)
        np.testing.assert_array_equal(found.row[...], np.ones((2, 3, 4)))
        np.testing.assert_array_equal(found.bias[...], [[0, -1, -1]] * 2)
