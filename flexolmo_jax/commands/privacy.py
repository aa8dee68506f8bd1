"""What `flexolmo train expert --dp-epsilon` and `flexolmo privacy` do and show."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from flexolmo_jax.commands.json_output import print_json
from flexolmo_jax.config import ExpertTraining, PrivacyConfig
from flexolmo_jax.federation.package import Package, check_packages, read_manifest
from flexolmo_jax.runtime.console import show_fields, show_table, tell
from flexolmo_jax.runtime.processes import is_main_process

OPTIONS = tuple(
    field.name for field in dataclasses.fields(PrivacyConfig) if field.name != "epsilon"
)


def privacy_asked_for(args: argparse.Namespace) -> PrivacyConfig | None:
    """From the command line; None without --dp-epsilon.

    Raises:
      ValueError: another --dp option is given without it, or one is out of range.
    """
    given = {name: getattr(args, f"dp_{name}") for name in OPTIONS}
    given = {name: value for name, value in given.items() if value is not None}
    if args.dp_epsilon is None:
        names = [f"--dp-{name.replace('_', '-')}" for name in given]
        names += ["--dp-ledger"] * (args.dp_ledger is not None)
        if names:
            raise ValueError(f"{names[0]} without --dp-epsilon, which states the budget; add it")
        return None
    return PrivacyConfig(args.dp_epsilon, **given)


def train_with_privacy(
    config: ExpertTraining, privacy: PrivacyConfig, ledger: str | None, **places: Any
) -> None:
    """`train_private_expert`, and its certificate on the screen."""
    from flexolmo_jax.privacy.ledger import FILE
    from flexolmo_jax.training.private.expert import train_private_expert

    file = Path(ledger) if ledger else places["run"].absolute().parent / FILE
    train_private_expert(config, privacy, ledger=file, **places)
    if is_main_process():
        _show_statement(read_manifest(places["out"])["privacy"], f"{places['name']}: privacy")
        tell(
            f"the ledger is {file}; what follows on held-out documents is for you, and is not "
            "covered by the statement"
        )


def verify(package: Path, as_json: bool) -> None:
    """Checks a package and its statement, and shows what was found.

    Raises:
      ValueError: the package is damaged, or the statement claims what its numbers do not give.
    """
    from flexolmo_jax.privacy.certificate import verify_certificate

    checked = Package.open(package, "expert")
    check_packages([checked])
    manifest = checked.manifest
    found = verify_certificate(manifest["privacy"], str(package), manifest.get("gating"))
    if as_json:
        print_json({**found, "privacy": manifest["privacy"]})
        return
    _show_statement(manifest["privacy"], f"{manifest['name']}: privacy")
    titles = {"epsilon": "this run", "epsilon_of_all_runs": "all runs in this ledger"}
    rows = [
        {
            "epsilon of": title, "stated": f"{found[name]['stated']:.4f}",
            "found": _bound(found[name]["pld"]), "Renyi bound": _bound(found[name]["renyi"]),
        }
        for name, title in titles.items()
    ]  # fmt: skip
    show_table(rows, title=f"epsilon at delta {found['delta']:.3g}")
    tell(
        "The statement is coherent: two accountants bound epsilon from its numbers. That the run "
        "did what it says, and that the ledger knows of all runs, is the owner's word."
    )
    if found["epsilon"]["stated"] > 20:
        tell("An epsilon above 20 promises next to nothing.")


def _bound(found: float | None) -> str:
    return "none" if found is None else f"{found:.4f}"


def budget(file: Path, as_json: bool) -> None:
    """Shows a ledger. Raises ValueError if it is damaged or not there."""
    from flexolmo_jax.privacy.ledger import Ledger

    if not file.exists():
        raise ValueError(f"{file}: no ledger there; `flexolmo train expert --dp-epsilon` makes one")
    ledger = Ledger(file).contents()
    if as_json:
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
    show_table(rows, title=limit, empty="no run was entered yet")


def _show_statement(statement: dict[str, Any], title: str) -> None:
    fields = {}
    for key, value in statement.items():
        if key == "outside":
            value = "\n".join(f"- {line}" for line in value)
        elif key == "other_runs":
            value = len(value)
        fields[key.replace("_", " ")] = str(value)
    show_fields(fields, title)
