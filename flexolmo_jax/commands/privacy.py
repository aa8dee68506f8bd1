"""`flexolmo privacy`: verifies a package's certificate, and shows an owner's ledger."""

import argparse
from pathlib import Path

from flexolmo_jax.commands.parser import Commands
from flexolmo_jax.commands.shared_arguments import add_json
from flexolmo_jax.runtime.console import print_json, show_fields, show_table, tell

WEAK = 20  # epsilon above which a certificate promises next to nothing


def add_to(commands: Commands) -> None:
    actions = commands.group("privacy", "verify a privacy certificate, show a privacy ledger")
    parser = actions.add(
        "verify",
        verify,
        "compute a package's epsilon again, with two independent accountants",
        "Checks every file of a package, and computes the epsilon of its privacy certificate again "
        "from the certificate's own numbers, by privacy loss distributions and by Renyi "
        "divergences.",
    )
    parser.add_argument("package", metavar="PACKAGE")
    add_json(parser)
    parser = actions.add("budget", budget, "show the planned and spent epsilon of an owner's runs")
    parser.add_argument("ledger", metavar="FILE", help="the ledger, budget.json")
    add_json(parser)


def verify(args: argparse.Namespace) -> None:
    from flexolmo_jax.audits.certificate import certificate_fields, verify_package

    manifest, computed = verify_package(Path(args.package))
    certificate = manifest["privacy"]
    if args.json:
        print_json({**computed, "privacy": certificate})
        return
    show_fields(certificate_fields(certificate), f"{manifest['name']}: privacy")
    titles = {"epsilon": "this run", "epsilon_of_all_runs": "all runs in this ledger"}
    rows = [
        {
            "epsilon of": title,
            "certified": f"{computed[name]['stated']:.4f}",
            "computed": _bound(computed[name]["pld"]),
            "Renyi bound": _bound(computed[name]["renyi"]),
        }
        for name, title in titles.items()
    ]
    show_table(rows, title=f"epsilon at delta {computed['delta']:.3g}")
    tell(
        "The certificate is coherent: two accountants bound epsilon from its numbers. That the run "
        "did what the certificate says, and that the ledger lists all runs, is the owner's word."
    )
    if computed["epsilon"]["stated"] > WEAK:
        tell(f"An epsilon above {WEAK} promises next to nothing.")


def _bound(epsilon: float | None) -> str:
    return "none" if epsilon is None else f"{epsilon:.4f}"


def budget(args: argparse.Namespace) -> None:
    from flexolmo_jax.privacy.ledger import Ledger

    file = Path(args.ledger)
    if not file.exists():
        raise ValueError(
            f"{file}: no such ledger; `flexolmo train expert --dp-epsilon` creates one"
        )
    ledger = Ledger(file).contents()
    if args.json:
        print_json(ledger)
        return
    rows = [
        {
            "expert": run["name"], "started": run["started"], "unit": run["unit"],
            "planned": f"{run['planned_epsilon']:.3f}", "spent": f"{run['spent_epsilon']:.3f}",
            "steps": f"{run['steps']}/{run['planned']['steps']}",
            "finished": "yes" if run["finished"] else "no",
        }
        for run in ledger["runs"]
    ]  # fmt: skip
    limit = f"limit: epsilon {ledger['epsilon_limit']:g} at delta {ledger['delta']:.2g}"
    show_table(rows, title=limit, empty="no run is recorded yet")
