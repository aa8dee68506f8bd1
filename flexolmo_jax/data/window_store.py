"""The TFDS builder: any source of documents becomes windows in array_record files.

No TensorFlow is involved: TFDS writes array_record itself and hands back random access.
"""

import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import tensorflow_datasets as tfds

from flexolmo_jax.config import DataConfig
from flexolmo_jax.data.sources import Document, Report, fingerprint, is_heldout, read_documents
from flexolmo_jax.data.tokenizer import Tokenizer
from flexolmo_jax.data.windows import Window, tokenized, windows
from flexolmo_jax.runtime.processes import is_main_process, one_process_at_a_time
from flexolmo_jax.storage.locks import private_folder


class SourceWindows(tfds.core.GeneratorBasedBuilder):
    """Windows of one source, in a train split and a held-out split (by document)."""

    VERSION = tfds.core.Version("2.0.0")  # windows of version 1 hold no report
    name = "source_windows"

    def __init__(
        self,
        source: str,
        data: DataConfig,
        tokenizer: Tokenizer,
        *,
        data_dir: Path,
        extra: Sequence[Document] = (),
        also: str = "",
    ):
        """`extra` documents are trained on too; `also` is what else the windows depend on."""
        self.source, self.data, self.tokenizer, self.extra = source, data, tokenizer, extra
        self.report = Report()
        what = [
            fingerprint(source), data.length, data.text_field, data.group_field, data.heldout,
            tokenizer.digest, tokenizer.separator, *filter(None, [also]), *(d.text for d in extra),
        ]  # fmt: skip
        name = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]
        super().__init__(
            config=tfds.core.BuilderConfig(name=name, version=self.VERSION),
            data_dir=data_dir,
            file_format="array_record",
        )

    def _info(self) -> tfds.core.DatasetInfo:
        row = tfds.features.Tensor(shape=(self.data.length + 1,), dtype=np.int32)
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict({"tokens": row, "segments": row}),
            metadata=tfds.core.MetadataDict(),  # the report, for a run that reads the same windows
            disable_shuffling=True,  # `batches` orders them, by its seed
        )

    def _split_generators(self, dl_manager):
        """The splits that hold anything; TFDS does not write empty ones."""
        splits = {}
        for name, heldout in (("train", False), ("heldout", True)):
            if heldout and not self.data.heldout:
                continue  # without this, the whole source would be read again for nothing
            examples = self._reported(heldout)
            first = next(examples, None)
            if first is not None:
                splits[name] = itertools.chain([first], examples)
        if "train" not in splits:
            raise ValueError(
                f"{self.source}: all documents are held out (heldout={self.data.heldout}); give "
                "more documents, or hold out less"
            )
        return splits

    def _reported(self, heldout: bool):
        """The examples; when all are written, the report of the read goes into the metadata."""
        yield from self._generate_examples(heldout)
        if not heldout:
            self.info.metadata.update(dataclasses.asdict(self.report))

    def _generate_examples(self, heldout: bool):
        for index, window in enumerate(self.windows(heldout=heldout)):
            yield index, window._asdict()

    def windows(self, *, heldout: bool) -> Iterator[Window]:
        """The windows of one side of the split, straight from the source."""
        chosen = self._documents(heldout, Report() if heldout else self.report)
        ids = tokenized(chosen, self.tokenizer)
        return windows(ids, self.data.length, self.tokenizer.separator)

    def _documents(self, heldout: bool, report: Report) -> Iterator[Document]:
        documents = read_documents(
            self.source,
            text_field=self.data.text_field,
            group_field=self.data.group_field,
            report=report,
        )
        chosen = (d for d in documents if is_heldout(d, self.data.heldout) == heldout)
        return itertools.chain(chosen, () if heldout else self.extra)

    def documents_of(self, numbers: Sequence[int]) -> list[str]:
        """Where the documents of some training windows are, as "file:row"; reads the source."""
        length = self.data.length
        found, start = [], 0
        chosen, again = itertools.tee(self._documents(False, Report()))
        for document, ids in zip(chosen, tokenized(again, self.tokenizer), strict=True):
            end = start + len(ids)  # window n reads and predicts n * length to (n + 1) * length
            if any(start <= (n + 1) * length and n * length < end for n in numbers):
                found.append(document.where)
            start = end
        return found


Windows = TypeVar("Windows", bound=SourceWindows)
Builder = TypeVar("Builder", bound=tfds.core.DatasetBuilder)


def prepare(
    source: str,
    data: DataConfig,
    tokenizer: Tokenizer,
    folder: Path,
    extra: Sequence[Document] = (),
) -> tuple[SourceWindows, Report]:
    """Builds the windows of a source below `folder`, unless they exist.

    Of several processes, the first builds them. `extra` documents are trained on too, after the
    source's, whatever is held out of it.

    Raises:
      ValueError: as `read_documents`; or nothing is left to train on after the held-out split.
    """
    private_folder(folder)  # the windows are the text
    builder = build(lambda: SourceWindows(source, data, tokenizer, data_dir=folder, extra=extra))
    return builder, builder.report


def build(make: Callable[[], Windows]) -> Windows:
    """A builder whose windows are on disk, with the report of the read that made them.

    Of several processes, the first has the report.
    """
    builder = one_process_at_a_time(lambda: prepared(make))
    if is_main_process():
        kept = {**builder.info.metadata, "source": str(builder.source)}
        builder.report = Report(**kept)
    return builder


def prepared(make: Callable[[], Builder]) -> Builder:
    """A builder whose files are on disk: written unless they exist."""
    logging.getLogger("absl").setLevel(logging.ERROR)
    tfds.disable_progress_bar()
    builder = make()
    with contextlib.redirect_stdout(io.StringIO()):  # it announces a download; there is none
        builder.download_and_prepare()
    return builder
