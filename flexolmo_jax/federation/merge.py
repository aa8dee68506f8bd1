"""Expert packages, and merged models: a manifest that names an anchor and packages.

Merging writes one small file. Loading checks every digest and concatenates; leaving an expert
out is not loading it.
"""

import concurrent.futures
import contextlib
import dataclasses
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from flexolmo_jax import sharding
from flexolmo_jax.config import MEMORY, ModelConfig, check_memory
from flexolmo_jax.data.tokenizer import Tokenizer
from flexolmo_jax.distributed import all_together
from flexolmo_jax.federation.anchor import (
    AnchorFacts,
    LoadedAnchor,
    anchor_facts,
    check_anchor,
    open_anchor,
)
from flexolmo_jax.federation.package import (
    FORMAT,
    NO_PRIVACY,
    check_files,
    check_name,
    check_names,
    find_tensors,
    new_directory,
    read_manifest,
    read_tensors,
    write_manifest,
    write_package,
)
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
    manifest = read_manifest(path, kind="expert")
    check_made_for(manifest, path, AnchorFacts.of(anchor))
    check_files(path, manifest)
    return read_tensors(path, manifest, _abstract_expert(anchor.config))


def _abstract_expert(config: ModelConfig) -> Experts:
    return jax.eval_shape(lambda key: Experts(config, 1, key), jax.random.key(0))


def check_made_for(manifest: dict[str, Any], path: Path, anchor: AnchorFacts) -> None:
    """Raises ValueError, saying which, if a package is for another config, tokenizer or anchor."""
    ours, theirs = anchor.architecture, manifest["model"]
    for field in sorted(ours.keys() | theirs.keys()):
        if ours.get(field) != theirs.get(field):
            raise ValueError(
                f"{path}: made for another model config: expected {field}={ours.get(field)}, "
                f"found {theirs.get(field)}"
            )
    if manifest["tokenizer"] != anchor.tokenizer:
        raise ValueError(
            f"{path}: made for another tokenizer: expected sha256 {str(anchor.tokenizer)[:12]}..., "
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
) -> None:
    """Merges an anchor and expert packages into a model: checks all of them, trains nothing.

    Args:
      anchor: an anchor package or a Hugging Face directory.
      experts: expert packages; their order is the order in the model.
      out: the merged model: one manifest that names them by relative path and digest.
      active_experts: how many a token may use; None for all.
      memory: decay and weight of what the router remembers of a document's earlier tokens
        (`remember`); None for a router that looks at each token alone, as in the paper.
      separator: the token that opens documents, for a Hugging Face directory that names none;
        default: what was named when the experts were trained.

    Raises:
      ValueError: a package is damaged or made for something else, or a name comes twice; `out`
        cannot be written (`check_new_folder`).
    """
    check_new_folder(out, [anchor, *experts])
    out = Path(out).absolute()
    separator = separator or _named_separator([Path(path) for path in experts])
    facts = anchor_facts(Path(anchor), separator)
    check_anchor(Path(anchor))
    entries = [_entry(Path(path), out, facts, check_files) for path in experts]
    _check_distinct(entries)
    if active_experts is not None and active_experts < 1:
        raise ValueError(f"active_experts must be at least 1, found {active_experts}")
    if memory is not None:
        check_memory(*memory)
    manifest = {
        "format": FORMAT,
        "made_by": f"flexolmo_jax {__version__}",
        "kind": "merged",
        "anchor": {
            "path": _relative(Path(anchor), out),
            "identity": facts.identity,
            **({"separator": separator} if separator else {}),
        },
        "experts": entries,
        "active_experts": active_experts,
        "memory": memory and dict(zip(("decay", "weight"), memory, strict=True)),
        "files": {},
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    with _changing(out), new_directory(out) as folder:
        write_manifest(folder, manifest)


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


def add_expert(model: str | Path, *packages: str | Path) -> bool:
    """Adds packages to a merged model on disk, all or none. True if that undid a tuned router.

    Reads manifests, and sees that every file is there: it takes as long at any size. Their bytes
    are checked when the model is loaded or inspected, as always.

    Raises:
      ValueError: as `merge`; the model is as it was.
    """
    model = Path(model)
    with _changing(model):
        return _add(model, [Path(one) for one in packages])


def _add(model: Path, packages: Sequence[Path]) -> bool:
    manifest = read_manifest(model, kind="merged")
    folder = model / manifest["anchor"]["path"]
    facts = anchor_facts(folder, manifest["anchor"].get("separator"))
    _check_identity(folder, facts.identity, manifest)
    added = [_entry(one, model.absolute(), facts, check_names) for one in packages]
    entries = [*manifest["experts"], *added]
    _check_distinct(entries)
    return _replace_experts(model, manifest, entries)


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


def check_merged(path: Path, share: tuple[int, int] = (0, 1)) -> None:
    """Checks every file of a merged model, of its anchor and of its packages; reads no weights.

    `share` is as in `check_files`.

    Raises:
      ValueError: a part is missing, damaged, or not the one that was merged.
    """
    manifest = read_manifest(path, kind="merged")
    # Where no router was tuned, a folder `params` is what an undone one left on a killed run.
    check_files(path, manifest, () if "tensors" in manifest else ("params",), share)
    check_anchor(path / manifest["anchor"]["path"], share)
    for entry in manifest["experts"]:
        check_files(path / entry["path"], _merged_package(path, entry), share=share)


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
        with concurrent.futures.ThreadPoolExecutor(1) as beside:
            checked = beside.submit(check_merged, path, share)  # while the files are read anyway
            try:
                loaded = _load_unchecked(path, dtype, mesh, over, separator)
            except Exception:  # anything can come of a damaged file,
                checked.result()  # and this says what it was
                raise
            checked.result()
        return loaded

    return load_checked() if mesh is None else all_together(load_checked)


def _load_unchecked(
    path: Path,
    dtype: str | None,
    mesh: Mesh | None,
    over: tuple[str, ...],
    separator: str | None,
) -> LoadedModel:
    manifest = read_manifest(path, kind="merged")
    folder = path / manifest["anchor"]["path"]
    separator = separator or manifest["anchor"].get("separator")
    anchor = open_anchor(folder, on_disk=True, separator=separator)
    _check_identity(folder, anchor.identity, manifest)
    stacks = [anchor.weights.public]
    for entry in manifest["experts"]:
        package = _merged_package(path, entry)
        check_made_for(package, path / entry["path"], AnchorFacts.of(anchor))
        stacks.append(find_tensors(path / entry["path"], package, _abstract_expert(anchor.config)))
    empty = 0 if mesh is None else -len(stacks) % mesh.shape[sharding.EXPERT]
    experts = join_files(stacks, empty)
    if "tensors" in manifest:
        whole = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), join_files(stacks))
        tuned = find_tensors(path, manifest, whole.router)
        experts.router = join_files([tuned], empty)
    backbone, experts = sharding.place((anchor.weights.backbone, experts), mesh, over, dtype)
    names = ("public", *(entry["name"] for entry in manifest["experts"]))
    memory = manifest.get("memory")  # not in the manifests of older versions
    config = anchor.config.replace(
        num_experts=len(names),
        active_experts=manifest["active_experts"],
        memory=memory and (memory["decay"], memory["weight"]),
    )
    return LoadedModel(backbone, experts, config, names, anchor.tokenizer, anchor.ends)


def _merged_package(model: Path, entry: dict[str, str]) -> dict[str, Any]:
    """The manifest of a package, if it is the one that was merged."""
    package = model / entry["path"]
    manifest = read_manifest(package, kind="expert")
    if manifest["digest"] != entry["digest"]:
        raise ValueError(
            f"{package}: not the package that was merged as {entry['name']!r} (its manifest "
            "differs); take it out with `flexolmo experts remove` and add it again"
        )
    return manifest


def load_pair(path: Path, anchor: LoadedAnchor) -> LoadedModel:
    """An owner's own two-expert model: the anchor and one package."""
    expert = read_expert(path, anchor)
    name = read_manifest(path)["name"]
    config = dataclasses.replace(anchor.config, num_experts=2)
    stack = join(anchor.weights.public, expert)
    return LoadedModel(
        anchor.weights.backbone, stack, config, ("public", name), anchor.tokenizer, anchor.ends
    )


def _named_separator(packages: Sequence[Path]) -> str | None:
    """The separator that owners named for their training, if they did; all must be the same."""
    manifests = [read_manifest(path, kind="expert") for path in packages]
    named = sorted({m["separator"] for m in manifests if m.get("separator")})
    if len(named) > 1:
        raise ValueError(
            f"the packages were trained with several separators, {', '.join(map(repr, named))}; a "
            "merged model has one"
        )
    return named[0] if named else None


def _check_identity(folder: Path, found: str, manifest: dict[str, Any]) -> None:
    if found != manifest["anchor"]["identity"]:
        raise ValueError(
            f"{folder}: not the anchor that was merged: expected "
            f"{manifest['anchor']['identity'][:12]}..., found {found[:12]}..."
        )


def _entry(
    package: Path, model: Path, anchor: AnchorFacts, check: Callable[[Path, dict], None]
) -> dict[str, str]:
    manifest = read_manifest(package, kind="expert")
    check_made_for(manifest, package, anchor)
    check(package, manifest)
    return {
        "name": manifest["name"],
        "path": _relative(package, model),
        "digest": manifest["digest"],
    }


def _check_distinct(entries: list[dict[str, str]]) -> None:
    names = [entry["name"] for entry in entries]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"two packages are named {name!r}; names must differ, so that each can be "
                "switched off"
            )


def _replace_experts(model: Path, manifest: dict[str, Any], entries: list[dict]) -> bool:
    undone = manifest.pop("tensors", None) is not None
    write_manifest(model, {**manifest, "experts": entries, "files": {}})
    shutil.rmtree(model / "params", ignore_errors=True)
    return undone


def _relative(path: Path, model: Path) -> str:
    return os.path.relpath(path.absolute().resolve(), model.resolve())
