"""Changes of a registry: its files, what its versions say, and who signed them."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from securesystemslib.signer import CryptoSigner, SSlibKey
from tuf.api.metadata import Metadata, Root

from flexolmo_jax.trust import registry_changes
from flexolmo_jax.trust.keys import tuf_key
from flexolmo_jax.trust.registry import Registry
from tests.forged.signatures import mutate
from tests.forged.world import ROOTS, World
from tests.hostile import mutations

PARTS = ("registry", "mine")
# Who signs a version that is forged: never two of the three root keys.
FORGERS = (("root1",), ("root3",), ("stranger",), ("hub", "math"), ("root1", "stranger"), ())


def change(draw: random.Random, world: World) -> str:
    """Changes the registry that the verifier is given, and says how."""
    return draw.choice((files, files, json_value, version, version, next_version))(draw, world)


def conclusion(world: World) -> Any:
    """What a verifier reads in the registry that it is given.

    A sound registry that is older than the verifier's own copy, or another one, can only be told by
    that copy; everything else, without it.
    """
    opened, mine = Registry.open(world.registry), Registry.open(world.mine)
    if opened.version < mine.version or opened.first_digest != mine.first_digest:
        registry_changes.update(world.mine, world.registry)
    return opened._replace(folder=Path())


def files(draw: random.Random, world: World) -> str:
    """The files of versions: flipped, cut, missing, swapped, links, of other versions."""
    versions = _versions(world)
    last, one = versions[-1], draw.choice(versions)
    kinds: dict[str, Callable[[], Any]] = {
        "rolled back": lambda: [file.unlink() for file in versions[draw.randrange(1, 5) :]],
        "a gap": lambda: one.unlink() if one != last else versions[-2].unlink(),
        "a version again": lambda: shutil.copy(one, last.with_name(f"{len(versions) + 1}.json")),
        "a version twice": lambda: shutil.copy(versions[-2], last),
        "another first version": lambda: _other_first(world),
        "a leading zero": lambda: one.rename(one.with_name(f"0{one.name}")),
        "a huge version": lambda: one.write_bytes(b" " * (5 * 2**20)),
    }
    if draw.random() < 0.5:
        one = draw.choice((mutations.flip, mutations.cut, mutations.grow, mutations.swap,
                           mutations.delete, mutations.carriage_returns, mutations.link_to_file,
                           mutations.special))  # fmt: skip
        return one(draw, world.registry)
    what = draw.choice(list(kinds))
    kinds[what]()
    return what


def json_value(draw: random.Random, world: World) -> str:
    """One value of a version's JSON, or its spelling; the signatures are as they were."""
    file = draw.choice(_versions(world))
    value = json.loads(file.read_text())
    if draw.random() < 0.1:
        file.write_text(json.dumps(value, indent=draw.choice((None, 1, 2)), sort_keys=True))
        return f"{file.name}: spelled otherwise"
    what = mutate(draw, value)
    file.write_text(json.dumps(value, separators=(",", ":"), sort_keys=True))
    return f"{file.name}: {what}"


def version(draw: random.Random, world: World) -> str:
    """A version is changed to somebody's advantage, and signed by too few."""
    file = draw.choice(_versions(world))
    return f"{file.name}: {_forged(draw, world, file, file)}"


def next_version(draw: random.Random, world: World) -> str:
    """A further version, signed by too few."""
    versions = _versions(world)
    file = versions[-1].with_name(f"{len(versions) + 1}.json")
    return f"{file.name}: {_forged(draw, world, versions[-1], file)}"


def _forged(draw: random.Random, world: World, source: Path, file: Path) -> str:
    metadata: Metadata[Root] = Metadata.from_bytes(source.read_bytes())
    root, signatures = metadata.signed, dict(metadata.signatures)
    role, signers = root.roles["root"], root.unrecognized_fields["signers"]
    stranger = tuf_key(world.public("stranger"))
    forgers = draw.choice(FORGERS)

    def all_roles(keys: list[str], threshold: int) -> None:
        for name in root.roles:
            root.roles[name].keyids, root.roles[name].threshold = list(keys), threshold

    def key_twice() -> None:
        alias = SSlibKey("f" * 64, stranger.keytype, stranger.scheme, stranger.keyval)
        root.keys.update({stranger.keyid: stranger, alias.keyid: alias})
        all_roles([*role.keyids, stranger.keyid, alias.keyid], role.threshold)

    def own_keys() -> None:
        root.keys = {stranger.keyid: stranger}
        all_roles([stranger.keyid], 1)

    entry: dict[str, Any] = {
        "name": "intruder", "key": world.public("stranger"), "role": "owner", "experts": ["math"],
        "from": "2020-01-01T00:00:00Z", "until": "2040-01-01T00:00:00Z", "revoked": None,
    }  # fmt: skip
    kinds: dict[str, Callable[[], Any]] = {
        "nothing but the signatures": lambda: None,
        "a signer more": lambda: signers.append(entry),
        "a signer less": lambda: signers and signers.pop(),
        "no longer revoked": lambda: [one.update(revoked=None) for one in signers],
        "another key": lambda: [one.update(key=world.public("stranger")) for one in signers[:1]],
        "longer valid": lambda: [one.update(until="2040-01-01T00:00:00Z") for one in signers],
        "a threshold of one": lambda: all_roles(role.keyids, 1),
        "a threshold of zero": lambda: all_roles(role.keyids, 0),
        "a key twice": key_twice,
        "keys of its own": own_keys,
        "a later expiry": lambda: setattr(root, "expires", root.expires.replace(year=2040)),
        "no log": lambda: root.unrecognized_fields.update(log={"number": 9, "digest": "0" * 64}),
    }
    what = draw.choice(list(kinds))
    kinds[what]()
    if source != file:
        root.version += 1
    metadata.signatures.clear()
    for name in forgers:
        metadata.sign(CryptoSigner(world.key(name)), append=True)
    if draw.random() < 0.3:  # with the old signatures of the root keys beside them
        for own, signature in signatures.items():
            metadata.signatures.setdefault(own, signature)
    if forgers and draw.random() < 0.2:  # the same signature under the ids of other root keys
        for name in ROOTS:
            key = tuf_key(world.public(name)).keyid
            made = next(iter(metadata.signatures.values()))
            metadata.signatures.setdefault(key, type(made)(key, made.signature))
    file.write_bytes(metadata.to_bytes())
    return f"{what}, signed by {', '.join(forgers) or 'nobody'}"


def _other_first(world: World) -> None:
    """A sound registry, but another one."""
    key, public = world.key("stranger"), world.public("stranger")
    shutil.rmtree(world.registry)
    registry_changes.create(world.registry, [public], 1, key)
    for _ in range(12):
        registry_changes.renew(world.registry, key)


def _versions(world: World) -> list[Path]:
    names = [file for file in world.registry.iterdir() if file.stem.isdigit()]
    return sorted(names, key=lambda file: int(file.stem))
