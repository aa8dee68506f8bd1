"""`flexolmo usage`: keys for a usage ledger, owners' excerpts of it, and the month's report."""

import argparse
from pathlib import Path
from typing import Any

from flexolmo_jax.commands.parser import Commands
from flexolmo_jax.commands.shared_arguments import add_json
from flexolmo_jax.runtime.console import log, print_json, show_fields, show_table, tell


def add_to(commands: Commands) -> None:
    actions = commands.group(
        "usage", "how much each owner's expert is used: reports, and excerpts that owners verify"
    )
    parser = actions.add("keygen", keygen, "make the key pair that signs a usage ledger")
    parser.add_argument("file", metavar="FILE", help="the private key; the public one is FILE.pub")
    parser = actions.add(
        "report", report, "a month's requests, tokens and routing mass of every owner"
    )
    parser.add_argument("ledger", metavar="LEDGER", help="of `flexolmo serve --usage`")
    parser.add_argument("--month", metavar="YYYY-MM", help="default: the last that has a request")
    parser.add_argument("--out", metavar="DIR", help="a new folder for report.json and month.png")
    add_json(parser)
    parser = actions.add(
        "extract", extract, "an owner's own lines, with what proves that they are all",
        "Writes what an owner may see of its own lines, up to the last signed one, and nothing of "
        "other owners. `flexolmo usage verify` shows that no line is missing or altered.",
    )  # fmt: skip
    parser.add_argument("ledger", metavar="LEDGER")
    parser.add_argument("--owner", required=True, metavar="NAME", help="of the expert")
    parser.add_argument("--out", required=True, metavar="FILE", help="a new file")
    parser = actions.add(
        "verify", verify, "check an excerpt, or a whole ledger, against the coordinator's key",
        "Checks the signature, that no line was dropped, altered, moved or added, and that the "
        "totals are those of the lines.",
    )  # fmt: skip
    parser.add_argument("file", metavar="FILE", help="of `flexolmo usage extract`, or a ledger")
    parser.add_argument(
        "--key", required=True, metavar="PUBLIC", help="the .pub of `flexolmo usage keygen`"
    )
    parser.add_argument("--owner", metavar="NAME", help="whose excerpt it should be")
    parser.add_argument(
        "--earlier", metavar="FILE",
        help="an excerpt that was given before: check that its history was not rewritten since",
    )  # fmt: skip
    add_json(parser)


def keygen(args: argparse.Namespace) -> None:
    from flexolmo_jax.usage.signing import make_keys

    public = make_keys(Path(args.file))
    log(f"{args.file} signs, and stays with you; give {public} to every owner")


def report(args: argparse.Namespace) -> None:
    import re

    from flexolmo_jax.usage.report import read_report, sentences, table, write_report

    if args.month is not None and not re.fullmatch(r"\d{4}-(0[1-9]|1[0-2])", args.month):
        raise ValueError(f"--month: expected YYYY-MM, found {args.month!r}")
    made = read_report(Path(args.ledger), args.month)
    if args.out is not None:
        write_report(made, Path(args.out))
    if args.json:
        print_json(made.to_json())
        return
    title = f"{made.month}: {made.requests:,} requests, {made.tokens:,} new tokens"
    show_table(table(made), title=title)
    for text in sentences(made):
        tell(text)
    if args.out is not None:
        tell(f"wrote {args.out}/report.json and month.png")


def extract(args: argparse.Namespace) -> None:
    from flexolmo_jax.usage.excerpts import extract as write_excerpt

    made = write_excerpt(Path(args.ledger), args.owner, Path(args.out))
    show_fields(_fields(made.statement), f"{args.out}: lines of {args.owner}")


def verify(args: argparse.Namespace) -> None:
    from flexolmo_jax.usage import excerpts
    from flexolmo_jax.usage.signing import read_public

    file, key = Path(args.file), read_public(Path(args.key))
    earlier = None
    if args.earlier is not None:
        earlier = excerpts.verify_excerpt(Path(args.earlier), key, args.owner)
    if not excerpts.is_excerpt(file):
        _verify_ledger(args, file, key, earlier)
        return
    made = excerpts.verify_excerpt(file, key, args.owner)
    if earlier is not None:
        excerpts.check_follows(file, made, earlier)
    if args.json:
        print_json({**made.statement, "signed_with": key})
        return
    show_fields(_fields(made.statement), f"{file}: verified")
    show_table(excerpts.months(made), title="by month", empty="no requests")
    tell(
        "These are all lines that the coordinator's ledger had of this owner at that time, as they "
        "were signed. That the ledger lists every request is the coordinator's word."
    )


def _verify_ledger(args: argparse.Namespace, file: Path, key: str, earlier: Any) -> None:
    from flexolmo_jax.usage import excerpts

    contents = excerpts.verify_ledger(file, key)
    if args.owner is not None and earlier is None:
        raise ValueError(f"--owner: {file} is a whole ledger, of all owners; leave it out")
    if earlier is not None:
        excerpts.check_contains(file, earlier)
    states = {owner: state._asdict() for owner, state in contents.states.items()}
    if args.json:
        print_json({"ledger": contents.ledger, "lines": contents.lines, "owners": states})
        return
    rows = [
        {"owner": owner, **{name: own[name] for name in ("requests", "tokens", "mass")}}
        for owner, own in states.items()
    ]
    show_table(rows, title=f"{file}: verified, {contents.lines:,} lines", empty="no requests")


def _fields(statement: dict[str, Any]) -> dict[str, Any]:
    names = {
        "owner": "owner", "lines": "lines", "requests": "requests", "tokens": "tokens",
        "mass": "mass", "time": "signed at", "ledger": "ledger", "ledger_lines": "its lines",
        "ledger_head": "its head",
    }  # fmt: skip
    return {title: statement[name] for name, title in names.items()}
