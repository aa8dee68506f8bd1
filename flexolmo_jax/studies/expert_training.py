"""How an expert should be trained: what it gains of a dense fine-tune at equal tokens.

    flexolmo study configs/study/full.py --out STUDY --texts flexmix --seeds 0
    .venv/bin/python flexolmo_jax/studies/expert_training.py STUDY OUT --texts flexmix

Takes the anchor and the training windows of a study's seed 0, trains experts (gate fixed to 1) and
dense models with several optimizers, scores them on the tuning split, and writes
docs/expert_training.md. Models that are in OUT already are not trained again.
"""

import argparse
import dataclasses
import datetime
import os
import platform
from pathlib import Path

from flexolmo_jax.parallel.mesh import matrix_name  # noqa: E402
from flexolmo_jax.runtime.startup import leave_libtpu_alone

leave_libtpu_alone()  # before JAX is imported

import jax  # noqa: E402
import optax  # noqa: E402

from flexolmo_jax.config import CONFIGS, OptimizerConfig, load_config  # noqa: E402
from flexolmo_jax.model import FlexOlmo, load  # noqa: E402
from flexolmo_jax.studies.baselines.config import StudyConfig  # noqa: E402
from flexolmo_jax.studies.baselines.datasets import TOKENIZER, read_sequences  # noqa: E402
from flexolmo_jax.studies.baselines.models import PACKAGE, trained  # noqa: E402
from flexolmo_jax.studies.baselines.scores import bits_per_byte, token_nats  # noqa: E402
from flexolmo_jax.studies.baselines.seed_stages import plan_seed  # noqa: E402
from flexolmo_jax.studies.baselines.shared_stages import SEQUENCES, WINDOWS, plan_shared  # noqa: E402
from flexolmo_jax.training import loop  # noqa: E402
from flexolmo_jax.training.optimizer import make_optimizer, make_schedule  # noqa: E402
from flexolmo_jax.training.stages.anchor import train_anchor  # noqa: E402
from flexolmo_jax.training.stages.expert import train_expert  # noqa: E402

DOCS = Path(__file__).parent
OWNERS = ("math", "news")
TRIED = [  # what is trained, optimizer, learning rate
    *(("expert", "AdamW", rate) for rate in (1.5e-3, 3e-3, 6e-3)),
    *(("expert", "Muon", rate) for rate in (1e-2, 2e-2)),
    *(("dense", "AdamW", rate) for rate in (1.5e-3, 3e-3, 6e-3)),
    *(("dense", "Muon", rate) for rate in (3e-3, 1e-2)),
]
PAGE = """\
# What an expert learns of what a dense model learns

`python flexolmo_jax/studies/expert_training.py STUDY OUT`, {date}, {cores} of {all} cores ({machine}). The anchor
and the training windows are those of the [full study](study.md)'s seed 0; every model sees the same
{tokens:,} tokens of its owner's, in the same order. *expert*: a feed-forward network whose gate is
fixed to 1, all else frozen; *dense*: every weight is trained. Bits per byte on the tuning split,
and in brackets how much lower than the anchor's; the best of a row's kind is in bold.

| trained | optimizer | learning rate | {domains} |
| --- | --- | ---: | {columns} |
{rows}
What the best expert gains of what the best dense model gains: {shares}.

Muon (`optax.contrib.muon`) stands in for AdamW in this script alone; the package trains with AdamW.
"""


class Trial:
    """Models that go on from a study's anchor."""

    def __init__(self, study: Path, texts: str, out: Path):
        full = load_config("full", StudyConfig, CONFIGS / "study")
        self.config, self.out = dataclasses.replace(full, texts=texts), out
        self.shared = plan_shared(self.config, study.absolute())
        self.start = plan_seed(self.config, self.shared, 0).stages[0].folder / PACKAGE
        if not self.start.exists():
            raise SystemExit(f"{study}: no anchor of seed 0 for {texts}; run the study first")
        self.sequences = read_sequences(self.shared.sequences.folder / SEQUENCES)

    def train(self, what: str, optimizer: str, rate: float, owner: str) -> FlexOlmo:
        """One model, loaded; an expert's answers alone."""
        folder = self.out / f"{what}_{optimizer}_{rate:g}_{owner}"
        where = {
            "data": str(self.shared.texts[owner].folder / "train.jsonl"),
            "windows": self.shared.windows[owner].folder / WINDOWS,
        }
        if what == "expert":
            train, training = train_expert, self.config.expert_training(0)
            training = dataclasses.replace(training, fit_tokens=self.config.length)  # unused
            where |= {"anchor": self.start, "name": owner}
        else:
            tokenizer = self.shared.tokenizer.folder / TOKENIZER
            train, training = train_anchor, self.config.dense_training(str(tokenizer), 0)
            where |= {"start": self.start}
        asked = dataclasses.replace(training.optimizer, learning_rate=rate)
        training = dataclasses.replace(training, optimizer=asked)
        if not (folder / PACKAGE).exists():
            folder.mkdir(parents=True, exist_ok=True)
            loop.make_optimizer = muon if optimizer == "Muon" else make_optimizer
            trained(train, folder, config=training, **where)
        return load(folder / PACKAGE, anchor=self.start if what == "expert" else None)

    def bits(self, model: FlexOlmo, owner: str, without: tuple[str, ...] = ()) -> float:
        """On the owner's tuning split."""
        sequences = self.sequences[f"tune.{owner}"]
        return bits_per_byte(token_nats(model, sequences, without=without), sequences.sizes)


def muon(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Muon on the layers' matrices, AdamW at 1.5e-3 on the rest."""
    inputs = {"q": (1, (2, 3)), "k": (1, (2, 3)), "v": (1, (2, 3)), "o": ((1, 2), 3)}
    inputs |= dict.fromkeys(("gate", "up", "down"), (2, 3))  # [L, E, D, F], [L, E, F, D]

    def matrices(tree):
        def axes(path, _):
            found = inputs.get(matrix_name(path))
            return found and optax.contrib.MuonDimensionNumbers(*found)

        return jax.tree_util.tree_map_with_path(axes, tree)

    rest = make_schedule(dataclasses.replace(config, learning_rate=1.5e-3), steps)
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.contrib.muon(
            make_schedule(config, steps), muon_weight_dimension_numbers=matrices,
            adam_learning_rate=rest, consistent_rms=0.2,
        ),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("study", type=Path, help="the folder of a study of the full preset")
    parser.add_argument("out", type=Path)
    parser.add_argument("--texts", default="flexmix", help="as the study was given")
    args = parser.parse_args()
    trial = Trial(args.study, args.texts, args.out)
    base = {owner: trial.bits(load(trial.start), owner) for owner in OWNERS}
    found = {}
    for one in TRIED:
        alone = ("public",) if one[0] == "expert" else ()
        found[one] = {o: trial.bits(trial.train(*one, o), o, alone) for o in OWNERS}
    best = {(k, o): min(found[one][o] for one in TRIED if one[0] == k)
            for k in ("expert", "dense") for o in OWNERS}  # fmt: skip
    rows = f"| anchor |  |  | {' | '.join(f'{base[o]:.3f}' for o in OWNERS)} |\n"
    for one in TRIED:
        cells = []
        for owner, value in found[one].items():
            bold = "**" if value == best[one[0], owner] else ""
            cells.append(f"{bold}{value:.3f} (-{base[owner] - value:.3f}){bold}")
        rows += f"| {one[0]} | {one[1]} | {one[2]:g} | {' | '.join(cells)} |\n"
    shares = []
    for o in OWNERS:
        kept = (base[o] - best["expert", o]) / (base[o] - best["dense", o])
        shares.append(f"{o} {kept:.0%}")
    expert = trial.config.expert
    page = PAGE.format(
        date=datetime.date.today(), cores=len(os.sched_getaffinity(0)), all=os.cpu_count(),
        machine=platform.machine(),
        tokens=expert.steps * expert.data.batch_size * expert.data.length,
        domains=" | ".join(OWNERS), columns=" | ".join("---:" for _ in OWNERS), rows=rows,
        shares=", ".join(shares),
    )  # fmt: skip
    (DOCS / "expert_training.md").write_text(page)
    print(page)


if __name__ == "__main__":
    main()
