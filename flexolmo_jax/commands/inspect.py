"""`flexolmo inspect`: verifies a package or a merged model, and prints its manifest.

Manifests come from strangers: any field may be missing or of any type, and fields that are not
listed here are shown too.
"""

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexolmo_jax.commands.experts import parts_of, show_experts, shown_parts
from flexolmo_jax.commands.merge import show_shares
from flexolmo_jax.commands.parser import Commands
from flexolmo_jax.commands.shared_arguments import add_json
from flexolmo_jax.runtime.console import print_json, show_fields, show_table

if TYPE_CHECKING:  # importing it imports JAX, which no --help waits for
    from flexolmo_jax.federation.merged import OpenedModel

KINDS = {"anchor": "public anchor", "expert": "expert package", "merged": "merged model"}
SIZES = (
    "vocab_size", "width", "num_layers", "num_heads", "num_kv_heads", "head_width", "ffn_width",
    "max_length",
)  # fmt: skip
SHOWN_FIRST = ("kind", "name", "licence", "contact", "privacy", "tokens_seen", "anchor", "model")
DIGEST = re.compile("[0-9a-f]{64}")
SHORT = 12  # hexadecimal digits of a digest; --json prints all


def add_to(commands: Commands) -> None:
    parser = commands.add("inspect", run, "verify a package and print its manifest")
    parser.add_argument("path")
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    from flexolmo_jax.federation.merged import OpenedModel, check_package, shares_of

    path = Path(args.path)
    checked = check_package(path)
    opened = checked if isinstance(checked, OpenedModel) else None
    manifest, shares = dict(checked.manifest), opened and shares_of(opened)
    if args.json:
        described = {"tensors": manifest.pop("tensors", {}), "files": manifest.pop("files")}
        if opened:
            parts = {one.manifest["name"]: parts_of(one.manifest) for one in opened.experts}
            measured: dict[str, Any] = {"parts": parts, "shares": shares and shares.rows()}
        else:
            measured = {"parts": parts_of({"tensors": described["tensors"]})}
        print_json({**manifest, **described, **measured})
        return
    show_package(path, manifest, opened)
    if opened and opened.experts:
        show_shares(shares)


def show_package(path: Path, manifest: Mapping[str, Any], opened: "OpenedModel | None") -> None:
    """Prints the manifest of a verified package or merged model.

    Args:
      path: its folder.
      manifest: as `read_manifest` returns it.
      opened: the parts of a merged model; None for a package.
    """
    title = f"{path}: every file is as it was written"
    title += ", those of its anchor and packages too" * (opened is not None)
    show_fields(package_fields(path, manifest, opened), title)
    if opened:
        show_experts(path, opened.experts)
    tensors = manifest.get("tensors")
    if tensors:
        rows = [
            {"tensor": name, "shape": "x".join(map(str, tensor["shape"])), "dtype": tensor["dtype"]}
            for name, tensor in tensors.items()
        ]
        show_table(rows)


def package_fields(
    path: Path, manifest: Mapping[str, Any], opened: "OpenedModel | None"
) -> dict[str, str]:
    """The fields of a manifest as people read them, the most important first."""
    from flexolmo_jax.federation.package import privacy_summary

    rest = dict(manifest)
    kind, tensors, files = rest["kind"], rest.pop("tensors", None), rest.pop("files", {})
    rest.pop("experts", None)  # in a table of their own
    fields = {"kind": KINDS.get(kind, str(kind))}
    for key in ("name", "licence", "contact"):
        if key in rest:
            fields[key] = str(rest[key])
    if "privacy" in rest:
        fields["privacy"] = privacy_summary(rest["privacy"])
        if isinstance(rest["privacy"], dict):
            fields["privacy"] += f"; verify it: flexolmo privacy verify {path}"
    if "tokens_seen" in rest:
        fields["tokens seen"] = _readable(rest["tokens_seen"])
    if opened:
        anchor = rest["anchor"]
        fields["anchor"] = f"{anchor['identity'][:SHORT]} in {path / anchor['path']}"
        model: Any = opened.anchor.config.architecture()
        rest["active_experts"] = rest["active_experts"] or "all"
    else:
        if "anchor" in rest:
            fields["trained beside anchor"] = str(rest["anchor"])[:SHORT]
        model = rest.get("model")
    if isinstance(model, dict):
        sizes = {key: model[key] for key in SIZES if model.get(key) is not None}
        fields["sizes"] = _readable(sizes)
        others = {key: v for key, v in model.items() if key not in SIZES and v is not None}
        fields["config"] = _readable(others)
    parts = parts_of(manifest)
    if tensors:
        count = sum(own["parameters"] for own in parts.values())
        fields["parameters"] = f"{count:,} in {len(tensors)} tensors"
    if not opened:
        fields["parts"] = shown_parts(parts)
    fields["routed by"] = _shown_routing(manifest, opened, parts)
    for key, value in rest.items():
        if key not in SHOWN_FIRST:
            fields[key.replace("_", " ")] = _readable(value)
    if files:
        size = sum((path / name).stat().st_size for name in files)
        fields["files checked"] = f"{len(files)}, {size / 1e6:,.1f} MB"
    return fields


def _shown_routing(
    manifest: Mapping[str, Any], opened: "OpenedModel | None", parts: Mapping[str, Any]
) -> str:
    """How a merged model routes, or how a model can route that an expert or anchor is merged to."""
    if opened:
        active = manifest["active_experts"] or "all"
        return f"{opened.routing.described()}; active experts: {active}"
    if "evidence" not in parts:
        return "router rows"
    return "evidence, where all others have evidence heads; else router rows"


def _readable(value: Any) -> str:
    if isinstance(value, str) and DIGEST.fullmatch(value):
        return value[:SHORT]
    if isinstance(value, dict):
        return ", ".join(f"{key.replace('_', ' ')} {_readable(v)}" for key, v in value.items())
    if isinstance(value, list):
        return ", ".join(map(_readable, value))
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return f"{value:,}" if isinstance(value, int) else str(value)
