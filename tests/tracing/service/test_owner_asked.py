"""A coordinator asks owners: all at once, over TLS, and believes none more than it must."""

import json
import random
import time

import pytest

from flexolmo_jax.tracing.service.answers import Said, SaidSpan, together
from flexolmo_jax.tracing.service.askers import KEYS, Asker
from flexolmo_jax.tracing.service.owners import Address, read_owners
from flexolmo_jax.tracing.table import summary

GOOD = {"start": 0, "stop": 9, "tokens": 2, "log_probability": -9.5, "count": 3, "passages": []}
ANSWER = {"owner": "x", "level": "counts", "tokens": 8, "spans": [GOOD], "receipt": None}


def http(content: bytes | dict, status="200 OK", more="") -> bytes:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    head = f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n{more}\r\n"
    return head.encode() + body


def test_answers_of_several_owners_are_one_trace(serve, indexed, asked, common, secret):
    other = indexed([f"Letter {i}, that {secret}." for i in range(3)], owner="ward")
    text = f"They wrote that {secret} again."
    with (
        serve(level="snippets", snippet_characters=12) as clinic,
        serve(index=other, level="ids") as ward,
    ):
        trace, _ = asked(text, [clinic.address("clinic"), ward.address("ward")], prompt="Why?")
    assert trace.asked == ("clinic", "ward") and trace.missing == {}
    said = {text[s.start : s.stop]: s for s in trace.spans}
    assert set(said) == {common, f"that {secret}"}  # the ward's does not hide the clinic's
    assert said[common].counts == {"clinic": 5} and said[f"that {secret}"].counts == {"ward": 3}
    first = said[common].passages[0]
    assert first.owner == "clinic" and first.match == common and first.licence == "CC0-1.0"
    assert {(p.owner, p.match) for p in said[f"that {secret}"].passages} == {("ward", "")}
    assert json.loads(json.dumps(trace.to_json()))["missing"] == {}


def test_spans_of_two_owners_at_one_place_are_one(common):
    span = SaidSpan(**{**GOOD, "stop": len(common)})
    rarer = span.model_copy(update={"log_probability": -20.0, "count": 4})
    said = {name: Said(**{**ANSWER, "spans": [s]}) for name, s in (("a", span), ("b", rarer))}
    [both] = together(common, said, common, ["a", "b"], {}).spans
    assert both.counts == {"a": 3, "b": 4} and both.log_probability == -9.5


def test_an_owner_that_does_not_answer_is_named_and_not_waited_for(serve, stranger, asked, common):
    slow = [b"HTTP/1.1 200 OK\r\n", *[b"X-Wait: 1\r\n"] * 100]
    with serve() as clinic, stranger(None) as silent, stranger(slow) as dripping:
        others = {"dead": "http://127.0.0.1:9", "silent": silent, "dripping": dripping}
        addresses = [clinic.address(), *(Address(*pair) for pair in others.items())]
        trace, seconds = asked(common, addresses, seconds=0.6)
        off, _ = asked(common, [clinic.says(level="off").address()])
    assert seconds < 2 and len(trace.spans) == 1
    assert trace.missing["silent"] == trace.missing["dripping"] == "no answer within 0.6 s"
    assert trace.missing["dead"].startswith("cannot be asked: ")
    assert off.missing == {"clinic": "refused (403): this owner answers no traces"}
    assert off.spans == ()
    assert summary(trace).startswith("The rarest span") and trace.receipts.keys() == {"clinic"}
    assert summary(off).startswith("Nobody answered")


def test_a_key_that_an_owner_does_not_know_is_named_as_the_reason(serve, asked, common, tmp_path):
    keys = tmp_path / "keys.json"
    KEYS.add(keys, Asker("coordinator"))
    with serve(keys=keys) as clinic:
        wrong, _ = asked(common, [clinic.address(key="fo-wrong")])
        none, _ = asked(common, [clinic.address()])
    assert wrong.missing == {"clinic": "it does not know this key (401)"}
    assert none.missing == {"clinic": "it does not know us: it expects a key (401)"}


LIES = {
    "no JSON": b"<html>",
    "deep": b"[" * 100_000,
    "not a number": json.dumps({**ANSWER, "spans": [{**GOOD, "log_probability": -1}]})
    .replace("-1", "NaN").encode(),
    "unknown field": {**ANSWER, "note": "x"},
    "missing field": {"owner": "x"},
    "a text for a number": {**ANSWER, "tokens": "8"},
    "beyond the text": {**ANSWER, "spans": [{**GOOD, "stop": 10_000}]},
    "negative": {**ANSWER, "spans": [{**GOOD, "start": -1}]},
    "empty": {**ANSWER, "spans": [{**GOOD, "stop": 0}]},
    "inside another": {**ANSWER, "spans": [GOOD, {**GOOD, "start": 1}]},
    "too many": {**ANSWER, "spans": [{**GOOD, "start": i, "stop": i + 1} for i in range(40)]},
    "a count of none": {**ANSWER, "spans": [{**GOOD, "count": 0}]},
    "an endless word": {**ANSWER, "owner": "x" * 2000},
}  # fmt: skip


@pytest.mark.parametrize("name", LIES)
def test_nonsense_is_not_believed(stranger, asked, common, name):
    with stranger(http(LIES[name])) as url:
        trace, _ = asked(common, [Address("liar", url)])
    assert trace.missing["liar"].startswith("its answer cannot be understood: ")
    assert len(trace.missing["liar"]) < 300 and trace.spans == ()


def test_strange_replies_are_named(stranger, asked, common):
    replies = {
        "huge": (http(b" " * (5 << 20)), "more than"),
        "no HTTP": (b"SSH-2.0-OpenSSH_9.6\r\n", "cannot be asked"),
        "redirect": (http(b"", "302 Found", "Location: http://127.0.0.1:9/\r\n"), "refused (302)"),
        "refusal": (http({"error": {"message": "no\x1b[31m\nway"}}, "500 X"), "(500): no [31m way"),
        "odd refusal": (http([1], "503 X"), "refused (503)"),  # type: ignore[arg-type]
        "compressed": (http(b"\x1f\x8b" + bytes(99), more="Content-Encoding: gzip\r\n"), "underst"),
    }
    for reply, expected in replies.values():
        with stranger(reply) as url:
            trace, _ = asked(common, [Address("odd", url)])
        assert expected in trace.missing["odd"]


def test_random_answers_never_break_the_coordinator(stranger, asked, common):
    """Valid answers, of which some bytes are exchanged."""
    draw = random.Random(0)
    for _ in range(60):
        body = bytearray(json.dumps(ANSWER).encode())
        for _ in range(draw.randint(1, 4)):
            body[draw.randrange(len(body))] = draw.randrange(256)
        with stranger(http(bytes(body))) as url:
            trace, _ = asked(common, [Address("odd", url)])
        assert trace.missing or all(0 <= s.start < s.stop <= len(common) for s in trace.spans)


def test_an_answer_of_very_many_passages_is_put_together_soon():
    """An owner chooses how long its answer is, and others wait for the coordinator meanwhile."""
    text = ("a b c d e f g h i j " * 65)[:1250]
    places = [
        {"document": f"d{i}", "source": "", "licence": "", "group": "", "before": "x", "after": "y"}
        for i in range(10)
    ]
    spans = [
        SaidSpan(**{**GOOD, "start": i, "stop": i + 1, "passages": places})
        for i in range(0, 1249, 2)
    ]
    said = {f"owner {i}": Said(**{**ANSWER, "level": "snippets", "spans": spans}) for i in range(9)}
    query = " ".join(f"word{i}" for i in range(100_000))
    begun = time.monotonic()
    assert together(text, said, query, list(said), {}).spans
    assert time.monotonic() - begun < 4


def test_tls_is_verified(serve, asked, certificates, common, tmp_path):
    (own, key), (other, _) = certificates
    with serve(tls=(own, key)) as clinic:

        def reached(certificate, url=clinic.url):
            file = tmp_path / "owners.toml"
            line = f"certificate = '{certificate}'" if certificate else ""
            file.write_text(f"[[owners]]\nname = 'clinic'\nurl = '{url}'\n{line}\n")
            return asked(common, read_owners(file).of(["clinic"]))[0].missing

        assert reached(own) == {}
        for certificate in (other, None):
            assert "CERTIFICATE_VERIFY_FAILED" in reached(certificate)["clinic"]
        assert "127.0.0.1" in reached(own, clinic.url.replace("localhost", "127.0.0.1"))["clinic"]


@pytest.mark.parametrize("text, named", [
    ("", "[[owners]]"),
    ("minutes = 3", "minutes"),
    ("seconds = 0\n[[owners]]\nname='a'\nurl='https://a'", "seconds"),
    ("[[owners]]\nname='a'", "name and url"),
    ("[[owners]]\nname='a'\nurl='https://a'\npassword='x'", "password"),
    ("[[owners]]\nname='a'\nurl='http://a.example'", "no TLS"),
    ("[[owners]]\nname='a'\nurl='ftp://a.example'", "https://HOST:PORT"),
    ("[[owners]]\nname='a'\nurl='https://a:99999'", "https://HOST:PORT"),
    ("[[owners]]\nname='a'\nurl='https://a'\n" * 2, "twice"),
    ("[[owners]]\nname='a'\nurl='https://a'\ncertificate='none.pem'", "none.pem"),
])  # fmt: skip
def test_a_wrong_file_of_owners_is_refused(tmp_path, text, named):
    file = tmp_path / "owners.toml"
    file.write_text(text)
    with pytest.raises(ValueError, match="owners.toml|pem") as refusal:
        read_owners(file)
    assert named in str(refusal.value)


def test_the_command_asks_owners(serve, flexolmo, refused, common, tmp_path):
    file = tmp_path / "owners.toml"
    with serve(level="ids") as clinic:
        tables = {"clinic": clinic.url, "ward": "http://127.0.0.1:9"}
        lines = [f"[[owners]]\nname = '{name}'\nurl = '{url}'\n" for name, url in tables.items()]
        file.write_text("".join(lines))
        _, shown, _ = flexolmo("trace", "find", common, "--owners", file, "--json")
        trace = json.loads(shown)
        assert trace["spans"][0]["counts"] == {"clinic": 5} and list(trace["missing"]) == ["ward"]
        code, shown, _ = flexolmo("trace", "find", common, "--owners", file)
        assert code == 0 and "ward" in shown and "cannot be asked" in shown
        _, shown, _ = flexolmo(
            "trace", "find", common, "--owners", file, "--json", "--without", "clinic"
        )
        assert json.loads(shown)["asked"] == ["ward"] and "clinic" not in shown
    find = ("trace", "find", common)
    assert "nobody is left" in refused(*find, "--owners", file, "--without", "clinic", "ward")
    assert "clinic, ward" in refused(*find, "--owners", file, "--without", "nobody")
    assert "either" in refused(*find) and "either" in refused(*find, "--owners", file, "--index", 1)
