"""The mechanism: clipped sums over units of privacy, Gaussian noise, Poisson batches, the secret.

All that training uses of jax-privacy is used here. A *unit* is what the guarantee speaks of: a
document, all documents of a group, or a window. Its part in any sum is clipped to a fixed length,
and no divisor depends on text: it is this, and the noise, that the accounts in `accounting.py` are
of.
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

SECRET_WORDS = 8  # of 32 bits: of the operating system's entropy


@dataclasses.dataclass(frozen=True)
class Clipping:
    """How the units of a batch are summed.

    Attributes:
      norm: C, the length to which a unit's part is clipped.
      microbatch_size: units whose gradients are in memory at the same time; None for all.
    """

    norm: float
    microbatch_size: int | None = None


class Secret:
    """Randomness of one process's life: where noise and batches come from.

    It is the operating system's, the same in all processes of a run, and is nowhere written down.
    A run that goes on after an interruption has another one, so that no noise comes twice.
    """

    def __init__(self) -> None:
        drawn = np.frombuffer(secrets.token_bytes(4 * SECRET_WORDS), np.uint32)
        if jax.process_count() > 1:
            drawn = np.asarray(multihost_utils.broadcast_one_to_all(drawn))
        self._noise, self._batches = drawn[:2], drawn[2:]

    def noise_key(self, number: int) -> jax.Array:
        """The key of noise number `number` (a step; 0 for the router rows)."""
        key = jax.random.wrap_key_data(jnp.asarray(self._noise), impl="threefry2x32")
        return jax.random.fold_in(key, number)

    def generator(self, purpose: str) -> np.random.Generator:
        """For drawing units, and windows of long ones; for each purpose a stream of its own.

        The release for router rows must not repeat the draws of training: that epsilon is small
        because nobody knows who was in a batch.
        """
        return np.random.default_rng([*self._batches.tolist(), *purpose.encode()])

    def __repr__(self) -> str:
        return "Secret()"


def batches(mechanism: Mechanism, steps: int, generator: np.random.Generator) -> Iterator[Any]:
    """The units of each of so many batches, int [at most the largest batch]."""
    sampling = batch_selection.CyclicPoissonSampling(
        sampling_prob=mechanism.sampling_probability,
        iterations=steps,
        truncated_batch_size=mechanism.largest_batch,
    )
    return sampling.batch_iterator(mechanism.units, generator)


def clipped_gradients(
    loss: Callable, clip: Clipping, trainable: Any, frozen: Any, batch: Any, is_empty: jax.Array
) -> tuple[Any, Any, jax.Array]:
    """The sum, over the units of a batch, of the gradient of each, clipped to length 1.

    A gradient that is not finite counts as 0 where it is not. The sum changes by at most 1 in
    length if the text of any one unit becomes nothing; it is float32, as clipping is.

    Args:
      loss: (trainable, frozen, one unit of the batch) -> (value, metrics), of that unit alone.
      clip: the length C that is cut to, before it is scaled to 1.
      trainable, frozen: weights, whole.
      batch: leaves with a leading axis of units.
      is_empty: bool [units]: those that are padding; they add nothing.

    Returns:
      the sum; and of each unit, NOT private, in another order: its metrics, and the length of its
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
    batch, is_empty = _by_turns(clip, batch, is_empty)
    total, about = gradients(trainable, frozen, batch, is_padding_example=is_empty)
    return total, about.aux, about.grad_norms


def clipped_sum(
    statistic: Callable, clip: Clipping, batch: Any, is_empty: jax.Array, *fixed: Any
) -> jax.Array:
    """The sum, over the units of a batch, of a vector of each, clipped to length 1.

    Args:
      statistic: (one unit of the batch, *fixed) -> float array.
      clip, batch, is_empty: as in `clipped_gradients`.
      fixed: the same for all units.
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
    batch, is_empty = _by_turns(clip, batch, is_empty)
    return total(batch, *fixed, is_padding_example=is_empty)


def _by_turns(clip: Clipping, batch: Any, is_empty: jax.Array) -> tuple[Any, jax.Array]:
    """The units in an order in which the empty ones share turns, which are then left out.

    Of n turns, jax-privacy works on units i, n + i, 2n + i, ... in turn i, up to the last turn in
    which a unit is not empty.
    """
    if clip.microbatch_size is None:
        return batch, is_empty
    places = jnp.arange(len(is_empty)).reshape(-1, clip.microbatch_size).T.reshape(-1)
    order = jnp.argsort(is_empty, stable=True)[places]
    return jax.tree.map(lambda x: x[order], batch), is_empty[order]


def with_noise(total: Any, noise_multiplier: float, key: jax.Array) -> Any:
    """A sum whose sensitivity is 1 with Gaussian noise on every coordinate, float32."""
    gaussian = noise_addition.gaussian_privatizer(
        stddev=noise_multiplier, prng_key=key, dtype=jnp.float32
    )
    return gaussian.update(total, gaussian.init(total))[0]


def version() -> str:
    """The package that clips, adds noise and draws batches."""
    return f"jax_privacy {importlib.metadata.version('jax_privacy')}"
