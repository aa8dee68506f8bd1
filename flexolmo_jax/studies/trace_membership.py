"""What an owner's tracing service gives away: a membership attack through it, at each policy.

    flexolmo study trace-membership OUT [--documents 40] [--seed 0]

Of four bundled corpora, half of the groups are indexed. Whoever has a document asks about its
first 500 characters, whole and in pieces of 125, and decides by the answers whether it is
indexed. Unknown documents are of the other groups: of the same kind, and by other hands. Each
statistic of the answers is a score; the best one is chosen on every other document, for AUC and for
the true positives alike, and measured on the rest. Writes OUT, a file of JSON, and prints the table
of docs/tracing_service.md. The questions pass through the application itself, without a socket; no
network is trained.
"""

import argparse
import asyncio
import json
import random
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flexolmo_jax.data.sources import Document, read_documents
from flexolmo_jax.data.tokenizer import Tokenizer
from flexolmo_jax.storage.files import replace_file
from flexolmo_jax.tracing.build import build_index

CORPORA = ("code", "math", "educational", "creative")
VOCABULARY = 4096
ASKED, PIECE = 500, 125  # characters
FALSE = 0.01  # the rate of false positives at which true ones are counted
SETTINGS = ((8, 1), (16, 1), (8, 2), (8, 5), (8, 20))  # minimum_tokens, minimum_documents
# What each level adds to the scores: an answer at one level is that of the next, less its fields.
SCORES = {
    "counts": ("longest", "covered", "rarest", "fewest"),
    "ids": ("together",),
    "snippets": ("context",),
}


class Known(NamedTuple):
    """A document that the attacker has."""

    text: str
    is_member: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `flexolmo study trace-membership`."""
    parser.add_argument("out", type=Path, help="file of JSON")
    parser.add_argument(
        "--documents", type=int, default=40, help="of each kind and corpus (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> None:
    """Attacks, writes the file and prints the table."""
    started = time.monotonic()
    scores: list[list[dict[str, float]]] = [[] for _ in SETTINGS]
    members: list[bool] = []
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = Path(folder) / "tokenizer.json"
        public = (document.text for document in read_documents("corpus:public"))
        tokenizer.write_text(Tokenizer.train(public, VOCABULARY).json)
        for name in CORPORA:
            known = prepare(name, Path(folder), tokenizer, args.documents, args.seed)
            members += [document.is_member for document in known]
            found = asyncio.run(attack(Path(folder) / name, known))
            for all_of, new in zip(scores, found, strict=True):
                all_of += new
    rows = [
        {"level": level, "minimum_tokens": tokens, "minimum_documents": documents,
         **measured(level, own, members)}
        for level in SCORES
        for (tokens, documents), own in zip(SETTINGS, scores, strict=True)
    ]  # fmt: skip
    about = {"corpora": CORPORA, "members": sum(members), "others": len(members) - sum(members)}
    result = {**about, "seed": args.seed, "seconds": time.monotonic() - started, "rows": rows}
    replace_file(args.out, json.dumps(result, indent=1) + "\n")
    print(page(result))


def prepare(name: str, folder: Path, tokenizer: Path, most: int, seed: int) -> list[Known]:
    """Indexes half of a corpus' groups as folder/name; documents that are in it, and others."""
    documents = list(read_documents(f"corpus:{name}"))
    draw = random.Random(f"{name}-{seed}")
    groups = sorted({document.group for document in documents})
    indexed = set(draw.sample(groups, len(groups) // 2))
    inside, outside = _split(documents, indexed)
    rows = folder / f"{name}.jsonl"
    rows.write_text("".join(json.dumps({"text": d.text, "group": d.group}) + "\n" for d in inside))
    build_index([str(rows)], tokenizer, folder / name, name)
    count = min(most, len(inside), len(outside))
    known = [Known(d.text, True) for d in draw.sample(inside, count)]
    known += [Known(d.text, False) for d in draw.sample(outside, count)]
    draw.shuffle(known)
    return known


def _split(
    documents: Sequence[Document], groups: set[str]
) -> tuple[list[Document], list[Document]]:
    inside = [document for document in documents if document.group in groups]
    return inside, [document for document in documents if document.group not in groups]


async def attack(index: Path, known: Sequence[Known]) -> list[list[dict[str, float]]]:
    """Asks about all documents under each of `SETTINGS`; the scores of each document."""
    import httpx

    from flexolmo_jax.tracing.service.app import make_app
    from flexolmo_jax.tracing.service.owner import Settings

    policy, found = index.with_suffix(".toml"), []
    write_policy(policy, *SETTINGS[0])
    app = make_app(Settings(index, policy))
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://owner") as client:
        for setting in SETTINGS:
            write_policy(policy, *setting)
            found.append([await ask(client, document.text[:ASKED]) for document in known])
    app.state.owner.close()
    return found


def write_policy(file: Path, tokens: int, documents: int) -> None:
    """A policy of snippets, without limits on what one asker may do."""
    most = "requests_per_minute = 1000000\ntokens_per_day = 1000000000000\n"
    most += "characters_per_day = 1000000000000\nseconds = 600\n"
    text = f'level = "snippets"\nminimum_tokens = {tokens}\nminimum_documents = {documents}\n'
    replace_file(file, text + most)


async def ask(client: Any, text: str) -> dict[str, float]:
    """The scores of all answers about a text."""
    starts = range(0, len(text), PIECE) if len(text) > PIECE else ()
    answers = []
    for part in [text, *(text[start : start + PIECE] for start in starts)]:
        answer = await client.post("/v1/trace", json={"text": part})
        answer.raise_for_status()
        answers.append((part, answer.json()["spans"]))
    return score(text, answers)


def score(text: str, answers: Sequence[tuple[str, list[dict[str, Any]]]]) -> dict[str, float]:
    """Statistics of answers: the higher, the likelier is a member. And how many spans were said."""
    spans = [(part, span) for part, own in answers for span in own]
    places = [(part, span, place) for part, span in spans for place in span["passages"]]
    named = Counter(place["document"] for _, _, place in places)
    covered = sum(span["stop"] - span["start"] for _, span in spans)
    return {
        "longest": max((float(span["tokens"]) for _, span in spans), default=0),
        "covered": covered / len(text),
        "rarest": max((-float(span["log_probability"]) for _, span in spans), default=0),
        "fewest": max((1 / span["count"] for _, span in spans), default=0),
        "together": float(max(named.values(), default=0)),
        "context": float(max((_shared(text, *place) for place in places), default=0)),
        "said": float(len(spans)),
    }


def _shared(text: str, part: str, span: dict[str, Any], place: dict[str, str]) -> int:
    """How many characters around a place stand around the same words in the attacker's text."""
    begin = text.find(part)
    before, after = text[: begin + span["start"]], text[begin + span["stop"] :]
    return _common(before[::-1], place["before"][::-1]) + _common(after, place["after"])


def _common(a: str, b: str) -> int:
    pairs = zip(a, b, strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))


def measured(
    level: str, scores: Sequence[dict[str, float]], members: Sequence[bool]
) -> dict[str, Any]:
    """How well the best score does: chosen on every other document, measured on the rest."""
    inside, levels = np.array(members), list(SCORES)
    names = [name for x in levels[: levels.index(level) + 1] for name in SCORES[x]]
    by_name = {name: np.array([own[name] for own in scores]) for name in names}
    half = np.arange(len(inside)) % 2 == 0
    best, sharpest = (
        max(names, key=lambda name: measure(by_name[name][half], inside[half]))
        for measure in (auc, tpr)
    )
    rest = inside[~half]
    said = np.array([row["said"] > 0 for row in scores])
    return {
        "auc": round(auc(by_name[best][~half], rest), 3),
        "auc_by": best,
        "tpr": round(tpr(by_name[sharpest][~half], rest), 3),
        "tpr_by": sharpest,
        "said_of_members": round(float(said[inside].mean()), 3),
        "said_of_others": round(float(said[~inside].mean()), 3),
    }


def auc(scores: np.ndarray, members: np.ndarray) -> float:
    """The probability that a member's score is above another's; ties count half."""
    inside, outside = scores[members], scores[~members]
    above = (inside[:, None] > outside[None]).mean()
    return float(above + (inside[:, None] == outside[None]).mean() / 2)


def tpr(scores: np.ndarray, members: np.ndarray) -> float:
    """The share of members above a threshold that at most `FALSE` of the others are above."""
    outside = np.sort(scores[~members])[::-1]
    threshold = outside[int(FALSE * len(outside))]
    return float((scores[members] > threshold).mean())


def page(result: dict[str, Any]) -> str:
    """The table of a result."""
    from flexolmo_jax.studies.engine.report import table

    head = [
        "level", "tokens >=", "documents >=", "AUC", "TPR at 1% FPR", "by",
        "said of members", "of others",
    ]  # fmt: skip
    rows = [
        [
            row["level"], row["minimum_tokens"], row["minimum_documents"], f"{row['auc']:.2f}",
            f"{row['tpr']:.0%}", row["tpr_by"], f"{row['said_of_members']:.0%}",
            f"{row['said_of_others']:.0%}",
        ]
        for row in result["rows"]
    ]  # fmt: skip
    return "\n".join(table(head, rows, "lrrrrlr"))
