"""The units of privacy of a source; no window holds text of two units."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from flexolmo_jax.config import DataConfig
from flexolmo_jax.data.batches import Batch
from flexolmo_jax.data.sources import Document, Report, is_heldout, read_documents
from flexolmo_jax.data.tokenizer import Tokenizer
from flexolmo_jax.data.window_store import SourceWindows, build
from flexolmo_jax.data.windows import Window, tokenized, windows
from flexolmo_jax.storage.locks import private_folder

KINDS = ("document", "group", "sequence")


class UnitWindows(SourceWindows):
    """As `SourceWindows`, but each window holds one document only, and names its unit."""

    name = "unit_windows"

    def __init__(
        self,
        source: str,
        data: DataConfig,
        tokenizer: Tokenizer,
        *,
        data_dir: Path,
        unit: str,
        extra: Sequence[Document] = (),
    ):
        """`unit` is one of KINDS; a group is what `data.group_field` says."""
        self.unit = unit
        super().__init__(source, data, tokenizer, data_dir=data_dir, extra=extra, also=unit)

    def _info(self) -> tfds.core.DatasetInfo:
        row = tfds.features.Tensor(shape=(self.data.length + 1,), dtype=np.int32)
        features = {"tokens": row, "segments": row, "unit": np.int64}
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(features),
            metadata=tfds.core.MetadataDict(),
            disable_shuffling=True,
        )

    def _generate_examples(self, heldout: bool):
        units = self._units(heldout)
        for index, (unit, window) in enumerate(units):
            number = index if self.unit == "sequence" else unit
            yield index, {**window._asdict(), "unit": number}

    def _units(self, heldout: bool) -> Iterator[tuple[int, Window]]:
        """The windows of each document, and the number of its unit."""
        length, separator = self.data.length, self.tokenizer.separator
        groups: dict[str, int] = {}
        documents = self._documents(heldout, Report() if heldout else self.report)
        for unit, document in enumerate(documents):
            if self.unit == "group":
                unit = groups.setdefault(document.group, len(groups))
            for window in windows(tokenized([document], self.tokenizer), length, separator):
                yield unit, window

    def _documents(self, heldout: bool, report: Report) -> Iterator[Document]:
        """Documents of one side of the split; a group keeps texts that another group has too."""
        for document in read_documents(
            self.source,
            text_field=self.data.text_field,
            group_field=self.data.group_field,
            report=report,
            distinct="group" if self.unit == "group" else "text",
        ):
            if self.unit == "group" and document.group == document.text:
                raise ValueError(
                    f"{document.where}: no field {self.data.group_field!r}, or nothing in it, "
                    "which says whose document this is; every row must have it, or it would be "
                    "protected alone"
                )
            if is_heldout(document, self.data.heldout) == heldout:
                yield document
        if not heldout:
            yield from self.extra


class Units:
    """The training units of a source, each with any number of windows.

    Attributes:
      data, report: as of the builder.
      windows: of all units, with random access.
    """

    def __init__(self, builder: UnitWindows, empty: int = 0):
        """Appends `empty` units without tokens; they are sampled and counted like any other."""
        self.data = builder.data
        self.report = builder.report
        self.windows = builder.as_data_source("train")
        self._empty = empty
        of = np.array([self.windows[i]["unit"] for i in range(len(self.windows))])
        self._order = np.argsort(of, kind="stable")
        self._first = np.flatnonzero(np.diff(of[self._order], prepend=-1))

    def __len__(self) -> int:
        return len(self._first) + self._empty

    def windows_of(self, unit: int) -> np.ndarray:
        """The numbers of the windows of a unit."""
        bounds = [*self._first[unit : unit + 2], len(self._order), len(self._order)]
        return self._order[bounds[0] : bounds[1]]

    def batch(
        self,
        units: Sequence[int] | np.ndarray,
        shape: tuple[int, int],
        generator: np.random.Generator,
        ways: int = 1,
    ) -> Batch:
        """The windows of some units, one row of windows for each; weights are 1 / (W * S) or 0.

        Args:
          units: their numbers.
          shape: (rows, W windows in each). Rows without a unit, and windows without text, are
            padding. Of a unit with more than W windows, W are drawn.
          generator: what to draw with.
          ways: units are assigned round-robin to this many equal shares of the rows.
        """
        rows, most = shape
        tokens = np.zeros((rows, most, self.data.length + 1), np.int32)
        segments = np.zeros_like(tokens)
        for number, unit in enumerate(units):
            found = self.windows_of(int(unit))
            if len(found) > most:
                found = generator.choice(found, most, replace=False, shuffle=False)
            row = number % ways * (rows // ways) + number // ways
            for place, window in enumerate(self.windows.__getitems__(found.tolist())):
                tokens[row, place] = window["tokens"]
                segments[row, place] = window["segments"]
        batch = Batch.of(tokens, segments)
        return batch._replace(weights=batch.weights / (most * self.data.length))


def prepare_units(
    source: str,
    data: DataConfig,
    tokenizer: Tokenizer,
    folder: Path,
    unit: str,
    extra: Sequence[Document] = (),
    empty: int = 0,
) -> Units:
    """As `window_store.prepare`, for the units of a private run (one of KINDS), and `empty` ones.

    Raises:
      ValueError: as `read_documents`; nothing is left to train on after the held-out split; a
        document is of no group where groups are the units.
    """

    def make() -> UnitWindows:
        return UnitWindows(source, data, tokenizer, data_dir=folder, unit=unit, extra=extra)

    private_folder(folder)  # the windows are the text
    return Units(build(make), empty)
