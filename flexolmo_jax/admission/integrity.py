"""Integrity: is a folder a sound expert package, made for this anchor."""

from pathlib import Path

from flexolmo_jax.admission.cohort import Cohort
from flexolmo_jax.admission.policy import Integrity
from flexolmo_jax.admission.results import Result
from flexolmo_jax.federation.expert import check_made_for
from flexolmo_jax.federation.package import Package, check_packages
from flexolmo_jax.federation.source import Require, open_required

MEASURED = "files, tensors, anchor"


def check_integrity(
    path: Path, cohort: Cohort, bounds: Integrity, require: Require | None = None
) -> tuple[Result, Package | None]:
    """Opens a package and checks every byte of it, as `merge` does.

    The exact list of tensors, their shapes and dtypes, digests of all files, values in range, and
    the anchor that it was made for; the anchor's own identity was computed from its tensors when it
    was opened.

    Args:
      path: the folder of the package.
      cohort: with the anchor.
      bounds: of the policy.
      require: may refuse the package by its signature (`record.requirement`).

    Returns:
      the result; and the package, or None if it is not sound: whatever is wrong with a stranger's
      folder is a finding, and no error.

    Raises:
      ValueError: there is no such folder, or it is one of the cohort.
    """
    if not path.is_dir():
        raise ValueError(f"{path}: no such folder (expected an expert package)")
    for member in cohort.members:
        if member.folder.resolve() == path.resolve():
            raise ValueError(
                f"{path}: is in the policy's cohort already; remove it from there to examine it"
            )
    try:
        package = open_required(path, "expert", require)
        check_made_for(package, cohort.anchor)
        check_packages([package])
    except (ValueError, OSError) as error:
        why = " ".join(str(error).split())
        return Result("integrity", MEASURED, None, None, bounds.fails, why, "text"), None
    entries = package.manifest["tensors"]
    details = {
        "tensors": {name: [entry["dtype"], entry["shape"]] for name, entry in entries.items()},
        "identity": cohort.anchor.identity,
    }
    why = (
        f"{len(package.manifest['files'])} files are as they were written, with exactly the "
        f"{len(entries)} tensors of this config, all finite, for the anchor "
        f"{cohort.anchor.identity[:12]}" + (", and its signature is valid." if require else ".")
    )
    return Result("integrity", MEASURED, None, None, "passed", why, "text", details), package
