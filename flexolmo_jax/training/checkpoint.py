"""Training checkpoints: trained weights, optimizer state and step; runs resume bit for bit.

The step is also the position in the data and in every random sequence: batch i is a function of
(seed, i).
"""

import contextlib
import errno
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import jax
from orbax.checkpoint import v1 as ocp

from flexolmo_jax.runtime.processes import all_agree, is_main_process
from flexolmo_jax.storage import tensors
from flexolmo_jax.storage.locks import private_folder


class Checkpoints:
    """The last two checkpoints of a run; each appears complete or not at all.

    As a context manager, it waits on leaving until pending writes have ended, even after an error:
    otherwise the next process in the folder could run into them.
    """

    def __init__(self, folder: Path):
        self.folder = folder.absolute()
        private_folder(self.folder)
        # If writing fails, each of Orbax's threads logs a traceback. `save` or `close` raises the
        # first error, which is enough.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        self._open()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with contextlib.nullcontext() if kind is None else contextlib.suppress(Exception):
            self.close()

    def _open(self) -> None:
        self._checkpointer = ocp.training.Checkpointer(
            self.folder,
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=ocp.training.preservation_policies.LatestN(2),
            cleanup_tmp_directories=True,
        )

    def save(self, step: int, state: Any) -> None:
        """Writes the state after `step` steps, in the background.

        Raises:
          OSError: this or the previous checkpoint could not be written, as on a full disk.
        """
        with _full_disk_as_os_error(self.folder):
            self._checkpointer.wait()
            if self.latest() != step:
                self._checkpointer.save_async(step, tensors.named(state))

    def latest(self) -> int | None:
        """The step of the newest checkpoint, or None."""
        newest = self._checkpointer.latest
        return None if newest is None else newest.step

    def load_newest(self, like: Any) -> tuple[int, Any]:
        """Loads the newest readable checkpoint.

        Moves an unreadable checkpoint to the folder `damaged`, with a warning.

        Args:
          like: the state to fill, on its devices.

        Returns:
          the step and the state; (0, like) if there is no checkpoint.

        Raises:
          ValueError: there are checkpoints, but none can be read.
        """
        while (step := self.latest()) is not None:
            try:
                state, damage = self.load(step, like), None
            except ValueError as error:
                state, damage = like, error
            if all_agree(damage is None):
                return step, state
            damage = damage or ValueError(f"another process could not read checkpoint {step}")
            if len(self._checkpointer.checkpoints) == 1:
                raise ValueError(f"{damage}; there is no other, so start a new run")
            self._move_to_damaged(step)
            warnings.warn(f"{damage}; resuming from checkpoint {self.latest()}", stacklevel=2)
        return 0, like

    def _move_to_damaged(self, step: int) -> None:
        self._checkpointer.close()
        if is_main_process():
            damaged = self.folder.with_name("damaged")
            private_folder(damaged)
            number = len(list(damaged.iterdir()))
            (self.folder / str(step)).rename(damaged / f"{step}.{number}")
        all_agree(True)  # a barrier: all processes wait for the move
        self._open()

    def load(self, step: int, like: Any) -> Any:
        """Loads checkpoint `step` into the structure of `like`, onto its devices.

        Raises:
          ValueError: the checkpoint is damaged, or of another model.
        """

        def abstract(leaf):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)

        named = {name: abstract(leaf) for name, leaf in tensors.named(like).items()}
        try:
            return tensors.refill(like, self._checkpointer.load(step, named))
        except Exception as error:  # Orbax and TensorStore raise many types
            reason = str(error).strip().splitlines()[0]
            raise ValueError(
                f"{self.folder}: checkpoint {step} cannot be read; it is damaged or of another "
                f"run ({type(error).__name__}: {reason})"
            ) from error

    def close(self) -> None:
        """Waits until everything is on disk. Raises OSError as `save`."""
        with _full_disk_as_os_error(self.folder):
            self._checkpointer.close()


@contextlib.contextmanager
def _full_disk_as_os_error(folder: Path) -> Iterator[None]:
    """TensorStore and Orbax raise several types of errors for a full disk; this raises OSError."""
    try:
        yield
    except Exception as error:
        for number in (errno.ENOSPC, errno.EDQUOT):
            if os.strerror(number) in str(error):
                raise OSError(number, os.strerror(number), str(folder)) from error
        raise
