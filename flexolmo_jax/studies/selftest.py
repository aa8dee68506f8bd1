"""The self-test of the audits: a private expert and a non-private baseline, audited alike.

Both are trained on the same text of the corpus that comes with the project, each with canaries of
its own. The audits must not refute the private expert's certificate, must detect the baseline's
canaries, and must find that nothing is left of either once it is removed from a merged model.
Audits that cannot distinguish the two have failed.
"""

import dataclasses
import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from flexolmo_jax.audits.certificate import certificate_fields, verify_package
from flexolmo_jax.audits.findings import check_controls
from flexolmo_jax.audits.runs import run_extraction, run_membership, run_removal
from flexolmo_jax.config import PrivacyConfig
from flexolmo_jax.federation.merge import merge
from flexolmo_jax.model import load
from flexolmo_jax.runtime.console import console, show_fields, show_table, silenced, tell
from flexolmo_jax.storage.files import replace_file
from flexolmo_jax.storage.outputs import check_kept_folder
from flexolmo_jax.studies.engine.commands import run_command

EXPERTS = ("private", "baseline")
DISTINGUISHED = "members are distinguished"  # the verdict of a membership audit


@dataclasses.dataclass(frozen=True)
class Trial:
    """The sizes of the self-test; the defaults take ten minutes on two cores.

    Attributes:
      data, heldout: the text, and the share of it that training holds out.
      canaries: of each run.
      prefixes: passages that the extraction audit tries.
      private, baseline: the config of each expert, and options that change it.
    """

    data: str = "corpus:math"
    heldout: float = 0.1
    canaries: int = 200
    prefixes: int = 100
    private: tuple[str, ...] = ("demo_private_expert", "--dp-windows", "2")
    baseline: tuple[str, ...] = ("demo_expert", "--steps", "1400", "--checkpoint-every", "700")


def run_twin(
    out: Path,
    anchor: Path | None = None,
    epsilon: float = 8.0,
    trial: Trial | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Trains and audits both, and writes OUT/report.json.

    Args:
      out: a new folder: anchor, private, baseline, merged, and runs/ with all that is secret.
      anchor: to train beside; None trains the demo's.
      epsilon: the budget of the private expert.
      trial: the sizes.
      quiet: print nothing; the report has all of it.

    Returns:
      the report, as JSON values.

    Raises:
      ValueError: `out` already exists.
      RuntimeError: a training failed.
    """
    check_kept_folder(out, [] if anchor is None else [anchor], holding=())
    PrivacyConfig(epsilon)  # refuses an epsilon out of range before any work
    trial = trial or Trial()
    with silenced(quiet):
        started = time.monotonic()
        out.mkdir(parents=True, exist_ok=True)
        anchor = _train(out, anchor, epsilon, trial, quiet)
        console.rule("3. the certificate")
        manifest, computed = verify_package(out / "private")
        show_fields(certificate_fields(manifest["privacy"]), "private: privacy")
        tell(f"computed again: epsilon is at most {computed['epsilon']['pld']:.4f}")
        console.rule("4. audits")
        # The private expert has no evidence head.
        merge(anchor, [out / name for name in EXPERTS], out / "merged", evidence=None)
        report: dict[str, Any] = {"privacy": manifest["privacy"]}
        report |= {name: _audit(out, name, anchor, trial) for name in EXPERTS}
        report["checks"] = _checks(report)
        report["seconds"] = round(time.monotonic() - started, 1)
        replace_file(out / "report.json", json.dumps(report, indent=1) + "\n")
        _show(report, out)
    return report


def _train(out: Path, anchor: Path | None, epsilon: float, trial: Trial, quiet: bool) -> Path:
    """Trains the anchor unless there is one, then both experts side by side; returns the anchor."""
    runs = out / "runs"

    def train(name: str, words: Sequence[str], is_quiet: bool) -> None:
        outputs = ["--out", str(out / name), "--run", str(runs / name)]
        run_command(["train", *words, *outputs], compiled=runs / "compiled", quiet=is_quiet)

    if anchor is None:
        console.rule("1. the public anchor")
        anchor = out / "anchor"
        train("anchor", ["anchor", "demo_anchor", "--data", "corpus:public"], quiet)
    console.rule("2. an expert with privacy, and a baseline without")
    more = ["--data", trial.data, "--anchor", str(anchor), "--canaries", str(trial.canaries)]

    def train_expert(name: str) -> None:
        private = [*trial.private, "--dp-epsilon", str(epsilon)]
        config = private if name == "private" else trial.baseline
        train(name, ["expert", *config, *more, "--name", name], True)
        tell(f"{name}: trained and packaged")

    with ThreadPoolExecutor(len(EXPERTS)) as pool:
        list(pool.map(train_expert, EXPERTS))
    return anchor


def _audit(out: Path, name: str, anchor: Path, trial: Trial) -> dict[str, Any]:
    """The three audits of one expert."""
    package, run = out / name, out / "runs" / name
    return {
        "membership": run_membership(package, run, anchor),
        "extraction": run_extraction(
            load(package, anchor=anchor), package, trial.data, run / "extraction", anchor=anchor,
            prefixes=trial.prefixes, heldout=trial.heldout, only=[name],
            with_control=name == "baseline",
        ),
        "removal": run_removal(
            out / "merged", name, run, trial.data, prefixes=trial.prefixes, heldout=trial.heldout
        ),
    }  # fmt: skip


def check_twin(report: dict[str, Any]) -> None:
    """Raises ValueError if the private expert and the baseline do not differ as they must."""
    failed = [what for what, ok in report["checks"].items() if not ok]
    if failed:
        raise ValueError(f"failed checks: {'; '.join(failed)}")


def _checks(report: dict[str, Any]) -> dict[str, bool]:
    try:
        check_controls(report["baseline"]["extraction"])
        extracted = True
    except ValueError:
        extracted = False
    private, baseline = (report[name]["membership"] for name in EXPERTS)
    bounds = [one["audits"]["the expert alone"]["epsilon"] for one in (private, baseline)]
    return {
        "the private expert's certificate is not refuted": private["verdict"] == "not refuted",
        "the baseline's canaries are distinguished": baseline["verdict"] == DISTINGUISHED,
        "the baseline's lower bound on epsilon exceeds the private expert's": bounds[0] < bounds[1],
        "memorized text is extracted": extracted,
        "nothing is left of either expert once it is removed": all(
            report[name]["removal"][way]["equal"]
            for name in EXPERTS
            for way in ("switched_off", "removed")
        ),
    }


def _show(report: dict[str, Any], out: Path) -> None:
    rows = []

    def add_row(what: str, private: str, baseline: str) -> None:
        rows.append({"what": what, "private": private, "baseline": baseline})

    both = [report[name] for name in EXPERTS]
    members = [one["membership"]["audits"]["the expert alone"] for one in both]
    add_row("certificate: epsilon", str(report["privacy"]["epsilon"]), "none")
    add_row("lower bound on epsilon (95%)", *(f"{one['epsilon']:.2f}" for one in members))
    areas = (one["area"] for one in members)
    add_row(
        "canaries distinguished: AUC (95%)",
        *(f"{a['area']:.3f} ({a['low']:.3f} to {a['high']:.3f})" for a in areas),
    )
    for number in (0, 1):
        rates = [one["caught"][number] for one in members]
        add_row(
            f"canaries: TPR at {rates[0]['allowed']:.1%} FPR",
            *(f"{one['members']['rate']:.1%}" for one in rates),
        )
    extracted = [one["extraction"]["audits"]["model"]["extracted"] for one in both]
    add_row(
        f"passages extracted, of {extracted[0]['of']} (95%)",
        *(f"{r['rate']:.1%} (up to {r['high']:.1%})" for r in extracted),
    )
    show_table(rows, title="a private expert and its non-private baseline")
    for what, ok in report["checks"].items():
        tell(f"{'yes' if ok else 'NO'}: {what}")
    tell(f"{report['seconds']:.0f} seconds; {out / 'report.json'}")
