"""Routing mass: how much of an answer each expert computed, by the router's weights.

The mass of expert e in an answer of n tokens is

    mass(e) = 1/L * sum over layers l and answer tokens t of w(e, l, t)

where w(e, l, t) is the weight that the router gave e in layer l at the token before t, from which t
was predicted. Its unit is tokens: where the weights of a token sum to 1, the masses sum to n.
Tokens of the prompt do not count, but for the last one, which predicts the first of the answer:
an asker chooses the prompt, and could paste anybody's text to move the mass, and a prompt whose
beginning another request has read is not computed again.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from flexolmo_jax.config import ModelConfig
from flexolmo_jax.modeling.experts import Experts
from flexolmo_jax.modeling.transformer import Backbone, forward
from flexolmo_jax.parallel import placement
from flexolmo_jax.parallel.mesh import BATCH, specs_of

BUCKET = 64  # texts are padded to a multiple, so that few shapes compile


def mass_by_name(names: Sequence[str], mass: np.ndarray) -> dict[str, float]:
    """The mass of experts [E], in tokens to 4 digits: of those that have any, largest first."""
    own = {name: round(float(x), 4) for name, x in zip(names, mass, strict=False)}
    return {name: own[name] for name in sorted(own, key=lambda x: -own[x]) if own[name] > 0}


def shares_by_name(names: Sequence[str], mass: np.ndarray) -> dict[str, float]:
    """As `mass_by_name`, scaled to a sum of 1."""
    total = float(mass.sum()) or 1.0
    own = {name: float(x) / total for name, x in zip(names, mass, strict=False) if x > 0}
    return {name: round(own[name], 4) for name in sorted(own, key=lambda x: -own[x])}


def read_mass(
    backbone: Backbone,
    experts: Experts,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    allowed: np.ndarray,
    config: ModelConfig,
    mesh: Mesh | None,
) -> np.ndarray:
    """The routing mass in answers that are known already, from one reading of all texts.

    Args:
      backbone, experts, config, mesh: the model.
      prompts, answers: token ids; a prompt has at least one.
      allowed: bool [B, E], the experts that each text may use.

    Returns:
      float32 [B, E], in tokens.
    """
    starts = np.array([len(prompt) for prompt in prompts], np.int32)
    stops = starts + np.array([len(answer) for answer in answers], np.int32)
    tokens = np.zeros((len(prompts), -(-int(stops.max()) // BUCKET) * BUCKET), np.int32)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        tokens[row, : stops[row]] = [*prompt, *answer]
    rows = placement.put_padded_batch((tokens, starts, stops, allowed), mesh)
    with placement.use_mesh(mesh):
        mass = _mass(backbone, experts, *rows, config, mesh)
    return placement.to_host(mass)[: len(prompts)]


@functools.partial(jax.jit, static_argnames=("config", "mesh"))
def _mass(
    backbone: Backbone,
    experts: Experts,
    tokens: Int[Array, "B S"],
    starts: Int[Array, " B"],
    stops: Int[Array, " B"],
    allowed: Bool[Array, "B E"],
    config: ModelConfig,
    mesh: Mesh | None,
) -> Float[Array, "B E"]:
    """Of the tokens [start, stop) of each sequence."""

    def local(backbone, experts, tokens, starts, stops, allowed):
        out = forward(backbone, (experts,), tokens, config, allowed=allowed)
        before = jnp.arange(1, tokens.shape[1] + 1)  # of which token each is the one before
        counts = (before >= starts[:, None]) & (before < stops[:, None])
        return jnp.einsum("ebs,bs->be", out.mean_weights, counts.astype(jnp.float32))

    weights = (backbone, experts)
    specs = mesh and (*specs_of(weights, mesh), BATCH, BATCH, BATCH, BATCH)
    return placement.shard_map(local, mesh, specs, BATCH)(*weights, tokens, starts, stops, allowed)  # type: ignore[arg-type]
