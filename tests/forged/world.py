"""Signed packages, their registry, and a verifier's own copy of it."""

import datetime
from pathlib import Path
from typing import Any

from flexolmo_jax.federation.package import Package
from flexolmo_jax.trust import log
from flexolmo_jax.trust import registry_changes as changes
from flexolmo_jax.trust.keys import make_keys, read_private, read_public
from flexolmo_jax.trust.signatures import sign_package, verify_package
from flexolmo_jax.trust.signers import make_signer, utc_now
from flexolmo_jax.trust.trusted import Trusted
from tests.hostile import attempts

ROOTS = ("root1", "root2", "root3")
DAY = datetime.timedelta(days=1)
SIGNERS = {  # name: role, experts, days from now until it begins and ends
    "publisher": ("publisher", (), -10, 100),
    "math": ("owner", ("math",), -10, 100),
    "code": ("owner", ("code",), -10, 100),
    "hub": ("coordinator", (), -10, 100),
    "past": ("owner", ("math", "code", "third"), -10, -1),
    "future": ("owner", ("math", "code", "third"), 10, 100),
    "revoked": ("owner", ("math", "code", "third"), -10, 100),
    "late": ("coordinator", (), 10, 100),
    "gone": ("coordinator", (), -10, 100),
}
SIGNED = {"anchor": "publisher", "experts/math": "math", "experts/code": "code", "merged": "hub"}


class World:
    """Folders of a world, which an attempt may change."""

    def __init__(self, root: Path):
        self.root = root
        self.registry = root / "registry"
        self.mine = root / "mine"  # the verifier's own copy of the registry

    def key(self, name: str):
        return read_private(self.root / "keys" / name)

    def public(self, name: str) -> str:
        return read_public(self.root / "keys" / f"{name}.pub")

    def verified(self) -> list[Any]:
        """Who signed what, of the merged model and its parts; every byte is checked."""
        trusted = Trusted.open(self.registry)
        found = verify_package(
            self.root / "merged",
            lambda package: trusted.registry.signer_of(trusted.check(package).key),
        )
        return [(package.digest, signer) for package, signer in found]


def make_world(root: Path) -> None:
    """Writes it: a registry that two of three root keys change, its log, and what `SIGNED` lists.

    The last version of the registry names the first line of the log, that of a coordinator whose
    key was revoked after it; two more lines follow.
    """
    attempts.make_world(root)
    (root / "keys").mkdir()
    for name in (*ROOTS, *SIGNERS, "stranger"):
        make_keys(root / "keys" / name)
    world = World(root)
    first, second = world.key("root1"), world.key("root2")
    changes.create(world.registry, [world.public(name) for name in ROOTS], 2, first)
    changes.cosign(world.registry, second)
    for name, (role, experts, start, until) in SIGNERS.items():
        now = utc_now()
        signer = make_signer(
            name, world.public(name), role, experts, now + start * DAY, now + until * DAY,
            where=name,
        )  # fmt: skip
        changes.add_signer(world.registry, signer, first)
        changes.cosign(world.registry, second)
    about = {"expert": "third", "package": Package.open(root / "experts" / "third").digest}
    log.append(world.registry, world.key("gone"), log.ADMITTED, **about)
    for name in ("revoked", "gone"):
        changes.revoke_signer(world.registry, name, "a test", first)
        changes.cosign(world.registry, second)
    log.append(world.registry, world.key("hub"), log.REVOKED, expert="third", reason="a test")
    log.append(world.registry, world.key("hub"), log.REMOVED, **about)
    changes.update(world.mine, world.registry)
    for package, name in SIGNED.items():
        sign_package(root / package, root / "keys" / name)
