"""Hugging Face directories of mixtures: taken apart into packages, and written from them."""

import json
from pathlib import Path

import jax
import numpy as np

from flexolmo_jax.federation.anchor import open_anchor, write_anchor
from flexolmo_jax.federation.expert import write_expert
from flexolmo_jax.federation.merged import OpenedModel, open_merged
from flexolmo_jax.federation.package import Package, check_packages
from flexolmo_jax.federation.source import HuggingFace
from flexolmo_jax.interop import hf_export, hf_import
from flexolmo_jax.modeling.experts import split
from flexolmo_jax.modeling.transformer import Anchor
from flexolmo_jax.storage.files import new_directory
from flexolmo_jax.storage.outputs import check_new_folder

ANCHOR, EXPERTS = "anchor", "experts"


def import_mixture(folder: Path, out: Path, separator: str | None = None) -> list[str]:
    """Writes the experts of a FlexOlmo or FlexMoRE directory as packages, beside their anchor.

    Merged again, without memory and with as many active experts, they are the same model. Low-rank
    experts stay low-rank.

    Args:
      folder: with a tokenizer.json.
      out: gets `anchor`, without public text, and `experts/expert_N`, N as in the directory.
      separator: the token that opens documents; default: what the directory names.

    Returns:
      the names of the experts, in the order in which the directory is loaded.

    Raises:
      ValueError: it is no such directory, has one expert only, or no tokenizer.
    """
    check_new_folder(out, [folder])
    if not hf_import.is_hugging_face(folder):
        raise ValueError(f"{folder}: expected a Hugging Face directory, with a config.json")
    backbone, experts, config, tokenizer, _, order = HuggingFace(folder).load(separator)
    if len(order) < 2:
        raise ValueError(
            f"{folder}: expected a mixture, found one expert; it can be used as an anchor as it is"
        )
    if tokenizer is None:
        raise ValueError(f"{folder}: expected a tokenizer.json, which an anchor has, found none")
    public, *owners = split(experts)
    alone = config.replace(num_experts=1, active_experts=None)
    facts = {"made_by": f"import of {folder.name}"}
    names = [f"expert_{number}" for number in order[1:]]
    with new_directory(out) as made:
        write_anchor(made / ANCHOR, Anchor(backbone, public), alone, tokenizer, [], facts)
        anchor = open_anchor(Package.open(made / ANCHOR, "anchor"))
        for name, own in zip(names, owners, strict=True):
            write_expert(made / EXPERTS / name, own, name, anchor, facts)
    return names


def export_mixture(model: Path, out: Path, without_biases: bool = False) -> list[int]:
    """Writes a merged model as a FlexOlmo directory, or a FlexMoRE one if experts are low-rank.

    Args:
      model: a merged model that routes by rows, without memory, of experts without heads.
      out: must not exist.
      without_biases: write rows although some have a bias, which the layout has no place for: then
        experts are chosen more often than here.

    Returns:
      the rank of each expert, 0 of a full one.

    Raises:
      ValueError: a package is damaged; the layout cannot hold the model.
    """
    check_new_folder(out, [model])
    opened = open_merged(Package.open(model, "merged"))
    routers = [jax.tree.map(np.asarray, router) for router in opened.routers]
    has_biases = any(np.any(router.bias[...] < 0) for router in routers)
    lost = [
        (opened.routing.evidence is not None, "evidence routing (merge with --no-evidence)"),
        (opened.routing.memory is not None, "a router memory (merge with --no-memory)"),
        (_heads(opened), f"heads of their own ({', '.join(_heads(opened))})"),
        (has_biases and not without_biases, "router biases (leave them out: --without-biases)"),
    ]
    found = "; ".join(words for is_lost, words in lost if is_lost)
    if found:
        raise ValueError(f"{model}: a Hugging Face directory has no place for {found}")
    check_packages(opened.packages)
    rows = np.concatenate([router.row[...] for router in routers], axis=1)
    networks = [stack.feed_forward for stack in opened.stacks(keep_low_rank=True)]
    tokenizer = opened.anchor.tokenizer
    ends = [*opened.anchor.ends, *([] if tokenizer is None else [tokenizer.separator])]
    with new_directory(out) as folder:
        backbone = opened.anchor.weights.backbone
        ranks = hf_export.write(folder, backbone, networks, rows, opened.config, ends)  # type: ignore[arg-type]
        if tokenizer is not None:
            (folder / "tokenizer.json").write_text(tokenizer.json, encoding="utf-8")
            names = {"eos_token": tokenizer.separator_text}
            (folder / "tokenizer_config.json").write_text(json.dumps(names), encoding="utf-8")
    return ranks


def _heads(opened: OpenedModel) -> list[str]:
    """The experts that have a head of their own, by name."""
    return [x.manifest["name"] for x in opened.experts if x.weights.ranks.head]
