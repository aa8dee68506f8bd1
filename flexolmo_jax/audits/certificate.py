"""Verification of a package's privacy certificate: its files, then epsilon computed again."""

from pathlib import Path
from typing import Any

from flexolmo_jax.federation.package import Package, check_packages
from flexolmo_jax.privacy.certificate import verify_certificate


def verify_package(package: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Checks every file of an expert's package, and computes its epsilon again.

    Returns:
      the manifest, and what `verify_certificate` computed.

    Raises:
      ValueError: the package is damaged, or its certificate claims more than its numbers give.
    """
    opened = Package.open(package, "expert")
    check_packages([opened])
    manifest = opened.manifest
    computed = verify_certificate(
        manifest["privacy"], str(package), manifest.get("gating"), opened.weights.parts
    )
    return dict(manifest), computed


def certificate_fields(certificate: dict[str, Any]) -> dict[str, str]:
    """The fields of a certificate as people read them."""
    fields = {}
    for key, value in certificate.items():
        if key == "outside":
            value = "\n".join(f"- {line}" for line in value)
        elif key == "other_runs":
            value = len(value)
        elif key == "parts":
            value = ", ".join(map(str, value))
        fields[key.replace("_", " ")] = str(value)
    return fields
