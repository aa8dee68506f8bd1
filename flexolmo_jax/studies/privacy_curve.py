"""What differential privacy costs: own-domain bits per byte after merging, for several epsilons.

    flexolmo study privacy-curve OUT --size ci
    flexolmo data fetch CORPUS
    flexolmo study privacy-curve OUT --size large --corpus CORPUS

Each training is a stage below OUT, and runs once. The two sizes write privacy_curve_SIZE.json and
.png and their part of docs/privacy.md; `--size smallest` runs the same path in minutes, as a test,
and writes into OUT only.

For each epsilon, batch, clip norm, steps and learning rate are chosen on the text of an owner that
the curve is not about, so that the choice costs the others no budget.
"""

import argparse
import dataclasses
import datetime
import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flexolmo_jax.config import ExpertTraining, load_config
from flexolmo_jax.data.sources import Document
from flexolmo_jax.evaluation.bits_per_byte import heldout_documents, score
from flexolmo_jax.federation.merge import merge
from flexolmo_jax.federation.package import read_manifest
from flexolmo_jax.model import FlexOlmo, load
from flexolmo_jax.studies.engine.commands import PACKAGE, training_stage
from flexolmo_jax.studies.engine.report import (
    add_page_argument,
    add_results_argument,
    link,
    machine,
    write_json,
    write_part,
)
from flexolmo_jax.studies.engine.stages import Stage, discard, in_order, run_stages, value_stage
from flexolmo_jax.studies.privacy_curve_page import draw, make_part

NON_PRIVATE = math.inf  # the epsilon of a run without privacy
Words = tuple[str, ...]
Scores = dict[str, float]  # bits per byte by domain


@dataclasses.dataclass(frozen=True)
class Choice:
    """What is tuned on another owner's text."""

    batch: int  # documents in the mean batch
    clip: float
    steps: int
    rate: float

    def words(self) -> Words:
        """Options of `flexolmo train expert`."""
        return (
            "--data.batch-size", str(self.batch), "--dp-clip", str(self.clip),
            "--steps", str(self.steps), "--optimizer.learning-rate", str(self.rate),
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Size:
    """How much is trained.

    Attributes:
      owners: the domains that the curve is about.
      tuned_on: the owner whose text chooses among `grid`; None where there is one choice only.
      tuned_unit: of privacy there, so that about as many units are protected as in the curve.
      grid: the choices.
      seeds: of the trainings.
      epsilons: NON_PRIVATE among them.
      windows: of a document in a step.
      anchor: options for `train anchor demo_anchor`.
      non_private: options for `train expert demo_expert` without privacy.
    """

    owners: Words
    tuned_on: str | None
    tuned_unit: str
    grid: tuple[Choice, ...]
    seeds: tuple[int, ...]
    epsilons: tuple[float, ...]
    windows: int
    anchor: Words = ()
    non_private: Words = ()


SIZES = {
    "smallest": Size(
        ("math",), "educational", "document",
        (Choice(16, 0.1, 4, 1.5e-3), Choice(16, 0.1, 8, 1.5e-3)), (0,),
        (8.0, NON_PRIVATE), 1, ("--steps", "60"), ("--steps", "30"),
    ),
    "ci": Size(
        ("math", "educational"), "creative", "sequence",
        tuple(Choice(128, 0.1, 40, rate) for rate in (5e-3, 1.5e-2, 4.5e-2)), (0, 1, 2),
        (1.0, 2.0, 8.0, NON_PRIVATE), 1, ("--steps", "400"),
    ),
    "large": Size(
        ("math", "news"), None, "document", (Choice(192, 0.1, 40, 1.5e-2),), (0, 1, 2),
        (1.0, 2.0, 8.0, NON_PRIVATE), 1, ("--steps", "2400"), ("--steps", "500"),
    ),
}  # fmt: skip


class CurvePlan:
    """The stages of a size.

    Args:
      root: the study's folder.
      size: what is trained.
      corpus: a folder that `flexolmo data fetch` filled; None is the corpus of the project.
    """

    def __init__(self, root: Path, size: Size, corpus: Path | None):
        self.root, self.size, self.corpus = root, size, corpus

    @functools.cached_property
    def texts(self) -> dict[str, list[Document]]:
        """The held-out documents of each domain."""
        data = load_config("demo_expert", ExpertTraining).data
        tuned = [self.size.tuned_on] if self.size.tuned_on else []
        domains = ("public", *self.size.owners, *tuned)
        return {name: heldout_documents(self.source(name), data) for name in domains}

    def source(self, domain: str) -> str:
        """The training text of a domain."""
        return str(self.corpus / f"{domain}.jsonl") if self.corpus else f"corpus:{domain}"

    def anchor(self, seed: int) -> Stage:
        """The anchor of a seed."""
        words = ["anchor", "demo_anchor", *self.size.anchor, "--seed", str(seed)]
        return training_stage(f"seed{seed}/anchor", self.root, words, data=self.source("public"))

    def expert(
        self, seed: int, owner: str, epsilon: float, choice: Choice | None, unit: str = "document"
    ) -> Stage:
        """An owner's expert; without a choice it is trained without privacy."""
        words = ["expert", "demo_expert", "--name", owner, "--seed", str(seed)]
        if choice is None:
            words += self.size.non_private
        else:
            words += ["--dp-epsilon", str(epsilon), "--dp-windows", str(self.size.windows)]
            words += ["--dp-unit", unit, *choice.words()]
        stage = training_stage(
            f"seed{seed}/{owner}_epsilon_{shown(epsilon)}", self.root, words,
            {"--anchor": (self.anchor(seed), PACKAGE)}, data=self.source(owner),
            is_private=choice is not None,
        )  # fmt: skip
        if choice is None or self.corpus is None:
            return stage
        mark = self.corpus / f".{owner}.jsonl.ledger"

        def work(folder: Path) -> None:
            mark.unlink(missing_ok=True)  # of another run's ledger; see `training_stage`
            stage.work(folder)

        return dataclasses.replace(stage, work=work)

    def tuning(self, epsilon: float) -> list[Stage]:
        """The score of each choice, by the expert alone of an owner that the curve is not about.

        Where there is no such owner there is one choice, and nothing is tried.
        """
        owner, seed = self.size.tuned_on, self.size.seeds[0]
        if owner is None:
            return []
        stages = []
        for choice in self.size.grid:
            expert = self.expert(seed, owner, epsilon, choice, self.size.tuned_unit)

            def alone(_: Path, expert=expert) -> float:
                model = load(expert.folder / PACKAGE, anchor=self.anchor(seed).folder / PACKAGE)
                return score(model, self.texts[owner], only=[owner]).bits_per_byte

            name = f"tuning/epsilon_{shown(epsilon)}"
            stages.append(value_stage(name, self.root, [expert], alone))
        return stages

    def anchor_scores(self, seed: int) -> Stage:
        """The scores of an anchor, by domain."""
        anchor = self.anchor(seed)
        return value_stage(
            f"seed{seed}/scores/anchor", self.root, [anchor],
            lambda _: self.scores(load(anchor.folder / PACKAGE)), domains=self.domains,
        )  # fmt: skip

    def merged_scores(self, seed: int, experts: Mapping[str, Stage]) -> Stage:
        """The scores of the experts of several owners, merged; by domain."""
        anchor = self.anchor(seed)

        def compute(folder: Path) -> Scores:
            merged = folder / "merged"
            discard(merged)  # of an interrupted run
            packages = [expert.folder / PACKAGE for expert in experts.values()]
            merge(anchor.folder / PACKAGE, packages, merged)
            return self.scores(load(merged))

        needs = [anchor, *experts.values()]
        return value_stage(
            f"seed{seed}/scores/merged", self.root, needs, compute, domains=self.domains
        )

    @property
    def domains(self) -> list[str]:
        """Those that are scored."""
        return ["public", *self.size.owners, *filter(None, [self.size.tuned_on])]

    def scores(self, model: FlexOlmo) -> Scores:
        """Bits per byte on the held-out documents of each domain."""
        return {name: score(model, texts).bits_per_byte for name, texts in self.texts.items()}

    def run(self, seeds: Sequence[int]) -> dict[str, Any]:
        """Trains and scores everything; returns what privacy_curve_SIZE.json holds."""
        size = self.size
        private = [epsilon for epsilon in size.epsilons if epsilon != NON_PRIVATE]
        tried = {epsilon: self.tuning(epsilon) for epsilon in private}
        run_stages(in_order(itertools.chain(*tried.values())))
        choices: dict[float, Choice | None] = {NON_PRIVATE: None}
        choices |= {epsilon: self.best(stages) for epsilon, stages in tried.items()}
        points: list[tuple[int, dict[str, float] | None, Stage]] = []
        for seed in seeds:
            points.append((seed, None, self.anchor_scores(seed)))
            for asked in self.wishes():
                experts = {o: self.expert(seed, o, e, choices[e]) for o, e in asked.items()}
                points.append((seed, asked, self.merged_scores(seed, experts)))
        certified = {
            f"{owner} {epsilon:g}": self.expert(seeds[0], owner, epsilon, choices[epsilon])
            for owner, epsilon in itertools.product(size.owners, private)
        }
        run_stages(in_order([*(stage for *_, stage in points), *certified.values()]))
        setting = dataclasses.asdict(size)
        return {
            "setting": {**setting, "epsilons": [shown(epsilon) for epsilon in size.epsilons]},
            "chosen": {shown(e): vars(c) for e, c in choices.items() if c is not None},
            "tried": [
                {"epsilon": epsilon, **vars(choice), "bits_per_byte": stage.result}
                for epsilon, stages in tried.items()
                for choice, stage in zip(size.grid, stages, strict=bool(stages))
            ],
            "points": [
                {
                    "seed": seed, "epsilon": asked and {o: shown(e) for o, e in asked.items()},
                    "bits_per_byte": stage.result,
                }
                for seed, asked, stage in points
            ],
            "certificates": {
                name: read_manifest(stage.folder / PACKAGE)["privacy"]
                for name, stage in certified.items()
            },
            "machine": f"{machine()}, {datetime.date.today()}",
        }  # fmt: skip

    def best(self, tried: Sequence[Stage]) -> Choice:
        """The choice with the lowest score; the only one where nothing was tried."""
        if not tried:
            (choice,) = self.size.grid
            return choice
        return self.size.grid[min(range(len(tried)), key=lambda n: tried[n].result)]

    def wishes(self) -> Iterator[dict[str, float]]:
        """The epsilon of each owner: the same for all, then one owner's beside others' none."""
        together = [dict.fromkeys(self.size.owners, epsilon) for epsilon in self.size.epsilons]
        yield from together
        for owner, epsilon in itertools.product(self.size.owners, self.size.epsilons):
            alone = {**dict.fromkeys(self.size.owners, NON_PRIVATE), owner: epsilon}
            if alone not in together:
                yield alone


def shown(epsilon: float) -> str:
    """Epsilon as the tables show it."""
    return "none" if epsilon == NON_PRIVATE else f"{epsilon:g}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `flexolmo study privacy-curve`."""
    parser.add_argument("out", type=Path, help="folder of the stages")
    parser.add_argument("--size", choices=SIZES, required=True)
    parser.add_argument("--corpus", type=Path, help="of `flexolmo data fetch`, for large")
    parser.add_argument(
        "--seeds", type=int, nargs="+", help="train these only, and write no page: several "
        "processes may work in one folder, each on seeds of its own",
    )  # fmt: skip
    add_page_argument(parser, "privacy.md")
    add_results_argument(parser)


def run(args: argparse.Namespace) -> None:
    """Runs the study, and writes its part of the page.

    Raises:
      ValueError: --corpus is missing or superfluous.
    """
    if (args.size == "large") != (args.corpus is not None):
        raise ValueError("--corpus goes with --size large, and only with it")
    root = args.out.absolute()
    root.mkdir(parents=True, exist_ok=True)
    size = SIZES[args.size]
    curve = CurvePlan(root, size, args.corpus).run(args.seeds or size.seeds)
    if args.seeds:
        return
    is_trial = args.size == "smallest"
    results, page = (root, None) if is_trial else (args.results, args.page)
    write_json(results / f"privacy_curve_{args.size}.json", curve)
    figure = results / f"privacy_curve_{args.size}.png"
    draw(curve, figure)
    write_part(page, f"curve {args.size}", make_part(curve, args.size, link(figure, page)))
