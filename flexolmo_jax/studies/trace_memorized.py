"""Are memorized sentences found, with their owner; and is an owner that is off never named?

flexolmo demo
flexolmo study trace-memorized OUT --demo flexolmo_demo

For each owner an expert is trained on sentences of the owner's training text until it knows them,
and is then given the first words of each. What it generates is traced in the indexes of all owners;
and, by the demo's merged model, with the owner switched off.
"""

import argparse
import datetime
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from flexolmo_jax.audits.control import train_control
from flexolmo_jax.config import ExpertTraining, load_config
from flexolmo_jax.data.tokenizer import Tokenizer
from flexolmo_jax.model import FlexOlmo, load
from flexolmo_jax.studies.demo import OWNERS
from flexolmo_jax.studies.demo_trace import index_training_text, training_documents
from flexolmo_jax.studies.engine.report import add_page_argument, machine, table, write_part
from flexolmo_jax.tracing.index import Index
from flexolmo_jax.tracing.results import Trace
from flexolmo_jax.tracing.trace import trace

GIVEN = 4  # words that the model is given
WORDS = range(12, 26)  # of a sentence
SENTENCES = 64  # to memorize
LENGTH = 64  # tokens: longer sentences are not taken
HEAD_RANK = 16
_SENTENCE = re.compile(r"""(?<=[\s"])[A-Z][^\n.?!"]*[.?!](?=\s|")""")


class Counts(NamedTuple):
    """What became of an owner's sentences."""

    memorized: int  # generated word for word
    found: int  # of these, where a span is of this owner
    whole: int  # of these, where one span of this owner holds all generated words but the first
    others: int  # of all that was generated with the owner off: traces in which it is named


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `flexolmo study trace-memorized`."""
    parser.add_argument("out", type=Path, help="folder of the runs and indexes")
    parser.add_argument("--demo", type=Path, required=True, help="the folder of a demo")
    add_page_argument(parser, "tracing.md")


def run(args: argparse.Namespace) -> None:
    """Trains, generates, traces, and writes the part of the page."""
    data, anchor = load_config("demo_expert", ExpertTraining).data, args.demo / "anchor"
    merged, indexes = load(args.demo / "merged"), []
    tokenizer = Tokenizer.load(anchor / "tokenizer.json")
    for name in ("public", *OWNERS):
        folder = args.out / "indexes" / name
        is_made = (folder / "index.json").exists()
        how = (data, anchor / "tokenizer.json", folder)
        indexes.append(Index.open(folder) if is_made else index_training_text(name, *how))
    rows: list[list[str | int]] = []
    total, tried = Counts(0, 0, 0, 0), 0
    for name in OWNERS:
        texts = (document.text for document in training_documents(name, data))
        chosen = list(pick_sentences(texts, tokenizer))
        ids = [tokenizer.encode_prompt(sentence) for sentence in chosen]
        model = train_control("expert", anchor, ids, LENGTH, args.out / name, None, HEAD_RANK)
        own = count(name, chosen, [len(own) for own in ids], model, merged, indexes)
        rows.append([name, len(chosen), *own])
        tried += len(chosen)
        total = Counts(*(a + b for a, b in zip(total, own, strict=True)))
    rows.append(["all", tried, *total])
    head = ["owner", "sentences", "memorized", "found", "found whole", "named while off"]
    write_part(args.page, "memorized", [
        f"`flexolmo study trace-memorized OUT --demo flexolmo_demo`, {datetime.date.today()}, "
        f"{machine()}: an expert is trained on {SENTENCES} sentences of each owner's training text "
        f"and given {GIVEN} words of each. *Memorized*: it generates the rest word for word. "
        "*Found*: a span of it stands with this owner; *whole*: a single span holds all of it "
        "(else it begins with a closing bracket, or lacks its last point, which the document's "
        "tokens join to a quotation mark). "
        "*Named while off*: traces of the same sentences by the merged model, with the owner "
        "switched off, that name the owner or one of its documents.", "",
        *table(head, rows), "",
        f"Found with their owner: {total.found / max(1, total.memorized):.1%} of the memorized "
        "sentences.",
    ])  # fmt: skip


def pick_sentences(texts: Iterator[str], tokenizer: Tokenizer) -> Iterator[str]:
    """The first sentences that are neither short nor long, each with other first words."""
    begins: set[str] = set()
    for text in texts:
        for sentence in _SENTENCE.findall(text):
            begin = " ".join(sentence.split()[:GIVEN])
            is_short = len(tokenizer.encode_prompt(sentence)) < LENGTH
            if len(sentence.split()) in WORDS and begin not in begins and is_short:
                begins.add(begin)
                yield sentence
                if len(begins) == SENTENCES:
                    return


def count(
    owner: str,
    sentences: Sequence[str],
    lengths: Sequence[int],
    model: FlexOlmo,
    merged: FlexOlmo,
    indexes: Sequence[Index],
) -> Counts:
    """Generates sentences from their first words, and traces what is generated.

    Args:
      lengths: of the sentences, in tokens.
      model: what memorized them.
      merged: a model in which the owner has an expert, to switch it off.
    """
    prompts = [" ".join(sentence.split()[:GIVEN]) for sentence in sentences]
    answers = [str(a) for a in model.generate(prompts, max(lengths))] if prompts else []
    made = Counts(0, 0, 0, 0)
    for sentence, prompt, answer in zip(sentences, prompts, answers, strict=True):
        rest = sentence[len(prompt) :]
        is_known = answer.startswith(rest)
        traced = trace(rest, indexes, prompt=prompt) if is_known else None
        spans = [span for span in traced.spans if owner in span.counts] if traced else []
        words = len(rest) - len(rest.lstrip())
        is_whole = any(span.start <= words and span.stop == len(rest) for span in spans)
        off = merged.trace(rest if is_known else answer, indexes, prompt=prompt, without=[owner])
        more = (is_known, bool(spans), is_whole, names(off, owner))
        made = Counts(*(a + int(b) for a, b in zip(made, more, strict=True)))
    return made


def names(made: Trace, owner: str) -> bool:
    """Whether a trace says anything of an owner."""
    passages = [p for span in made.spans for p in span.passages]
    documents = any(p.owner == owner or p.document.startswith(f"{owner}.") for p in passages)
    return documents or owner in made.asked or any(owner in span.counts for span in made.spans)
