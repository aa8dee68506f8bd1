"""The mechanism: clipped sums over units of privacy, Gaussian noise, Poisson batches, randomness.

All uses of jax-privacy in training are in this file. The guarantee protects a *unit*: a document,
all documents of a group, or a window. Its contribution to any sum is clipped to a fixed norm, and
no divisor depends on text; `accounting.py` accounts for these sums and their noise.
"""

import dataclasses
import importlib.metadata
import secrets
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import jax_privacy
import numpy as np
from jax.experimental import multihost_utils
from jax_privacy import batch_selection, clipping, noise_addition

from flexolmo_jax.privacy.accounting import ZERO_OUT, Mechanism

SECRET_WORDS = 8  # words of 32 bits from the operating system's entropy


@dataclasses.dataclass(frozen=True)
class Clipping:
    """How the units of a batch are summed.

    Attributes:
      norm: C, the norm that a unit's contribution is clipped to.
      microbatch_size: number of units whose gradients are in memory at once; None for all.
    """

    norm: float
    microbatch_size: int | None = None


class Secret:
    """Randomness of noise and batches, for the lifetime of a process.

    It comes from the operating system, is the same in all processes of a run, and is never stored.
    A resumed run draws new randomness, so no noise is used twice.
    """

    def __init__(self) -> None:
        drawn = np.frombuffer(secrets.token_bytes(4 * SECRET_WORDS), np.uint32)
        if jax.process_count() > 1:
            drawn = np.asarray(multihost_utils.broadcast_one_to_all(drawn))
        self._noise, self._batches = drawn[:2], drawn[2:]

    def noise_key(self, number: int) -> jax.Array:
        """The key of the noise of a step; 0 is the release for the router rows."""
        key = jax.random.wrap_key_data(jnp.asarray(self._noise), impl="threefry2x32")
        return jax.random.fold_in(key, number)

    def generator(self, purpose: str) -> np.random.Generator:
        """Draws units, and windows of long units, from an independent stream for each purpose.

        The release for router rows must not repeat the draws of training: epsilon is small because
        nobody knows which units were in a batch.
        """
        return np.random.default_rng([*self._batches.tolist(), *purpose.encode()])

    def __repr__(self) -> str:
        return "Secret()"


def batches(mechanism: Mechanism, steps: int, generator: np.random.Generator) -> Iterator[Any]:
    """The units of `steps` batches: int [at most the largest batch] each."""
    sampling = batch_selection.CyclicPoissonSampling(
        sampling_prob=mechanism.sampling_probability,
        iterations=steps,
        truncated_batch_size=mechanism.largest_batch,
    )
    return sampling.batch_iterator(mechanism.units, generator)


def clipped_gradients(
    loss: Callable, clip: Clipping, trainable: Any, frozen: Any, batch: Any, is_empty: jax.Array
) -> tuple[Any, Any, jax.Array]:
    """The sum of the units' gradients, each clipped and then scaled to at most norm 1.

    Entries of a gradient that are not finite count as 0. Emptying the text of any one unit changes
    the sum by at most norm 1. Clipping and the sum are float32.

    Args:
      loss: (trainable, frozen, one unit of the batch) -> (value, metrics), of that unit alone.
      clip: the norm C that gradients are clipped to before they are divided by it.
      trainable, frozen: weights, replicated.
      batch: leaves with a leading axis of units.
      is_empty: bool [units]: padding units, which contribute nothing.

    Returns:
      the sum; and for each unit, NOT private and in another order, its metrics and the norm of its
      gradient.
    """
    gradients = jax_privacy.clipped_grad(
        loss,
        has_aux=True,
        batch_argnums=2,
        keep_batch_dim=False,
        l2_clip_norm=clip.norm,
        rescale_to_unit_norm=True,
        return_grad_norms=True,
        microbatch_size=clip.microbatch_size,
        dtype=jnp.float32,
    )
    assert gradients.sensitivity(ZERO_OUT) == 1.0
    batch, is_empty = _empty_last(clip, batch, is_empty)
    total, about = gradients(trainable, frozen, batch, is_padding_example=is_empty)
    return total, about.aux, about.grad_norms


def clipped_sum(
    statistic: Callable, clip: Clipping, batch: Any, is_empty: jax.Array, *fixed: Any
) -> jax.Array:
    """The sum of one vector per unit, each clipped and then scaled to at most norm 1.

    Args:
      statistic: (one unit of the batch, *fixed) -> float array.
      clip, batch, is_empty: as in `clipped_gradients`.
      fixed: further arguments, the same for all units.
    """
    total = clipping.clipped_fun(
        statistic,
        keep_batch_dim=False,
        l2_clip_norm=clip.norm,
        rescale_to_unit_norm=True,
        microbatch_size=clip.microbatch_size,
        dtype=jnp.float32,
    )
    assert total.sensitivity(ZERO_OUT) == 1.0
    batch, is_empty = _empty_last(clip, batch, is_empty)
    return total(batch, *fixed, is_padding_example=is_empty)


def _empty_last(clip: Clipping, batch: Any, is_empty: jax.Array) -> tuple[Any, jax.Array]:
    """Orders units so that empty ones share microbatches, which jax-privacy then skips.

    Of n microbatches, jax-privacy processes units i, n + i, 2n + i, ... in microbatch i, up to the
    last one with a unit that is not empty.
    """
    if clip.microbatch_size is None:
        return batch, is_empty
    places = jnp.arange(len(is_empty)).reshape(-1, clip.microbatch_size).T.reshape(-1)
    order = jnp.argsort(is_empty, stable=True)[places]
    return jax.tree.map(lambda x: x[order], batch), is_empty[order]


def with_noise(total: Any, noise_multiplier: float, key: jax.Array) -> Any:
    """Adds Gaussian noise to every coordinate of a sum with sensitivity 1: float32."""
    gaussian = noise_addition.gaussian_privatizer(
        stddev=noise_multiplier, prng_key=key, dtype=jnp.float32
    )
    return gaussian.update(total, gaussian.init(total))[0]


def version() -> str:
    """Name and version of the package that clips, adds noise and draws batches."""
    return f"jax_privacy {importlib.metadata.version('jax_privacy')}"
