"""The stages of a study for one seed: every model that is trained, chosen and scored, in order."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from flexolmo_jax.federation.merge import add_expert
from flexolmo_jax.model import FlexOlmo, load
from flexolmo_jax.storage.files import replace_file
from flexolmo_jax.studies.baselines import datasets, models, scores
from flexolmo_jax.studies.baselines.config import Router, StudyConfig
from flexolmo_jax.studies.baselines.datasets import MIXED, TOKENIZER, read_sequences
from flexolmo_jax.studies.baselines.models import PACKAGE, merged, routed, trained
from flexolmo_jax.studies.baselines.scores import load_scores, save_scores, tuning_score
from flexolmo_jax.studies.baselines.shared_stages import (
    EMBEDDING,
    POOL,
    SCORES,
    SEQUENCES,
    WINDOWS,
    Shared,
)
from flexolmo_jax.studies.engine.stages import Stage
from flexolmo_jax.training.stages.anchor import train_anchor
from flexolmo_jax.training.stages.expert import train_expert
from flexolmo_jax.training.stages.joint import train_jointly
from flexolmo_jax.training.stages.router import train_router

CHOICE = "choice.json"
ROUTING_SEQUENCES = 32  # of each domain, for the shares of the experts


@dataclasses.dataclass
class SeedPlan:
    """The stages of one seed, in order; `scored` are those that hold a model's scores, by name."""

    stages: list[Stage]
    scored: dict[str, Stage]
    choices: dict[str, Stage]
    routing: Stage


def plan_seed(config: StudyConfig, shared: Shared, seed: int) -> SeedPlan:
    """The stages of one seed; nothing is run."""
    return _Planner(config, shared, seed).plan()


class _Planner:
    """Lists one seed's stages."""

    def __init__(self, config: StudyConfig, shared: Shared, seed: int):
        self.config, self.shared, self.seed = config, shared, seed
        self.stages: list[Stage] = []
        self.scored: dict[str, Stage] = {}
        self.texts = {domain: one.folder for domain, one in shared.texts.items()}
        self.windows = {name: one.folder / WINDOWS for name, one in shared.windows.items()}
        self.tokenizer = str(shared.tokenizer.folder / TOKENIZER)

    def add(
        self, name: str, needs: Sequence[Stage], work: Callable[[Path], None], **made_from: Any
    ) -> Stage:
        root = self.shared.pool.root
        made = Stage(f"seed{self.seed}/{name}", root, made_from, tuple(needs), work)
        self.stages.append(made)
        return made

    def plan(self) -> SeedPlan:
        config, owners = self.config, self.config.owners
        self.anchor = self._anchor()
        self.dense = {name: self._dense(name) for name in owners}
        self.experts = {name: self._expert(name) for name in owners}
        self.paper = {name: self._paper(name, "paper", True) for name in owners}
        self.plain = {name: self._paper(name, "plain", False) for name in owners}
        rows: dict[str, _Packages] = {config.expert.router: self._packages(self.experts)}
        rows |= {
            router: self._refitted("rows", router, self.anchor, self.experts, False)
            for router in config.routers
            if router not in rows
        }
        self.btx = self._btx()
        btx_rows: dict[str, _Packages] = {
            router: self._refitted("btx_rows", router, self.btx, self.dense, True)
            for router in config.routers
        }
        apart = self._refitted("uncoordinated", config.expert.router, self.anchor, self.dense, True)

        anchor, btx = self._place(self.anchor), self.btx.folder / "btx" / "anchor"
        self._score("anchor", [self.anchor], partial(_load, anchor), splits=("tune", "heldout"))
        self._score_owners()
        soup = self._score_soups()
        ours = _Family(anchor, rows, self._choice("flexolmo", anchor, rows))
        theirs = _Family(btx, btx_rows, self._choice("btx", btx, btx_rows))
        self._score_btx(theirs)
        self._score_paper()
        self._score_ours(ours, apart)
        self._score_tuned(ours)
        self._score_unrestricted()
        self._score_removal(ours)
        routing = self._routing(ours)
        choices = {"flexolmo": ours.choice, "btx": theirs.choice, "soup": soup}
        return SeedPlan(self.stages, self.scored, choices, routing)

    # Training

    def _train(
        self, name: str, needs: Sequence[Stage], train: Callable, training: Any, /, **more: Any
    ) -> Stage:
        return self.add(
            name, needs,
            lambda folder: trained(train, folder, config=training, **more),
            training=_values(training),
        )  # fmt: skip

    def _text(self, name: str) -> str:
        return str(self.texts[name] / "train.jsonl")

    def _place(self, stage: Stage) -> Path:
        return stage.folder / PACKAGE

    def _anchor(self) -> Stage:
        embedding = self.shared.embeddings["public"]
        training = dataclasses.replace(
            self.config.anchor_training(self.tokenizer, self.seed),
            domain_embedding=str(embedding.folder / EMBEDDING),
        )
        needs = (self.shared.texts["public"], self.shared.tokenizer, embedding)
        return self._train("anchor", needs, train_anchor, training, data=self._text("public"))

    def _dense(self, name: str) -> Stage:
        training = self.config.dense_training(self.tokenizer, self.seed)
        where = {"data": self._text(name), "start": self._place(self.anchor)}
        where["windows"] = self.windows[name]
        needs = (self.anchor, self.shared.windows[name])
        return self._train(f"dense/{name}", needs, train_anchor, training, **where)

    def _expert(self, name: str) -> Stage:
        training = self.config.expert_training(self.seed)
        where = {"data": self._text(name), "anchor": self._place(self.anchor), "name": name}
        where["windows"] = self.windows[name]
        needs = (self.anchor, self.shared.windows[name])
        return self._train(f"expert/{name}", needs, train_expert, training, **where)

    def _paper(self, name: str, kind: str, with_embedding: bool) -> Stage:
        embedding = self.shared.embeddings[name]
        row = str(embedding.folder / EMBEDDING) if with_embedding else None
        training = self.config.paper_training(row, self.seed)
        where = {"data": self._text(name), "anchor": self._place(self.anchor), "name": name}
        where["windows"] = self.windows[name]
        needs = (self.anchor, self.shared.windows[name], *([embedding] if with_embedding else []))
        return self._train(f"{kind}/{name}", needs, train_expert, training, **where)

    def _packages(self, trainings: Mapping[str, Stage]) -> "_Packages":
        places = {name: self._place(stage) for name, stage in trainings.items()}
        return _Packages(places, tuple(trainings.values()))

    def _refitted(
        self,
        kind: str,
        router: Router,
        anchor: Stage,
        experts: Mapping[str, Stage],
        are_dense: bool,
    ) -> "_Packages":
        """Rows that owners fit alone, for experts that have others or none."""
        training = dataclasses.replace(self.config.expert_training(self.seed), router=router)
        places = {name: self._place(stage) for name, stage in experts.items()}
        beside = self._beside(anchor)

        def work(folder: Path) -> None:
            if are_dense:
                found = models.dense_experts(places)
            else:
                found = models.experts_of(beside, places)
            models.refit(beside, found, self.texts, self.windows, training, folder)

        windows = (self.shared.windows[name] for name in experts)
        needs = (anchor, *experts.values(), *windows)
        fit = {name: getattr(training, name) for name in ("fit_tokens", "fit_prior", "fit_ridge")}
        stage = self.add(f"{kind}/{router}", needs, work, router=router, **fit)
        return _Packages({name: stage.folder / name for name in experts}, (stage, *needs))

    def _beside(self, anchor: Stage) -> Path:
        """What packages stand beside: the anchor, or BTX's averaged one."""
        return self._place(anchor) if anchor is self.anchor else anchor.folder / "btx" / "anchor"

    def _btx(self) -> Stage:
        places = {name: self._place(stage) for name, stage in self.dense.items()}
        anchor = self._place(self.anchor)
        needs = (self.anchor, *self.dense.values())
        return self.add(
            "btx", needs, lambda folder: models.write_btx(anchor, places, folder / "btx")
        )

    # Scores

    def _score(
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
        names = [f"{s}.{d}" for s in splits for d in domains or (*self.config.domains, MIXED)]

        def work(folder: Path) -> None:
            sequences = read_sequences(self.shared.sequences.folder / SEQUENCES)
            found = scores.score(model(folder), sequences, names, without=without)
            save_scores(folder / SCORES, found)

        needs = (self.shared.sequences, *needs)
        made_from |= {"without": without, "names": names}
        self.scored[name] = self.add(f"scores/{name}", needs, work, **made_from)

    def _score_owners(self) -> None:
        anchor, both = self._place(self.anchor), ("tune", "heldout")
        for name in self.config.owners:
            dense, expert, paper = self.dense[name], self.experts[name], self.paper[name]
            whole = partial(_load, self._place(dense))
            pair = partial(_load, self._place(expert), anchor=anchor)
            as_in_paper = partial(_load, self._place(paper), anchor=anchor)
            self._score(f"dense.{name}", [dense], whole, splits=both)
            self._score(f"expert.{name}", [expert], pair)
            self._score(f"alone.{name}", [expert], pair, without=("public",), domains=(name,))
            self._score(f"paper_expert.{name}", [paper], as_in_paper, domains=(name,))

    def _score_soups(self) -> Stage:
        """The uniform soup, and one whose weights are chosen; returns the stage that does."""
        places = {name: self._place(stage) for name, stage in self.dense.items()}
        members = (self.anchor, *self.dense.values())
        count = len(members)

        def soup(weights: Sequence[float]) -> FlexOlmo:
            loaded = models.load_all(self._place(self.anchor), places)
            return models.average(loaded, weights)

        self._score("soup_uniform", members, lambda _: soup([1 / count] * count))
        scored = [self.scored[n] for n in ("anchor", *(f"dense.{o}" for o in places))]
        temperatures = self.config.soup_temperatures

        def choose(folder: Path) -> None:
            sequences = read_sequences(self.shared.sequences.folder / SEQUENCES)
            names = [name for name in sequences if name.startswith("tune.")]
            own = np.array(
                [tuning_score(load_scores(s.folder / SCORES), sequences) for s in scored]
            )
            tried = []
            for temperature in temperatures:
                weights = np.exp((own.min() - own) / temperature)
                weights = (weights / weights.sum()).tolist()
                found = tuning_score(scores.score(soup(weights), sequences, names), sequences)
                tried.append({"temperature": temperature, "weights": weights, "tune": found})
            best = min(tried, key=lambda one: one["tune"])
            replace_file(folder / CHOICE, json.dumps({**best, "tried": tried}, indent=1))

        chosen = self.add(
            "choice/soup", (self.shared.sequences, *scored), choose, temperatures=temperatures
        )
        self._score(
            "soup_weighted", [chosen, *members],
            lambda _: soup(json.loads((chosen.folder / CHOICE).read_text())["weights"]),
        )  # fmt: skip
        return chosen

    def _choice(self, name: str, anchor: Path, rows: Mapping[str, "_Packages"]) -> Stage:
        """The kind of rows, the memory and the number of active experts, one after the other."""
        config = self.config
        memories, actives = config.memories, [k for k in config.active if k <= len(config.owners)]

        def work(folder: Path) -> None:
            sequences = read_sequences(self.shared.sequences.folder / SEQUENCES)
            names = [name for name in sequences if name.startswith("tune.")]
            models = {
                router: load(merged(anchor, packages.paths, folder))
                for router, packages in rows.items()
            }
            tried: list[dict[str, Any]] = []

            def best(options: list[dict[str, Any]]) -> dict[str, Any]:
                for option in options:
                    if not any(option == {k: t[k] for k in option} for t in tried):
                        model = routed(
                            models[option["router"]],
                            active=option["active"], memory=_pair(option["memory"]),
                        )  # fmt: skip
                        found = tuning_score(scores.score(model, sequences, names), sequences)
                        tried.append({**option, "tune": found})
                seen = [t for t in tried if {k: t[k] for k in options[0]} in options]
                chosen = min(seen, key=lambda t: t["tune"])
                return {k: chosen[k] for k in options[0]}

            choice = best([{"router": r, "memory": None, "active": None} for r in rows])
            choice = best([{**choice, "memory": list(m) if m else None} for m in (None, *memories)])
            choice = best([{**choice, "active": k} for k in (None, *actives)])
            replace_file(folder / CHOICE, json.dumps({**choice, "tried": tried}, indent=1))

        needs = dict.fromkeys([self.shared.sequences, *(n for p in rows.values() for n in p.needs)])
        return self.add(
            f"choice/{name}", tuple(needs), work,
            memories=memories, active=actives, routers=tuple(rows),
        )  # fmt: skip

    def _score_btx(self, btx: "_Family") -> None:
        uniform = [self.btx.folder / "btx" / name for name in self.config.owners]
        self._score("btx_uniform", [self.btx], partial(_merged, btx.anchor, uniform))
        for router, packages in btx.rows.items():
            whole = partial(_merged, btx.anchor, packages.paths)
            self._score(f"btx_{router}", packages.needs, whole)
        self._score("btx_best", btx.needs, btx.chosen)

    def _score_paper(self) -> None:
        anchor = self._place(self.anchor)
        paper, plain = self._packages(self.paper), self._packages(self.plain)
        for k in (*self._actives(), None):
            whole = partial(_merged, anchor, paper.paths, active=k)
            self._score(f"paper_top{k or 'all'}", paper.needs, whole, active=k)
        no_bias = partial(_merged, anchor, paper.paths, bias=False)
        self._score("paper_without_bias", paper.needs, no_bias)
        self._score("paper_plain", plain.needs, partial(_merged, anchor, plain.paths))

    def _actives(self) -> list[int]:
        return [k for k in self.config.active if k <= len(self.config.owners)]

    def _score_ours(self, ours: "_Family", apart: "_Packages") -> None:
        for router, packages in ours.rows.items():
            whole = partial(_merged, ours.anchor, packages.paths)
            self._score(f"flexolmo_{router}", packages.needs, whole)
        for k in (*self._actives(), None):
            whole = partial(ours.chosen, active=k)
            self._score(f"flexolmo_top{k or 'all'}", ours.needs, whole, active=k)
        self._score("flexolmo_without_bias", ours.needs, ours.without_bias)
        self._score("flexolmo_bias_folded", ours.needs, ours.bias_folded)
        needs = dict.fromkeys((*ours.needs, *apart.needs))
        self._score("flexolmo_uncoordinated", tuple(needs), partial(ours.chosen, packages=apart))
        for count in range(2, len(self.config.owners)):
            names = self.config.owners[:count]
            self._score(
                f"owners.{count}", ours.needs, partial(ours.grown, count=count), owners=names
            )

    def _score_tuned(self, ours: "_Family") -> None:
        paper = self._packages(self.paper)
        training = dataclasses.replace(self.config.router, seed=self.seed)
        proxies = self.shared.proxies

        def tuned(name: str, needs: Sequence[Stage], whole: Callable[[Path], Path]) -> Stage:
            def work(folder: Path) -> None:
                data = folder / "proxies"
                data.mkdir(exist_ok=True)
                for domain, stage in proxies.items():
                    file = f"{domain}.jsonl"
                    replace_file(data / file, (stage.folder / file).read_text(encoding="utf-8"))
                model = whole(folder)
                trained(train_router, folder, config=training, model=model, data=str(data))

            needs = (*proxies.values(), *needs)
            return self.add(f"tuned/{name}", needs, work, training=_values(training))

        whole = partial(merged, ours.anchor, paper.paths)
        paper_tuned, ours_tuned = (
            tuned("paper", paper.needs, whole),
            tuned("flexolmo", ours.needs, ours.merged),
        )
        self._score("paper_tuned", [paper_tuned], partial(_load, self._place(paper_tuned)))
        self._score(
            "flexolmo_tuned", [ours_tuned, *ours.needs],
            lambda _: ours.as_chosen(load(self._place(ours_tuned))),
        )  # fmt: skip

    def _score_unrestricted(self) -> None:
        for times in self.config.unrestricted_flops:
            steps = models.unrestricted_steps(self.config, times)
            training = self.config.unrestricted_training(self.tokenizer, steps, self.seed)
            pool = self.shared.pool
            where = {"anchor": self._place(self.anchor), "data": str(pool.folder / POOL)}
            stage = self._train(
                f"unrestricted/{times:g}x", [self.anchor, pool], train_jointly, training, **where
            )
            whole = partial(_load, self._place(stage) / "merged", expert_compute="grouped")
            self._score(f"unrestricted_{times:g}x", [stage], whole)

    def _score_removal(self, ours: "_Family") -> None:
        for name in self.config.owners:
            self._score(f"without.{name}", ours.needs, ours.chosen, without=(name,))

    def _routing(self, ours: "_Family") -> Stage:
        def work(folder: Path) -> None:
            sequences = read_sequences(self.shared.sequences.folder / SEQUENCES)
            model = ours.chosen(folder)
            shares = {
                domain: scores.routing_shares(
                    model, datasets.first(sequences[f"heldout.{domain}"], ROUTING_SEQUENCES)
                )
                for domain in self.config.domains
            }
            save_scores(folder / SCORES, shares)

        return self.add("routing", (self.shared.sequences, *ours.needs), work)


@dataclasses.dataclass(frozen=True)
class _Packages:
    """The owners' packages in one form, and the stages that make them."""

    places: Mapping[str, Path]
    needs: tuple[Stage, ...]

    @property
    def paths(self) -> list[Path]:
        return list(self.places.values())


@dataclasses.dataclass(frozen=True)
class _Family:
    """A merged model in all forms that were tried, and the stage that chooses one of them."""

    anchor: Path
    rows: Mapping[str, _Packages]  # by kind of router
    choice: Stage

    @property
    def needs(self) -> tuple[Stage, ...]:
        return (self.choice, *self.choice.needs)

    def read(self) -> dict[str, Any]:
        """The choice: router, memory, active."""
        return json.loads((self.choice.folder / CHOICE).read_text())

    def packages(self) -> _Packages:
        """Those with the chosen rows."""
        return self.rows[self.read()["router"]]

    def merged(self, folder: Path) -> Path:
        """The chosen form on disk."""
        return merged(self.anchor, self.packages().paths, folder, _pair(self.read()["memory"]))

    def as_chosen(self, model: FlexOlmo, **changes: Any) -> FlexOlmo:
        """A model with the chosen memory and number of active experts, or another number."""
        choice = {**self.read(), **changes}
        return routed(model, active=choice["active"], memory=_pair(choice["memory"]))

    def chosen(self, folder: Path, packages: _Packages | None = None, **changes: Any) -> FlexOlmo:
        """The chosen form in memory, or that of other packages."""
        paths = (packages or self.packages()).paths
        return self.as_chosen(load(merged(self.anchor, paths, folder)), **changes)

    def without_bias(self, folder: Path) -> FlexOlmo:
        """The chosen form without router biases."""
        return models.without_bias(self.chosen(folder))

    def bias_folded(self, folder: Path) -> FlexOlmo:
        """The chosen form with its biases folded into the rows."""
        return models.bias_folded(self.chosen(folder), self.anchor)

    def grown(self, folder: Path, count: int) -> FlexOlmo:
        """The chosen form of two owners, to which others are added later, one by one."""
        two, later = self.packages().paths[:2], self.packages().paths[2:count]
        model = merged(self.anchor, two, folder)
        for package in later:
            add_expert(model, package, allow_share=None)
        return self.as_chosen(load(model))


def _pair(memory: Sequence[float] | None) -> tuple[float, float] | None:
    return None if memory is None else (memory[0], memory[1])


def _load(path: Path, _: Path, anchor: Path | None = None, **changes: Any) -> FlexOlmo:
    """What is at a path, with changes of its config."""
    model = load(path, anchor=anchor)
    return dataclasses.replace(model, config=model.config.replace(**changes))


def _merged(
    anchor: Path,
    packages: Sequence[Path],
    folder: Path,
    active: int | None = None,
    bias: bool = True,
) -> FlexOlmo:
    """A merged model without memory, as in the paper."""
    model = routed(load(merged(anchor, packages, folder)), active=active)
    return model if bias else models.without_bias(model)


def _values(training) -> dict[str, Any]:
    """A training's values as JSON, without the folders of stages that it needs."""
    values = json.loads(json.dumps(dataclasses.asdict(training)))
    for name in ("tokenizer", "domain_embedding"):
        if values.get(name):
            values[name] = Path(values[name]).name
    return values
