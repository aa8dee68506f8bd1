"""Expert packages, and merged models: a manifest that names an anchor and packages.

Merging writes one small file. Loading checks every digest and concatenates; leaving an expert
out is not loading it.
"""

import concurrent.futures
import contextlib
import dataclasses
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from flexolmo_jax import sharding
from flexolmo_jax.config import MEMORY, ModelConfig, check_memory
from flexolmo_jax.data.tokenizer import Tokenizer
from flexolmo_jax.distributed import all_together
from flexolmo_jax.federation import fields
from flexolmo_jax.federation.anchor import LoadedAnchor, open_anchor, read_anchor
from flexolmo_jax.federation.names import PUBLIC, check_distinct, check_name
from flexolmo_jax.federation.package import (
    FORMAT,
    MANIFEST,
    NO_PRIVACY,
    PARAMS,
    Package,
    check_packages,
    new_directory,
    open_package,
    read_manifest,
    write_manifest,
    write_package,
)
from flexolmo_jax.federation.shares import REFUSE, Shares, check_shares, measure_shares
from flexolmo_jax.locking import locked
from flexolmo_jax.modeling.experts import Experts, join
from flexolmo_jax.modeling.router import Router
from flexolmo_jax.modeling.transformer import Backbone
from flexolmo_jax.outputs import check_new_folder
from flexolmo_jax.tensors import Joined
from flexolmo_jax.version import __version__

CHANGE_SECONDS = 60.0  # how long a change of a merged model waits for another one to end


class LoadedModel(NamedTuple):
    """A model in memory, ready to run.

    Attributes:
      backbone, experts: the weights; the public expert is the first of the stack.
      config: sizes; `num_experts` as loaded.
      names: of the experts, in the order of the stack.
      tokenizer: None where there is none.
      ends: ids that end a generated text, beside the tokenizer's separator.
    """

    backbone: Backbone
    experts: Experts
    config: ModelConfig
    names: tuple[str, ...]
    tokenizer: Tokenizer | None
    ends: tuple[int, ...] = ()


def write_expert(
    path: Path, expert: Experts, name: str, anchor: LoadedAnchor, facts: dict[str, Any]
) -> None:
    """Writes an expert package: an expert axis of 1, and what it was made for.

    Args:
      path: where; must not exist.
      expert: a stack of one.
      name: what the expert is called in merged models.
      anchor: the one it was trained beside.
      facts: licence, contact, tokens seen, how the router rows were made.
    """
    manifest = {
        "kind": "expert",
        "name": check_name(name),
        "anchor": anchor.identity,
        "model": anchor.config.architecture(),
        "tokenizer": anchor.tokenizer and anchor.tokenizer.digest,
        "privacy": NO_PRIVACY,
        **facts,
    }
    write_package(path, manifest, expert)


def read_expert(path: Path, anchor: LoadedAnchor) -> Experts:
    """Reads an expert package in full, if it was made for this anchor.

    Raises:
      ValueError: it is missing or damaged, or made for another config, tokenizer or anchor.
    """
    package = open_expert(path)
    check_made_for(package, anchor)
    check_packages([package])
    return sharding.place(_weights(package), None)


def open_expert(path: Path) -> Package:
    """An expert package, with the bytes of its files yet to be checked (`check_packages`).

    Raises:
      ValueError: it is missing or damaged.
    """
    manifest = read_manifest(path, kind="expert")
    return open_package(path, manifest, _abstract_expert(manifest, path))


def _abstract_expert(manifest: dict[str, Any], path: Path) -> Experts:
    config = fields.model_of(manifest, path / MANIFEST)
    try:
        return jax.eval_shape(lambda key: Experts(config, 1, key), jax.random.key(0))
    except (TypeError, ValueError, OverflowError) as error:  # of sizes that no array can have
        raise ValueError(f"{path}: not the config of a model ({error})") from error


def _weights(package: Package) -> Experts:
    return package.weights(_abstract_expert(package.manifest, package.folder))


def check_made_for(package: Package, anchor: LoadedAnchor) -> None:
    """Raises ValueError, saying which, if a package is for another config, tokenizer or anchor."""
    path, manifest = package.folder, package.manifest
    ours, theirs = anchor.config.architecture(), manifest["model"]
    tokenizer = anchor.tokenizer and anchor.tokenizer.digest
    for field in sorted(ours.keys() | theirs.keys()):
        if ours.get(field) != theirs.get(field):
            raise ValueError(
                f"{path}: made for another model config: expected {field}={ours.get(field)}, "
                f"found {theirs.get(field)}"
            )
    if manifest["tokenizer"] != tokenizer:
        raise ValueError(
            f"{path}: made for another tokenizer: expected sha256 {str(tokenizer)[:12]}..., "
            f"found {str(manifest['tokenizer'])[:12]}..."
        )
    if manifest["anchor"] != anchor.identity:
        raise ValueError(
            f"{path}: made for another anchor: expected {anchor.identity[:12]}..., found "
            f"{manifest['anchor'][:12]}...; merge it with the anchor it was trained beside"
        )


def merge(
    anchor: str | Path,
    experts: Sequence[str | Path],
    out: str | Path,
    *,
    active_experts: int | None = None,
    memory: tuple[float, float] | None = MEMORY,
    separator: str | None = None,
    allow_share: float | None = REFUSE,
) -> Shares | None:
    """Merges an anchor and expert packages into a model: checks all of them, trains nothing.

    Args:
      anchor: an anchor package or a Hugging Face directory.
      experts: expert packages; their order is the order in the model.
      out: the merged model: one manifest that names them by relative path and digest.
      active_experts: how many a token may use; None for all.
      memory: decay and weight of what the router remembers of a document's earlier tokens
        (`remember`); None for a router that looks at each token alone, as in the paper.
      allow_share: the largest share of the anchor's public text that an expert may take in a
        layer, in (0, 1]; None does not route it.
      separator: the token that opens documents, for a Hugging Face directory that names none;
        default: what was named when the experts were trained.

    Returns:
      the share of public text that each expert takes; None if that is not known, since the anchor
      came without such text, or was not asked for.

    Raises:
      ValueError: a package is damaged or made for something else, a name comes twice, an expert
        takes more public text than it may, or `out` cannot be written (`check_new_folder`); nothing
        is written.
    """
    check_new_folder(out, [anchor, *experts])
    out = Path(out).absolute()
    if active_experts is not None and active_experts < 1:
        raise ValueError(f"active_experts must be at least 1, found {active_experts}")
    if memory is not None:
        check_memory(*memory)
    packages = [open_expert(Path(path)) for path in experts]
    _check_twice(packages)
    separator = separator or _named_separator(packages)
    loaded = open_anchor(Path(anchor), separator)
    for package in packages:
        check_made_for(package, loaded)
    check_packages([*loaded.packages, *packages])
    names = [package.manifest["name"] for package in packages]
    shares = _allowed_shares(loaded, packages, names, active_experts, memory, allow_share)
    manifest = {
        "format": FORMAT,
        "made_by": f"flexolmo_jax {__version__}",
        "kind": "merged",
        "anchor": _pinned(loaded, Path(anchor), out, separator),
        "experts": [_entry(package, out) for package in packages],
        "active_experts": active_experts,
        "memory": memory and dict(zip(("decay", "weight"), memory, strict=True)),
        "files": {},
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    with _changing(out), new_directory(out) as folder:
        write_manifest(folder, manifest)
    return shares


def _check_twice(packages: Sequence[Package]) -> None:
    folders = [package.folder.resolve() for package in packages]
    for package, folder in zip(packages, folders, strict=True):
        if folders.count(folder) > 1:
            raise ValueError(f"{package.folder}: given twice; give each package once")
    check_distinct([package.manifest["name"] for package in packages])


def _allowed_shares(
    anchor: LoadedAnchor,
    packages: Sequence[Package],
    names: Sequence[str],
    active_experts: int | None,
    memory: tuple[float, float] | None,
    allow: float | None,
) -> Shares | None:
    if allow is None or not packages:
        return None
    if not 0 < allow <= 1:
        raise ValueError(f"allow_share must be in (0, 1], found {allow}")
    config = anchor.config.replace(
        num_experts=len(packages) + 1, active_experts=active_experts, memory=memory
    )
    routers = [anchor.weights.public.router, *(_weights(one).router for one in packages)]
    shares = measure_shares(anchor, routers, (PUBLIC, *names), config)
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
    model: str | Path, *packages: str | Path, allow_share: float | None = REFUSE
) -> Added:
    """Adds packages to a merged model on disk, all or none.

    The anchor and the added packages are checked in full, as `merge` does; of those that are in the
    model already, all but the bytes, which were checked when they came and are at every load.

    Args:
      model: the merged model.
      packages: expert packages.
      allow_share: as in `merge`.

    Raises:
      ValueError: as `merge`; the model is as it was.
    """
    model = Path(model)
    with _changing(model):
        return _add(model, [Path(one) for one in packages], allow_share)


def _add(model: Path, packages: Sequence[Path], allow_share: float | None) -> Added:
    opened = open_merged(model)
    manifest, anchor = opened.manifest, opened.anchor
    added = [open_expert(path) for path in packages]
    whole = [*opened.parts, *added]
    _check_twice(whole)
    for package in added:
        check_made_for(package, anchor)
    check_packages([*anchor.packages, *added])
    named, own = _named_separator(whole), anchor.tokenizer and anchor.tokenizer.separator_text
    if named not in (None, own):
        raise ValueError(
            f"{', '.join(map(str, packages))}: trained with the separator {named!r}, and {model} "
            f"has {own!r}; merge anew with --separator {named!r}"
        )
    names = [package.manifest["name"] for package in whole]
    active, memory = manifest["active_experts"], _memory(manifest)
    shares = _allowed_shares(anchor, whole, names, active, memory, allow_share)
    entries = [*manifest["experts"], *(_entry(package, model.absolute()) for package in added)]
    place = model / manifest["anchor"]["path"]
    pinned = _pinned(anchor, place, model.absolute(), manifest["anchor"].get("separator"))
    return Added(_replace_experts(model, {**manifest, "anchor": pinned}, entries), shares)


def remove_expert(model: str | Path, *names: str) -> bool:
    """Takes experts out of a merged model on disk, all or none. True if a tuned router is undone.

    A tuned router goes too, because its rows were fitted with the removed experts present; the
    remaining experts are back to the rows of their owners.

    Raises:
      ValueError: there is no such expert; the model is as it was.
    """
    model = Path(model)
    with _changing(model):
        return _remove(model, names)


def _remove(model: Path, names: Sequence[str]) -> bool:
    manifest = read_manifest(model, kind="merged")
    there = [entry["name"] for entry in manifest["experts"]]
    for name in names:
        if name not in there:
            raise ValueError(f"{model}: no expert named {name!r}; there are {', '.join(there)}")
    entries = [entry for entry in manifest["experts"] if entry["name"] not in names]
    return _replace_experts(model, manifest, entries)


class Opened(NamedTuple):
    """A merged model of which all is checked but the bytes of its files (`check_packages`).

    Attributes:
      manifest: of the merged model.
      anchor: its weights in their files, if it is a package.
      parts: the packages of its experts, in order.
      tuned: its own files: a tuned router, or nothing.
    """

    manifest: dict[str, Any]
    anchor: LoadedAnchor
    parts: list[Package]
    tuned: Package

    @property
    def names(self) -> tuple[str, ...]:
        return (PUBLIC, *(part.manifest["name"] for part in self.parts))

    @property
    def config(self) -> ModelConfig:
        return self.anchor.config.replace(
            num_experts=len(self.names),
            active_experts=self.manifest["active_experts"],
            memory=_memory(self.manifest),
        )

    @property
    def packages(self) -> list[Package]:
        return [self.tuned, *self.anchor.packages, *self.parts]


def open_merged(path: Path, separator: str | None = None) -> Opened:
    """Opens a merged model, its anchor and its packages; reads no weights of packages.

    Args:
      path: the merged model.
      separator: the token that opens documents; default: what was named when it was merged.

    Raises:
      ValueError: a part is missing, unfit, or not the one that was merged.
    """
    manifest = read_manifest(path, kind="merged")
    anchor, parts = _open_parts(path, manifest, separator)
    router = None
    if "tensors" in manifest:
        stacks = [anchor.weights.public, *map(_weights, parts)]
        router = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), join_files(stacks).router
        )
    return Opened(manifest, anchor, parts, open_package(path, manifest, router))


def check_merged(path: Path) -> Opened:
    """Checks every byte of a merged model, of its anchor and of its packages.

    Raises:
      ValueError: a part is missing, damaged, or not the one that was merged.
    """
    opened = open_merged(path)
    check_packages(opened.packages)
    return opened


def shares_of(opened: Opened) -> Shares | None:
    """The share of public text that each expert of a merged model takes, as `merge` returns it."""
    if not opened.parts:
        return None
    routers = [opened.anchor.weights.public.router, *(_weights(x).router for x in opened.parts)]
    if opened.tuned.tensors:
        like = Router(0, 0, 0)
        routers = [opened.tuned.weights(like)]
    return measure_shares(opened.anchor, routers, opened.names, opened.config)


def check_package(path: Path) -> dict[str, Any]:
    """Checks every byte of a package of any kind; returns its manifest.

    Raises:
      ValueError: it is missing, damaged or unfit.
    """
    manifest = read_manifest(path)
    if manifest["kind"] == "merged":
        check_merged(path)
    elif manifest["kind"] == "anchor":
        read_anchor(path, on_disk=True)
    else:
        check_packages([open_expert(path)])
    return manifest


@contextlib.contextmanager
def _changing(model: Path) -> Iterator[None]:
    """While the body runs, no other process changes this merged model; it would be undone.

    The lock file stands beside the model, since every file in it is checked.
    """
    model = model.resolve()
    with locked(
        model.parent / f".{model.name}.lock", f"is changing {model.name}",
        "try again when it has ended", wait=CHANGE_SECONDS,
    ):  # fmt: skip
        yield


def join_files(stacks: list[Any], empty: int = 0) -> Any:
    """As `join`, of arrays on the host, read when they are placed; with empty experts after them.

    Empty experts (`fill_up`) have weights 0 and the bias -inf: no token ever chooses them.
    """

    def one(path, *leaves):
        is_bias = jax.tree_util.keystr(path).removesuffix(".value").endswith("bias")
        return Joined(leaves, empty, -np.inf if is_bias else 0.0)

    return jax.tree_util.tree_map_with_path(one, *stacks)


def load_merged(
    path: Path,
    dtype: str | None = None,
    mesh: Mesh | None = None,
    over: tuple[str, ...] = sharding.AXES,
    separator: str | None = None,
) -> LoadedModel:
    """Loads a merged model: checks every file, and concatenates along the expert axis.

    Args:
      path: the merged model.
      dtype: of the weights; default: as stored.
      mesh, over: where they go (`sharding.place`), each device reading its own part of every
        file; with empty experts after them, up to a number that the axis `expert` divides. Of
        several processes, all must load, and each checks its share of the bytes.
      separator: the token that opens documents; default: what was named at the merge.

    Raises:
      ValueError: a part is missing, damaged, or not the one that was merged.
    """
    share = (0, 1) if mesh is None else (jax.process_index(), jax.process_count())

    def load_checked() -> LoadedModel:
        opened = open_merged(path, separator)
        with concurrent.futures.ThreadPoolExecutor(1) as beside:
            # While the files are read anyway.
            checked = beside.submit(check_packages, opened.packages, share)
            try:
                loaded = _place(opened, dtype, mesh, over)
            except Exception:  # anything can come of a damaged file,
                checked.result()  # and this says what it was
                raise
            checked.result()
        return loaded

    return load_checked() if mesh is None else all_together(load_checked)


def _place(
    opened: Opened, dtype: str | None, mesh: Mesh | None, over: tuple[str, ...]
) -> LoadedModel:
    anchor, config = opened.anchor, opened.config
    stacks = [anchor.weights.public, *map(_weights, opened.parts)]
    empty = 0 if mesh is None else -len(stacks) % mesh.shape[sharding.EXPERT]
    experts = join_files(stacks, empty)
    if opened.tuned.tensors:
        experts.router = join_files([opened.tuned.weights(experts.router)], empty)
    backbone, experts = sharding.place((anchor.weights.backbone, experts), mesh, over, dtype)
    return LoadedModel(backbone, experts, config, opened.names, anchor.tokenizer, anchor.ends)


def _memory(manifest: dict[str, Any]) -> tuple[float, float] | None:
    memory = manifest.get("memory")  # not in the manifests of older versions
    return memory and (memory["decay"], memory["weight"])


def _open_parts(
    model: Path, manifest: dict[str, Any], separator: str | None
) -> tuple[LoadedAnchor, list[Package]]:
    """The anchor and the packages of a merged model, if they are those that were merged."""
    folder = model / manifest["anchor"]["path"]
    anchor = open_anchor(folder, separator or manifest["anchor"].get("separator"))
    _check_pin(folder, anchor, manifest["anchor"])
    parts = [open_part(model, entry) for entry in manifest["experts"]]
    for part in parts:
        check_made_for(part, anchor)
    return anchor, parts


def open_part(model: Path, entry: dict[str, str]) -> Package:
    """The package of an entry of a merged model, if it is the one that was merged.

    Raises:
      ValueError: it is missing, unfit, or another one.
    """
    package = open_expert(model / entry["path"])
    found = package.manifest["name"]
    if package.digest != entry["digest"] or found != entry["name"]:
        what = "its manifest differs" if found == entry["name"] else f"its name is {found!r}"
        raise ValueError(
            f"{package.folder}: not the package that was merged as {entry['name']!r} ({what}); "
            "take it out with `flexolmo experts remove` and add it again"
        )
    return package


def load_pair(path: Path, anchor: LoadedAnchor) -> LoadedModel:
    """An owner's own two-expert model: the anchor and one package."""
    expert = read_expert(path, anchor)
    name = read_manifest(path)["name"]
    config = dataclasses.replace(anchor.config, num_experts=2)
    stack = join(anchor.weights.public, expert)
    return LoadedModel(
        anchor.weights.backbone, stack, config, (PUBLIC, name), anchor.tokenizer, anchor.ends
    )


def _named_separator(packages: Sequence[Package]) -> str | None:
    """The separator that owners named for their training, if they did; all must be the same."""
    named = sorted({p.manifest["separator"] for p in packages if p.manifest.get("separator")})
    if len(named) > 1:
        raise ValueError(
            f"the packages were trained with several separators, {', '.join(map(repr, named))}; a "
            "merged model has one"
        )
    return named[0] if named else None


def _check_pin(folder: Path, anchor: LoadedAnchor, pinned: dict[str, Any]) -> None:
    """That an anchor is the one that was merged, its public text and separator included."""
    if anchor.identity != pinned["identity"]:
        raise ValueError(
            f"{folder}: not the anchor that was merged: expected "
            f"{pinned['identity'][:12]}..., found {anchor.identity[:12]}..."
        )
    expected = pinned.get("digest")  # not in the manifests of older versions
    found = anchor.package and anchor.package.digest
    if expected is not None and found != expected:
        raise ValueError(
            f"{folder}: not the anchor that was merged: it has the same weights, and another "
            f"manifest (expected {expected[:12]}..., found {str(found)[:12]}...)"
        )


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
