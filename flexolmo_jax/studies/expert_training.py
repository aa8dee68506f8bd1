"""How to train an expert: what it gains, compared with a dense fine-tune at equal tokens.

    flexolmo study configs/study/full.py --out STUDY --texts flexmix --seeds 0
    flexolmo study expert-training STUDY OUT --texts flexmix

Takes the anchor and the training windows of a study's seed 0, trains experts (gate fixed to 1) and
dense models with several optimizers, and scores them on the tuning split. Models that OUT already
holds are not trained again.
"""

import argparse
import dataclasses
import datetime
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

from flexolmo_jax.config import CONFIGS, AnchorTraining, load_config
from flexolmo_jax.model import FlexOlmo, load
from flexolmo_jax.studies.baselines.config import StudyConfig
from flexolmo_jax.studies.baselines.datasets import TOKENIZER, read_sequences
from flexolmo_jax.studies.baselines.models import trained
from flexolmo_jax.studies.baselines.rates import choose_rates
from flexolmo_jax.studies.baselines.scores import bits_per_byte, token_nats
from flexolmo_jax.studies.baselines.seed_stages import plan_seed
from flexolmo_jax.studies.baselines.shared_stages import SEQUENCES, WINDOWS, plan_shared
from flexolmo_jax.studies.engine.commands import PACKAGE
from flexolmo_jax.studies.engine.report import add_page_argument, machine, table, write_page
from flexolmo_jax.studies.engine.stages import Stage
from flexolmo_jax.training.stages.anchor import train_anchor
from flexolmo_jax.training.stages.expert import train_expert

OWNERS = ("math", "news")


class Recipe(NamedTuple):
    """What is trained, "expert" or "dense", and how."""

    kind: str
    optimizer: str
    rate: float


RECIPES = (
    *(Recipe("expert", "AdamW", rate) for rate in (1.5e-3, 3e-3, 6e-3)),
    *(Recipe("expert", "Muon", rate) for rate in (1e-2, 2e-2)),
    *(Recipe("dense", "AdamW", rate) for rate in (1.5e-3, 3e-3, 6e-3)),
    *(Recipe("dense", "Muon", rate) for rate in (3e-3, 1e-2)),
)
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "AdamW": {"name": "adamw", "adamw_learning_rate": None},
    "Muon": {"name": "muon", "adamw_learning_rate": 1.5e-3},
}
Bits = Mapping[str, float]  # bits per byte by owner


class Trial:
    """Models that start from a study's anchor.

    Args:
      config: the study's.
      study: its folder.
      out: where the models go.

    Raises:
      ValueError: the study has no anchor of seed 0.
    """

    def __init__(self, config: StudyConfig, study: Path, out: Path):
        def must_be_done(stages: Sequence[Stage]) -> None:
            if not all(stage.is_done for stage in stages):
                raise ValueError(
                    f"{study}: no anchor of seed 0 for --texts {config.texts}; run the study first"
                )

        self.out, self.shared = out, plan_shared(config, study.absolute())
        self.config = choose_rates(config, self.shared, must_be_done).config
        self.plan = plan_seed(self.config, self.shared, 0)
        anchor = self.plan.stages[0]
        must_be_done([anchor])
        self.anchor = anchor.folder / PACKAGE
        self.sequences = read_sequences(self.shared.sequences.folder / SEQUENCES)

    @classmethod
    def of(cls, args: argparse.Namespace) -> Self:
        """Of the options that `add_trial_arguments` adds."""
        config = load_config("full", StudyConfig, CONFIGS / "study")
        return cls(dataclasses.replace(config, texts=args.texts), args.study, args.out)

    def train(self, recipe: Recipe, owner: str) -> FlexOlmo:
        """Trains one model unless OUT holds it, and loads it; an expert beside the anchor."""
        train: Callable[..., None]
        training: Any
        inputs: dict[str, Any]
        if recipe.kind == "expert":
            train, training = train_expert, self.config.expert_training(0)
            # The expert is scored alone, so that its router rows do not matter: fit them to little.
            training = dataclasses.replace(training, fit_tokens=self.config.length)
            inputs = {"anchor": self.anchor, "name": owner}
        else:
            train, training = train_anchor, self.dense_training()
            inputs = {"start": self.anchor}
        optimizer = dataclasses.replace(
            training.optimizer, learning_rate=recipe.rate, **OPTIMIZERS[recipe.optimizer]
        )
        training = dataclasses.replace(training, optimizer=optimizer)
        name = f"{recipe.kind}_{recipe.optimizer}_{recipe.rate:g}_{owner}"
        package = self.package(name, train, owner, config=training, **inputs)
        return load(package, anchor=self.anchor if recipe.kind == "expert" else None)

    def dense_training(self) -> AnchorTraining:
        """The study's fine-tuning of the whole anchor."""
        return self.config.dense_training(str(self.shared.tokenizer.folder / TOKENIZER), 0)

    def text(self, domain: str) -> str:
        """The training text of a domain."""
        return str(self.shared.texts[domain].folder / "train.jsonl")

    def package(
        self, folder_name: str, train: Callable[..., None], domain: str, **inputs: Any
    ) -> Path:
        """The package of a training on a domain's text, which is run unless OUT holds it.

        Args:
          folder_name: of its folder in OUT.
          train: as in `models.trained`.
          domain: whose text; the training windows of owners are those of the study.
          inputs: of `train`, but for its text and its folders.
        """
        folder = self.out / folder_name
        if not (folder / PACKAGE).exists():
            folder.mkdir(parents=True, exist_ok=True)
            made = self.shared.windows.get(domain)  # not of public text
            windows = made.folder / WINDOWS if made else None
            trained(train, folder, data=self.text(domain), windows=windows, **inputs)
        return folder / PACKAGE

    def bits(self, model: FlexOlmo, owner: str, without: tuple[str, ...] = ()) -> float:
        """Bits per byte on the owner's tuning split."""
        sequences = self.sequences[f"tune.{owner}"]
        return bits_per_byte(token_nats(model, sequences, without=without), sequences.sizes)


def add_trial_arguments(parser: argparse.ArgumentParser, page: str) -> None:
    """The options of a study whose models start from a study's anchor; `page` is its page."""
    parser.add_argument("study", type=Path, help="the folder of a study of the full preset")
    parser.add_argument("out", type=Path, help="folder of the models")
    parser.add_argument("--texts", default="flexmix", help="as the study was given")
    add_page_argument(parser, page)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `flexolmo study expert-training`."""
    add_trial_arguments(parser, "expert_training.md")


def run(args: argparse.Namespace) -> None:
    """Trains and scores all models, and writes the page."""
    trial = Trial.of(args)
    anchor = {owner: trial.bits(load(trial.anchor), owner) for owner in OWNERS}
    scores: dict[Recipe, Bits] = {}
    for recipe in RECIPES:
        alone = ("public",) if recipe.kind == "expert" else ()
        scores[recipe] = {o: trial.bits(trial.train(recipe, o), o, alone) for o in OWNERS}
    expert = trial.config.expert
    tokens = expert.steps * expert.data.batch_size * expert.data.length
    write_page(args.page, make_page(anchor, scores, tokens))


def make_page(anchor: Bits, scores: Mapping[Recipe, Bits], tokens: int) -> list[str]:
    """The page.

    Args:
      anchor: scores of the anchor.
      scores: of each recipe.
      tokens: that each model was trained on.
    """
    best = {
        (kind, owner): min(bits[owner] for recipe, bits in scores.items() if recipe.kind == kind)
        for kind in ("expert", "dense")
        for owner in anchor
    }
    rows = [["anchor", "", "", *(f"{bits:.3f}" for bits in anchor.values())]]
    for recipe, bits in scores.items():
        cells = []
        for owner, value in bits.items():
            bold = "**" if value == best[recipe.kind, owner] else ""
            cells.append(f"{bold}{value:.3f} (-{anchor[owner] - value:.3f}){bold}")
        rows.append([recipe.kind, recipe.optimizer, f"{recipe.rate:g}", *cells])
    shares = []
    for owner, start in anchor.items():
        share = (start - best["expert", owner]) / (start - best["dense", owner])
        shares.append(f"{owner} {share:.0%}")
    cores = len(os.sched_getaffinity(0))
    return [
        "# What an expert learns, compared with a dense model",
        "",
        f"`flexolmo study expert-training STUDY OUT`, {datetime.date.today()}, {cores} of "
        f"{machine()}. The anchor and the training windows are those of the [full study]"
        f"(study.md)'s seed 0; every model sees the same {tokens:,} tokens of its owner's, in the "
        "same order. *expert*: a feed-forward network whose gate is fixed to 1, all else frozen; "
        "*dense*: every weight is trained. Bits per byte on the tuning split, and in brackets how "
        "much lower than the anchor's; the best of a row's kind is in bold.",
        "",
        *table(["trained", "optimizer", "learning rate", *anchor], rows, "llr"),
        "",
        f"What the best expert gains of what the best dense model gains: {', '.join(shares)}.",
        "",
        'With Muon (`optimizer.name="muon"`), what is no matrix is trained by AdamW at 0.0015.',
    ]
