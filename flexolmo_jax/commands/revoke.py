"""`flexolmo revoke` and `flexolmo log`: what may not be used any more, and what was admitted."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from flexolmo_jax.commands.parser import Commands
from flexolmo_jax.commands.shared_arguments import add_json
from flexolmo_jax.runtime.console import print_json, show_table, tell

if TYPE_CHECKING:
    from flexolmo_jax.trust.registry import Registry

KEY = "a coordinator's private key, of `flexolmo registry keygen`"


def add_to(commands: Commands) -> None:
    parser = commands.add(
        "revoke", revoke, "let nobody use a package, or an expert, any more",
        "Writes a revocation into the registry's log. From then on `load`, `merge` and servers "
        "that require signatures refuse it with the reason; a running server stops using it "
        "within a minute. Publish the folder again after it. (`flexolmo registry revoke-key` "
        "revokes the key of a signer.)",
    )  # fmt: skip
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("package", nargs="?", metavar="PACKAGE", help="this very package")
    what.add_argument("--expert", metavar="NAME", help="all packages of an expert, later ones too")
    what.add_argument("--digest", metavar="DIGEST", help="a package, by its manifest's digest")
    parser.add_argument("--keys", required=True, metavar="REGISTRY", help="its log is written")
    parser.add_argument("--key", required=True, metavar="FILE", help=KEY)
    parser.add_argument(
        "--reason", required=True, metavar="TEXT", help="whoever is refused sees it"
    )
    parser.add_argument(
        "--undo", action="store_true", help="let it be used again: takes a revocation back"
    )
    parser = commands.add(
        "log", show_log, "show a registry's log: what was admitted, removed and revoked",
        "Verifies every line of the log, and shows it, the oldest line first.",
    )  # fmt: skip
    parser.add_argument("--keys", required=True, metavar="REGISTRY")
    add_json(parser)


def revoke(args: argparse.Namespace) -> None:
    from flexolmo_jax.trust import log
    from flexolmo_jax.trust.keys import read_private
    from flexolmo_jax.trust.registry import Registry

    key = read_private(Path(args.key))
    expert, digest = _what(args, Registry.open(args.keys))
    event = log.REINSTATED if args.undo else log.REVOKED
    given = {"expert": expert, "package": digest, "reason": args.reason}
    entry = log.append(args.keys, key, event, **given)
    tell(f"line {entry.number} of the log: the {entry.what} is {entry.event}")


def _what(args: argparse.Namespace, registry: "Registry") -> tuple[str | None, str | None]:
    """The name of an expert, and the digest of a package; each None where it is not known."""
    from flexolmo_jax.federation.package import read_manifest

    if args.package is not None:
        manifest = read_manifest(Path(args.package))
        return manifest["name"] if manifest["kind"] == "expert" else None, manifest["digest"]
    if args.digest is not None:
        return None, args.digest
    known = sorted({name for signer in registry.signers for name in signer.experts})
    if args.expert not in known:
        raise ValueError(
            f"--expert: nobody may sign an expert named {args.expert!r} in {args.keys}; there are: "
            f"{', '.join(known) or 'none'}"
        )
    return args.expert, None


def show_log(args: argparse.Namespace) -> None:
    from flexolmo_jax.trust import log
    from flexolmo_jax.trust.registry import Registry
    from flexolmo_jax.trust.signers import time_text

    entries = log.read(Registry.open(args.keys))
    if args.json:
        print_json([{**entry._asdict(), "time": time_text(entry.time)} for entry in entries])
        return
    rows = [
        {
            "line": entry.number, "time": time_text(entry.time), "event": entry.event,
            "expert": entry.expert or "", "package": (entry.package or "")[:12],
            "reason": entry.reason or "", "signed by": entry.signer,
        }
        for entry in entries
    ]  # fmt: skip
    show_table(rows, title=f"{args.keys}: the log, verified", empty="nothing yet")
