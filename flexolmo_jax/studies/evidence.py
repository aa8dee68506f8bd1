"""Where evidence routing breaks: heads that want more, short prompts, changes of subject, growth.

    flexolmo study evidence flexolmo_demo OUT

DEMO is the folder that `flexolmo demo` wrote. Everything is measured on held-out documents of its
five domains. One owner's evidence head is changed or exchanged, and the table says what share of
the text its expert takes then, and what the text costs. OUT keeps the heads that are trained for
this, and the report; the tables are those of docs/routing.md.
"""

import argparse
import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flexolmo_jax.config import EVIDENCE, EvidenceTraining, ExpertTraining, load_config
from flexolmo_jax.data.sources import Document, read_documents
from flexolmo_jax.evaluation.bits_per_byte import heldout_documents
from flexolmo_jax.federation.anchor import read_anchor
from flexolmo_jax.model import FlexOlmo, load
from flexolmo_jax.modeling.experts import join, select, with_parts
from flexolmo_jax.modeling.heads import LowRankHead
from flexolmo_jax.studies.baselines.datasets import (
    Sequences,
    cut_sequences,
    mix_sequences,
    token_sizes,
    write_documents,
)
from flexolmo_jax.studies.baselines.models import routed
from flexolmo_jax.studies.baselines.scores import bits_per_byte, routing_shares, token_nats
from flexolmo_jax.studies.demo import OWNERS
from flexolmo_jax.studies.engine.commands import run_command
from flexolmo_jax.studies.engine.report import machine, table, write_json

CHANGED = "creative"  # the owner whose evidence head is changed
OTHER = "math"  # the owner on whose text the changed head is trained
CONFIDENT = 3.0  # times the logits of an over-confident head
SHIFTS = (0.0, 0.75, 1.5, 3.0)
DECAYS = (0.8, 0.9, 0.95, 0.98)
PARTS = 8  # that each owner's text is split into
LENGTH = 128  # tokens of a window, at most: what the demo's models were made for
WINDOWS = 48  # of each domain
MIXED = 144  # windows that change their owner in the middle
EDGES = (0, 8, 16, 32, 64)  # of tokens, from the start of a document or a change
PUBLIC_LONGER = "public"  # a head trained twice as long on public text as the anchor's own
Rows = list[dict[str, Any]]
Texts = dict[str, Sequences]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `flexolmo study evidence`."""
    parser.add_argument("demo", type=Path, help="the folder of a demo")
    parser.add_argument("out", type=Path, help="for the heads that are trained, and the report")


def run(args: argparse.Namespace) -> None:
    """Trains the heads that are missing, measures, prints the tables, writes OUT/report.json."""
    heads = trained_heads(args.demo, args.out)
    merged, anchor = load(args.demo / "merged"), load(args.demo / "anchor")
    texts = heldout_texts(merged)
    tables = {
        "attacks": attacks(merged, heads, texts),
        "starts": starts(anchor, merged, texts),
        "changes": changes(anchor, merged, texts),
        "growth": growth(anchor, merged, heads, texts),
    }
    write_json(args.out / "report.json", {"machine": machine(), **tables})
    for name, rows in tables.items():
        cells = [[_shown(value) for value in row.values()] for row in rows]
        print("\n".join(["", f"{name}:", "", *table(list(rows[0]), cells)]))


def _shown(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def trained_heads(demo: Path, out: Path) -> dict[str, LowRankHead]:
    """Evidence heads beside the demo's anchor, by the text that they were trained on.

    PUBLIC_LONGER, OTHER, and "OWNER-K": one of PARTS shares of an owner's documents.
    """
    steps = load_config("demo_evidence", EvidenceTraining).steps
    wanted = {PUBLIC_LONGER: ("corpus:public", 2 * steps), OTHER: (f"corpus:{OTHER}", steps)}
    for owner in OWNERS:
        for name, file in _split(owner, out / "texts").items():
            wanted[name] = (str(file), steps // 2)
    found = {}
    for name, (data, count) in wanted.items():
        package = out / "heads" / name
        if not package.exists():
            words = ["train", "evidence", "demo_evidence", "--data", data, "--steps", str(count)]
            words += ["--anchor", str(demo / "anchor"), "--out", str(package)]
            words += ["--run", str(out / "runs" / name)]
            run_command(words, compiled=out / "compiled", quiet=True)
        head = read_anchor(package).weights.public.evidence
        found[name] = jax.tree.map(jnp.asarray, head)
    return found


def _split(owner: str, folder: Path) -> dict[str, Path]:
    """Files of PARTS shares of an owner's documents, groups kept together, one after another."""
    folder.mkdir(parents=True, exist_ok=True)
    shares: list[list[Document]] = [[] for _ in range(PARTS)]
    numbers: dict[str, int] = {}
    for document in read_documents(f"corpus:{owner}"):
        number = numbers.setdefault(document.group, len(numbers))
        shares[number % PARTS].append(document)
    files = {}
    for number, documents in enumerate(shares):
        files[f"{owner}-{number}"] = folder / f"{owner}-{number}.jsonl"
        write_documents(files[f"{owner}-{number}"], documents)
    return files


def heldout_texts(model: FlexOlmo) -> Texts:
    """Windows of held-out documents of every domain, each of one document."""
    data = load_config("demo_expert", ExpertTraining).data
    length = min(LENGTH, model.config.max_length)
    assert model.tokenizer is not None
    return {
        domain: cut_sequences(
            heldout_documents(f"corpus:{domain}", data), model.tokenizer, length, 4, WINDOWS
        )
        for domain in ("public", *OWNERS)
    }


def attacks(merged: FlexOlmo, heads: dict[str, LowRankHead], texts: Texts) -> Rows:
    """What one owner's changed evidence head takes and costs, for several shifts."""
    honest = _head_of(merged, CHANGED)
    confident = jax.tree.map(jnp.array, honest)
    confident.b[...] *= CONFIDENT
    confident.bias[...] *= CONFIDENT
    kinds = {
        f"honest ({CHANGED})": honest,
        "trained longer on public text": heads[PUBLIC_LONGER],
        f"{CONFIDENT:g} times as confident": confident,
        f"trained on {OTHER}": heads[OTHER],
    }
    rows = []
    for kind, head in kinds.items():
        changed = _with_head(merged, CHANGED, head)
        for shift in SHIFTS:
            model = routed(changed, evidence=(*EVIDENCE[:2], shift))
            taken = {f"share of {x}": _share(model, CHANGED, text) for x, text in texts.items()}
            cost = {f"bits, {x}": _bits(model, text) for x, text in texts.items()}
            rows.append({"evidence head": kind, "shift": f"{shift:g}", **taken, **cost})
    return rows


def starts(anchor: FlexOlmo, merged: FlexOlmo, texts: Texts) -> Rows:
    """Bits per byte by the tokens read before, mean over the owners' domains."""
    return _by_position(anchor, {"merged": merged}, [texts[x] for x in OWNERS], 0)


def changes(anchor: FlexOlmo, merged: FlexOlmo, texts: Texts) -> Rows:
    """The same after a change from one owner's text to another's, for several decays."""
    assert merged.tokenizer is not None
    owners, sizes = {owner: texts[owner] for owner in OWNERS}, token_sizes(merged.tokenizer)
    mixed = mix_sequences(owners, sizes, MIXED)
    models = {f"decay {x:g}": routed(merged, evidence=(x, *EVIDENCE[1:])) for x in DECAYS}
    return _by_position(anchor, models, [mixed], mixed.sizes.shape[1] // 2)


def _by_position(
    anchor: FlexOlmo, models: dict[str, FlexOlmo], texts: list[Sequences], start: int
) -> Rows:
    costs = {
        name: [token_nats(model, one) for one in texts]
        for name, model in {"anchor": anchor, **models}.items()
    }
    length, rows = texts[0].sizes.shape[1] - start, []
    for first, last in itertools.pairwise((*(edge for edge in EDGES if edge < length), length)):
        span = slice(start + first, start + last)
        of_span = {
            name: np.mean(
                [
                    bits_per_byte(nats[:, span], one.sizes[:, span])
                    for nats, one in zip(own, texts, strict=True)
                ]
            ).item()
            for name, own in costs.items()
        }
        rows.append({"tokens": f"{first + 1} to {last}", **of_span})
    return rows


def growth(anchor: FlexOlmo, merged: FlexOlmo, heads: dict[str, LowRankHead], texts: Texts) -> Rows:
    """Bits per byte with one to four owners, and with each of the four split in PARTS.

    An owner's parts have its network, and evidence heads of their own from shares of its text.
    """
    rows = [{"owners": "0", **{x: _bits(anchor, text) for x, text in texts.items()}}]
    for count in range(1, len(OWNERS) + 1):
        without = OWNERS[count:]
        own = {x: _bits(merged, text, without) for x, text in texts.items()}
        rows.append({"owners": f"{count}: {', '.join(OWNERS[:count])}", **own})
    stacks, names = [select(merged.experts, [0])], ["public"]
    for owner in OWNERS:
        network = select(merged.experts, [merged.expert_names.index(owner)])
        for number in range(PARTS):
            name = f"{owner}-{number}"
            stacks.append(with_parts(network, evidence=heads[name]))
            names.append(name)
    config = merged.config.replace(num_experts=len(names))
    split = FlexOlmo(merged.backbone, join(*stacks), config, tuple(names), merged.tokenizer)
    own = {x: _bits(split, text) for x, text in texts.items()}
    rows.append({"owners": f"{len(names) - 1}: each in {PARTS} parts", **own})
    return rows


def _bits(model: FlexOlmo, text: Sequences, without: Sequence[str] = ()) -> float:
    return bits_per_byte(token_nats(model, text, without=without), text.sizes)


def _head_of(model: FlexOlmo, owner: str) -> LowRankHead:
    return select(model.experts, [model.expert_names.index(owner)]).evidence


def _with_head(model: FlexOlmo, owner: str, head: LowRankHead) -> FlexOlmo:
    """A model in which an owner's evidence head is another one."""
    stacks = [select(model.experts, [number]) for number in range(len(model.expert_names))]
    number = model.expert_names.index(owner)
    stacks[number] = with_parts(stacks[number], evidence=head)
    return dataclasses.replace(model, experts=join(*stacks))


def _share(model: FlexOlmo, owner: str, text: Sequences) -> float:
    """The mean weight of an owner's expert over the tokens of a text."""
    (weights,) = routing_shares(model, text)
    return float(weights[model.expert_names.index(owner)])
