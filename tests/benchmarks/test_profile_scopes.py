"""The profile's parts: which operation of a compiled program belongs to which."""

import jax
import jax.numpy as jnp

from benchmarks.profile import operations


def test_a_product_whose_scope_xla_drops_has_that_of_its_branch(tmp_path):
    """XLA for CPU drops the scope of a row times a matrix, of which decoding consists."""

    def layer(x, matrix, is_used):
        with jax.named_scope("attention"):
            x = jnp.tanh(x @ matrix)
        with jax.named_scope("experts"):
            return jax.lax.cond(is_used, lambda x: jnp.tanh(x) @ matrix * 2, lambda x: x, x)

    arguments = jnp.ones((1, 512)), jnp.ones((512, 512)), jnp.bool_(True)
    text = jax.jit(layer).lower(*arguments).compile().as_text()
    (tmp_path / "module_0001.jit_layer.cpu_after_optimizations.txt").write_text(text)
    found = operations(tmp_path)
    products = [scope for opcode, scope in found.values() if opcode == "dot"]
    assert len(products) == 2
    assert sum("experts/cond" in scope for scope in products) == 1
