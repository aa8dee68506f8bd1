"""Mass is not credit: how far routing mass and the counterfactual agree, on the demo's model.

flexolmo demo
flexolmo study usage-agreement flexolmo_demo
"""

import argparse
import collections
import datetime
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from flexolmo_jax.config import ExpertTraining, load_config
from flexolmo_jax.evaluation.bits_per_byte import heldout_documents
from flexolmo_jax.federation.names import PUBLIC
from flexolmo_jax.inference.engine import Engine
from flexolmo_jax.inference.mass import mass_by_name, read_mass
from flexolmo_jax.model import FlexOlmo, load
from flexolmo_jax.studies.demo import OWNERS
from flexolmo_jax.studies.engine.report import (
    add_page_argument,
    add_results_argument,
    machine,
    table,
    write_json,
    write_part,
)
from flexolmo_jax.usage.agreement import Answer, agreement
from flexolmo_jax.usage.counterfactual import counterfactual

MARK = "usage agreement"
PROMPT, ANSWER = 32, 64  # tokens
KINDS = {"greedy": "likeliest tokens", "sampled": "temperature 1", "text": "the document's own"}
SLOTS = 8


class Case(NamedTuple):
    """An answer to the beginning of a passage of a held-out document.

    Attributes:
      domain: of the document.
      kind: of `KINDS`.
    """

    domain: str
    kind: str
    answer: Answer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `flexolmo study usage-agreement`."""
    parser.add_argument("demo", type=Path, help="the folder of a demo")
    parser.add_argument(
        "--passages", type=int, default=40, metavar="N", help="of each domain, at most"
    )
    add_results_argument(parser)
    add_page_argument(parser, "usage.md")


def run(args: argparse.Namespace) -> None:
    """Measures, and writes the JSON, the figure, and the part of the page."""
    model = load(args.demo / "merged")
    data = load_config("demo_expert", ExpertTraining).data
    cases: list[Case] = []
    engine = model.engine(SLOTS, PROMPT + ANSWER)
    for domain in (PUBLIC, *OWNERS):
        heldout = heldout_documents(f"corpus:{domain}", data, max_bytes=10_000_000)
        assert model.tokenizer is not None
        texts = [model.tokenizer.encode_prompt(document.text) for document in heldout]
        cases += measure(model, engine, domain, passages(texts, args.passages))
    counts = collections.Counter(case.domain for case in cases if case.kind == "text")
    made = {
        "machine": machine(), "passages": counts, "rows": summary(cases), "totals": totals(cases)
    }  # fmt: skip
    write_json(args.results / "usage_agreement.json", made)
    plot(cases, args.results / "usage_agreement.png")
    write_part(args.page, MARK, make_part(made))


def passages(texts: Sequence[Sequence[int]], count: int) -> list[Sequence[int]]:
    """At most that many passages of a prompt and an answer: first the beginnings of all texts."""
    size = PROMPT + ANSWER
    last = max(map(len, texts)) // size
    places = ((text, at * size) for at in range(last) for text in texts)
    found = (text[at : at + size] for text, at in places if len(text) >= at + size)
    return list(itertools.islice(found, count))


def measure(
    model: FlexOlmo, engine: Engine, domain: str, texts: Sequence[Sequence[int]]
) -> list[Case]:
    """Every kind of answer to each passage's beginning, with its mass and counterfactual."""
    prompts = [list(text[:PROMPT]) for text in texts]
    mask = model.allowed(1)[0]
    made: dict[str, list[tuple[list[int], np.ndarray]]] = {}
    for kind, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        requests = [
            model.request(prompt, ANSWER, temperature=temperature, seed=number)
            for number, prompt in enumerate(prompts)
        ]
        for request in requests:
            engine.add(request)
        while engine.step():
            pass
        made[kind] = [(request.generated, request.mass) for request in requests]
    rest = [list(text[PROMPT:]) for text in texts]
    masks = np.repeat(mask[None], len(texts), axis=0)
    mass = read_mass(model.backbone, model.experts, prompts, rest, masks, model.config, model.mesh)
    made["text"] = list(zip(rest, mass, strict=True))
    cases = []
    for kind, answers in made.items():
        for prompt, (answer, own_mass) in zip(prompts, answers, strict=True):
            if answer:
                bits = counterfactual(engine, prompt, answer, mask, own_mass)
                named = mass_by_name(model.expert_names, own_mass)
                by_name = {model.expert_names[e]: own for e, own in bits.items()}
                own = {name: by_name[name] for name in named}
                cases.append(Case(domain, kind, Answer(named, own)))
    return cases


def summary(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """How far both agree, by kind of answer, with the public expert and without it."""
    rows = []
    for kind in KINDS:
        answers = [case.answer for case in cases if case.kind == kind]
        for experts, kept in (("all", answers), ("owners", [_of_owners(x) for x in answers])):
            found = agreement(kept)
            assert found is not None, f"too few answers: {len(kept)}"
            rows.append(
                {
                    "answers": kind, "experts": experts, "count": found.answers,
                    "rank_correlation": found.rank_correlation._asdict(),
                    "same_first": found.same_first._asdict(),
                    "negative": found.negative._asdict(),
                }
            )  # fmt: skip
    return rows


def _of_owners(answer: Answer) -> Answer:
    parts = ({name: x for name, x in own.items() if name != PUBLIC} for own in answer)
    return Answer(*parts)


def totals(cases: Sequence[Case]) -> dict[str, dict[str, dict[str, float]]]:
    """By kind of answer, each expert's share of all mass, and of all bits that are above 0."""
    made = {}
    for kind in KINDS:
        mass, bits = collections.Counter[str](), collections.Counter[str]()
        for case in cases:
            if case.kind == kind:
                tokens = sum(case.answer.mass.values())
                mass.update(case.answer.mass)
                bits.update({name: max(0.0, x) * tokens for name, x in case.answer.bits.items()})
        made[kind] = {
            title: {name: own[name] / sum(own.values()) for name in (PUBLIC, *OWNERS)}
            for title, own in (("mass", mass), ("bits above 0", bits))
        }
    return made


def make_part(made: Mapping[str, Any]) -> list[str]:
    """The tables of the page."""

    def percent(row: Mapping[str, Any], name: str) -> str:
        return "{:.0%} ({:.0%} to {:.0%})".format(*row[name].values())

    counts = ", ".join(f"{count} {name}" for name, count in made["passages"].items())
    head = ["answer", "experts", "rank correlation", "same first", "mass of harmful experts"]
    cells = [
        [
            KINDS[row["answers"]], row["experts"],
            "{:.2f} ({:.2f} to {:.2f})".format(*row["rank_correlation"].values()),
            percent(row, "same_first"), percent(row, "negative"),
        ]
        for row in made["rows"]
    ]  # fmt: skip
    shares = [
        [f"{KINDS[kind]}: {title}", *(f"{x:.1%}" for x in own.values())]
        for kind, both in made["totals"].items()
        for title, own in both.items()
    ]
    return [
        f"`flexolmo study usage-agreement flexolmo_demo`, {datetime.date.today()}, "
        f"{made['machine']}: passages of held-out documents ({counts}), of which the model reads "
        f"{PROMPT} tokens; answers of at most {ANSWER}. 95% intervals, by bootstrap over answers.",
        "",
        *table(head, cells, "llr"),
        "",
        "What each expert would get of all answers together:",
        "",
        *table(["share by", PUBLIC, *OWNERS], shares),
    ]


def plot(cases: Sequence[Case], file: Path) -> None:
    """Draws the share and the counterfactual of each answer and expert, by kind of answer."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    for axes, (kind, title) in zip(figure.subplots(1, len(KINDS)), KINDS.items(), strict=True):
        for number, name in enumerate((PUBLIC, *OWNERS)):
            own = [x.answer for x in cases if x.kind == kind and name in x.answer.bits]
            shares = [x.share(name) for x in own]
            bits = [x.bits[name] for x in own]
            axes.plot(shares, bits, ".", color=f"C{number}", alpha=0.6, label=name)
        axes.axhline(0, color="grey", linewidth=0.8)
        axes.set(title=title, xlabel="share of the mass")
    figure.axes[0].set_ylabel("bits per token more without the expert")
    figure.axes[0].legend(fontsize=8)
    figure.savefig(file, dpi=130)
