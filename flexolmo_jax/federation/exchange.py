"""Hugging Face directories of mixtures, taken apart into packages."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from flexolmo_jax.config import ModelConfig
from flexolmo_jax.federation.anchor import LoadedAnchor, open_anchor, read_anchor, write_anchor
from flexolmo_jax.federation.expert import write_expert
from flexolmo_jax.federation.names import check_distinct
from flexolmo_jax.federation.package import Package
from flexolmo_jax.federation.source import HuggingFace, HuggingFaceModel
from flexolmo_jax.interop import hf_import
from flexolmo_jax.interop.layouts import BACKBONE, ROW, SEPARATE
from flexolmo_jax.modeling.experts import Experts, split
from flexolmo_jax.modeling.transformer import Anchor
from flexolmo_jax.storage.files import new_directory
from flexolmo_jax.storage.outputs import check_new_folder
from flexolmo_jax.storage.tensors import named

ANCHOR, EXPERTS = "anchor", "experts"
SHOWN = 3  # tensors that an error names


def import_mixture(
    folder: Path,
    out: Path,
    separator: str | None = None,
    *,
    anchor: Path | None = None,
    names: Sequence[str] = (),
) -> list[str]:
    """Writes the experts of a FlexOlmo or FlexMoRE directory as packages, beside their anchor.

    Merged again, without memory and with as many active experts, they are the same model. Low-rank
    experts stay low-rank.

    Args:
      folder: with a tokenizer.json.
      out: gets `experts/NAME`; and `anchor`, without public text, unless `anchor` is given.
      separator: the token that opens documents; default: what the directory names.
      anchor: an anchor that exists, which the experts become packages for.
      names: of all experts but the public one, in the directory's order. Default: expert_N, N as
        in the directory.

    Returns:
      the names of the experts, in the order in which the directory is loaded.

    Raises:
      ValueError: it is no such directory, has one expert only, or no tokenizer; a wrong number of
        names; what the experts share with their anchor is not that of `anchor`, bit for bit.
    """
    check_new_folder(out, [folder, *([anchor] if anchor else [])])
    if not hf_import.is_hugging_face(folder):
        raise ValueError(f"{folder}: expected a Hugging Face directory, with a config.json")
    model = HuggingFace(folder).load(separator)
    if len(model.order) < 2:
        raise ValueError(
            f"{folder}: expected a mixture, found one expert; it can be used as an anchor as it is"
        )
    if model.tokenizer is None:
        raise ValueError(f"{folder}: expected a tokenizer.json, which an anchor has, found none")
    called = _names(folder, model.order, names)
    public, *owners = split(model.experts)
    own = Anchor(model.backbone, public)
    facts = {"made_by": f"import of {folder.name}"}
    given = None if anchor is None else _equal_anchor(folder, model, own, anchor, separator)
    with new_directory(out) as made:
        if given is None:
            config = model.config.replace(num_experts=1, active_experts=None)
            write_anchor(made / ANCHOR, own, config, model.tokenizer, [], facts)
            given = open_anchor(Package.open(made / ANCHOR, "anchor"))
        for name, expert in zip(called, owners, strict=True):
            write_expert(made / EXPERTS / name, expert, name, given, facts)
    return called


def _names(folder: Path, order: Sequence[int], names: Sequence[str]) -> list[str]:
    """Of all experts but the public one, in the order in which they are loaded."""
    if names and len(names) != len(order) - 1:
        raise ValueError(
            f"{folder}: expected {len(order) - 1} names, of all experts but the public one, found "
            f"{len(names)} ({', '.join(names)})"
        )
    check_distinct(names)
    return [names[number - 1] if names else f"expert_{number}" for number in order[1:]]


def _equal_anchor(
    folder: Path, model: HuggingFaceModel, own: Anchor, path: Path, separator: str | None
) -> LoadedAnchor:
    """The anchor at `path`, if it is the directory's backbone and public expert, bit for bit."""
    anchor = read_anchor(path, separator=separator)
    ours, theirs = anchor.config.architecture(), model.config.architecture()
    for field in ours:
        if ours[field] != theirs[field]:
            raise ValueError(
                f"{folder}: made for another model config than that of {path}: expected "
                f"{field}={ours[field]}, found {theirs[field]}"
            )
    digests = [x and x.digest for x in (anchor.tokenizer, model.tokenizer)]
    if digests[0] != digests[1]:
        raise ValueError(
            f"{folder}: its tokenizer.json is not that of {path}: expected sha256 "
            f"{str(digests[0])[:12]}..., found {str(digests[1])[:12]}..."
        )
    unlike = list(_unlike(own, anchor.weights, model.config))
    if unlike:
        shown = "; ".join(unlike[:SHOWN]) + ("; ..." if unlike[SHOWN:] else "")
        raise ValueError(
            f"{folder}: {len(unlike)} of the tensors that experts share with their anchor are not "
            f"those of {path}, bit for bit: {shown}. Its experts are made for other weights: "
            "import it without --anchor, and merge them with the anchor that it brings"
        )
    return anchor


def _unlike(own: Anchor, given: Anchor, config: ModelConfig) -> Iterator[str]:
    """The tensors of the two that differ in any bit, by their names in the directory."""
    tables = (
        (own.backbone, given.backbone, BACKBONE),
        (_without_heads(own.public), _without_heads(given.public), {**SEPARATE, "router.row": ROW}),
    )
    for one, other, table in tables:
        leaves, others = named(one), named(other)
        for name, source in table.items():
            if name not in leaves:  # a tied head
                continue
            for place, key in source._replace(experts=(0,)).places(config):
                mine, theirs = (np.asarray(x[name])[place] for x in (leaves, others))
                if mine.dtype != theirs.dtype:
                    yield f"{key} ({mine.dtype}, and there {theirs.dtype})"
                elif mine.tobytes() != theirs.tobytes():
                    change = np.abs(np.subtract(mine, theirs, dtype=np.float32)).max()
                    yield f"{key} (largest difference {change:.2g})"


def _without_heads(public: Experts) -> dict:
    """What a directory holds of a public expert."""
    return {"feed_forward": public.feed_forward, "router": public.router}
