"""How long a running server still uses what was revoked: a table.

    flexolmo demo
    python -m benchmarks.revocation --demo flexolmo_demo --tries 3

The server is `flexolmo serve --require-signed` in a process of its own, over a copy of the demo's
packages, which are signed. A client asks one question after the other; measured is the time from
when the revocation is on the disk until an answer refuses the expert with the reason. So is the
time to verify a log, which a server does whenever it has changed.
"""

import argparse
import datetime
import shutil
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import httpx
import jax

from benchmarks.machine import commit, machine, versions
from benchmarks.serving import served
from flexolmo_jax.federation.package import read_manifest
from flexolmo_jax.trust import keys, log, registry_changes
from flexolmo_jax.trust.registry import Registry
from flexolmo_jax.trust.signatures import sign_package
from flexolmo_jax.trust.signers import make_signer, utc_now

LINES = 200
REASON = "measured"


class SignedCopy:
    """A copy of the demo's packages, all of them signed, and the registry that says by whom."""

    def __init__(self, demo: Path, root: Path):
        for name in ("anchor", "experts", "merged"):
            shutil.copytree(demo / name, root / name)
        self.merged, self.registry, self._keys = root / "merged", root / "registry", root
        experts = sorted(folder.name for folder in (root / "experts").iterdir())
        for name in ("root", "anchor", "merged", *experts):
            keys.make_keys(root / f"{name}.key")
        public = keys.public_of(self.key("root"))
        registry_changes.create(self.registry, [public], 1, self.key("root"))
        roles = {"anchor": "publisher", "merged": "coordinator", **dict.fromkeys(experts, "owner")}
        for name, role in roles.items():
            own = (name,) if role == "owner" else ()
            times = utc_now(), utc_now() + datetime.timedelta(days=1)
            public = keys.public_of(self.key(name))
            signer = make_signer(name, public, role, own, *times, where=name)
            registry_changes.add_signer(self.registry, signer, self.key("root"))
            sign_package(root / "experts" / name if own else root / name, root / f"{name}.key")
        self.digests = {x["name"]: x["digest"] for x in read_manifest(self.merged)["experts"]}
        self.anchor = read_manifest(root / "anchor")["digest"]

    def key(self, name: str):
        return keys.read_private(self._keys / f"{name}.key")

    def revoke(self, **given: str) -> None:
        log.append(self.registry, self.key("merged"), log.REVOKED, reason=REASON, **given)


def seconds_until_refused(url: str, expert: str, revoke: Callable[[], None]) -> float:
    """From when `revoke` has returned until the server refuses an expert because of it."""
    experts = {"only": [expert]}
    body = {"model": "ours", "prompt": "1 + 1", "max_tokens": 1, "experts": experts}

    def ask() -> httpx.Response:
        return httpx.post(f"{url}/v1/completions", json=body, timeout=60)

    assert ask().status_code == 200
    revoke()
    begun = time.monotonic()
    while (answer := ask()).status_code == 200:
        pass
    seconds = time.monotonic() - begun
    assert answer.status_code in (410, 503) and REASON in answer.text, answer.text
    return seconds


def measure(demo: Path, found: dict[str, list[float]]) -> None:
    """One server, from its start on, for each way to revoke."""
    with tempfile.TemporaryDirectory() as folder:
        own = SignedCopy(demo, Path(folder) / "world")
        first, second, third, *_ = own.digests
        process, url = served(str(own.merged), "--require-signed", str(own.registry))
        given = own.registry, third, REASON, own.key("root")
        try:
            for how, expert, revoke in (
                ("the name of an expert", first, lambda: own.revoke(expert=first)),
                ("a package", second, lambda: own.revoke(package=own.digests[second])),
                ("the key of an owner", third, lambda: registry_changes.revoke_signer(*given)),
                ("the anchor", "public", lambda: own.revoke(package=own.anchor)),
            ):
                found[how].append(seconds_until_refused(url, expert, revoke))
        finally:
            process.terminate()
            process.wait()


def seconds_to_verify(demo: Path) -> float:
    """A log of `LINES` lines."""
    with tempfile.TemporaryDirectory() as folder:
        own = SignedCopy(demo, Path(folder) / "world")
        name, digest = next(iter(own.digests.items()))
        for _ in range(LINES):
            log.append(own.registry, own.key("merged"), log.ADMITTED, expert=name, package=digest)
        registry = Registry.open(own.registry)
        begun = time.monotonic()
        assert len(log.read(registry)) == LINES
        return time.monotonic() - begun


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.revocation", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--demo", required=True, metavar="DIR", type=Path)
    parser.add_argument("--tries", type=int, default=3)
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # as the server
    found: dict[str, list[float]] = defaultdict(list)
    for _ in range(args.tries):
        measure(args.demo, found)
    print(f"{time.strftime('%Y-%m-%d')}, commit {commit()}, {machine()}, {versions('jax')}")
    print("| revoked | until it was refused, s | median |\n| --- | --- | ---: |")
    for how, seconds in found.items():
        shown = ", ".join(f"{x:.2f}" for x in seconds)
        print(f"| {how} | {shown} | {statistics.median(seconds):.2f} |")
    print(f"a log of {LINES} lines is verified in {seconds_to_verify(args.demo):.3f} s")


if __name__ == "__main__":
    main()
