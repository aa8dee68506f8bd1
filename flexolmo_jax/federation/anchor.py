"""The anchor on disk: a package of ours, or a Hugging Face directory as it was released."""

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax

from flexolmo_jax import tensors
from flexolmo_jax.config import ModelConfig
from flexolmo_jax.data.tokenizer import Tokenizer
from flexolmo_jax.federation.package import (
    canonical_digest,
    check_files,
    find_tensors,
    read_manifest,
    read_tensors,
    write_package,
)
from flexolmo_jax.interop import huggingface
from flexolmo_jax.modeling.transformer import Anchor, init_anchor

PUBLIC_TEXT = "public.jsonl"
TOKENIZER = "tokenizer.json"


class LoadedAnchor(NamedTuple):
    """An anchor in memory.

    Attributes:
      weights: the backbone and the public expert.
      config: sizes; one expert.
      tokenizer: None where a Hugging Face directory has none.
      identity: digest of config, tokenizer and every tensor; what packages are made for.
      public_text: documents that owners fit their router rows against; may be empty.
      ends: ids that end a generated text, beside the tokenizer's separator.
    """

    weights: Anchor
    config: ModelConfig
    tokenizer: Tokenizer | None
    identity: str
    public_text: list[str]
    ends: tuple[int, ...] = ()


def identity(config: ModelConfig, tokenizer: Tokenizer | None, described: dict[str, Any]) -> str:
    """Digest of all that an expert depends on; the same weights have it wherever they lie."""
    return canonical_digest(
        {
            "architecture": config.architecture(),
            "tokenizer": tokenizer and tokenizer.digest,
            "tensors": {name: entry["sha256"] for name, entry in described.items()},
        }
    )


def write_anchor(
    path: Path,
    weights: Anchor,
    config: ModelConfig,
    tokenizer: Tokenizer,
    public_text: list[str],
    facts: dict[str, Any],
) -> None:
    """Writes an anchor package; `facts` (licence, tokens seen, ...) go into its manifest."""
    described = tensors.describe(tensors.named(weights))
    manifest = {
        "kind": "anchor",
        "name": "public",
        "identity": identity(config, tokenizer, described),
        "model": dataclasses.asdict(config),
        "tokenizer": {"digest": tokenizer.digest, "separator": tokenizer.separator_text},
        **facts,
    }
    lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in public_text)
    files = {TOKENIZER: tokenizer.json, PUBLIC_TEXT: "".join(lines)}
    write_package(path, manifest, weights, files)


def read_anchor(path: Path, on_disk: bool = False, separator: str | None = None) -> LoadedAnchor:
    """Reads an anchor package, or a Hugging Face directory of an OLMo 2 model, in full.

    Args:
      path: the directory.
      on_disk: leave the weights of a package in their files (`tensors.OnDisk`), once checked.
      separator: the token that opens documents, for a Hugging Face directory that names none.

    Raises:
      ValueError: it is missing, damaged, or not an anchor.
    """
    check_anchor(path)
    return open_anchor(path, on_disk, separator)


def open_anchor(path: Path, on_disk: bool, separator: str | None = None) -> LoadedAnchor:
    """As `read_anchor`, of an anchor whose files have been checked."""
    if huggingface.is_hugging_face(path):
        return _from_hugging_face(path, separator)
    manifest = read_manifest(path, kind="anchor")
    own = manifest["tokenizer"]["separator"]
    if separator not in (None, own):
        raise ValueError(
            f"{path}: this anchor was trained with the separator {own!r}, found --separator "
            f"{separator!r}; leave it out"
        )
    config = ModelConfig.from_json(manifest["model"], str(path))
    abstract = jax.eval_shape(lambda key: init_anchor(config, key), jax.random.key(0))
    weights = (find_tensors if on_disk else read_tensors)(path, manifest, abstract)
    tokenizer = Tokenizer.load(path / TOKENIZER, own, config.vocab_size)
    with open(path / PUBLIC_TEXT, encoding="utf-8") as lines:
        public_text = [json.loads(line)["text"] for line in lines]
    return LoadedAnchor(weights, config, tokenizer, manifest["identity"], public_text)


def check_anchor(path: Path, share: tuple[int, int] = (0, 1)) -> None:
    """Checks every file of an anchor package; a Hugging Face directory has no digests.

    `share` is as in `check_files`.

    Raises:
      ValueError: one is missing, changed, or should not be there.
    """
    if not huggingface.is_hugging_face(path):
        check_files(path, read_manifest(path, kind="anchor"), share=share)


class AnchorFacts(NamedTuple):
    """What packages have to agree with."""

    architecture: dict[str, Any]
    tokenizer: str | None  # digest
    identity: str

    @classmethod
    def of(cls, anchor: LoadedAnchor) -> "AnchorFacts":
        digest = anchor.tokenizer.digest if anchor.tokenizer else None
        return cls(anchor.config.architecture(), digest, anchor.identity)


def anchor_facts(path: Path, separator: str | None = None) -> AnchorFacts:
    """The facts of an anchor on disk, from its manifest; of a Hugging Face directory, read in full.

    Raises:
      ValueError: it is missing, its manifest was changed, or it is not an anchor.
    """
    if huggingface.is_hugging_face(path):
        return AnchorFacts.of(_from_hugging_face(path, separator))
    manifest = read_manifest(path, kind="anchor")
    config = ModelConfig.from_json(manifest["model"], str(path))
    return AnchorFacts(config.architecture(), manifest["tokenizer"]["digest"], manifest["identity"])


def hugging_face_tokenizer(
    path: Path, config: ModelConfig, separator: str | None = None
) -> Tokenizer | None:
    """The tokenizer of a Hugging Face directory, if it has a tokenizer.json.

    Args:
      path: the directory.
      config: of its model.
      separator: the token that opens documents; default: what the directory names.
    """
    file = huggingface.tokenizer_file(path)
    if file is None:
        return None
    return Tokenizer.load(file, separator or huggingface.separator(path), config.vocab_size)


def _from_hugging_face(path: Path, separator: str | None = None) -> LoadedAnchor:
    backbone, experts, config = huggingface.load(path)
    if config.num_experts != 1:
        raise ValueError(
            f"{path}: expected a dense OLMo 2 model as the anchor, found {config.num_experts} "
            "experts"
        )
    tokenizer = hugging_face_tokenizer(path, config, separator)
    weights = Anchor(backbone, experts)
    described = tensors.describe(tensors.named(weights))
    found = identity(config, tokenizer, described)
    return LoadedAnchor(weights, config, tokenizer, found, [], huggingface.ends_of_text(path))
