"""Admission of a package: all checks, the cheap ones first, and a report."""

import contextlib
import datetime
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flexolmo_jax.admission import probes as probing
from flexolmo_jax.admission.cohort import Cohort, open_cohort
from flexolmo_jax.admission.identity import check_identity, same_names
from flexolmo_jax.admission.integrity import check_integrity
from flexolmo_jax.admission.loss import check_loss
from flexolmo_jax.admission.policy import Policy
from flexolmo_jax.admission.results import Report, Result, not_judged
from flexolmo_jax.admission.routing import Texts, check_routing
from flexolmo_jax.admission.spectral import check_spectral
from flexolmo_jax.federation.merge import merge
from flexolmo_jax.federation.names import PUBLIC
from flexolmo_jax.federation.package import Package, privacy_summary
from flexolmo_jax.federation.source import Require
from flexolmo_jax.model import FlexOlmo, load
from flexolmo_jax.runtime.console import log

FACTS = ("name", "digest", "licence", "contact", "tokens_seen", "made_by")


def examine(
    package: str | Path,
    anchor: str | Path,
    public: str,
    policy: Policy,
    require: Require | None = None,
) -> Report:
    """Examines an expert package: is it sound, new, modest in routing, harmless and usual.

    A package that is not sound is not examined further. All else is measured, whatever fails: the
    report is for a person. Nothing is written, and progress goes to standard error.

    Args:
      package: the folder of the package.
      anchor: the anchor that it must be made for.
      public: SOURCE of public text, as in `read_documents`.
      policy: bounds, cohort, domains and probes (`read_policy`).
      require: may refuse the package by its signature (`record.requirement`); default: it need not
        be signed.

    Returns:
      the report; `report.verdict` is "admitted", "review" or "rejected", and `report.results` has
      each check's figure, bound and verdict.

    Raises:
      ValueError: the examination cannot be made: there is no such folder; the anchor, the cohort,
        a text, or the probes are missing or damaged; the policy allows too few subsets.
    """
    cohort = open_cohort(anchor, policy.cohort)
    texts = Texts.read(public, policy.domains, policy.loss.bytes)
    file = policy.probes.file
    probes = [] if file is None else probing.read_probes(file)
    timer = _Timer()
    with timer.of("integrity"):
        sound, opened = check_integrity(Path(package), cohort, policy.integrity, require)
        if opened is not None:
            _check_fits(policy, (PUBLIC, *cohort.names), opened.manifest["name"], bool(probes))
    results = [sound]
    if opened is not None:
        results += _examine(opened, cohort, texts, probes, policy, timer)
    return Report(
        package=str(package),
        facts={} if opened is None else _facts(opened),
        anchor=cohort.anchor.identity,
        cohort=cohort.names,
        policy=policy.digest(),
        results=tuple(results),
        seconds=timer.seconds,
        made_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def _examine(
    package: Package,
    cohort: Cohort,
    texts: Texts,
    probes: list[probing.Probe],
    policy: Policy,
    timer: "_Timer",
) -> list[Result]:
    name = package.manifest["name"]
    results: list[Result] = []
    with timer.of("identity"):
        results += check_identity(package, cohort, policy.identity)
    with timer.of("spectral"):
        results += check_spectral(package, cohort, policy.spectral)
    with timer.of("routing"):
        results += check_routing(package, cohort, texts, policy.routing)
    if same_names(package, cohort):
        why = "No model can hold two experts of this name, so none was run."
        return results + [not_judged(check, "behaviour", why) for check in ("loss", "probes")]
    with timer.of("merging"):
        model = _merged(package, cohort)
    with timer.of("loss"):
        results += check_loss(model, name, texts, policy.loss)
    with timer.of("probes"):
        results.append(probing.check_probes(model, name, probes, policy.always_on, policy.probes))
    return results


def _check_fits(policy: Policy, names: tuple[str, ...], new: str, probes: bool) -> None:
    """Raises ValueError, before any long work, if a policy is not for these experts."""
    for name in policy.always_on:
        if name not in (*names, new):
            raise ValueError(
                f"always_on: no expert named {name!r}; there are {', '.join((*names, new))}"
            )
    if probes and new not in names:
        probing.subsets((*names, new), policy.always_on, new, policy.probes.subsets)


def _merged(package: Package, cohort: Cohort) -> FlexOlmo:
    """The model that a merge of the cohort and the package makes."""
    evidence: Any = "auto"
    if cohort.routing is not None:  # an expert without an evidence head makes rows route
        evidence = cohort.routing.evidence if package.weights.ranks.evidence else None
    folders = [*(member.folder.absolute() for member in cohort.members), package.folder.absolute()]
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of routing by rows: the report says it
        merged = Path(folder) / "merged"
        merge(
            cohort.path.absolute(), folders, merged, active_experts=cohort.active_experts,
            memory=cohort.memory, evidence=evidence, allow_share=None,
        )  # fmt: skip
        return load(merged)


def _facts(package: Package) -> dict[str, Any]:
    manifest = package.manifest
    facts = {key: manifest[key] for key in FACTS if key in manifest}
    return {**facts, "privacy": privacy_summary(manifest["privacy"])}


class _Timer:
    """How long each check takes, said as it ends."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def of(self, check: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[check] = round(time.perf_counter() - started, 2)
        log(f"{check}: {self.seconds[check]:.1f} s")
