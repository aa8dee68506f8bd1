"""`flexolmo audit`: attacks an expert from outside, to test what it leaks."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flexolmo_jax.commands.parser import Commands, Parser
from flexolmo_jax.commands.shared_arguments import (
    add_anchor,
    add_heldout,
    add_json,
    add_model,
    add_seed,
    load_model,
)
from flexolmo_jax.runtime.console import print_json, show_table, tell

SKIP_HELDOUT = (
    "skip documents that training with this held-out share held out (default: as the expert's "
    "manifest says)"
)


def add_to(commands: Commands) -> None:
    actions = commands.group("audit", "test from outside what an expert leaks", dest="audit")
    _add_extraction(actions)
    _add_membership(actions)
    _add_evidence(actions)
    _add_removal(actions)
    _add_twin(actions)


def _add_extraction(actions: Commands) -> None:
    parser = actions.add(
        "extraction",
        extraction,
        "does the model reproduce passages of a text",
        "Prompts the model with 32 tokens of documents, samples continuations, and counts those "
        "that reproduce the text, beside the anchor alone. An audit that was killed continues "
        "when it is started again.",
    )
    add_model(parser)
    parser.add_argument("--data", required=True, metavar="SOURCE", help="the owner's text")
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="folder of the results; keep it private"
    )
    parser.add_argument(
        "--prefixes", type=int, default=1000, help="passages to try (default: %(default)s)"
    )
    parser.add_argument(
        "--samples",
        type=int,
        default=10,
        metavar="N",
        help="samples of each (default: %(default)s)",
    )
    parser.add_argument(
        "--control", action="store_true", help="also audit models that memorized some documents"
    )
    add_seed(parser)
    add_heldout(parser, SKIP_HELDOUT)


def extraction(args: argparse.Namespace) -> None:
    from flexolmo_jax.audits.findings import check_controls
    from flexolmo_jax.audits.runs import run_extraction
    from flexolmo_jax.storage.outputs import check_kept_folder

    reads = [path for path in (args.model, args.anchor, args.data) if path is not None]
    check_kept_folder(args.out, reads, holding=("*model.json*",))
    model = load_model(args)
    model.allowed(1, args.without, args.only)  # raises an error before any long work
    report = run_extraction(
        model, Path(args.model), args.data, Path(args.out), anchor=args.anchor,
        prefixes=args.prefixes, samples=args.samples, seed=args.seed, heldout=args.heldout,
        group_field=args.group_field, text_field=args.text_field, without=args.without,
        only=args.only, with_control=args.control, dtype=args.dtype,
    )  # fmt: skip
    _print(report, _show_extraction, args.json)
    check_controls(report)


def _show_extraction(report: dict[str, Any]) -> None:
    def percent(rate: dict[str, float]) -> str:
        return f"{rate['rate']:.2%} ({rate['low']:.2%} to {rate['high']:.2%})"

    rows = [
        {
            "model": name,
            "prefixes": audit["prefixes"],
            "extracted (95%)": percent(audit["extracted"]),
            "continuation alone (95%)": percent(audit["continuation"]),
            "greedily (95%)": percent(audit["greedy"]),
            "attempts/s": audit["attempts_per_second"],
        }
        for name, audit in report["audits"].items()
    ]
    show_table(rows, title=f"extraction from {report['model']}: {report['data']}")
    for line in report["lines"]:
        tell(f"- {line}")


def _add_membership(actions: Commands) -> None:
    parser = actions.add(
        "membership",
        membership,
        "do the weights reveal which canaries were trained on",
        "Compares the scores of an expert's included and held-out canaries, bounds epsilon from "
        "below, and compares that bound with the package's certificate.",
    )
    _add_expert(parser)
    parser.add_argument(
        "--run", required=True, metavar="DIR", help="the expert's run folder, with its canaries"
    )
    add_json(parser)


def membership(args: argparse.Namespace) -> None:
    from flexolmo_jax.audits.findings import check_certificate
    from flexolmo_jax.audits.runs import run_membership

    report = run_membership(Path(args.model), Path(args.run), args.anchor, args.expert)
    _print(report, _show_membership, args.json)
    check_certificate(report)


def _show_membership(report: dict[str, Any]) -> None:
    rows = []
    for title, audit in report["audits"].items():
        area = audit["area"]
        powers = {
            f"TPR at {power['allowed']:.1%} FPR": "{rate:.1%} ({low:.1%} to {high:.1%})".format(
                **power["members"]
            )
            for power in audit["caught"]
        }
        rows.append(
            {
                "model": title,
                "included": audit["members"],
                "held out": audit["controls"],
                "AUC (95%)": "{area:.3f} ({low:.3f} to {high:.3f})".format(**area),
                **powers,
                "epsilon at least": f"{audit['epsilon']:.2f}",
                "largest bound possible": f"{audit['epsilon_at_most']:.2f}",
            }
        )
    show_table(rows, title=f"membership in {report['expert']} ({report['model']})")
    tell(f"{report['verdict']}: {report['why']}")


def _add_expert(parser: Parser) -> None:
    """The options of audits of one expert, in a package of its own or in a merged model."""
    parser.add_argument(
        "--model", required=True, metavar="DIR", help="an expert package, or a merged model"
    )
    add_anchor(parser)
    parser.add_argument("--expert", metavar="NAME", help="for a merged model: the expert")


def _add_evidence(actions: Commands) -> None:
    parser = actions.add(
        "evidence",
        evidence,
        "which words an expert's evidence head reveals",
        "Lists the tokens and bigrams that an expert's evidence head makes likelier than the "
        "public one does, as everyone who holds the package can.",
    )
    _add_expert(parser)
    parser.add_argument(
        "--count", type=int, default=20, metavar="N", help="rows to list (default: %(default)s)"
    )
    add_json(parser)


def evidence(args: argparse.Namespace) -> None:
    from flexolmo_jax.audits.runs import run_evidence

    report = run_evidence(Path(args.model), args.anchor, args.expert, args.count)
    _print(report, _show_evidence, args.json)


def _show_evidence(report: dict[str, Any]) -> None:
    for kind in ("tokens", "bigrams"):
        rows = [
            {
                kind: repr(one["text"]),
                "of its text": f"{one['probability']:.3%}",
                "times likelier": f"{one['times']:,.1f}",
                "nats": f"{one['nats']:.4f}",
            }
            for one in report[kind]
        ]
        show_table(rows, title=f"{kind} that {report['expert']}'s evidence head reveals")


def _add_removal(actions: Commands) -> None:
    parser = actions.add(
        "removal",
        removal,
        "is a model without an expert the same as one that never had it",
        "Compares the logits of a merged model with an expert switched off, of a copy from which "
        "the expert is removed, and of a model that never had it; they must be equal.",
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="a merged model")
    parser.add_argument("--expert", required=True, metavar="NAME")
    parser.add_argument("--run", metavar="DIR", help="the expert's run folder, for its canaries")
    parser.add_argument("--data", metavar="SOURCE", help="the owner's text, for passages of it")
    parser.add_argument(
        "--prefixes", type=int, default=100, help="passages to compare (default: %(default)s)"
    )
    add_heldout(parser, SKIP_HELDOUT)
    add_json(parser)


def removal(args: argparse.Namespace) -> None:
    from flexolmo_jax.audits.findings import check_removal
    from flexolmo_jax.audits.runs import run_removal

    report = run_removal(
        Path(args.model), args.expert, args.run and Path(args.run), args.data,
        prefixes=args.prefixes, heldout=args.heldout, group_field=args.group_field,
        text_field=args.text_field,
    )  # fmt: skip
    _print(report, _show_removal, args.json)
    check_removal(report)


def _show_removal(report: dict[str, Any]) -> None:
    tell(
        f"{report['expert']} in {report['model']}: {report['canaries']} canaries, "
        f"{report['passages']} passages"
    )
    for line in report["lines"]:
        tell(f"- {line}")


def _add_twin(actions: Commands) -> None:
    parser = actions.add(
        "twin",
        twin,
        "train a private expert and a non-private baseline, and audit both",
        "On bundled text, in about ten minutes: the certificate must hold, and the audits must "
        "detect the non-private baseline.",
    )
    parser.add_argument(
        "--out", default="flexolmo_twin", metavar="DIR", help="default: %(default)s"
    )
    parser.add_argument("--anchor", metavar="DIR", help="default: train the demo's")
    parser.add_argument(
        "--dp-epsilon",
        type=float,
        default=8.0,
        metavar="E",
        help="privacy budget (default: %(default)s)",
    )
    add_json(parser)


def twin(args: argparse.Namespace) -> None:
    from flexolmo_jax.studies.selftest import check_twin, run_twin

    anchor = args.anchor and Path(args.anchor)
    report = run_twin(Path(args.out), anchor, args.dp_epsilon, quiet=args.json)
    if args.json:
        print_json(report)
    check_twin(report)


def _print(report: dict[str, Any], show: Callable[[dict[str, Any]], None], as_json: bool) -> None:
    """Prints a report, as JSON or for people."""
    if as_json:
        print_json(report)
    else:
        show(report)
