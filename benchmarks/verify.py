"""How long verifying a signed package takes, beside reading its files.

    python -m benchmarks.verify --folder /tmp/verify --out docs/results/verify.json

Writes an expert package of `--gigabytes`, signs it, and then alternately: reads its files and does
nothing with the bytes; reads them and keeps the bytes; checks its digests, as every load does;
verifies its signature and its digests; and verifies its signature alone. All use the same number of
threads, and all but the one that keeps the bytes read in chunks of the same size. Cold: the files
were evicted from the system's memory before. Warm: they are in it. The folder is deleted at the
end.
"""

import argparse
import concurrent.futures
import dataclasses
import datetime
import json
import os
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from benchmarks.machine import commit, machine, versions
from flexolmo_jax.config import ModelConfig
from flexolmo_jax.federation.package import NO_PRIVACY, Package, check_packages, write_package
from flexolmo_jax.federation.package_files import CHUNK
from flexolmo_jax.modeling.experts import Experts
from flexolmo_jax.storage.regular_files import open_regular
from flexolmo_jax.studies.loading import evict
from flexolmo_jax.trust import registry_changes
from flexolmo_jax.trust.keys import make_keys, read_private, read_public
from flexolmo_jax.trust.registry import Registry
from flexolmo_jax.trust.signatures import sign_package, verify_package, verify_signature
from flexolmo_jax.trust.signers import make_signer, utc_now

BAR = 1.2  # verify and digests, at most, as a multiple of reading
LAYER = 3 * 4096 * 11_008 * 2  # bytes of a layer's feed-forward network in bfloat16, as OLMo 2 7B


def write_expert(path: Path, gigabytes: float) -> None:
    """An expert package of the width of OLMo 2 7B, with as many layers as fit."""
    layers = max(1, round(gigabytes * 1e9 / LAYER))
    config = ModelConfig(
        vocab_size=100_352, width=4096, num_layers=layers, num_heads=32, ffn_width=11_008
    )
    shapes = jax.eval_shape(lambda key: Experts(config, 1, key), jax.random.key(0))
    rng = np.random.default_rng(0)
    block = rng.standard_normal(2**24, np.float32).astype(ml_dtypes.bfloat16)
    tree = jax.tree.map(lambda x: np.resize(block, x.shape), shapes)
    manifest = {
        "kind": "expert", "name": "large", "anchor": "0" * 64, "tokenizer": None,
        "model": dataclasses.asdict(config), "privacy": NO_PRIVACY,
    }  # fmt: skip
    write_package(path, manifest, tree)


def sign(folder: Path) -> tuple[Registry, float]:
    """A registry that knows the package's owner; and the seconds that signing took."""
    make_keys(folder / "root")
    make_keys(folder / "owner")
    key, now = read_private(folder / "root"), utc_now()
    changes = registry_changes
    changes.create(folder / "registry", [read_public(folder / "root.pub")], 1, key)
    until = now + datetime.timedelta(days=1)
    owner = read_public(folder / "owner.pub")
    signer = make_signer("owner", owner, "owner", ("large",), now, until, where="owner")
    changes.add_signer(folder / "registry", signer, key)
    begun = time.perf_counter()
    sign_package(folder / "large", folder / "owner")
    return Registry.open(folder / "registry"), time.perf_counter() - begun


def read(package: Path) -> None:
    """Reads every file, as `check_packages` does, and does nothing with the bytes."""
    files = (file for file in package.rglob("*") if file.is_file())
    largest_first = sorted(files, key=lambda file: -file.stat().st_size)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        for _ in pool.map(_read_file, largest_first):
            pass


def read_and_keep(package: Path) -> None:
    """Reads every file into memory of its own, as whoever uses the weights has to."""
    files = [file for file in package.rglob("*") if file.stat().st_size and file.is_file()]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        kept = list(pool.map(lambda file: np.fromfile(file, np.uint8), files))
    del kept


def _read_file(file: Path) -> None:
    memory = memoryview(bytearray(CHUNK))
    with open_regular(file) as opened:
        while opened.readinto(memory):  # type: ignore[attr-defined]
            pass


def measure(
    package: Path, ways: dict[str, Callable[[], object]], cold: bool, rounds: int
) -> dict[str, Any]:
    """Seconds and seconds of CPU of each way: medians, and the range of the seconds."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    used: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            if cold:
                evict(package)
            begun, before = time.perf_counter(), time.process_time()
            way()
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - begun)
                used[name].append(time.process_time() - before)
    plain, kept = (statistics.median(seconds[name]) for name in ("read", "read_and_keep"))
    return {
        name: {
            "seconds": round(statistics.median(seconds[name]), 2),
            "from": round(min(seconds[name]), 2),
            "to": round(max(seconds[name]), 2),
            "cpu_seconds": round(statistics.median(used[name]), 2),
            "times_reading": round(statistics.median(seconds[name]) / plain, 2),
            "times_reading_and_keeping": round(statistics.median(seconds[name]) / kept, 2),
        }
        for name in ways
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.verify", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--folder", type=Path, required=True, help="new; deleted at the end")
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=5, help="timed runs: %(default)s")
    parser.add_argument("--out", type=Path, help="a JSON file; default: only print it")
    args = parser.parse_args()
    args.folder.mkdir(parents=True)
    try:
        package = args.folder / "large"
        write_expert(package, args.gigabytes)
        registry, signing = sign(args.folder)
        files = [file for file in package.rglob("*") if file.is_file()]
        ways: dict[str, Callable[[], object]] = {
            "read": lambda: read(package),
            "read_and_keep": lambda: read_and_keep(package),
            "digests": lambda: check_packages([Package.open(package)]),
            "verify_and_digests": lambda: verify_package(
                package, lambda opened: verify_signature(opened, registry)
            ),
            "verify_alone": lambda: verify_signature(Package.open(package), registry),
        }
        result = {
            "about": {
                "machine": machine(), "date": str(datetime.date.today()), "commit": commit(),
                "versions": versions("model-signing", "cryptography", "tuf", "jax"),
                "load": round(os.getloadavg()[0], 1), "rounds": args.rounds,
                "chunk_bytes": CHUNK, "threads": min(32, (os.cpu_count() or 1) + 4),
            },
            "package": {
                "bytes": sum(file.stat().st_size for file in files), "files": len(files),
                "signature_bytes": (args.folder / "large.sig").stat().st_size,
            },
            "sign_seconds": round(signing, 2),
            "cold": measure(package, ways, True, args.rounds),
            "warm": measure(package, ways, False, args.rounds),
            "bar": {"verify_and_digests": f"at most {BAR} times reading"},
        }  # fmt: skip
    finally:
        shutil.rmtree(args.folder)
    text = json.dumps(result, indent=1) + "\n"
    print(text, end="")
    if args.out:
        args.out.write_text(text)


if __name__ == "__main__":
    main()
