"""Training checkpoints: what is trained, the optimizer and the step; resumed bit for bit.

The step is the position in the data too, since batch i is a function of (seed, i).
"""

from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from flexolmo_jax import tensors


class Checkpoints:
    """The checkpoints of one run: the last two are kept, each appears complete or not at all."""

    def __init__(self, folder: Path):
        self.folder = folder.absolute()
        self._checkpointer = ocp.training.Checkpointer(
            self.folder,
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=ocp.training.preservation_policies.LatestN(2),
            cleanup_tmp_directories=True,
        )

    def save(self, step: int, state: Any) -> None:
        """Writes the state after `step` steps, in the background."""
        self._checkpointer.wait()
        if self.latest() != step:
            self._checkpointer.save_async(step, tensors.named(state))

    def latest(self) -> int | None:
        """The number of the newest checkpoint, or None."""
        newest = self._checkpointer.latest
        return None if newest is None else newest.step

    def load(self, step: int, like: Any) -> Any:
        """Reads checkpoint `step` into the structure of `like`.

        Raises:
          ValueError: it is damaged, or of another model.
        """

        def abstract(leaf):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)

        named = {name: abstract(leaf) for name, leaf in tensors.named(like).items()}
        try:
            return tensors.refill(like, self._checkpointer.load(step, named))
        except Exception as error:  # Orbax and TensorStore raise many kinds
            reason = str(error).strip().splitlines()[0]
            raise ValueError(
                f"{self.folder}: checkpoint {step} cannot be read, it is damaged or of another "
                f"run ({type(error).__name__}: {reason}); delete its folder to go on from an "
                "earlier one"
            ) from error

    def close(self) -> None:
        """Waits until all is on disk."""
        self._checkpointer.close()
