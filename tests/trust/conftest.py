"""Keys, a registry that knows their owners, and packages that they signed."""

import dataclasses
import datetime
import shutil
from pathlib import Path

import pytest

from flexolmo_jax.trust import registry_changes as changes
from flexolmo_jax.trust.keys import make_keys, read_private, read_public
from flexolmo_jax.trust.registry import Registry
from flexolmo_jax.trust.signatures import sign_package
from flexolmo_jax.trust.signers import make_signer, utc_now

SIGNERS = {
    "publisher": ("publisher", ()),
    "math": ("owner", ("math",)),
    "code": ("owner", ("code",)),
    "hub": ("coordinator", ()),
}


@dataclasses.dataclass(frozen=True)
class Signed:
    """The world's packages, each with its signature, and the registry: a test's own folder."""

    root: Path

    @property
    def anchor(self) -> Path:
        return self.root / "anchor"

    @property
    def math(self) -> Path:
        return self.root / "experts" / "math"

    @property
    def code(self) -> Path:
        return self.root / "experts" / "code"

    @property
    def merged(self) -> Path:
        return self.root / "merged"

    @property
    def registry_folder(self) -> Path:
        return self.root / "registry"

    @property
    def registry(self) -> Registry:
        return Registry.open(self.registry_folder)

    def key(self, name: str) -> Path:
        return self.root / "keys" / name


@pytest.fixture(scope="session")
def all_signed(world, tmp_path_factory) -> Signed:
    """Nobody changes it; `signed` is a copy."""
    made = Signed(tmp_path_factory.mktemp("signed"))
    for name in ("anchor", "experts", "merged"):
        shutil.copytree(world.root / name, made.root / name)
    (made.root / "keys").mkdir()
    for name in ("root", "stranger", *SIGNERS):
        make_keys(made.key(name))
    root = read_private(made.key("root"))
    changes.create(made.registry_folder, [read_public(made.key("root.pub"))], 1, root)
    start = utc_now() - datetime.timedelta(days=1)
    until = start + datetime.timedelta(days=100)
    for name, (role, experts) in SIGNERS.items():
        public = read_public(made.key(f"{name}.pub"))
        signer = make_signer(name, public, role, experts, start, until, where=name)
        changes.add_signer(made.registry_folder, signer, root)
    for package, name in (
        (made.anchor, "publisher"), (made.math, "math"), (made.code, "code"), (made.merged, "hub"),
    ):  # fmt: skip
        sign_package(package, made.key(name))
    return made


@pytest.fixture
def signed(all_signed, tmp_path) -> Signed:
    """Signed packages and their registry, to be tampered with."""
    shutil.copytree(all_signed.root, tmp_path / "signed")
    return Signed(tmp_path / "signed")
