"""Privacy, tried out: a private expert and its twin without privacy, audited in the same way.

Both are trained on the same text that comes with the project, with canaries of their own. The
private one's certificate has to stand, the twin has to be caught, and both have to be gone once
they are taken out of a merged model. An audit that cannot tell the two apart has failed.
"""

import dataclasses
import json
import time
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
from flexolmo_jax.studies.demo import run_command


@dataclasses.dataclass(frozen=True)
class Trial:
    """What is tried: the defaults take ten minutes on two cores.

    Attributes:
      data, heldout: the text, and the share of it that training leaves out.
      canaries: N of each run.
      prefixes: passages whose continuations are tried.
      private, twin: the configs of both, and what is changed in them.
    """

    data: str = "corpus:math"
    heldout: float = 0.1
    canaries: int = 200
    prefixes: int = 100
    private: tuple[str, ...] = ("demo_private_expert", "--dp-windows", "2")
    twin: tuple[str, ...] = ("demo_expert", "--steps", "1400", "--checkpoint-every", "700")


def run_twin(
    out: Path,
    anchor: Path | None = None,
    epsilon: float = 8.0,
    trial: Trial | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Trains and audits both, and writes OUT/report.json.

    Args:
      out: a new folder: anchor, private, twin, merged, and runs/ with all that is secret.
      anchor: to train beside; None trains the demo's.
      epsilon: the budget of the private one.
      trial: what is tried.
      quiet: print nothing; the report says all of it.

    Returns:
      the report, as JSON values.

    Raises:
      ValueError: `out` is there already.
      RuntimeError: a stage failed.
    """
    check_kept_folder(out, [] if anchor is None else [anchor], holding=())
    PrivacyConfig(epsilon)  # in its range?
    trial = trial or Trial()
    with silenced(quiet):
        started = time.monotonic()
        out.mkdir(parents=True, exist_ok=True)
        runs = {name: out / "runs" / name for name in ("anchor", "private", "twin")}
        if anchor is None:
            console.rule("1. the public anchor")
            anchor = out / "anchor"
            words = ["train", "anchor", "demo_anchor", "--data", "corpus:public"]
            run_command(words, out=anchor, run=runs["anchor"], quiet=quiet)
        console.rule("2. an expert with privacy, and its twin without")
        configs = {
            "private": [*trial.private, "--dp-epsilon", str(epsilon)],
            "twin": [*trial.twin],
        }

        def train(name: str) -> None:
            words = ["train", "expert", *configs[name], "--data", trial.data]
            words += ["--anchor", str(anchor), "--name", name, "--canaries", str(trial.canaries)]
            run_command(words, out=out / name, run=runs[name], quiet=True)
            tell(f"{name}: trained and packaged")

        with ThreadPoolExecutor(len(configs)) as pool:
            list(pool.map(train, configs))
        console.rule("3. the certificate")
        manifest, computed = verify_package(out / "private")
        show_fields(certificate_fields(manifest["privacy"]), "private: privacy")
        tell(f"computed again: epsilon is at most {computed['epsilon']['pld']:.4f}")
        console.rule("4. audits")
        merged = out / "merged"
        merge(anchor, [out / name for name in configs], merged)
        report: dict[str, Any] = {"privacy": manifest["privacy"]}
        for name in configs:
            report[name] = {
                "membership": run_membership(out / name, runs[name], anchor),
                "extraction": run_extraction(
                    load(out / name, anchor=anchor), out / name, trial.data,
                    runs[name] / "extraction", anchor=anchor, prefixes=trial.prefixes,
                    heldout=trial.heldout, only=[name], with_control=name == "twin",
                ),
                "removal": run_removal(
                    merged, name, runs[name], trial.data,
                    prefixes=trial.prefixes, heldout=trial.heldout,
                ),
            }  # fmt: skip
        report["checks"] = _checks(report)
        report["seconds"] = round(time.monotonic() - started, 1)
        replace_file(out / "report.json", json.dumps(report, indent=1) + "\n")
        _show(report, out)
    return report


def check_twin(report: dict[str, Any]) -> None:
    """Raises ValueError if a private expert and its twin do not differ as they should."""
    failed = [what for what, ok in report["checks"].items() if not ok]
    if failed:
        raise ValueError(f"not as it should be: {'; '.join(failed)}")


def _checks(report: dict[str, Any]) -> dict[str, bool]:
    try:
        check_controls(report["twin"]["extraction"])
        caught = True
    except ValueError:
        caught = False
    private, twin = (report[name]["membership"] for name in ("private", "twin"))
    bounds = [one["audits"]["the expert alone"]["epsilon"] for one in (private, twin)]
    return {
        "the private expert's certificate is not refuted": private["verdict"] == "not refuted",
        "the twin's canaries are told apart": twin["verdict"] == "members are told apart",
        "epsilon of the twin is at least more than the private expert's": bounds[0] < bounds[1],
        "what is learned by heart is extracted": caught,
        "nothing is left of either once it is off": all(
            report[name]["removal"][way]["equal"]
            for name in ("private", "twin")
            for way in ("switched_off", "removed")
        ),
    }


def _show(report: dict[str, Any], out: Path) -> None:
    rows = []

    def add_row(what: str, private: str, twin: str) -> None:
        rows.append({"what": what, "private": private, "twin": twin})

    both = [report[name] for name in ("private", "twin")]
    members = [one["membership"]["audits"]["the expert alone"] for one in both]
    add_row("certificate: epsilon", str(report["privacy"]["epsilon"]), "none")
    add_row("epsilon, at least (95%)", *(f"{one['epsilon']:.2f}" for one in members))
    areas = (one["area"] for one in members)
    add_row(
        "canaries told apart: AUC (95%)",
        *(f"{a['area']:.3f} ({a['low']:.3f} to {a['high']:.3f})" for a in areas),
    )
    for number in (0, 1):
        caught = [one["caught"][number] for one in members]
        add_row(
            f"canaries found at {caught[0]['allowed']:.1%} false alarms",
            *(f"{one['members']['rate']:.1%}" for one in caught),
        )
    extracted = [one["extraction"]["audits"]["model"]["extracted"] for one in both]
    add_row(
        f"passages extracted, of {extracted[0]['of']} (95%)",
        *(f"{r['rate']:.1%} (up to {r['high']:.1%})" for r in extracted),
    )
    show_table(rows, title="a private expert and its twin")
    for what, ok in report["checks"].items():
        tell(f"{'yes' if ok else 'NO'}: {what}")
    tell(f"{report['seconds']:.0f} seconds; {out / 'report.json'}")
