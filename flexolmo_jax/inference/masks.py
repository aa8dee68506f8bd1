"""Which experts each sequence of a batch may use."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool


def expert_mask(
    names: Sequence[str],
    batch: int,
    without: Sequence[str] = (),
    only: Sequence[str] | None = None,
    allowed=None,
) -> Bool[np.ndarray, "B E"]:
    """The experts that each sequence may use, by names and by a mask.

    Args:
      names: of all experts, in the order of the stack.
      batch: the number of sequences.
      without: names of experts to switch off.
      only: names of the only experts to use.
      allowed: bool [E] or [B, E].

    Raises:
      ValueError: an unknown name, a mask of another shape, or a sequence without any expert.
    """
    count = len(names)
    mask = np.ones((batch, count), bool)
    if allowed is not None:
        given = np.asarray(allowed)
        if given.dtype != bool or given.shape not in ((count,), (batch, count)):
            raise ValueError(
                f"allowed must be bool [{count}] or [{batch}, {count}], found {given.dtype} "
                f"{list(given.shape)}"
            )
        mask &= given
    mask[:, _indices(names, without)] = False
    if only is not None:
        mask &= np.isin(np.arange(count), _indices(names, only))
    if not mask.any(axis=1).all():
        raise ValueError(f"all experts are switched off; leave at least one of {', '.join(names)}")
    return mask


def _indices(names: Sequence[str], chosen: Sequence[str]) -> list[int]:
    chosen = [chosen] if isinstance(chosen, str) else list(chosen)
    for name in chosen:
        if name not in names:
            raise ValueError(f"no expert named {name!r}; there are {', '.join(names)}")
    return [list(names).index(name) for name in chosen]
