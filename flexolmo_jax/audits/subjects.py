"""What an audit examines: a package, its anchor, its canaries, and the documents it trained on."""

from pathlib import Path
from typing import Any

from flexolmo_jax.audits.scoring import tokenizer_of
from flexolmo_jax.data.sources import Report, read_documents
from flexolmo_jax.data.windows import tokenized
from flexolmo_jax.evaluation.split import GROUP_FIELD, Split
from flexolmo_jax.federation.loading import anchor_path
from flexolmo_jax.federation.package import Package, read_manifest
from flexolmo_jax.federation.source import open_source
from flexolmo_jax.model import FlexOlmo
from flexolmo_jax.privacy.canaries import Canaries


def package_of(path: Path, expert: str | None) -> Path:
    """The package of an expert.

    Args:
      path: a merged model, or the package itself.
      expert: its name; None if `path` is the package.

    Raises:
      ValueError: there is no such expert, or the name is missing.
    """
    manifest = read_manifest(path)
    if manifest["kind"] == "expert":
        if expert not in (None, manifest["name"]):
            raise ValueError(f"{path}: this is the package of {manifest['name']!r}, not {expert!r}")
        return path
    packages = {entry["name"]: path / entry["path"] for entry in manifest.get("experts", ())}
    known = ", ".join(packages) or "none"
    if manifest["kind"] != "merged":
        raise ValueError(f"{path}: expected an expert package or a merged model, found an anchor")
    if expert is None:
        raise ValueError(f"{path}: a merged model; name one of its experts with --expert: {known}")
    if expert not in packages:
        raise ValueError(f"{path}: no expert named {expert!r}; there are {known}")
    return packages[expert]


def anchor_of(path: Path, given: str | Path | None) -> Path:
    """The anchor of a model on disk: the given one, or the one that the model names."""
    return anchor_path(open_source(path)) if given is None else Path(given)


def identity_of(path: Path) -> str:
    """The digest of a model's manifest, or its path if it is a Hugging Face directory.

    An audit that was killed is resumed only if this is unchanged.
    """
    source = open_source(path)
    return source.digest if isinstance(source, Package) else str(path)


def trained_documents(
    model: FlexOlmo, data: str, split: Split | None, text_field: str
) -> list[list[int]]:
    """Token ids of the documents that a model was trained on, without separators.

    Args:
      model: its tokenizer is used.
      data: the owner's text, as `read_documents` takes it.
      split: documents that it holds out are left out; None leaves out nothing.
      text_field: the field of rows that holds the text.
    """
    report = Report()
    field = split.group_field if split else GROUP_FIELD
    documents = read_documents(data, text_field=text_field, group_field=field, report=report)
    trained = (d for d in documents if split is None or not split.holds_out(d))
    encoded = [ids[1:].tolist() for ids in tokenized(trained, tokenizer_of(model))]
    report.tell()
    return encoded


def claim_of(package: Path, manifest: dict[str, Any]) -> dict[str, Any] | None:
    """The privacy certificate of a package, verified or not; None if it has none.

    Raises:
      ValueError: the certificate lacks epsilon, delta or the unit of privacy.
    """
    claim = manifest["privacy"]
    if not isinstance(claim, dict):
        return None
    numbers: list[Any] = [claim.get(name) for name in ("epsilon", "delta")]
    if not all(type(x) in (int, float) and x > 0 for x in numbers) or "unit" not in claim:
        raise ValueError(
            f"{package}: its privacy certificate claims no epsilon and delta above 0 of a unit; "
            f"see `flexolmo privacy verify {package}`"
        )
    return claim


def canaries_of(package: Path, manifest: dict[str, Any], run: Path) -> Canaries:
    """The canaries in a run folder, checked against the commitment in the package.

    Raises:
      ValueError: there are none, or they belong to another package.
    """
    canaries = Canaries.read(run)
    recorded = manifest.get("canaries")
    if recorded is None:
        raise ValueError(
            f"{package}: its manifest records no canaries; it was trained without --canaries"
        )
    if recorded["commitment"] != canaries.commitment:
        raise ValueError(
            f"{run}: not the canaries of {package}: its manifest commits to "
            f"{recorded['commitment'][:12]}..., found {canaries.commitment[:12]}...; name the run "
            "folder of this expert"
        )
    return canaries
