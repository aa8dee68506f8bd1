"""Where weights come from: a package or a Hugging Face directory, decided once, at opening."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from flexolmo_jax.config import ModelConfig
from flexolmo_jax.data.tokenizer import Tokenizer
from flexolmo_jax.federation.package import Package
from flexolmo_jax.interop import hf_import
from flexolmo_jax.modeling.experts import Experts
from flexolmo_jax.modeling.transformer import Backbone


class HuggingFaceModel(NamedTuple):
    """What a Hugging Face directory holds.

    Attributes:
      backbone, experts, config: the model, on one device.
      tokenizer: None where there is no tokenizer.json.
      ends: ids that end a generated text.
      order: the numbers of its experts, in the order of the stack.
    """

    backbone: Backbone
    experts: Experts
    config: ModelConfig
    tokenizer: Tokenizer | None
    ends: tuple[int, ...]
    order: tuple[int, ...]


class HuggingFace(NamedTuple):
    """A Hugging Face directory of a FlexOlmo, FlexMoRE or OLMo 2 model."""

    folder: Path

    def load(self, separator: str | None = None, dtype: Any = None) -> HuggingFaceModel:
        """Loads all of it.

        Args:
          separator: the token that opens documents; default: what the directory names.
          dtype: of the weights, as in `hf_import.load`.
        """
        backbone, experts, config = hf_import.load(self.folder, dtype)
        file, tokenizer = hf_import.tokenizer_file(self.folder), None
        if file is not None:
            separator = separator or hf_import.separator(self.folder)
            tokenizer = Tokenizer.load(file, separator, config.vocab_size)
        ends = hf_import.ends_of_text(self.folder)
        order = hf_import.expert_order(self.folder, config)
        return HuggingFaceModel(backbone, experts, config, tokenizer, ends, order)


WeightSource = Package | HuggingFace
# Is called with an opened package before anything but its manifest is used, and raises ValueError
# to refuse it: `trust` gives one that asks for a signature.
Require = Callable[[Package], object]


def open_source(
    path: Path, kind: str | None = None, require: Require | None = None
) -> WeightSource:
    """Opens a package or a Hugging Face directory.

    Args:
      path: the folder.
      kind: of a package, as in `Package.open`.
      require: what a package must be, beyond that; a Hugging Face directory is then refused.

    Raises:
      ValueError: it is neither, or as `Package.open`, or `require` refuses it.
    """
    if not hf_import.is_hugging_face(path):
        return open_required(path, kind, require)
    if require is not None:
        raise ValueError(
            f"{path}: expected a signed package, found a Hugging Face folder, which cannot be "
            "signed; make a package of it with `flexolmo import`"
        )
    return HuggingFace(path)


def open_required(path: Path, kind: str | None = None, require: Require | None = None) -> Package:
    """As `Package.open`; `require` may refuse the package."""
    package = Package.open(path, kind)
    if require is not None:
        require(package)
    return package
