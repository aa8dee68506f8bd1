"""The anchor on disk: a package of ours, or a Hugging Face directory as it was released."""

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

from flexolmo_jax.config import ModelConfig
from flexolmo_jax.data.tokenizer import Tokenizer
from flexolmo_jax.federation.names import PUBLIC
from flexolmo_jax.federation.package import Package, check_packages, write_package
from flexolmo_jax.federation.source import HuggingFace, WeightSource, open_source
from flexolmo_jax.modeling.transformer import Anchor
from flexolmo_jax.parallel import placement
from flexolmo_jax.storage import tensors
from flexolmo_jax.storage.files import canonical_digest

PUBLIC_TEXT = "public.jsonl"
TOKENIZER = "tokenizer.json"


class LoadedAnchor(NamedTuple):
    """An anchor, its weights in memory or left in its files.

    Attributes:
      weights: the backbone and the public expert.
      config: sizes; one expert.
      tokenizer: None where a Hugging Face directory has none.
      identity: digest of config, tokenizer and every tensor, computed from them; an expert package
        names the anchor it was made for by it.
      public_text: documents that owners fit their router rows against; may be empty.
      package: its files; None for a Hugging Face directory.
      ends: ids that end a generated text, beside the tokenizer's separator.
    """

    weights: Anchor
    config: ModelConfig
    tokenizer: Tokenizer | None
    identity: str
    public_text: list[str]
    package: Package | None = None
    ends: tuple[int, ...] = ()

    @property
    def packages(self) -> list[Package]:
        """What `check_packages` has to check: nothing of a Hugging Face directory."""
        return [] if self.package is None else [self.package]


def identity(config: ModelConfig, tokenizer: Tokenizer | None, described: dict[str, Any]) -> str:
    """Digest of all that an expert depends on; the same in a package and in a Hugging Face form.

    The public evidence head is not among it: no expert is trained against it, so it can be added to
    an anchor that has experts.
    """
    return canonical_digest(
        {
            "architecture": config.architecture(),
            "tokenizer": tokenizer and tokenizer.digest,
            "tensors": {
                name: entry["sha256"]
                for name, entry in described.items()
                if not name.startswith("public.evidence.")
            },
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
        "name": PUBLIC,
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
      on_disk: leave the weights of a package in their files (`storage.on_disk`), once checked.
      separator: the token that opens documents, for a Hugging Face directory that names none.

    Raises:
      ValueError: it is missing, damaged, or not an anchor.
    """
    anchor = open_anchor(open_source(path, "anchor"), separator)
    check_packages(anchor.packages)
    if on_disk:
        return anchor
    return anchor._replace(weights=placement.device_put(anchor.weights, None))


def open_anchor(source: WeightSource, separator: str | None = None) -> LoadedAnchor:
    """As `read_anchor`, but the bytes of a package are not checked yet (`check_packages`).

    Raises:
      ValueError: as `read_anchor`; its identity is not that of its config, tokenizer and tensors.
    """
    if isinstance(source, HuggingFace):
        return _from_hugging_face(source, separator)
    path, manifest, config = source.folder, source.manifest, source.config
    own = manifest["tokenizer"]["separator"]
    if separator not in (None, own):
        raise ValueError(
            f"{path}: this anchor was trained with the separator {own!r}, found --separator "
            f"{separator!r}; leave it out"
        )
    for name in (TOKENIZER, PUBLIC_TEXT):
        if name not in manifest["files"]:
            raise ValueError(f"{path / name}: missing from the anchor; get it again from its host")
    tokenizer = Tokenizer.load(path / TOKENIZER, own, config.vocab_size)
    found = identity(config, tokenizer, manifest["tensors"])
    if found != manifest["identity"] or tokenizer.digest != manifest["tokenizer"]["digest"]:
        raise ValueError(
            f"{path}: its config, tokenizer and tensors make the anchor {found[:12]}..., and not "
            f"{manifest['identity'][:12]}..., as its manifest says; get it again from its host"
        )
    public_text = _public_text(path / PUBLIC_TEXT)
    return LoadedAnchor(source.weights, config, tokenizer, found, public_text, source)


def _public_text(file: Path) -> list[str]:
    texts = []
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        try:
            texts.append(json.loads(line)["text"])
            texts[-1].encode()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{file}, line {number}: expected an object with text ({error!r})"
            ) from error
    return texts


def _from_hugging_face(source: HuggingFace, separator: str | None) -> LoadedAnchor:
    backbone, experts, config, tokenizer, ends, _ = source.load(separator)
    if config.num_experts != 1:
        raise ValueError(
            f"{source.folder}: expected a dense OLMo 2 model as the anchor, found "
            f"{config.num_experts} experts"
        )
    weights = Anchor(backbone, experts)
    named = tensors.named(weights)
    for name, x in named.items():
        tensors.check_in_range(name, x, source.folder)
    found = identity(config, tokenizer, tensors.describe(named))
    return LoadedAnchor(weights, config, tokenizer, found, [], ends=ends)
