"""Training checkpoints: what is trained, the optimizer and the step; resumed bit for bit.

The step is the position in the data and in every random sequence too: batch i is a function of
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
    """The checkpoints of one run: the last two are kept, each appears complete or not at all.

    As a context manager, it waits on leaving for what is being written, also after an error: the
    next process in the folder would otherwise meet a writer of this one.
    """

    def __init__(self, folder: Path):
        self.folder = folder.absolute()
        private_folder(self.folder)
        # Each of Orbax's threads logs a traceback of its own where writing fails. The first error
        # is raised in `save` or `close`, and says enough.
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
          OSError: this or the one before could not be written, as on a full disk.
        """
        with _full_disk_told(self.folder):
            self._checkpointer.wait()
            if self.latest() != step:
                self._checkpointer.save_async(step, tensors.named(state))

    def latest(self) -> int | None:
        """The number of the newest checkpoint, or None."""
        newest = self._checkpointer.latest
        return None if newest is None else newest.step

    def load_newest(self, like: Any) -> tuple[int, Any]:
        """The newest checkpoint that can be read: its step, and the state; (0, like) if none is.

        One that cannot be read is put into the folder `damaged` beside, with a warning.

        Args:
          like: the state to fill, placed where it shall be.

        Raises:
          ValueError: there are checkpoints, and none can be read.
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
                raise ValueError(f"{damage}; there is no other, so the run must be started anew")
            self._put_aside(step)
            warnings.warn(f"{damage}; going on from checkpoint {self.latest()}", stacklevel=2)
        return 0, like

    def _put_aside(self, step: int) -> None:
        self._checkpointer.close()
        if is_main_process():
            aside = self.folder.with_name("damaged")
            private_folder(aside)
            number = len(list(aside.iterdir()))
            (self.folder / str(step)).rename(aside / f"{step}.{number}")
        all_agree(True)  # nobody looks before it is done
        self._open()

    def load(self, step: int, like: Any) -> Any:
        """Reads checkpoint `step` into the structure of `like`, on its devices.

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
                f"run ({type(error).__name__}: {reason})"
            ) from error

    def close(self) -> None:
        """Waits until all is on disk. Raises OSError as `save`."""
        with _full_disk_told(self.folder):
            self._checkpointer.close()


@contextlib.contextmanager
def _full_disk_told(folder: Path) -> Iterator[None]:
    """TensorStore and Orbax have several errors for a full disk; this makes them one."""
    try:
        yield
    except Exception as error:
        for number in (errno.ENOSPC, errno.EDQUOT):
            if os.strerror(number) in str(error):
                raise OSError(number, os.strerror(number), str(folder)) from error
        raise
