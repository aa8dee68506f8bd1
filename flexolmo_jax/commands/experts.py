"""`flexolmo experts`: lists, adds and removes the experts of a merged model."""

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexolmo_jax.commands.merge import show_shares
from flexolmo_jax.commands.parser import Commands
from flexolmo_jax.commands.shared_arguments import (
    add_allow_share,
    add_json,
    add_require_signed,
    requirement,
)
from flexolmo_jax.runtime.console import print_json, show_table, tell

if TYPE_CHECKING:  # importing it imports JAX, which no --help waits for
    from flexolmo_jax.federation.package import Package


def add_to(commands: Commands) -> None:
    actions = commands.group("experts", "list, add or remove a merged model's experts")
    parser = actions.add("list", list_experts, "list the experts of a merged model")
    parser.add_argument("model")
    add_json(parser)
    parser = actions.add("add", add, "add expert packages to a merged model")
    parser.add_argument("model")
    parser.add_argument("packages", nargs="+", metavar="PACKAGE")
    add_allow_share(parser)
    add_require_signed(parser)
    parser = actions.add(
        "remove", remove, "remove experts from a merged model",
        "Removes experts from a merged model; their packages stay where they are, and may be added "
        "again. With --log and --key, the registry's log has a line for each, and a model that was "
        "signed is signed again. To let nobody use a package any more: `flexolmo revoke`.",
    )  # fmt: skip
    parser.add_argument("model")
    parser.add_argument("names", nargs="+", metavar="NAME")
    parser.add_argument("--log", metavar="REGISTRY", help="record the removal in this registry")
    parser.add_argument("--key", metavar="FILE", help="a coordinator's private key, for --log")
    parser.add_argument("--reason", metavar="TEXT", help="for the record")


def list_experts(args: argparse.Namespace) -> None:
    from flexolmo_jax.federation.merged import open_part
    from flexolmo_jax.federation.package import read_manifest

    model = Path(args.model)
    entries = read_manifest(model, kind="merged")["experts"]
    experts = [open_part(model, entry) for entry in entries]
    if args.json:
        print_json(expert_rows(experts))
    else:
        show_experts(model, experts)


def add(args: argparse.Namespace) -> None:
    from flexolmo_jax.federation.merge import add_expert

    added = add_expert(
        args.model, *args.packages, allow_share=args.allow_share,
        require=requirement(args.require_signed),
    )  # fmt: skip
    _tell_if_untuned(added.undone)
    _tell_if_signed(args.model)
    show_shares(added.shares)


def remove(args: argparse.Namespace) -> None:
    from flexolmo_jax.federation.merge import remove_expert

    is_signed = _record_removal(args)
    _tell_if_untuned(remove_expert(args.model, *args.names))
    if is_signed:
        from flexolmo_jax.trust.signatures import sign_package

        tell(f"wrote {sign_package(args.model, args.key)}: the model is signed again")
    else:
        _tell_if_signed(args.model)


def _record_removal(args: argparse.Namespace) -> bool:
    """Writes a removal down, before it happens, if that is asked for.

    Returns:
      whether the model was signed, and is to be signed again.
    """
    if args.log is None:
        for option in ("key", "reason"):
            if getattr(args, option) is not None:
                raise ValueError(f"--{option} needs --log REGISTRY")
        return False
    if args.key is None:
        raise ValueError("--log needs --key FILE, a coordinator's private key")
    from flexolmo_jax.federation.package import Package
    from flexolmo_jax.trust import log
    from flexolmo_jax.trust.keys import read_private
    from flexolmo_jax.trust.registry import Registry
    from flexolmo_jax.trust.signatures import signature_file, verify_signature

    key, model = read_private(Path(args.key)), Package.open(Path(args.model), "merged")
    is_signed = signature_file(model.folder).exists()
    if is_signed:  # what somebody else changed is not signed again
        verify_signature(model, Registry.open(args.log))
    digests = {entry["name"]: entry["digest"] for entry in model.manifest["experts"]}
    if digests.keys() >= set(args.names):  # else the removal is refused
        for name in args.names:
            about = {"expert": name, "package": digests[name], "reason": args.reason}
            log.append(args.log, key, log.REMOVED, **about)
    return is_signed


def _tell_if_signed(model: str) -> None:
    from flexolmo_jax.trust.signatures import signature_file

    file = signature_file(Path(model))
    if file.exists():
        tell(f"{file} is of the model before this change: run `flexolmo sign` again")


def _tell_if_untuned(undone: bool) -> None:
    if undone:
        tell(
            "the router had been tuned for the old set of experts: it is back to the owners' own "
            "rows; to tune it for the new set, run `flexolmo train router` again"
        )


def expert_rows(experts: Sequence["Package"]) -> list[dict[str, Any]]:
    """The name, path and manifest fields of each opened expert package, as JSON values."""
    fields = ("tokens_seen", "licence", "contact", "privacy")
    return [
        {
            "name": expert.manifest["name"],
            "path": str(expert.folder),
            "parts": parts_of(expert.manifest),
            **{key: expert.manifest.get(key) for key in fields},
        }
        for expert in experts
    ]


def parts_of(manifest: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """The parts of an expert or an anchor, by the names of its tensors.

    Args:
      manifest: of a package that was checked.

    Returns:
      {part: {"parameters": count}}; its "rank" if it is low-rank, of a feed-forward part the
      largest of its matrices'; and its "bits" if its matrices are integers.
    """
    from flexolmo_jax.storage.integers import LARGEST, PEAK

    parts: dict[str, dict[str, int]] = {}
    for name, tensor in (manifest.get("tensors") or {}).items():
        part = name.removeprefix("public.").partition(".")[0]
        found = parts.setdefault(part, {"parameters": 0})
        if name.endswith(PEAK):  # the scales of integers, which are no weights
            continue
        found["parameters"] += math.prod(tensor["shape"])
        if name.endswith(".a"):
            found["rank"] = max(found.get("rank", 0), tensor["shape"][-1])
        if tensor["dtype"] in LARGEST:
            found["bits"] = int(tensor["dtype"].removeprefix("int"))
    return parts


def shown_parts(parts: Mapping[str, Mapping[str, int]]) -> str:
    """In words: each part, its rank if it has one, and its number of weights."""
    return "; ".join(
        name.replace("_", " ")
        + (f" of rank {own['rank']}" if "rank" in own else "")
        + (f" in {own['bits']} bits" if "bits" in own else "")
        + f": {own['parameters']:,}"
        for name, own in parts.items()
    )


def show_experts(model: Path, experts: Sequence["Package"]) -> None:
    """Prints a merged model's experts."""
    from flexolmo_jax.federation.package import privacy_summary

    rows = [
        {
            **{key.replace("_", " "): value for key, value in row.items()},
            "parts": shown_parts(row["parts"]),
            "privacy": privacy_summary(row["privacy"]),
        }
        for row in expert_rows(experts)
    ]
    show_table(rows, title=f"experts of {model}, besides public", empty="no experts")
