"""`flexolmo admit`: examines an expert package before it is merged."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from flexolmo_jax.commands.parser import Commands
from flexolmo_jax.commands.shared_arguments import SOURCE, add_json, need_packages, optional_path
from flexolmo_jax.runtime.console import print_json, show_table, tell

if TYPE_CHECKING:
    from flexolmo_jax.admission.results import Report
    from flexolmo_jax.trust.log import Entry

EXIT_CODES = {"admitted": 0, "review": 3, "rejected": 4}


class PrintPolicy(argparse.Action):
    """`--print-policy`: the default policy, with what each line means."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        from flexolmo_jax.admission.policy import EXAMPLE

        print(EXAMPLE, end="")
        parser.exit()


def add_to(commands: Commands) -> None:
    parser = commands.add(
        "admit",
        run,
        "examine an expert package before it is merged",
        "Checks an expert package from somebody else: is it sound and made for this anchor, is it "
        "an admitted one under another name, what would it take of other texts, whom does it harm, "
        "are its weights unlike those admitted before, and what does it say in every subset of "
        "experts. A package that passes can still be harmful. Exit codes: 0 admitted, 3 needs "
        "review, 4 rejected, 2 an error.",
    )
    parser.add_argument("package", metavar="PACKAGE", help="the folder of an expert package")
    parser.add_argument("--anchor", required=True, metavar="DIR")
    parser.add_argument(
        "--public", required=True, metavar="SOURCE", help=f"public text, to measure on: {SOURCE}"
    )
    parser.add_argument(
        "--policy",
        required=True,
        metavar="FILE",
        help="bounds, the admitted experts, their domains' proxies and probes, in TOML",
    )
    parser.add_argument(
        "--out", metavar="DIR", help="write the report there, report.html and report.json"
    )
    parser.add_argument(
        "--quarantine",
        metavar="DIR",
        help="move the package below this folder if it is rejected, with its report",
    )
    parser.add_argument(
        "--keys",
        metavar="REGISTRY",
        help="require the owner's signature, and write the decision into the log of this registry",
    )
    parser.add_argument(
        "--key",
        metavar="FILE",
        help="with --keys and --out: the private key of a coordinator, which signs the log's line",
    )
    parser.add_argument(
        "--print-policy",
        action=PrintPolicy,
        nargs=0,
        help="print the default policy, to begin with, and end",
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    need_packages("flexolmo admit", "trust", "jinja2")
    from flexolmo_jax.admission.admit import examine
    from flexolmo_jax.admission.policy import read_policy
    from flexolmo_jax.admission.quarantine import check_can_move, quarantine
    from flexolmo_jax.admission.report import HTML, JSON, write_report
    from flexolmo_jax.storage.outputs import check_kept_folder, check_new_folder

    package, out, aside = Path(args.package), optional_path(args.out), args.quarantine
    reads = [args.package, args.anchor, args.public, args.policy]
    if out is not None:
        check_new_folder(out, reads)
    if aside is not None:
        check_kept_folder(aside, reads)
        check_can_move(package)
    require = key = None
    if args.keys is not None:
        from flexolmo_jax.admission.record import read_coordinator, requirement

        if args.key is None or out is None:
            raise ValueError(
                "--keys needs --key, of a coordinator, and --out: the log's line has the digest of "
                "the report"
            )
        require, key = requirement(args.keys), read_coordinator(args.keys, Path(args.key))
    elif args.key is not None:
        raise ValueError("--key is for --keys, the registry whose log is written")
    report = examine(package, args.anchor, args.public, read_policy(args.policy), require)
    if args.json:
        print_json(report.to_json())
    else:
        _show(report)
    if out is not None:
        write_report(report, out)
        if not args.json:
            tell(f"wrote {out / HTML}")
    if key is not None and out is not None:
        from flexolmo_jax.admission.record import record

        entry = record(report, out / JSON, args.keys, key)
        if not args.json:
            tell(_said(entry, report))
    if aside is not None and report.verdict == "rejected":
        moved = quarantine(package, Path(aside), report)
        if not args.json:
            tell(f"moved {package} to {moved}")
    return EXIT_CODES[report.verdict]


def _said(entry: "Entry | None", report: "Report") -> str:
    if entry is not None:
        return f"line {entry.number} of the log: the {entry.what} is {entry.event}"
    if report.verdict == "review":
        return "nothing is in the log yet: a person decides first"
    return "nothing is in the log: what is not sound and signed is no package of anybody"


def _show(report: "Report") -> None:
    from flexolmo_jax.admission.report import headline, summary

    rows = [
        {
            "check": result.check,
            "measured": result.measured,
            "figure": result.shown(result.value),
            "bound": result.shown(result.bound),
            "verdict": result.verdict,
        }
        for result in report.results
    ]
    show_table(rows, title=headline(report))
    for sentence in summary(report):
        tell(f"- {sentence}")
