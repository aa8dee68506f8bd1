"""What tests of decoding share."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexolmo_jax.modeling.experts import Ranks


@pytest.fixture(scope="session")
def routed_by():
    """routed_by(model, routing): the model routed by its router, with memory, or by evidence."""

    def routed(model, routing: str):
        if routing != "evidence":
            memory = {"router": None, "memory": (0.5, 2.0)}[routing]
            return dataclasses.replace(model, config=model.config.replace(memory=memory))
        config = model.config.replace(memory=None, evidence=(0.9, 0.5, 1.5))
        experts = jax.tree.map(jnp.array, model.experts)
        experts.set_heads(config, Ranks(evidence=4), jax.random.key(0))
        values = np.random.default_rng(0).standard_normal(experts.evidence.b[...].shape)
        experts.evidence.b[...] = jnp.asarray(values, jnp.float32)  # random bigram models
        return dataclasses.replace(model, experts=experts, config=config)

    return routed
