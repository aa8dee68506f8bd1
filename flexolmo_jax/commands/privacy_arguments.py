"""The arguments of private training and of `flexolmo privacy`."""

import argparse
from collections.abc import Callable


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """What `flexolmo train expert` takes for differential privacy, and to be audited."""
    parser.add_argument(
        "--canaries", type=int, default=0, metavar="N",
        help="draw 2N made-up documents, of which a coin puts each into the text, for `flexolmo "
        "audit`; which ones stays in the run folder",
    )  # fmt: skip
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
        "--dp-microbatch-size", type=int, metavar="N",
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


def add_audit_commands(
    commands: argparse._SubParsersAction, command: Callable, model_arguments: Callable
) -> None:
    """`flexolmo audit ...`; `model_arguments` adds what commands that load a model take."""
    audit = commands.add_parser("audit", help="test from outside what an expert gives away")
    actions = audit.add_subparsers(dest="action", required=True, metavar="AUDIT")
    extraction = command(
        actions, "extraction", "does the model write down passages of a text",
        "Prompts the model with 32 tokens of documents, samples how they go on, and counts what "
        "comes out as it stands in the text, beside the anchor alone. An audit that was killed "
        "goes on when it is started again.",
    )  # fmt: skip
    model_arguments(extraction)
    extraction.add_argument("--data", required=True, metavar="SOURCE", help="the owner's text")
    extraction.add_argument(
        "--out", required=True, metavar="DIR",
        help="report.json, and what came of each passage; keep it to yourself",
    )  # fmt: skip
    extraction.add_argument("--prefixes", type=int, default=1000, help="default: %(default)s")
    extraction.add_argument(
        "--samples", type=int, default=10, metavar="N", help="of each (default: %(default)s)"
    )
    extraction.add_argument(
        "--control", action="store_true",
        help="also learn a few documents by heart, and see that the audit catches it",
    )  # fmt: skip
    extraction.add_argument("--seed", type=int, default=0)
    membership = command(
        actions, "membership", "can the weights be asked which canaries were trained on",
        "Compares an expert's canaries that were put in with those that were left out, bounds "
        "epsilon from below, and holds that against the package's certificate.",
    )  # fmt: skip
    membership.add_argument(
        "--model", required=True, metavar="DIR", help="an expert package, or a merged model"
    )
    membership.add_argument("--anchor", metavar="DIR", help="for an expert package: its anchor")
    membership.add_argument("--expert", metavar="NAME", help="which one of a merged model")
    membership.add_argument(
        "--run", required=True, metavar="DIR", help="the expert's run folder, with its canaries"
    )
    removal = command(
        actions, "removal", "is a model without an expert as if it had never had it",
        "Asks a merged model with an expert switched off, a copy that it was taken out of, and one "
        "that never had it, the same questions; their logits must be equal.",
    )  # fmt: skip
    removal.add_argument("--model", required=True, metavar="DIR", help="a merged model")
    removal.add_argument("--expert", required=True, metavar="NAME")
    removal.add_argument("--run", metavar="DIR", help="the expert's run folder, for its canaries")
    removal.add_argument("--data", metavar="SOURCE", help="the owner's text, for passages of it")
    removal.add_argument("--prefixes", type=int, default=100, help="default: %(default)s")
    for one in (extraction, removal):
        one.add_argument("--text-field", default="text", help="default: %(default)s")
        one.add_argument(
            "--heldout", type=float, metavar="SHARE", nargs="?", const=True,
            help="do not try documents that training with this held-out share left out (default: "
            "as the expert's manifest says)",
        )  # fmt: skip
        one.add_argument(
            "--group-field", metavar="FIELD",
            help="documents that share it were held out together (default: as the manifest says)",
        )  # fmt: skip
    twin = command(
        actions, "twin", "train a private expert and its twin without privacy, and audit both",
        "On text that comes with the project, in about ten minutes: the certificate must stand, "
        "and the twin must be caught.",
    )  # fmt: skip
    twin.add_argument("--out", default="flexolmo_twin", metavar="DIR", help="default: %(default)s")
    twin.add_argument("--anchor", metavar="DIR", help="default: train the demo's")
    twin.add_argument(
        "--dp-epsilon", type=float, default=8.0, metavar="E", help="default: %(default)s"
    )
    for one in (membership, removal, twin):
        one.add_argument("--json", action="store_true")
