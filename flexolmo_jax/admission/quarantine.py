"""Quarantine: a rejected package is moved to where nobody merges from, with its report."""

import errno
import os
import shutil
from pathlib import Path

from flexolmo_jax.admission.report import write_report
from flexolmo_jax.admission.results import Report
from flexolmo_jax.storage.files import new_directory
from flexolmo_jax.trust.signatures import signature_file

PACKAGE = "package"


def quarantine(package: Path, folder: Path, report: Report) -> Path:
    """Moves a package to FOLDER/NAME-TIME/package, its report to FOLDER/NAME-TIME/report.

    A signature beside it, PACKAGE.sig, goes with it. The move is one rename; to another file
    system, it is a copy, complete before the original is deleted. So the package is whole, at one
    of the two places, whenever the power fails. Links in it are moved as links.

    Args:
      package: the folder to move.
      folder: of all quarantined packages; made if it is missing.
      report: says why.

    Returns:
      FOLDER/NAME-TIME.

    Raises:
      ValueError: the place is taken.
      OSError: it cannot be moved; the package stays where it is.
    """
    time = report.made_at.replace(":", "").removesuffix("+0000")
    place = folder / f"{package.resolve().name}-{time}"
    write_report(report, place / "report")
    moved = place / PACKAGE
    try:
        os.rename(package, moved)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        with new_directory(moved) as partial:
            shutil.copytree(package, partial, symlinks=True, dirs_exist_ok=True)
        shutil.rmtree(package)
    signature = signature_file(package)
    if os.path.lexists(signature):
        shutil.move(signature, signature_file(moved))
    return place


def check_can_move(package: Path) -> None:
    """Raises ValueError if a folder is no folder of its own that can be moved."""
    if package.is_symlink():
        raise ValueError(f"{package}: is a link; name the folder itself, to be quarantined")
    if not os.access(package.absolute().parent, os.W_OK):
        raise ValueError(f"{package}: the folder that it lies in cannot be written, so it stays")
