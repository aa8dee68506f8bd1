"""What a feed-forward expert lacks, part by part, and how small its heads may be.

    flexolmo study configs/study/full.py --out STUDY --texts flexmix --seeds 0
    flexolmo study expert-parts STUDY OUT --texts flexmix

Takes the anchor, the experts and the training windows of a study's seed 0. Whole models are trained
of which only some parts move, experts with output heads of several ranks, and evidence heads of
several ranks for all owners; all are scored on the tuning split. Models that OUT already holds are
not trained again.
"""

import argparse
import dataclasses
import datetime
import functools
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flexolmo_jax.config import AnchorTraining, ModelConfig
from flexolmo_jax.data.tokenizer import Tokenizer
from flexolmo_jax.data.window_store import prepare
from flexolmo_jax.federation.anchor import read_anchor, write_anchor
from flexolmo_jax.model import FlexOlmo, load
from flexolmo_jax.modeling.evidence import log_probabilities
from flexolmo_jax.modeling.experts import with_parts
from flexolmo_jax.modeling.transformer import Anchor, forward, init_anchor, num_parameters
from flexolmo_jax.storage.tensors import leaf_name
from flexolmo_jax.studies.baselines.config import StudyConfig
from flexolmo_jax.studies.baselines.datasets import MIXED, Sequences
from flexolmo_jax.studies.baselines.families import CHOICE, CHOSEN, as_evidence, routed_as
from flexolmo_jax.studies.baselines.models import merged
from flexolmo_jax.studies.baselines.scores import bits_per_byte, nats_of_text, token_nats
from flexolmo_jax.studies.engine.commands import PACKAGE
from flexolmo_jax.studies.engine.report import machine, table, write_page
from flexolmo_jax.studies.expert_training import Bits, Trial, add_trial_arguments
from flexolmo_jax.training.loop import StandardSteps, train
from flexolmo_jax.training.objectives import AnchorLoss
from flexolmo_jax.training.prune import prune
from flexolmo_jax.training.run import package_facts
from flexolmo_jax.training.stages.evidence import train_evidence
from flexolmo_jax.training.stages.expert import train_expert

OWNERS = ("math", "code", "news", "conversation")
PARTS = {  # of a model, by the ends of their leaves' names
    "networks": ("feed_forward.gate", "feed_forward.up", "feed_forward.down"),
    "head": ("backbone.head",),
    "gains": ("scale",),
    "attention": ("attention.q", "attention.k", "attention.v", "attention.o"),
    "embedding": ("backbone.embed",),
}
TRAINED = (
    ("networks",),
    ("networks", "head"),
    ("networks", "head", "gains"),
    ("networks", "head", "attention"),
    ("networks", "head", "gains", "attention"),
    tuple(PARTS),
)
HEAD_RANKS = (16, 32, 64, 128)
EVIDENCE_RANKS = (8, 16, 32, 64, 128)
WIDTHS = (192, 176, 96)  # hidden units of narrower experts


@dataclasses.dataclass(frozen=True)
class PartsLoss(AnchorLoss):
    """The loss of a whole model of which only some PARTS move; no weight may decay."""

    parts: tuple[str, ...]

    def __call__(self, anchor, frozen, batch):
        ends = tuple(end for part in self.parts for end in PARTS[part])

        def stop(path, leaf):
            return leaf if leaf_name(path).endswith(ends) else jax.lax.stop_gradient(leaf)

        return super().__call__(jax.tree_util.tree_map_with_path(stop, anchor), frozen, batch)


def train_parts(
    config: AnchorTraining,
    *,
    data: str,
    start: Path,
    parts: tuple[str, ...],
    out: Path,
    run: Path,
    resume: bool = False,
) -> None:
    """Trains some PARTS of an anchor on an owner's text, from the newest checkpoint if any."""
    del resume  # `train` looks for itself
    given = read_anchor(start)
    assert config.tokenizer is not None
    tokenizer = Tokenizer.load(config.tokenizer)
    source, _ = prepare(data, config.data, tokenizer, run / "data")
    loss = PartsLoss(config.computing(given.config), config.output_z_loss, parts)
    weights = Anchor(given.weights.backbone, with_parts(given.weights.public, evidence=None))
    weights = train(StandardSteps(" + ".join(parts), config, loss, source), weights, None, run)
    write_anchor(out, weights, given.config, tokenizer, [], package_facts(config))


class Merged(NamedTuple):
    """Bits per byte of a merged model on the tuning split."""

    owners: float  # the mean over their domains
    public: float
    mixed: float


class PartsTrial(Trial):
    """The models of this study, which start from a study's anchor."""

    def of_parts(self, parts: tuple[str, ...], owner: str) -> float:
        """Trains some parts of the anchor on an owner's text; bits per byte of the model."""
        package = self.package(
            f"{'_'.join(parts)}_{owner}", train_parts, owner, config=self.dense_training(),
            start=self.anchor, parts=parts,
        )  # fmt: skip
        return self.bits(load(package), owner)

    def headed(self, rank: int, owner: str) -> float:
        """Trains an expert with a head of its own; bits per byte of it alone."""
        config = dataclasses.replace(
            self.config.headed_training(0), head_rank=rank, evidence_rank=0,
            fit_tokens=self.config.length,  # it is scored alone, so that its rows do not matter
        )  # fmt: skip
        package = self.package(
            f"head{rank}_{owner}", train_expert, owner, config=config, anchor=self.anchor,
            name=owner,
        )  # fmt: skip
        return self.bits(load(package, anchor=self.anchor), owner, ("public",))

    def merged(self) -> FlexOlmo:
        """The merged model of all owners, as the study has chosen it."""
        return load(self.plan.choices["evidence"].folder / CHOSEN)

    def with_evidence(self, rank: int, at_zero: bool = False) -> Merged:
        """The merged model with evidence heads of another rank; owners' begin as the public one.

        Args:
          rank: of all heads.
          at_zero: owners' heads begin at zero instead.
        """
        public = self.anchor
        if rank != self.config.evidence_rank:
            public = self._evidence(rank, "public", self.anchor, at_zero=True)
        owners = [self._evidence(rank, owner, public, at_zero) for owner in self.config.owners]
        heads = [read_anchor(package).weights.public.evidence for package in (public, *owners)]
        stack = jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=1), *heads)
        model = self.merged()
        model = dataclasses.replace(model, experts=with_parts(model.experts, evidence=stack))
        return self.bits_of_merged(functools.partial(token_nats, model))

    def narrowed(self, width: int) -> Merged:
        """The merged model, as chosen, of the same experts with fewer hidden units."""
        trainings = {stage.name: stage for stage in self.plan.stages}
        packages = []
        for owner in self.config.owners:
            packages.append(self.out / f"width{width}_{owner}")
            if not packages[-1].exists():
                full = trainings[f"seed0/headed/{owner}"].folder / PACKAGE
                prune(full, packages[-1], width, self.text(owner), self.anchor)
        folder = self.out / f"width{width}"
        folder.mkdir(exist_ok=True)
        choice = json.loads((self.plan.choices["evidence"].folder / CHOICE).read_text())
        evidence = as_evidence(choice["evidence"])
        model = routed_as(load(merged(self.anchor, packages, folder, evidence=evidence)), choice)
        return self.bits_of_merged(functools.partial(token_nats, model))

    def bits_of_merged(self, nats: Callable[[Sequences], np.ndarray]) -> Merged:
        """The scores of a merged model, given the nats that it needs for each token."""
        bits = {}
        for domain in (*self.config.domains, MIXED):
            sequences = self.sequences[f"tune.{domain}"]
            bits[domain] = bits_per_byte(nats(sequences), sequences.sizes)
        owners = float(np.mean([bits[owner] for owner in self.config.owners]))
        return Merged(owners, bits["public"], bits[MIXED])

    def _evidence(self, rank: int, domain: str, anchor: Path, at_zero: bool) -> Path:
        steps = (self.config.anchor if domain == "public" else self.config.expert).steps
        config = self.config.evidence_training(0, steps)
        name = f"evidence{rank}_{domain}" + ("_at_zero" if at_zero else "")
        return self.package(
            name, train_evidence, domain, anchor=anchor, begin_as_public=not at_zero,
            config=dataclasses.replace(config, evidence_rank=rank),
        )  # fmt: skip


def nats_of_mixed_probabilities(model: FlexOlmo, sequences: Sequences) -> np.ndarray:
    """As `scores.token_nats`, of a model whose heads' probabilities are mixed, not their logits."""
    return nats_of_text(
        lambda tokens: _mixed_nats(model.backbone, model.experts, tokens, model.config), sequences
    )


@functools.partial(jax.jit, static_argnames="config")
def _mixed_nats(backbone, experts, tokens, config) -> jax.Array:
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    out = forward(backbone, (experts,), inputs, config)
    each = log_probabilities(
        experts.head, out.hidden, backbone.head_matrix(config), targets, config.loss_chunk
    )
    weights = out.weights / jnp.sum(out.weights, axis=0)
    return -jax.nn.logsumexp(each, axis=0, b=weights)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `flexolmo study expert-parts`."""
    add_trial_arguments(parser, "expert_parts.md")


def run(args: argparse.Namespace) -> None:
    """Trains and scores all models, and writes the page."""
    trial = PartsTrial.of(args)
    write_page(args.page, make_page(measure(trial), trial.config))


class Scores(NamedTuple):
    """What this study measures; bits per byte on the tuning split."""

    anchor: Bits
    parts: Mapping[tuple[str, ...], Bits]
    heads: Mapping[int, Bits]  # by rank
    evidence: Mapping[int, Merged]  # by rank
    at_zero: Merged  # with evidence heads of the study's rank that begin at zero
    narrowed: Mapping[int, Merged]  # by hidden units
    chosen: Merged
    mixed_probabilities: Merged


def measure(trial: PartsTrial) -> Scores:
    """Trains and scores all models."""
    chosen = trial.merged()
    return Scores(
        anchor={owner: trial.bits(load(trial.anchor), owner) for owner in OWNERS},
        parts={names: {o: trial.of_parts(names, o) for o in OWNERS} for names in TRAINED},
        heads={rank: {o: trial.headed(rank, o) for o in OWNERS} for rank in HEAD_RANKS},
        evidence={rank: trial.with_evidence(rank) for rank in EVIDENCE_RANKS},
        at_zero=trial.with_evidence(trial.config.evidence_rank, at_zero=True),
        narrowed={width: trial.narrowed(width) for width in WIDTHS},
        chosen=trial.bits_of_merged(functools.partial(token_nats, chosen)),
        mixed_probabilities=trial.bits_of_merged(
            functools.partial(nats_of_mixed_probabilities, chosen)
        ),
    )


def make_page(scores: Scores, config: StudyConfig) -> list[str]:
    """The page.

    Args:
      scores: of all models.
      config: of the study.
    """
    tokens = config.expert.steps * config.expert.data.batch_size * config.expert.data.length
    dense = scores.parts[tuple(PARTS)]

    def row(title: str, weights: int, bits: Bits) -> list[str]:
        cells = []
        for owner, start in scores.anchor.items():
            learned = (start - bits[owner]) / (start - dense[owner])
            cells.append(f"{bits[owner]:.3f} ({learned:.0%})")
        return [title, f"{weights:,}", *cells]

    start = ["anchor", "", *(f"{bits:.3f}" for bits in scores.anchor.values())]
    model = config.model
    sizes = _sizes(config)
    parts = [
        row(" + ".join(names), sum(sizes[name] for name in names), bits)
        for names, bits in scores.parts.items()
    ]
    heads = [
        row(f"{rank}", sizes["networks"] + _head_size(model, rank), bits)
        for rank, bits in scores.heads.items()
    ]
    own = config.evidence_rank
    evidence = [
        [title, f"{_head_size(model, rank):,}", *(f"{value:.3f}" for value in merged)]
        for title, rank, merged in (
            *((f"{rank}", rank, merged) for rank, merged in scores.evidence.items()),
            (f"{own}, owners' begin at zero", own, scores.at_zero),
            (f"{own}, as chosen: trained with the experts", own, scores.chosen),
        )
    ]
    of_btm = len(config.domains) * num_parameters(model)
    narrowed = []
    for width, found in {model.ffn_width: scores.chosen, **scores.narrowed}.items():
        weights = _merged_size(config, width)
        cells = (f"{value:.3f}" for value in found)
        narrowed.append([f"{width}", f"{weights:,} ({weights / of_btm:.0%})", *cells])
    at_the_head = [
        [title, *(f"{value:.3f}" for value in merged)]
        for title, merged in (
            ("logits, as chosen", scores.chosen),
            ("probabilities", scores.mixed_probabilities),
        )
    ]
    cores = len(os.sched_getaffinity(0))
    return [
        "# What a feed-forward expert lacks",
        "",
        f"`flexolmo study expert-parts STUDY OUT`, {datetime.date.today()}, {cores} of "
        f"{machine()}. The anchor, the training windows and the experts are those of the "
        f"[full study](study.md)'s seed 0; every model sees the same {tokens:,} tokens of its "
        "owner's, in the same order. Bits per byte on the tuning split, lower is better; one run "
        "each.",
        "",
        "**Which weights have to move.** A whole model is trained on an owner's text, but only "
        "some of its parts move; all others stay the anchor's. In brackets, how much it learns of "
        "what a dense fine-tune does.",
        "",
        *table(["trained", "weights", *scores.anchor], [start, *parts], "lr"),
        "",
        "**How large a head.** The same for an expert: networks, and an output head of its own of "
        "some rank, answering alone.",
        "",
        *table(["rank", "weights", *scores.anchor], heads, "lr"),
        "",
        "**How large an evidence head.** The merged model of all owners, in the form that the "
        "study chose, with evidence heads of other ranks, the public one too, trained after the "
        "rest; owners' begin as the public one. Weights are those of one.",
        "",
        *table(["rank", "weights", "owners", "public", "mixed"], evidence, "lr"),
        "",
        "**How narrow a network.** The same merged model; of each owner's network, only the hidden "
        "units stay that matter most on its text (`flexolmo compress --width`). In brackets, the "
        "weights of all experts, as packages hold them, of those of BTM's whole models.",
        "",
        *table(["hidden units", "weights", "owners", "public", "mixed"], narrowed, "lr"),
        "",
        "**What is mixed at the end.** The heads' logits with the experts' weights, which needs "
        "one softmax, or their probabilities, which needs one for each expert.",
        "",
        *table(["mixed", "owners", "public", "mixed text"], at_the_head),
    ]


def _sizes(config: StudyConfig) -> dict[str, int]:
    """The number of weights in each of PARTS."""
    shapes = jax.eval_shape(lambda: init_anchor(config.model, jax.random.key(0)))
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    return {
        part: sum(leaf.size for path, leaf in leaves if leaf_name(path).endswith(ends))
        for part, ends in PARTS.items()
    }


def _merged_size(config: StudyConfig, width: int) -> int:
    """The number of weights of the anchor and of all experts with `width` hidden units."""
    owners, model = len(config.owners), config.model
    networks = _sizes(config)["networks"] * width // model.ffn_width
    head, evidence = (_head_size(model, rank) for rank in (config.head_rank, config.evidence_rank))
    return num_parameters(model) + evidence + owners * (networks + head + evidence)


def _head_size(model: ModelConfig, rank: int) -> int:
    """The number of weights in a low-rank head."""
    return rank * (model.width + model.vocab_size) + model.vocab_size
