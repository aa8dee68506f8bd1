"""The results of a study: bits per byte of every method, with bootstrap intervals over documents.

Every method is scored on the same sequences, so differences between two are paired: documents are
drawn with replacement once, and all methods and seeds are summed over the same draws.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from flexolmo_jax.studies.baselines import methods
from flexolmo_jax.studies.baselines.config import StudyConfig
from flexolmo_jax.studies.baselines.datasets import MIXED, Sequences, read_sequences
from flexolmo_jax.studies.baselines.families import CHOICE
from flexolmo_jax.studies.baselines.scores import Scores, load_scores, tuning_score
from flexolmo_jax.studies.baselines.seed_stages import SeedPlan
from flexolmo_jax.studies.baselines.shared_stages import SCORES, SEQUENCES, Shared

DRAWS = 1000
INTERVAL = (2.5, 97.5)  # percentiles
AFTER = "after the change"  # of mixed sequences, the second half
HEADED = ("evidence", "headed_rows")  # merged from experts with heads


@dataclasses.dataclass(frozen=True)
class Value:
    """Bits per byte, or a difference of them: the mean over seeds, and its interval."""

    mean: float
    low: float  # of the 95% interval over documents
    high: float
    seeds: tuple[float, ...]

    @property
    def spread(self) -> float:
        """Standard deviation over the seeds; 0 for a single seed."""
        return float(np.std(self.seeds, ddof=1)) if len(self.seeds) > 1 else 0.0

    def json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "spread": self.spread}


class Results:
    """Bits per byte of all methods, on all columns, of all seeds.

    Attributes:
      methods: the names of all methods.
      columns: the domains, "mixed", and AFTER.
      choices: what was chosen on the tuning split, by seed.
    """

    def __init__(self, config: StudyConfig, shared: Shared, plans: Mapping[int, SeedPlan]):
        self.config = config
        self.sequences = read_sequences(shared.sequences.folder / SEQUENCES)
        self.prompts = load_scores(shared.prompts.folder / SCORES)
        self.columns = (*config.domains, MIXED, AFTER)
        self.choices: dict[int, dict[str, Any]] = {}
        self._masks = {column: self._mask(column) for column in self.columns}
        self._draws = {column: self._draw(column) for column in self.columns}
        per_seed = []
        for seed, plan in plans.items():
            scores = {name: load_scores(s.folder / SCORES) for name, s in plan.scored.items()}
            self.choices[seed] = {
                name: json.loads((stage.folder / CHOICE).read_text())
                for name, stage in plan.choices.items()
            }
            self._combine(scores, self.choices[seed])
            per_seed.append({name: self._sums(of_method) for name, of_method in scores.items()})
        self.methods = tuple(per_seed[0])
        # Nats by method and column: float64 [seeds, documents].
        self._nats = {
            (name, column): np.stack([one[name][column] for one in per_seed])
            for name in self.methods
            for column in per_seed[0][name]
        }

    def _sequences(self, column: str) -> Sequences:
        return self.sequences[f"heldout.{MIXED if column == AFTER else column}"]

    def _mask(self, column: str) -> np.ndarray:
        sizes = self._sequences(column).sizes
        # Of mixed sequences, prediction S / 2 - 1 is the first token of the second domain.
        start = sizes.shape[1] // 2 - 1 if column == AFTER else 0
        return sizes * (np.arange(sizes.shape[1]) >= start)

    def _draw(self, column: str) -> tuple[np.ndarray, np.ndarray]:
        """How often each document is drawn, int [DRAWS, documents]; and their bytes."""
        document = self._sequences(column).document
        count = document.max() + 1
        random = np.random.default_rng(0)
        times = random.multinomial(count, np.full(count, 1 / count), size=DRAWS)
        return times, np.bincount(document, self._masks[column].sum(axis=1), count)

    def _sums(self, scores: Scores) -> dict[str, np.ndarray]:
        """Nats of each document, by column."""
        out = {}
        for column in self.columns:
            name = f"heldout.{MIXED if column == AFTER else column}"
            if name in scores:
                counted = np.where(self._masks[column] > 0, scores[name], 0.0)
                nats = counted.sum(axis=1, dtype=np.float64)
                out[column] = np.bincount(self._sequences(column).document, nats)
        return out

    def _combine(self, scores: dict[str, Scores], choices: dict[str, Any]) -> None:
        """Adds the methods that combine whole models; chooses BTM's decay."""
        config = self.config
        members = ["anchor", *(f"dense.{name}" for name in config.owners)]
        nats = self._stacked(scores, members)
        self._add_btm("btm", nats, scores, choices)
        scores["prompt_routing"] = {
            name: methods.follow(one, self.prompts[name], config.prefix)
            for name, one in nats.items()
        }
        self._add_told("oracle", "expert", scores)
        self._add_told("told_dense", "dense", scores)
        active = choices["flexolmo"]["active"]
        scores["flexolmo"] = scores[f"flexolmo_top{active or 'all'}"]
        if config.has_heads:
            alone = ["anchor", *(f"headed_alone.{name}" for name in config.owners)]
            nats = self._stacked(scores, alone)
            self._add_btm("btm_headed", nats, scores, choices)
            self._add_told("told_headed", "headed_alone", scores)
            scores["best_token"] = {name: one.min(axis=0) for name, one in nats.items()}
            active = choices["evidence"]["active"]
            scores["evidence"] = scores[f"evidence_top{active or 'all'}"]

    def _stacked(self, scores: dict[str, Scores], members: list[str]) -> dict[str, np.ndarray]:
        """Nats of several models by the sequences' name: float32 [M, N, S]."""
        return {
            name: np.stack([scores[member][name] for member in members]) for name in self.sequences
        }

    def _add_told(self, name: str, kind: str, scores: dict[str, Scores]) -> None:
        """Adds what is told the domain: each domain is answered by its own model of a kind."""
        scores[name] = {
            f"heldout.{domain}": scores[f"{kind}.{domain}" if domain != "public" else "anchor"][
                f"heldout.{domain}"
            ]
            for domain in self.config.domains
        }

    def _add_btm(
        self,
        family: str,
        nats: dict[str, np.ndarray],
        scores: dict[str, Scores],
        choices: dict[str, Any],
    ) -> None:
        """Adds branch-train-merge of some models; chooses its decay.

        Args:
          family: begins the names of the methods and choices.
          nats: of the models, the anchor first, by the sequences' name.
          scores, choices: of the seed; both are added to.
        """
        sizes = {name: one.sizes for name, one in self.sequences.items()}

        def combine(evidence, active: int) -> Scores:
            mixed = {n: methods.btm(one, evidence(one), active) for n, one in nats.items()}
            return {n: np.where(sizes[n] > 0, one, 0.0) for n, one in mixed.items()}

        for active in (1, 2):
            scores[f"{family}_prefix_top{active}"] = combine(
                lambda one: methods.prefix_evidence(one, self.config.prefix), active
            )
            scores[f"{family}_running_top{active}"] = combine(methods.running_evidence, active)
            tried = []
            for decay in self.config.decays:
                decayed = combine(lambda one, d=decay: methods.running_evidence(one, d), active)
                tried.append((tuning_score(decayed, self.sequences), decay, decayed))
            best = min(tried, key=lambda one: one[0])
            scores[f"{family}_decay_top{active}"] = best[2]
            choices[f"{family}_top{active}"] = {
                "decay": best[1], "tried": [{"decay": d, "tune": t} for t, d, _ in tried]
            }  # fmt: skip

    def has(self, method: str, column: str) -> bool:
        return (method, column) in self._nats

    def value(self, method: str, *columns: str, minus: str | None = None) -> Value:
        """Bits per byte of a method: the plain mean over the columns.

        Args:
          method: one of `methods`.
          columns: some of `columns`.
          minus: a method to compare with: the value is the difference from it, paired.
        """
        parts = [self._value(method, column) for column in columns]
        if minus is not None:
            others = [self._value(minus, column) for column in columns]
            parts = [(a - c, b - d) for (a, b), (c, d) in zip(parts, others, strict=True)]
        seeds = np.mean([one for one, _ in parts], axis=0)
        low, high = np.percentile(np.mean([draws for _, draws in parts], axis=0), INTERVAL)
        return Value(float(seeds.mean()), float(low), float(high), tuple(map(float, seeds)))

    def _value(self, method: str, column: str) -> tuple[np.ndarray, np.ndarray]:
        """Bits per byte of each seed; and of each draw, the mean over seeds."""
        nats, (times, sizes) = self._nats[method, column], self._draws[column]
        bits = nats / np.log(2)
        seeds = bits.sum(axis=1) / sizes.sum()
        return seeds, (times @ bits.mean(axis=0)) / (times @ sizes)

    def owners_mean(self, method: str, minus: str | None = None) -> Value:
        """The mean over the owners' domains."""
        return self.value(method, *self.config.owners, minus=minus)

    def kept(self, method: str, owner: str) -> float:
        """Share of an expert's gain on its own domain that a merged model keeps.

        The gain is that of the expert answering alone, over the anchor.
        """
        alone = "headed_alone" if method in HEADED else "alone"
        anchor, own, merged = (
            self.value(name, owner).mean for name in ("anchor", f"{alone}.{owner}", method)
        )
        return (anchor - merged) / (anchor - own)

    def public_cost(self, method: str) -> float:
        """The relative increase over the anchor on public text."""
        return self.value(method, "public").mean / self.value("anchor", "public").mean - 1
