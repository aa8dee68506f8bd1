"""Where weights come from: a package or a Hugging Face directory, decided once, at opening."""

from pathlib import Path
from typing import Any, NamedTuple

from flexolmo_jax.config import ModelConfig
from flexolmo_jax.data.tokenizer import Tokenizer
from flexolmo_jax.federation.package import Package
from flexolmo_jax.interop import hf_import
from flexolmo_jax.modeling.experts import Experts
from flexolmo_jax.modeling.transformer import Backbone


class HuggingFace(NamedTuple):
    """A Hugging Face directory of a FlexOlmo or OLMo 2 model."""

    folder: Path

    def load(self, dtype: Any = None) -> tuple[Backbone, Experts, ModelConfig]:
        """All weights, on one device; `hf_import.load`."""
        return hf_import.load(self.folder, dtype)

    def tokenizer(self, config: ModelConfig, separator: str | None = None) -> Tokenizer | None:
        """Its tokenizer, or None where it has no tokenizer.json.

        Args:
          config: of its model.
          separator: the token that opens documents; default: what the directory names.
        """
        file = hf_import.tokenizer_file(self.folder)
        if file is None:
            return None
        separator = separator or hf_import.separator(self.folder)
        return Tokenizer.load(file, separator, config.vocab_size)

    def ends(self) -> tuple[int, ...]:
        """Ids that end a generated text."""
        return hf_import.ends_of_text(self.folder)


WeightSource = Package | HuggingFace


def open_source(path: Path, kind: str | None = None) -> WeightSource:
    """Opens a package or a Hugging Face directory.

    Args:
      path: the folder.
      kind: of a package, as in `Package.open`.

    Raises:
      ValueError: it is neither, or as `Package.open`.
    """
    return HuggingFace(path) if hf_import.is_hugging_face(path) else Package.open(path, kind)
