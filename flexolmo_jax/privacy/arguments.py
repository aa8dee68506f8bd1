"""The arguments of private training and of `flexolmo privacy`."""

import argparse
from collections.abc import Callable


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """What `flexolmo train expert` takes for differential privacy."""
    group = parser.add_argument_group(
        "differential privacy",
        "State a budget and all else is calibrated. The config's data.batch-size is then the mean "
        "number of units in a step's batch; take it large, as noise is the same for any size.",
    )
    group.add_argument(
        "--dp-epsilon", type=float, metavar="E", help="budget of this run; switches the mode on"
    )
    group.add_argument(
        "--dp-delta",
        type=float,
        metavar="D",
        help="default: that of the ledger, or a tenth of a unit, at most 1e-5",
    )
    group.add_argument(
        "--dp-clip",
        type=float,
        metavar="C",
        help="length a unit's gradient is cut to (default: 0.1; most should be longer)",
    )
    group.add_argument(
        "--dp-unit", metavar="UNIT",
        help="what is protected: document (default), group:FIELD of the rows (a patient, an "
        "author), or sequence (one window of tokens)",
    )  # fmt: skip
    group.add_argument(
        "--dp-windows", type=int, metavar="W",
        help="most windows of a unit in a step; of longer ones so many are drawn (default: 8)",
    )  # fmt: skip
    group.add_argument(
        "--dp-at-a-time", type=int, metavar="N",
        help="units whose gradients a device holds at once; less memory with fewer (default: 8)",
    )  # fmt: skip
    group.add_argument(
        "--dp-limit", type=float, metavar="E",
        help="epsilon of all runs in the ledger together; a run that would exceed it does not "
        "start (default: what the ledger says, or the first run's budget)",
    )  # fmt: skip
    group.add_argument(
        "--dp-ledger", metavar="FILE",
        help="the ledger of all runs on this text (default: budget.json beside the run folder)",
    )  # fmt: skip


def add_privacy_commands(commands: argparse._SubParsersAction, command: Callable) -> None:
    """`flexolmo privacy ...`; `command` is the function that `make_parser` adds commands with."""
    privacy = commands.add_parser("privacy", help="check a certificate, look at a budget")
    actions = privacy.add_subparsers(dest="action", required=True, metavar="ACTION")
    verify = command(
        actions, "verify", "compute a package's epsilon again, with two accountants",
        "Checks every file of a package, and computes the epsilon of its privacy statement again "
        "from the statement's own numbers, by privacy loss distributions and by Renyi divergences.",
    )  # fmt: skip
    verify.add_argument("package", metavar="PACKAGE")
    verify.add_argument("--json", action="store_true")
    budget = command(actions, "budget", "what was planned and spent of an owner's ledger")
    budget.add_argument("ledger", metavar="FILE", help="budget.json")
    budget.add_argument("--json", action="store_true")
