"""The signature that a package must have, and the decision in a registry's log."""

from pathlib import Path
from typing import TYPE_CHECKING

from flexolmo_jax.admission.results import Report
from flexolmo_jax.federation.package import Package
from flexolmo_jax.federation.source import Require
from flexolmo_jax.runtime.console import visible
from flexolmo_jax.storage.files import file_digest
from flexolmo_jax.trust import keys, log
from flexolmo_jax.trust.log import Entry
from flexolmo_jax.trust.registry import Registry
from flexolmo_jax.trust.signers import utc_now
from flexolmo_jax.trust.trusted import Trusted

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

LONGEST = 500  # characters of a reason


def requirement(registry: str | Path) -> Require:
    """Refuses a package that its owner did not sign, or that was revoked.

    One that was rejected before may be examined again: an admission ends the rejection.

    Raises:
      ValueError: the registry or its log is damaged, or has expired.
    """
    trusted = Trusted.open(registry)

    def require(package: Package) -> None:
        revoked = trusted.revocation(trusted.signed(package))
        if revoked is not None:
            raise ValueError(f"{package.folder}: {revoked}")

    return require


def read_coordinator(registry: str | Path, file: Path) -> "EllipticCurvePrivateKey":
    """The private key that signs lines of a registry's log.

    Raises:
      ValueError: it is no key, or no coordinator's now.
    """
    key = keys.read_private(file)
    opened, now = Registry.open(registry), utc_now()
    opened.check_signer(keys.public_of(key), "coordinator", now=now)
    return key


def record(
    report: Report, file: Path, registry: str | Path, key: "EllipticCurvePrivateKey"
) -> Entry | None:
    """Writes an admission or a rejection into a registry's log, with the digest of its report.

    Args:
      report: of a package whose signature was required.
      file: report.json, as it was written.
      registry: the folder.
      key: of a coordinator.

    Returns:
      the line; None where a person has to decide first, or the package was not sound and signed: a
      line names a digest, and anybody can send a damaged copy of an honest package, which has the
      honest one's.

    Raises:
      ValueError: as `log.append`.
    """
    if report.verdict == "review" or not report.facts:
        return None
    admitted = report.verdict == "admitted"
    failed = [x.explanation for x in report.results if x.verdict == "reject"]
    return log.append(
        registry,
        key,
        log.ADMITTED if admitted else log.REJECTED,
        expert=report.facts["name"],
        package=report.facts["digest"],
        reason=None if admitted else visible(" ".join(failed), keep="")[:LONGEST],
        report=file_digest(file),
    )
