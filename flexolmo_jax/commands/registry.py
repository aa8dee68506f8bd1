"""`flexolmo registry`: whose keys may sign anchors, experts and merged models."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexolmo_jax.commands.parser import Commands, Parser
from flexolmo_jax.commands.shared_arguments import add_json
from flexolmo_jax.runtime.console import log, print_json, show_fields, show_table, tell
from flexolmo_jax.trust.signers import time_text

if TYPE_CHECKING:
    from flexolmo_jax.trust.registry import Registry
    from flexolmo_jax.trust.registry_changes import Change

DAYS = 365


def add_to(commands: Commands) -> None:
    actions = commands.group("registry", "the keys that packages may be signed with, and whose")
    parser = actions.add("keygen", keygen, "make a key pair, to sign packages or a registry")
    parser.add_argument("file", metavar="FILE", help="the private key; the public one is FILE.pub")

    parser = actions.add("init", init, "make a registry without signers: its version 1")
    parser.add_argument("folder", metavar="REGISTRY")
    _add_roots(parser, "who may change the registry", required=True)
    parser.add_argument(
        "--threshold", type=int, default=1, metavar="N",
        help="how many of them must sign every version (default: %(default)s)",
    )  # fmt: skip
    _add_days(parser)
    _add_key(parser)

    parser = actions.add("add", add, "add a signer: whose key may sign what, and until when")
    parser.add_argument("folder", metavar="REGISTRY")
    parser.add_argument("--name", required=True, help="of the signer")
    parser.add_argument("--public", required=True, metavar="FILE", help="its public key")
    parser.add_argument(
        "--role", required=True, metavar="ROLE",
        help="publisher (of anchors), owner (of experts), coordinator (of merged models)",
    )  # fmt: skip
    parser.add_argument(
        "--experts", nargs="+", default=[], metavar="NAME", help="of an owner: which it may sign"
    )
    parser.add_argument("--from", dest="start", metavar="DATE", help="default: now")
    parser.add_argument("--until", metavar="DATE", help="default: a year later")
    _add_key(parser)

    parser = actions.add(
        "revoke-key", revoke_key, "accept no signature of a signer any more",
        "Revokes a signer's key for good: nothing that it signed is accepted any more, whenever it "
        "was signed. Whoever signs again needs a new key, added under a new name.",
    )  # fmt: skip
    parser.add_argument("folder", metavar="REGISTRY")
    parser.add_argument("--name", required=True, help="of the signer")
    parser.add_argument("--reason", required=True, metavar="TEXT")
    _add_key(parser)

    parser = actions.add("sign", sign, "sign the version that waits for signatures")
    parser.add_argument("folder", metavar="REGISTRY")
    _add_key(parser)

    parser = actions.add(
        "renew", renew, "make a version that expires later, perhaps with other root keys"
    )
    parser.add_argument("folder", metavar="REGISTRY")
    _add_roots(parser, "replace all who may change the registry (default: keep them)")
    parser.add_argument("--threshold", type=int, metavar="N", help="default: as before")
    _add_days(parser)
    _add_key(parser)

    parser = actions.add(
        "update", update, "take over newer versions from a copy of a registry",
        "Verifies a copy of a registry that came from somewhere, and takes over its newer versions "
        "and log. A copy that is older than REGISTRY, or is another registry, is refused. Without "
        "REGISTRY, makes it: compare the sha256 of 1.json with what the coordinator told you.",
    )  # fmt: skip
    parser.add_argument("folder", metavar="REGISTRY")
    parser.add_argument("--source", required=True, metavar="COPY", help="the folder of the copy")

    parser = actions.add("show", show, "verify a registry, and list its signers")
    parser.add_argument("folder", metavar="REGISTRY")
    add_json(parser)


def _add_roots(parser: Parser, effect: str, required: bool = False) -> None:
    parser.add_argument(
        "--root", nargs="+", default=[], required=required, metavar="PUBLIC",
        help=f"{effect}: their public keys",
    )  # fmt: skip


def _add_days(parser: Parser) -> None:
    parser.add_argument(
        "--days", type=int, default=DAYS, help="until the version expires (default: %(default)s)"
    )


def _add_key(parser: Parser) -> None:
    parser.add_argument(
        "--key", required=True, metavar="FILE", help="your private key, one of the root keys"
    )


def keygen(args: argparse.Namespace) -> None:
    from flexolmo_jax.trust.keys import make_keys

    public = make_keys(Path(args.file))
    log(f"{args.file} signs, and stays with you; give {public} to the registry's coordinator")


def init(args: argparse.Namespace) -> None:
    from flexolmo_jax.trust.keys import read_private, read_public
    from flexolmo_jax.trust.registry_changes import create

    roots = [read_public(Path(file)) for file in args.root]
    key = read_private(Path(args.key))
    _tell(args.folder, create(Path(args.folder), roots, args.threshold, key, args.days))


def add(args: argparse.Namespace) -> None:
    import datetime

    from flexolmo_jax.trust.keys import read_private, read_public
    from flexolmo_jax.trust.registry_changes import add_signer
    from flexolmo_jax.trust.signers import make_signer, utc_now

    start = _time("--from", args.start) or utc_now()
    until = _time("--until", args.until) or start + datetime.timedelta(days=DAYS)
    public = read_public(Path(args.public))
    signer = make_signer(
        args.name, public, args.role, tuple(args.experts), start, until, where="the signer"
    )
    _tell(args.folder, add_signer(Path(args.folder), signer, read_private(Path(args.key))))


def revoke_key(args: argparse.Namespace) -> None:
    from flexolmo_jax.trust.keys import read_private
    from flexolmo_jax.trust.registry_changes import revoke_signer

    key = read_private(Path(args.key))
    _tell(args.folder, revoke_signer(Path(args.folder), args.name, args.reason, key))


def sign(args: argparse.Namespace) -> None:
    from flexolmo_jax.trust.keys import read_private
    from flexolmo_jax.trust.registry_changes import cosign

    _tell(args.folder, cosign(Path(args.folder), read_private(Path(args.key))))


def renew(args: argparse.Namespace) -> None:
    from flexolmo_jax.trust import registry_changes
    from flexolmo_jax.trust.keys import read_private, read_public

    roots = [read_public(Path(file)) for file in args.root]
    key = read_private(Path(args.key))
    folder = Path(args.folder)
    _tell(folder, registry_changes.renew(folder, key, args.days, roots, args.threshold))


def update(args: argparse.Namespace) -> None:
    from flexolmo_jax.trust.registry_changes import update as take_over

    before, now = take_over(Path(args.folder), Path(args.source))
    tell(f"{args.folder}: version {now}" + f" (before: {before})" * (before != now))


def show(args: argparse.Namespace) -> None:
    from flexolmo_jax.trust.registry import Registry, read_versions
    from flexolmo_jax.trust.registry_changes import read_pending

    folder = Path(args.folder)
    pending = read_pending(folder)
    # Of a new registry that needs several signatures, there is no version in force yet.
    opened = None if pending and pending[0].version == 1 else read_versions(folder)[0]
    if args.json:
        waits = pending and {**_described(pending[0]), "missing": pending[1]}
        print_json({**(_described(opened) if opened else {}), "pending": waits})
    else:
        if opened:
            _show(opened, f"{folder}: version {opened.version}, verified from 1.json on")
        if pending:
            _show_pending(*pending)
    if opened:
        Registry.open(folder)  # refuses one that has expired


def _show_pending(proposed: "Registry", missing: int) -> None:
    more = f"{missing} more signature{'s' * (missing > 1)}"
    _show(
        proposed,
        f"version {proposed.version}, not in force: it waits for {more}; whoever has a root key "
        "adds one with `flexolmo registry sign`",
    )


def _show(registry: "Registry", title: str) -> None:
    fields = {
        "expires": time_text(registry.expires),
        "sha256 of 1.json": registry.first_digest,
        "root keys": " ".join(key[:12] for key in registry.root_keys),
        "signatures needed": registry.threshold,
    }
    show_fields({name: value for name, value in fields.items() if value}, title)
    rows = [
        {
            "name": signer.name, "role": signer.role, "experts": " ".join(signer.experts),
            "key": signer.key_id[:12], "until": time_text(signer.until)[:10],
            "revoked": signer.revoked and signer.revoked.reason,
        }
        for signer in registry.signers
    ]  # fmt: skip
    show_table(rows, title="signers", empty="none")


def _described(registry: "Registry") -> dict[str, Any]:
    return {
        "version": registry.version,
        "expires": time_text(registry.expires),
        "first_digest": registry.first_digest,
        "root_keys": list(registry.root_keys),
        "threshold": registry.threshold,
        "signers": [{**signer.to_json(), "key_id": signer.key_id} for signer in registry.signers],
        "log": registry.log and registry.log._asdict(),
    }


def _time(option: str, text: str | None):
    from flexolmo_jax.trust.signers import read_time

    if text is None:
        return None
    return read_time(f"{text}T00:00:00Z" if len(text) == len("2026-11-29") else text, option)


def _tell(folder: str | Path, change: "Change") -> None:
    if not change.missing:
        tell(f"{folder}: version {change.version} is in force")
        return
    tell(
        f"{folder}: version {change.version} waits for {change.missing} more "
        f"signature{'s' * (change.missing > 1)}: whoever has a root key looks at it with "
        "`flexolmo registry show`, and signs it with `flexolmo registry sign`"
    )
