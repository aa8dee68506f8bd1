"""Attackers and honest experts, examined alike: who is caught by which check, and who passes.

    flexolmo study admission flexolmo_demo OUT

DEMO is the folder that `flexolmo demo` wrote. Below OUT, every training, examination and
measurement of harm is a stage, and runs once: one to two hours in all. Writes admission.json, a
figure, and the page docs/admission_attacks.md.
"""

import argparse
import datetime
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flexolmo_jax.admission.policy import Policy
from flexolmo_jax.data.proxies import pick_proxies
from flexolmo_jax.studies.admission import attackers
from flexolmo_jax.studies.admission.attackers import ATTACKS, VICTIM
from flexolmo_jax.studies.admission.cohort import HONEST, make_cohort
from flexolmo_jax.studies.admission.examined import BYTES, examined
from flexolmo_jax.studies.admission.harm import Bystanders, bystanders, harm
from flexolmo_jax.studies.admission.page import make_page
from flexolmo_jax.studies.demo import OWNERS
from flexolmo_jax.studies.engine.commands import PACKAGE
from flexolmo_jax.studies.engine.report import (
    add_page_argument,
    add_results_argument,
    machine,
    without_paths,
    write_json,
    write_page,
)
from flexolmo_jax.studies.engine.stages import Stage, in_order, run_stages, value_stage

PROXIES = "proxies"  # in a stage's folder


class Plan:
    """The stages of the study.

    Args:
      demo: the folder of a demo.
      root: the study's folder.
    """

    def __init__(self, demo: Path, root: Path):
        self.root = root
        self.cohort = make_cohort(demo, root)
        self.anchor = demo.absolute() / "anchor"
        self.owners = {name: self.cohort.packages[name] for name in OWNERS}
        self.trained = attackers.training_stages(self.cohort.demo)
        self.proxies = Stage("proxies", root, list(OWNERS), (), self._pick_proxies)
        self.attackers = {name: self._attacker(name) for name in ATTACKS}
        packages: dict[str, tuple[Path, Stage | None]] = {
            name: (path, None) for name, path in self.cohort.packages.items()
        }
        packages |= {name: (own.folder / PACKAGE, own) for name, own in self.attackers.items()}
        self.examined = {name: self._examined(name, *own) for name, own in packages.items()}
        self.harm = {name: self._harm(name, *own) for name, own in packages.items()}

    @functools.cached_property
    def scene(self) -> attackers.Scene:
        """What attackers have; read once."""
        return attackers.open_scene(self.cohort.demo, self.trained, self.owners[VICTIM])

    @functools.cached_property
    def bystanders(self) -> Bystanders:
        """The model that every newcomer joins; measured once."""
        return bystanders(self.anchor, self.owners, self.root / "bystanders")

    def _pick_proxies(self, folder: Path) -> None:
        for name in OWNERS:
            file = folder / PROXIES / f"{name}.jsonl"
            file.unlink(missing_ok=True)  # of an interrupted run
            pick_proxies(f"corpus:{name}", "corpus:public", file)

    def _attacker(self, name: str) -> Stage:
        attack = ATTACKS[name]
        is_copy = attack.kind == attackers.COPIED

        def work(folder: Path) -> None:
            like = self.owners[VICTIM] if is_copy else self.trained["own"].folder / PACKAGE
            if not (folder / PACKAGE).exists():
                attackers.write_attacker(name, attack, self.scene, like, folder / PACKAGE)

        needs = tuple(self.trained[one] for one in ("own", *attack.uses))
        return Stage(f"attackers/made/{name}", self.root, attack.what, needs, work)

    def _examined(self, name: str, package: Path, made: Stage | None) -> Stage:
        others = [path for other, path in self.cohort.packages.items() if other != name]
        served = [path for owner, path in self.owners.items() if owner != name]

        def compute(folder: Path) -> Any:
            texts = {n: self.proxies.folder / PROXIES / f"{n}.jsonl" for n in OWNERS if n != name}
            domains = {own: str(file) for own, file in texts.items()}
            return examined(
                package, self.anchor, others, served, domains, Policy(), folder / "merged"
            )

        needs = [*self.cohort.stages, self.proxies, *([made] if made else [])]
        return value_stage(f"examined/{name}", self.root, needs, compute, bytes=BYTES)

    def _harm(self, name: str, package: Path, made: Stage | None) -> Stage:
        needs = [*self.cohort.stages, *([made] if made else [])]
        return value_stage(
            f"harm/{name}", self.root, needs,
            lambda folder: harm(name, package, self.bystanders, folder),
        )  # fmt: skip

    def run(self) -> dict[str, Any]:
        """Runs what is missing; returns what admission.json holds."""
        stages = in_order([*self.examined.values(), *self.harm.values()])
        run_stages(stages)
        about = {
            "machine": f"{machine()}, {datetime.date.today()}",
            "minutes": round(sum(stage.seconds for stage in stages) / 60),
            "honest": {name: _described(name) for name in self.cohort.packages},
            "attackers": {
                name: {"kind": own.kind, "level": own.level, "what": own.what}
                for name, own in ATTACKS.items()
            },
        }
        found: Mapping[str, Mapping[str, Stage]] = {"examined": self.examined, "harm": self.harm}
        values = {
            kind: {name: stage.result for name, stage in stages.items()}
            for kind, stages in found.items()
        }
        return without_paths({**about, **values}, self.root, self.anchor.parent)


def _described(name: str) -> dict[str, Any]:
    """How an honest expert was made; the demo's have no entry of their own."""
    own = HONEST.get(name)
    if own is None:
        return {"text": name, "config": "demo_expert", "words": [], "made": None}
    return {**own._asdict(), "words": list(own.words)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `flexolmo study admission`."""
    parser.add_argument("demo", type=Path, help="the folder of a demo")
    parser.add_argument("out", type=Path, help="folder of the stages")
    add_page_argument(parser, "admission_attacks.md")
    add_results_argument(parser)


def run(args: argparse.Namespace) -> None:
    """Runs the study, and writes its JSON, figure and page."""
    root = args.out.absolute()
    root.mkdir(parents=True, exist_ok=True)
    report = Plan(args.demo, root).run()
    write_json(args.results / "admission.json", report)
    write_page(args.page, make_page(report, args.results, args.page))
