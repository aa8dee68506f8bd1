"""Merging: a merged model is a manifest that names an anchor and packages; experts come and go.

Merging writes one small file. The concatenation itself is done at load (`loading.py`).
"""

import contextlib
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from flexolmo_jax.config import MEMORY
from flexolmo_jax.federation.anchor import LoadedAnchor, open_anchor
from flexolmo_jax.federation.expert import check_made_for
from flexolmo_jax.federation.merged import open_merged
from flexolmo_jax.federation.names import PUBLIC, check_distinct
from flexolmo_jax.federation.package import (
    FORMAT,
    PARAMS,
    Package,
    check_packages,
    read_manifest,
    write_manifest,
    write_package,
)
from flexolmo_jax.federation.routing import (
    EvidenceChoice,
    Routing,
    choose_routing,
    without_evidence_head,
)
from flexolmo_jax.federation.shares import REFUSE, Shares, check_shares, measure_shares
from flexolmo_jax.federation.source import Require, open_required, open_source
from flexolmo_jax.modeling.router import Router
from flexolmo_jax.storage.files import new_directory
from flexolmo_jax.storage.locks import locked
from flexolmo_jax.storage.outputs import check_new_folder
from flexolmo_jax.version import __version__

CHANGE_SECONDS = 60.0  # that a change of a merged model waits for another change


def merge(
    anchor: str | Path,
    experts: Sequence[str | Path],
    out: str | Path,
    *,
    active_experts: int | None = None,
    memory: tuple[float, float] | None = MEMORY,
    evidence: EvidenceChoice = "auto",
    separator: str | None = None,
    allow_share: float | None = REFUSE,
    require: Require | None = None,
) -> Shares | None:
    """Merges an anchor and expert packages into a model: checks all of them, trains nothing.

    Args:
      anchor: an anchor package or a Hugging Face directory.
      experts: expert packages; their order is the order in the model.
      out: the merged model: one manifest that names them by relative path and digest.
      active_experts: how many a token may use; None for all.
      memory: decay and weight of what the router remembers of a document's earlier tokens
        (`add_decayed_logits`); None for a router that looks at each token alone, as in the paper.
        Not used with evidence routing.
      evidence: decay, strength and shift of evidence routing (modeling/evidence.py); None for
        router rows; "auto": evidence routing if the anchor and all packages have evidence heads.
      allow_share: the largest share of the anchor's public text that an expert may take in a
        layer, in (0, 1]; None does not route it.
      separator: the token that opens documents, for a Hugging Face directory that names none;
        default: what was named when the experts were trained.
      require: is called with the anchor's package and each expert's before they are used, and
        raises ValueError to refuse one; a Hugging Face directory is then refused too.

    Returns:
      the share of public text that each expert takes; None if the anchor came without such text, or
      it was not asked for.

    Raises:
      ValueError: a package is damaged or made for something else, a name comes twice, an expert
        takes more public text than it may, or `out` cannot be written; nothing is written.

    Examples:
      >>> import flexolmo_jax as fo
      >>> shares = fo.merge("anchor", ["experts/math", "experts/code"], "merged")
      >>> shares.names
      ('public', 'math', 'code')
    """
    check_new_folder(out, [anchor, *experts])
    anchor, out = Path(anchor), Path(out).absolute()
    loaded, packages, separator = _open_all(anchor, experts, separator, require)
    routing = choose_routing(loaded, packages, active_experts, memory, evidence)
    if evidence == "auto":
        _warn_of_rows(without_evidence_head(loaded, packages), len(packages))
    shares = _allowed_shares(loaded, packages, routing, allow_share)
    manifest = {
        "format": FORMAT,
        "made_by": f"flexolmo_jax {__version__}",
        "kind": "merged",
        "anchor": _pinned(loaded, anchor, out, separator),
        "experts": [_entry(package, out) for package in packages],
        **routing.fields(),
        "files": {},
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    with _changing(out), new_directory(out) as folder:
        write_manifest(folder, manifest)
    return shares


def _warn_of_rows(without: list[str], num_packages: int) -> None:
    """Warns if evidence heads are not used because some have none."""
    if 0 < len(without) < num_packages + 1:
        warnings.warn(
            f"there is no evidence head in {', '.join(without)}, so this model routes by router "
            "rows, the others' evidence heads unused; train with evidence_rank, or leave it out",
            stacklevel=3,
        )


def _open_all(
    anchor: Path,
    experts: Sequence[str | Path],
    separator: str | None,
    require: Require | None,
) -> tuple[LoadedAnchor, list[Package], str | None]:
    """The anchor, the packages, which are made for it, and the separator that they name."""
    packages = [open_required(Path(path), "expert", require) for path in experts]
    _check_twice(packages)
    separator = separator or _named_separator(packages)
    loaded = open_anchor(open_source(anchor, "anchor", require), separator)
    for package in packages:
        check_made_for(package, loaded)
    check_packages([*loaded.packages, *packages])
    return loaded, packages, separator


def _check_twice(packages: Sequence[Package]) -> None:
    folders = [package.folder.resolve() for package in packages]
    for package, folder in zip(packages, folders, strict=True):
        if folders.count(folder) > 1:
            raise ValueError(f"{package.folder}: given twice; give each package once")
    check_distinct([package.manifest["name"] for package in packages])


def _allowed_shares(
    anchor: LoadedAnchor,
    packages: Sequence[Package],
    routing: Routing,
    allow: float | None,
) -> Shares | None:
    if allow is None or not packages:
        return None
    if not 0 < allow <= 1:
        raise ValueError(f"allow_share must be in (0, 1], found {allow}")
    config = anchor.config.replace(num_experts=len(packages) + 1, **routing._asdict())
    experts = [anchor.weights.public, *(package.weights for package in packages)]
    names = [package.manifest["name"] for package in packages]
    shares = measure_shares(anchor, experts, (PUBLIC, *names), config)
    if shares is not None:
        check_shares(shares, allow)
    return shares


def _pinned(anchor: LoadedAnchor, path: Path, out: Path, separator: str | None) -> dict[str, str]:
    """What a merged model says of its anchor: its identity, and the digest of all its files."""
    pinned = {"path": _relative(path, out), "identity": anchor.identity}
    if separator:
        pinned["separator"] = separator
    return pinned if anchor.package is None else {**pinned, "digest": anchor.package.digest}


def write_tuned(out: Path, model: Path, router: Router) -> None:
    """Writes a merged model whose router rows were tuned together (stage 3).

    Args:
      out: where; must not exist.
      model: the merged model that was tuned.
      router: rows [L, E, D] and biases [L, E] of all its experts, the public one first.
    """
    manifest = read_manifest(model, kind="merged")
    out = out.absolute()
    for entry in [manifest["anchor"], *manifest["experts"]]:
        entry["path"] = _relative(model / entry["path"], out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with _changing(out):
        write_package(out, manifest, router)


class Added(NamedTuple):
    """What adding experts did.

    Attributes:
      undone: whether a tuned router was undone, since it was tuned without them.
      shares: as `merge` returns them, of all experts that are now in the model.
    """

    undone: bool
    shares: Shares | None


def add_expert(
    model: str | Path,
    *packages: str | Path,
    allow_share: float | None = REFUSE,
    require: Require | None = None,
) -> Added:
    """Adds packages to a merged model on disk, all or none.

    The anchor and the added packages are checked in full, as `merge` does. Of the packages in the
    model, all but the bytes are checked: those were checked at the merge, and are at every load.

    Args:
      model: the merged model.
      packages: expert packages.
      allow_share: as in `merge`.
      require: as in `merge`, of the packages that are in the model too.

    Raises:
      ValueError: as `merge`; the model is unchanged.

    Examples:
      >>> import flexolmo_jax as fo
      >>> _ = fo.remove_expert("ours", "math")
      >>> added = fo.add_expert("ours", "experts/math")
      >>> fo.load("ours").expert_names
      ('public', 'code', 'math')
    """
    model = Path(model)
    with _changing(model):
        return _add(model, [Path(package) for package in packages], allow_share, require)


def _add(
    model: Path,
    packages: Sequence[Path],
    allow_share: float | None,
    require: Require | None,
) -> Added:
    opened = open_merged(Package.open(model, "merged"), require=require)
    manifest, anchor = opened.manifest, opened.anchor
    added = [open_required(path, "expert", require) for path in packages]
    whole = [*opened.experts, *added]
    _check_twice(whole)
    for package in added:
        check_made_for(package, anchor)
    check_packages([*anchor.packages, *added])
    named, own = _named_separator(whole), anchor.tokenizer and anchor.tokenizer.separator_text
    if named not in (None, own):
        raise ValueError(
            f"{', '.join(map(str, packages))}: trained with the separator {named!r}, and {model} "
            f"has {own!r}; merge again with --separator {named!r}"
        )
    routing = choose_routing(anchor, whole, *Routing.of(manifest))
    shares = _allowed_shares(anchor, whole, routing, allow_share)
    entries = [*manifest["experts"], *(_entry(package, model.absolute()) for package in added)]
    place = model / manifest["anchor"]["path"]
    pinned = _pinned(anchor, place, model.absolute(), manifest["anchor"].get("separator"))
    return Added(_replace_experts(model, {**manifest, "anchor": pinned}, entries), shares)


def remove_expert(model: str | Path, *names: str) -> bool:
    """Removes experts from a merged model on disk, all or none. True if a tuned router is undone.

    A tuned router goes too, because its rows were fitted with the removed experts present; the
    remaining experts are back to the rows of their owners.

    Raises:
      ValueError: there is no such expert; the model is unchanged.

    Examples:
      >>> import flexolmo_jax as fo
      >>> fo.remove_expert("ours", "math")
      False
      >>> fo.load("ours").expert_names
      ('public', 'code')
    """
    model = Path(model)
    with _changing(model):
        return _remove(model, names)


def _remove(model: Path, names: Sequence[str]) -> bool:
    manifest = read_manifest(model, kind="merged")
    known = [entry["name"] for entry in manifest["experts"]]
    for name in names:
        if name not in known:
            raise ValueError(f"{model}: no expert named {name!r}; there are {', '.join(known)}")
    entries = [entry for entry in manifest["experts"] if entry["name"] not in names]
    return _replace_experts(model, manifest, entries)


@contextlib.contextmanager
def _changing(model: Path) -> Iterator[None]:
    """While the body runs, no other process changes this merged model: one change would be lost.

    The lock file lies beside the model, since unlisted files in it are refused.
    """
    model = model.resolve()
    with locked(
        model.parent / f".{model.name}.lock", f"is changing {model.name}",
        "try again when it has ended", wait=CHANGE_SECONDS,
    ):  # fmt: skip
        yield


def _named_separator(packages: Sequence[Package]) -> str | None:
    """The separator that owners named for their training, if they did; all must be the same."""
    named = sorted({p.manifest["separator"] for p in packages if p.manifest.get("separator")})
    if len(named) > 1:
        raise ValueError(
            f"the packages were trained with several separators, {', '.join(map(repr, named))}; a "
            "merged model has one"
        )
    return named[0] if named else None


def _entry(package: Package, model: Path) -> dict[str, str]:
    return {
        "name": package.manifest["name"],
        "path": _relative(package.folder, model),
        "digest": package.digest,
    }


def _replace_experts(model: Path, manifest: dict[str, Any], entries: list[dict]) -> bool:
    undone = manifest.pop("tensors", None) is not None
    write_manifest(model, {**manifest, "experts": entries, "files": {}})
    shutil.rmtree(model / PARAMS, ignore_errors=True)
    return undone


def _relative(path: Path, model: Path) -> str:
    return os.path.relpath(path.absolute().resolve(), model.resolve())
