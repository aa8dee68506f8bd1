"""What audits find: extraction, membership and removal, for experts with and without privacy.

    flexolmo study privacy-audits OUT

Each training and each audit is a stage below OUT, and runs once. Writes privacy_audits.json and the
tables of docs/privacy.md; `--size smallest` runs the same path in minutes, as a test, and prints
the tables only.
"""

import argparse
import dataclasses
import datetime
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flexolmo_jax.audits import control, extraction
from flexolmo_jax.audits.extraction import Passage, Protocol
from flexolmo_jax.audits.findings import CONTROLS
from flexolmo_jax.audits.runs import run_membership, run_removal
from flexolmo_jax.audits.statistics import as_json
from flexolmo_jax.audits.subjects import trained_documents
from flexolmo_jax.data.proxies import pick_proxies
from flexolmo_jax.evaluation.split import Split
from flexolmo_jax.federation.merge import merge
from flexolmo_jax.federation.package import read_manifest
from flexolmo_jax.model import load
from flexolmo_jax.studies.engine.commands import PACKAGE, RUN, training_stage
from flexolmo_jax.studies.engine.report import (
    add_page_argument,
    add_results_argument,
    machine,
    without_paths,
    write_json,
    write_part,
)
from flexolmo_jax.studies.engine.stages import Stage, discard, in_order, run_stages, value_stage
from flexolmo_jax.studies.privacy_audits_page import (
    extraction_part,
    membership_part,
    removal_part,
)

OWNER, DATA = "math", "corpus:math"
OTHER = "code"  # the owner with which the audited expert is merged
HELDOUT = 0.1
MERGED, PROXIES = "merged", "proxies"  # in stages' folders
Words = tuple[str, ...]
Values = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Size:
    """How much is trained and tried.

    Attributes:
      canaries: of each run.
      prefixes: passages that are tried.
      epsilons: of the private experts.
      anchor: options for `train anchor demo_anchor`.
      non_private: options for `train expert demo_expert`.
      private: options for `train expert demo_private_expert`.
      other: options for the other owner's expert.
    """

    canaries: int
    prefixes: int
    epsilons: Words
    anchor: Words = ()
    non_private: Words = ("--steps", "1400")
    private: Words = ("--dp-windows", "2")
    other: Words = ()


SIZES = {
    "smallest": Size(
        20, 50, ("8",), ("--steps", "60"), ("--steps", "600"),
        ("--dp-windows", "2", "--steps", "30"), ("--steps", "30"),
    ),
    "ci": Size(200, 1000, ("8", "1")),
}  # fmt: skip


class AuditPlan:
    """The trainings and audits of a size.

    Args:
      root: the study's folder.
      size: what is trained and tried.
    """

    def __init__(self, root: Path, size: Size):
        self.root, self.size = root, size
        anchor = ["anchor", "demo_anchor", *size.anchor]
        self.anchor = training_stage("anchor", root, anchor, data="corpus:public")
        own = ["--name", OWNER, "--canaries", str(size.canaries)]
        non_private = self._expert("non_private", "demo_expert", [*own, *size.non_private])
        self.experts = {"no privacy": non_private}
        for epsilon in size.epsilons:
            words = [*own, "--dp-epsilon", epsilon, *size.private]
            self.experts[f"epsilon {epsilon}"] = self._expert(
                f"private_{epsilon}", "demo_private_expert", words, is_private=True
            )
        other = ["expert", "demo_expert", "--name", OTHER, *size.other]
        reads = {"--anchor": (self.anchor, PACKAGE)}
        self.other = training_stage(OTHER, root, other, reads, data=f"corpus:{OTHER}")
        self.merged = {title: self._merged(title) for title in self.experts}
        self.proxies = Stage("proxies", root, [OWNER, OTHER], (), self._pick_proxies)
        model = self.merged["no privacy"]
        reads = {"--model": (model, MERGED), "--data": (self.proxies, PROXIES)}
        self.tuned = training_stage("tuned", root, ["router", "demo_router"], reads)

    def _expert(self, name: str, config: str, words: list[str], is_private: bool = False) -> Stage:
        reads = {"--anchor": (self.anchor, PACKAGE)}
        words = ["expert", config, *words]
        return training_stage(name, self.root, words, reads, data=DATA, is_private=is_private)

    def _merged(self, title: str) -> Stage:
        needs = (self.anchor, self.experts[title], self.other)

        def work(folder: Path) -> None:
            discard(folder / MERGED)  # of an interrupted run
            anchor, *experts = (stage.folder / PACKAGE for stage in needs)
            # By rows, which are tuned below.
            merge(anchor, experts, folder / MERGED, evidence=None)

        return Stage(f"merged/{title.replace(' ', '_')}", self.root, None, needs, work)

    def _pick_proxies(self, folder: Path) -> None:
        for name in (OWNER, OTHER):
            file = folder / PROXIES / f"{name}.jsonl"
            file.unlink(missing_ok=True)  # of an interrupted run
            pick_proxies(f"corpus:{name}", "corpus:public", file)

    @functools.cached_property
    def protocol(self) -> Protocol:
        """The extraction protocol, as far as the model's length allows."""
        model = load(self.merged["no privacy"].folder / MERGED)
        return Protocol().within(model.config.max_length)

    @functools.cached_property
    def documents(self) -> list[list[int]]:
        """Ids of the documents that the owner's experts were trained on."""
        model = load(self.merged["no privacy"].folder / MERGED)
        return trained_documents(model, DATA, Split(HELDOUT), "text")

    def extraction(self) -> dict[str, Stage]:
        """The extraction audit of each model, by title."""
        off = f"merged, {OWNER} switched off"
        stages = {"anchor": self._extraction("anchor", self.anchor, PACKAGE)}
        for title, expert in self.experts.items():
            alone, merged = f"expert alone, {title}", f"merged, {title}"
            stages[alone] = self._extraction(alone, expert, PACKAGE, only=[OWNER])
            stages[merged] = self._extraction(merged, self.merged[title], MERGED)
        stages[off] = self._extraction(off, self.merged["no privacy"], MERGED, without=[OWNER])
        return stages | {title: self._control(title, what) for title, what in CONTROLS.items()}

    def _extraction(self, title: str, audited: Stage, file: str, **experts: Any) -> Stage:
        reference = self.merged["no privacy"]  # its tokenizer and length choose the passages

        def compute(folder: Path) -> Values:
            path = audited.folder / file
            passages = extraction.pick_passages(
                self.documents, self.size.prefixes, self.protocol, seed=0
            )
            return as_json(
                extraction.extract(
                    load(path, anchor=self.anchor.folder / PACKAGE), passages, self.protocol,
                    folder / "state.json", title=title,
                    described={"model": read_manifest(path)["digest"], **experts}, **experts,
                )
            )  # fmt: skip

        name = f"extraction/{title.replace(' ', '_').replace(',', '')}"
        needs = dict.fromkeys((self.anchor, audited, reference))
        return value_stage(
            name, self.root, needs, compute, prefixes=self.size.prefixes, file=file, **experts
        )

    def _control(self, title: str, what: control.What) -> Stage:
        reference = self.merged["no privacy"]

        def compute(folder: Path) -> Values:
            memorized = control.control_documents(self.documents, self.protocol.length)
            model = control.train_control(
                what, self.anchor.folder / PACKAGE, memorized, self.protocol.length, folder / RUN
            )
            return as_json(
                extraction.extract(
                    model, self._control_passages(memorized), self.protocol,
                    folder / "state.json", title=title, described={"control": what},
                )
            )  # fmt: skip

        return value_stage(
            f"extraction/control_{what}", self.root, (self.anchor, reference), compute
        )

    def _control_passages(self, memorized: list[Any]) -> list[Passage]:
        count = min(control.PASSAGES, control.MORE * len(memorized))
        return extraction.pick_passages(memorized, count, self.protocol, seed=0)

    def membership(self) -> dict[str, Stage]:
        """The membership audit of each expert, by title."""

        def stage(title: str, expert: Stage) -> Stage:
            return value_stage(
                f"membership/{title.replace(' ', '_')}", self.root, (expert, self.anchor),
                lambda _: run_membership(
                    expert.folder / PACKAGE, expert.folder / RUN, self.anchor.folder / PACKAGE
                ),
            )  # fmt: skip

        return {title: stage(title, expert) for title, expert in self.experts.items()}

    def removal(self) -> dict[str, Stage]:
        """The removal audit of the merged model, and of the one whose router was tuned."""
        expert, prefixes = self.experts["no privacy"], self.size.prefixes

        def stage(name: str, model: Stage, file: str) -> Stage:
            return value_stage(
                f"removal/{name}", self.root, (model, expert),
                lambda _: run_removal(
                    model.folder / file, OWNER, expert.folder / RUN, DATA, prefixes=prefixes,
                    heldout=HELDOUT,
                ),
                prefixes=prefixes,
            )  # fmt: skip

        return {
            "merged": stage("merged", self.merged["no privacy"], MERGED),
            "merged, router tuned": stage("tuned", self.tuned, PACKAGE),
        }

    def run(self) -> Values:
        """Trains and audits everything; returns what privacy_audits.json holds."""
        audits: Mapping[str, Mapping[str, Stage]] = {
            "extraction": self.extraction(),
            "membership": self.membership(),
            "removal": self.removal(),
        }
        run_stages(in_order(stage for kind in audits.values() for stage in kind.values()))
        report = {
            "setting": dataclasses.asdict(self.size),
            "machine": f"{machine()}, {datetime.date.today()}",
            **{
                kind: {title: stage.result for title, stage in stages.items()}
                for kind, stages in audits.items()
            },
        }
        return without_paths(report, self.root)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `flexolmo study privacy-audits`."""
    parser.add_argument("out", type=Path, help="folder of the stages")
    parser.add_argument("--size", choices=SIZES, default="ci")
    add_page_argument(parser, "privacy.md")
    add_results_argument(parser)


def run(args: argparse.Namespace) -> None:
    """Runs the study, and writes its parts of the page."""
    root = args.out.absolute()
    root.mkdir(parents=True, exist_ok=True)
    report = AuditPlan(root, SIZES[args.size]).run()
    is_trial = args.size == "smallest"
    if not is_trial:
        write_json(args.results / "privacy_audits.json", report)
    for mark, lines in make_parts(report).items():
        write_part(None if is_trial else args.page, mark, lines)


def make_parts(report: Values) -> dict[str, list[str]]:
    """The parts of the page, by their mark."""
    return {
        "audit extraction": extraction_part(report["extraction"], DATA, report["machine"]),
        "audit membership": membership_part(report["membership"], report["setting"]["canaries"]),
        "audit removal": removal_part(report["removal"]),
    }
