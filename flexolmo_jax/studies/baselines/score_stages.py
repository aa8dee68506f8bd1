"""The stages of a study that score the models of one seed, and choose among their forms."""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from flexolmo_jax.model import FlexOlmo, load
from flexolmo_jax.storage.files import replace_file
from flexolmo_jax.studies.baselines import datasets, models, scores
from flexolmo_jax.studies.baselines.datasets import MIXED, Sequences, read_sequences
from flexolmo_jax.studies.baselines.families import (
    CHOICE,
    Family,
    Packages,
    load_merged,
    load_with,
    routed_as,
    write_choice,
)
from flexolmo_jax.studies.baselines.models import merged
from flexolmo_jax.studies.baselines.scores import load_scores, save_scores, tuning_score
from flexolmo_jax.studies.baselines.shared_stages import SCORES, SEQUENCES
from flexolmo_jax.studies.baselines.training_stages import (
    Seed,
    Trained,
    btx_folder,
    package,
    packages_of,
    tuned_stages,
    unrestricted_stage,
)
from flexolmo_jax.studies.engine.stages import Stage

ROUTING_SEQUENCES = 32  # of each domain, for the shares of the experts
NEAR = 0.002  # options whose tuning scores differ by no more are taken to be equally good


@dataclasses.dataclass
class Scoring:
    """The trained models of one seed, and the stages that hold their scores, by name."""

    seed: Seed
    models: Trained
    scored: dict[str, Stage] = dataclasses.field(default_factory=dict)

    def add(
        self,
        name: str,
        needs: Sequence[Stage],
        model: Callable[[Path], FlexOlmo],
        *,
        without: tuple[str, ...] = (),
        splits: tuple[str, ...] = ("heldout",),
        domains: Sequence[str] = (),
        **made_from: Any,
    ) -> None:
        """Adds a stage that scores a model; `domains` are all, and mixed, unless given."""
        all_domains = (*self.seed.config.domains, MIXED)
        names = [f"{split}.{domain}" for split in splits for domain in domains or all_domains]

        def work(folder: Path) -> None:
            nats = scores.score(model(folder), self.sequences(), names, without=without)
            save_scores(folder / SCORES, nats)

        needs = (self.seed.shared.sequences, *needs)
        made_from |= {"without": without, "names": names}
        self.scored[name] = self.seed.add(f"scores/{name}", needs, work, **made_from)

    def sequences(self) -> dict[str, Sequences]:
        """All sequences to score, by "SPLIT.DOMAIN"."""
        return read_sequences(self.seed.shared.sequences.folder / SEQUENCES)

    def tuning_score(self, model: FlexOlmo) -> float:
        """What choices are made by; see `scores.tuning_score`."""
        sequences = self.sequences()
        names = [name for name in sequences if name.startswith("tune.")]
        return tuning_score(scores.score(model, sequences, names), sequences)

    @property
    def actives(self) -> list[int]:
        """The numbers of active experts that are tried, beside all."""
        return [k for k in self.seed.config.active if k <= len(self.seed.config.owners)]


def score_anchor(scoring: Scoring) -> None:
    """Adds the anchor's scores, on both splits."""
    anchor = scoring.models.anchor
    model = partial(load_with, package(anchor))
    scoring.add("anchor", [anchor], model, splits=("tune", "heldout"))


def score_owners(scoring: Scoring) -> None:
    """Adds the scores of each owner's dense model and experts, which nothing was merged with."""
    trained, anchor = scoring.models, scoring.models.anchor_path
    for name in scoring.seed.config.owners:
        dense, expert, paper = trained.dense[name], trained.experts[name], trained.paper[name]
        pair = partial(load_with, package(expert), anchor=anchor)
        paper_pair = partial(load_with, package(paper), anchor=anchor)
        both = ("tune", "heldout")
        scoring.add(f"dense.{name}", [dense], partial(load_with, package(dense)), splits=both)
        scoring.add(f"expert.{name}", [expert], pair)
        scoring.add(f"alone.{name}", [expert], pair, without=("public",), domains=(name,))
        scoring.add(f"paper_expert.{name}", [paper], paper_pair, domains=(name,))


def score_soups(scoring: Scoring) -> Stage:
    """Adds the uniform soup, and one whose weights are chosen; returns the stage that chooses."""
    trained = scoring.models
    dense = {name: package(stage) for name, stage in trained.dense.items()}
    members = (trained.anchor, *trained.dense.values())

    def soup(weights: Sequence[float]) -> FlexOlmo:
        return models.average(models.load_all(trained.anchor_path, dense), weights)

    uniform = [1 / len(members)] * len(members)
    scoring.add("soup_uniform", members, lambda _: soup(uniform))
    scored = [scoring.scored[name] for name in ("anchor", *(f"dense.{owner}" for owner in dense))]
    temperatures = scoring.seed.config.soup_temperatures

    def choose(folder: Path) -> None:
        sequences = scoring.sequences()
        own = np.array([tuning_score(load_scores(s.folder / SCORES), sequences) for s in scored])
        tried: list[dict[str, Any]] = []
        for temperature in temperatures:
            weights = np.exp((own.min() - own) / temperature)
            weights = (weights / weights.sum()).tolist()
            score = scoring.tuning_score(soup(weights))
            tried.append({"temperature": temperature, "weights": weights, "tune": score})
        best = min(tried, key=lambda option: option["tune"])
        replace_file(folder / CHOICE, json.dumps({**best, "tried": tried}, indent=1))

    needs = (scoring.seed.shared.sequences, *scored)
    chosen = scoring.seed.add("choice/soup", needs, choose, temperatures=temperatures)
    scoring.add(
        "soup_weighted", [chosen, *members],
        lambda _: soup(json.loads((chosen.folder / CHOICE).read_text())["weights"]),
    )  # fmt: skip
    return chosen


def choose_family(
    scoring: Scoring, name: str, anchor: Path, rows: Mapping[str, Packages]
) -> Family:
    """Adds the choice of rows, then memory, then number of active experts.

    Args:
      scoring: of the seed.
      name: of the family.
      anchor: what the packages stand beside.
      rows: packages by the kind of their rows.
    """
    memories, actives = scoring.seed.config.memories, scoring.actives

    def work(folder: Path) -> None:
        tried: list[dict[str, Any]] = []
        loaded = {r: load(merged(anchor, p.paths, folder)) for r, p in rows.items()}

        best = partial(best_option, scoring, loaded, tried)

        choice = best([{"router": r, "memory": None, "active": None} for r in rows])
        choice = best([{**choice, "memory": list(m) if m else None} for m in (None, *memories)])
        choice = best([{**choice, "active": k} for k in (None, *actives)], active_experts)
        write_choice(anchor, rows[choice["router"]], choice, tried, folder)

    of_packages = (need for packages in rows.values() for need in packages.needs)
    needs = dict.fromkeys([scoring.seed.shared.sequences, *of_packages])
    choice = scoring.seed.add(
        f"choice/{name}", tuple(needs), work,
        memories=memories, active=actives, routers=tuple(rows), near=NEAR,
    )  # fmt: skip
    return Family(anchor, rows, choice)


def best_option(
    scoring: Scoring,
    loaded: Mapping[str, FlexOlmo],
    tried: list[dict[str, Any]],
    options: Sequence[dict[str, Any]],
    cost: Callable[[dict[str, Any]], float] | None = None,
) -> dict[str, Any]:
    """The option with the best tuning score; those that were tried before are not scored again.

    Args:
      scoring: of the seed.
      loaded: merged models by the kind of their rows.
      tried: options with their scores; new ones are appended.
      options: router, memory and active of each, and perhaps evidence.
      cost: of an option; given, the cheapest of those that are nearly best.
    """
    for option in options:
        if not any(option == {key: t[key] for key in option} for t in tried):
            model = routed_as(loaded[option["router"]], option)
            tried.append({**option, "tune": scoring.tuning_score(model)})
    if cost is not None:
        return nearly_best(tried, options, cost)
    scored = [t for t in tried if {key: t[key] for key in options[0]} in options]
    chosen = min(scored, key=lambda t: t["tune"])
    return {key: chosen[key] for key in options[0]}


def nearly_best(
    tried: Sequence[Mapping[str, Any]],
    options: Sequence[dict[str, Any]],
    cost: Callable[[dict[str, Any]], float],
) -> dict[str, Any]:
    """Of the options whose tuning scores are within NEAR of the best, the one that costs least.

    Args:
      tried: options with their tuning scores.
      options: to choose from; all of them were tried.
      cost: of an option.
    """
    scores = [next(t["tune"] for t in tried if option.items() <= t.items()) for option in options]
    near = [o for o, score in zip(options, scores, strict=True) if score <= min(scores) + NEAR]
    return min(near, key=cost)


def active_experts(option: Mapping[str, Any]) -> float:
    """What an option costs a token: its number of active experts."""
    return math.inf if option["active"] is None else option["active"]


def score_btx(scoring: Scoring, btx: Family) -> None:
    """Adds the scores of BTX: with equal rows, with each kind of rows, and as chosen."""
    stage = scoring.models.btx
    uniform = [btx_folder(stage) / name for name in scoring.seed.config.owners]
    scoring.add("btx_uniform", [stage], partial(load_merged, btx.anchor, uniform))
    for router, packages in btx.rows.items():
        scoring.add(
            f"btx_{router}", packages.needs, partial(load_merged, btx.anchor, packages.paths)
        )
    scoring.add("btx_best", btx.needs, btx.chosen)


def score_paper(scoring: Scoring) -> None:
    """Adds the scores of the paper's form, and of what it is without bias or embedding."""
    anchor = scoring.models.anchor_path
    paper, plain = packages_of(scoring.models.paper), packages_of(scoring.models.plain)
    for k in (*scoring.actives, None):
        model = partial(load_merged, anchor, paper.paths, active=k)
        scoring.add(f"paper_top{k or 'all'}", paper.needs, model, active=k)
    without_bias = partial(load_merged, anchor, paper.paths, bias=False)
    scoring.add("paper_without_bias", paper.needs, without_bias)
    scoring.add("paper_plain", plain.needs, partial(load_merged, anchor, plain.paths))


def score_ours(scoring: Scoring, ours: Family) -> None:
    """Adds the scores of our form: each kind of rows, top-k, ablations, and growing by owners."""
    for router, packages in ours.rows.items():
        model = partial(load_merged, ours.anchor, packages.paths)
        scoring.add(f"flexolmo_{router}", packages.needs, model)
    for k in (*scoring.actives, None):
        model = partial(ours.chosen, active=k)
        scoring.add(f"flexolmo_top{k or 'all'}", ours.needs, model, active=k)
    scoring.add("flexolmo_without_bias", ours.needs, ours.without_bias)
    scoring.add("flexolmo_bias_folded", ours.needs, ours.bias_folded)
    uncoordinated = scoring.models.uncoordinated
    needs = dict.fromkeys((*ours.needs, *uncoordinated.needs))
    model = partial(ours.chosen, packages=uncoordinated)
    scoring.add("flexolmo_uncoordinated", tuple(needs), model)
    owners = scoring.seed.config.owners
    for count in range(2, len(owners)):
        model = partial(ours.grown, count=count)
        scoring.add(f"owners.{count}", ours.needs, model, owners=owners[:count])


def score_tuned(scoring: Scoring, ours: Family) -> None:
    """Adds router tuning on proxies, and its scores."""
    paper, tuned = tuned_stages(scoring.seed, scoring.models, ours)
    scoring.add("paper_tuned", [paper], partial(load_with, package(paper)))
    scoring.add(
        "flexolmo_tuned", [tuned, *ours.needs], lambda _: ours.as_chosen(load(package(tuned)))
    )


def score_unrestricted(scoring: Scoring) -> None:
    """Adds the unrestricted mixtures, and their scores."""
    for flops in scoring.seed.config.unrestricted_flops:
        stage = unrestricted_stage(scoring.seed, scoring.models.anchor, flops)
        model = partial(load_with, package(stage) / "merged", expert_compute="grouped")
        scoring.add(f"unrestricted_{flops:g}x", [stage], model)


def score_removal(scoring: Scoring, ours: Family) -> None:
    """Adds the scores of the chosen form with each owner switched off."""
    for name in scoring.seed.config.owners:
        scoring.add(f"without.{name}", ours.needs, ours.chosen, without=(name,))


def routing_stage(scoring: Scoring, name: str, family: Family) -> Stage:
    """Adds the mean weight of each expert of a family on each domain's text."""

    def work(folder: Path) -> None:
        sequences, model = scoring.sequences(), family.chosen(folder)
        shares = {
            domain: scores.routing_shares(
                model, datasets.first(sequences[f"heldout.{domain}"], ROUTING_SEQUENCES)
            )
            for domain in scoring.seed.config.domains
        }
        save_scores(folder / SCORES, shares)

    needs = (scoring.seed.shared.sequences, *family.needs)
    return scoring.seed.add(f"routing/{name}", needs, work)
