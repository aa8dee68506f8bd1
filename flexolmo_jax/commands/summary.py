"""What `flexolmo inspect` and `flexolmo experts list` show of packages and merged models.

Manifests are text of strangers: any field may be missing or of any type, and what is in no list
here is shown all the same.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flexolmo_jax.federation.anchor import open_anchor
from flexolmo_jax.federation.merged import open_part
from flexolmo_jax.federation.package import privacy_summary, read_manifest
from flexolmo_jax.federation.shares import Shares
from flexolmo_jax.federation.source import open_source
from flexolmo_jax.runtime.console import show_fields, show_table, tell

KINDS = {
    "anchor": "public anchor",
    "expert": "expert package",
    "merged": "merged model",
}
SIZES = (
    "vocab_size", "width", "num_layers", "num_heads", "num_kv_heads", "head_width", "ffn_width",
    "max_length",
)  # fmt: skip
SHOWN_FIRST = ("kind", "name", "licence", "contact", "privacy", "tokens_seen", "anchor", "model")
DIGEST = re.compile("[0-9a-f]{64}")
SHORT = 12  # hexadecimal digits of a digest; --json has all


def show_package(path: Path, manifest: Mapping[str, Any]) -> None:
    """Prints what a checked package or merged model says of itself.

    Args:
      path: where it is.
      manifest: as `read_manifest` returns it.
    """
    merged = manifest["kind"] == "merged"
    title = f"{path}: every file is as it was written"
    title += ", those of its anchor and packages too" * merged
    show_fields(package_fields(path, manifest), title)
    if merged:
        show_experts(path)
    tensors = manifest.get("tensors")
    if tensors:
        rows = [
            {"tensor": name, "shape": "x".join(map(str, one["shape"])), "dtype": one["dtype"]}
            for name, one in tensors.items()
        ]
        show_table(rows)


def package_fields(path: Path, manifest: Mapping[str, Any]) -> dict[str, str]:
    """A manifest for people: names and values, the most asked for first."""
    about = dict(manifest)
    kind, tensors, files = about["kind"], about.pop("tensors", None), about.pop("files", {})
    about.pop("experts", None)  # a table of their own
    fields = {"kind": KINDS.get(kind, str(kind))}
    if "name" in about:
        fields["name"] = str(about["name"])
    for key in ("licence", "contact"):
        if key in about:
            fields[key] = str(about[key])
    if "privacy" in about:
        fields["privacy"] = privacy_summary(about["privacy"])
        if isinstance(about["privacy"], dict):
            fields["privacy"] += f"; check it: flexolmo privacy verify {path}"
    if "tokens_seen" in about:
        fields["tokens seen"] = _plain(about["tokens_seen"])
    if kind == "merged":
        folder = path / about["anchor"]["path"]
        fields["anchor"] = f"{about['anchor']['identity'][:SHORT]} in {folder}"
        anchor = open_anchor(open_source(folder, "anchor"), about["anchor"].get("separator"))
        model: Any = anchor.config.architecture()
        about["active_experts"] = about["active_experts"] or "all"
    else:
        if "anchor" in about:
            fields["made for anchor"] = str(about["anchor"])[:SHORT]
        model = about.get("model")
    if isinstance(model, dict):
        sizes = {key: model[key] for key in SIZES if model.get(key) is not None}
        fields["sizes"] = _plain(sizes)
        others = {key: v for key, v in model.items() if key not in SIZES and v is not None}
        fields["config"] = _plain(others)
    if tensors:
        count = sum(math.prod(one["shape"]) for one in tensors.values())
        fields["parameters"] = f"{count:,} in {len(tensors)} tensors"
    for key, value in about.items():
        if key not in SHOWN_FIRST:
            fields[key.replace("_", " ")] = _plain(value)
    if files:
        size = sum((path / name).stat().st_size for name in files)
        fields["files checked"] = f"{len(files)}, {size / 1e6:,.1f} MB"
    return fields


def expert_rows(model: Path) -> list[dict[str, Any]]:
    """What the packages of a merged model say of themselves, as JSON values.

    Raises:
      ValueError: a manifest is missing, damaged, or of another kind.
    """
    rows = []
    for entry in read_manifest(model, kind="merged")["experts"]:
        about = open_part(model, entry).manifest
        rows.append(
            {
                "name": entry["name"],
                "path": str(model / entry["path"]),
                **{key: about.get(key) for key in ("tokens_seen", "licence", "contact", "privacy")},
            }
        )
    return rows


def show_experts(model: Path) -> None:
    """Prints a merged model's experts."""
    rows = [
        {
            **{key.replace("_", " "): value for key, value in row.items()},
            "privacy": privacy_summary(row["privacy"]),
        }
        for row in expert_rows(model)
    ]
    show_table(rows, title=f"experts of {model}, besides public", empty="no experts")


def show_shares(shares: Shares | None) -> None:
    """Prints what each expert takes of the anchor's public text, layer by layer."""
    if shares is None:
        tell(
            "no public text came with the anchor, so nothing is known of the share of it that each "
            "expert would take"
        )
        return
    rows = [
        {
            "expert": row["expert"],
            **{key: f"{row[key]:.1%}" for key in ("mean", "largest")},
            "by layer": " ".join(f"{x:.0%}" for x in row["layers"]),
        }
        for row in shares.rows()
    ]
    show_table(rows, title=f"shares of {shares.tokens:,} tokens of the anchor's public text")


def _plain(value: Any) -> str:
    if isinstance(value, str) and DIGEST.fullmatch(value):
        return value[:SHORT]
    if isinstance(value, dict):
        return ", ".join(f"{key.replace('_', ' ')} {_plain(one)}" for key, one in value.items())
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return f"{value:,}" if isinstance(value, int) else str(value)
