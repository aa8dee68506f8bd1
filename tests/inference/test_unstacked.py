"""Decoding from unstacked weights against decoding over the stacks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexolmo_jax.inference.unstacked import turn_back, unstack
from flexolmo_jax.modeling.transformer import forward

TOKENS = np.array([[5, 3, 8, 1], [7, 7, 2, 9]], np.int32)


@pytest.mark.parametrize("turned", [False, True])
def test_unstacked_weights_give_the_same_logits(model, turned):
    allowed = np.array([[True, False, True, True], [True, True, False, True]])
    expected = model.logits(TOKENS, allowed=allowed)

    @jax.jit
    def logits(weights):
        layers, head = turn_back(weights) if turned else weights
        out = forward(
            model.backbone, (model.experts,), TOKENS, model.config, allowed=allowed, layers=layers
        )
        return out.hidden @ head

    found = logits(unstack(model.backbone, model.experts, turned))
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found / scale, expected / scale, atol=1e-5)


def test_a_skipped_expert_may_be_nan(model):
    """Also in decoding: what is switched off is not read."""
    experts = jax.tree.map(jnp.array, model.experts)
    experts.feed_forward.up[...] = experts.feed_forward.up[...].at[:, 1].set(jnp.nan)
    broken = type(model)(model.backbone, experts, model.config, model.expert_names, model.tokenizer)
    for prompts in (["The theorem"], ["The theorem", "A river"]):
        without = [model.expert_names[1]]
        expected = model.generate(prompts, 8, without=without)
        assert broken.generate(prompts, 8, without=without) == expected
