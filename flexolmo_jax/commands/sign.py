"""`flexolmo sign` and `flexolmo verify`: who made a package, and that nobody changed it since."""

import argparse
import os
from typing import Any

from flexolmo_jax.commands.parser import Commands
from flexolmo_jax.commands.shared_arguments import add_json
from flexolmo_jax.runtime.console import print_json, show_table, tell


def add_to(commands: Commands) -> None:
    parser = commands.add(
        "sign", sign, "sign a package or a merged model, for others to verify",
        "Signs the package as it is now, with OpenSSF Model Signing. The signature lies beside the "
        "package, as PACKAGE.sig; send both. Sign again after any change.",
    )  # fmt: skip
    parser.add_argument("package", metavar="PACKAGE", help="an anchor, an expert, a merged model")
    parser.add_argument(
        "--key", required=True, metavar="FILE", help="of `flexolmo registry keygen`"
    )
    parser = commands.add(
        "verify", verify, "verify who signed a package, and every byte of it",
        "Verifies PACKAGE.sig against a registry of keys, and reads every byte of the package; of "
        "a merged model, those of its anchor and experts too. A signature says who made a "
        "package, and nothing of what the model does.",
    )  # fmt: skip
    parser.add_argument("package", metavar="PACKAGE")
    parser.add_argument(
        "--keys", required=True, metavar="REGISTRY", help="the folder of `flexolmo registry`"
    )
    add_json(parser)


def sign(args: argparse.Namespace) -> None:
    from flexolmo_jax.trust.signatures import sign_package

    file = sign_package(args.package, args.key)
    tell(f"wrote {file}; send it with the package")


def verify(args: argparse.Namespace) -> None:
    from flexolmo_jax.trust.signatures import verify_package
    from flexolmo_jax.trust.trusted import Trusted

    trusted = Trusted.open(args.keys)
    registry = trusted.registry
    verified = verify_package(
        args.package, lambda package: registry.signer_of(trusted.check(package).key)
    )
    rows: list[dict[str, Any]] = [
        {
            "package": os.path.normpath(package.folder),
            "kind": package.manifest["kind"],
            "digest": package.digest,
            "signed_by": signer.name,
            "key_id": signer.key_id,
        }
        for package, signer in verified
    ]
    if args.json:
        print_json({"registry_version": registry.version, "verified": rows})
        return
    rows = [
        {"package": row["package"], "kind": row["kind"], "signed by": row["signed_by"],
         "key": row["key_id"][:12]}
        for row in rows
    ]  # fmt: skip
    show_table(rows, title=f"{args.package}: signed, and every byte is as it was signed")
