"""Honest experts of many kinds, trained as owners would: those of a demo, and others beside it.

They differ in text, share of it, seed, steps, optimizer, ranks and heads; some are compressed,
pruned, or trained with differential privacy. Training each is a stage of its own, and runs once.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from flexolmo_jax.data.sources import Document, read_documents
from flexolmo_jax.federation.compress import compress
from flexolmo_jax.federation.package import read_manifest
from flexolmo_jax.studies.baselines.datasets import write_documents
from flexolmo_jax.studies.demo import OWNERS
from flexolmo_jax.studies.engine.commands import PACKAGE, training_stage
from flexolmo_jax.studies.engine.stages import Stage
from flexolmo_jax.training.prune import prune

ANCHOR = "anchor"  # in the folder of the demo's stage
Words = tuple[str, ...]


class Honest(NamedTuple):
    """An expert to train.

    Attributes:
      text: corpora joined by "+", each whole or a half of its groups: "math", "news/0+code/1".
      words: options of `flexolmo train expert`.
      config: the preset.
      made: what the owner hands out in place of the trained package.
    """

    text: str
    words: Words
    config: str = "demo_expert"
    made: Mapping[str, int] | None = None


def _steps(steps: int, seed: int, *more: str) -> Words:
    return ("--steps", str(steps), "--seed", str(seed), *more)


ADAMW = ("--optimizer.name", "adamw", "--optimizer.learning-rate", "3e-3",
         "--optimizer.adamw-learning-rate", "None")  # fmt: skip
NO_HEADS = ("--head-rank", "0", "--evidence-rank", "0")
PRIVATE = ("--dp-epsilon", "8", "--dp-windows", "2", "--data.batch-size", "64")
HONEST = {
    "academic": Honest("academic", _steps(250, 1)),
    "news": Honest("news", _steps(250, 2)),
    "math_again": Honest("math", _steps(250, 9)),
    "code_0": Honest("code/0", _steps(150, 3)),
    "code_1": Honest("code/1", _steps(150, 4, "--optimizer.learning-rate", "7e-3")),
    "math_0": Honest("math/0", _steps(150, 5, "--optimizer.learning-rate", "2.5e-2")),
    "math_1": Honest("math/1", _steps(60, 6, *NO_HEADS)),
    "educational_0": Honest("educational/0", _steps(100, 7)),
    "educational_1": Honest("educational/1", _steps(120, 8, "--router", "lda")),
    "creative_0": Honest("creative/0", _steps(150, 10, *ADAMW)),
    "creative_1": Honest("creative/1", _steps(300, 11, "--optimizer.weight-decay", "0.1")),
    "academic_0": Honest("academic/0", _steps(150, 12, "--head-rank", "0")),
    "academic_1": Honest("academic/1", _steps(150, 13, *NO_HEADS)),
    "news_0": Honest("news/0", _steps(150, 14, "--rank", "16")),
    "news_1": Honest("news/1", _steps(150, 15, "--rank", "48", "--evidence-rank", "32")),
    "mixed": Honest("news/0+academic/1", _steps(150, 16)),
    "code_low_rank": Honest("code/1", _steps(120, 17), made={"rank": 16}),
    "news_int8": Honest("news/1", _steps(120, 18), made={"bits": 8}),
    "academic_int4": Honest("academic/0", _steps(120, 19), made={"bits": 4}),
    "creative_narrow": Honest("creative/0", _steps(120, 20), made={"width": 192}),
    "math_private": Honest("math", _steps(30, 21, *PRIVATE), "demo_private_expert"),
    "educational_private": Honest(
        "educational", _steps(30, 22, *PRIVATE, "--dp-unit", "sequence"), "demo_private_expert"
    ),
}  # fmt: skip


class Cohort(NamedTuple):
    """The stages that make a cohort.

    Attributes:
      demo: has the anchor, as folder/anchor.
      trained: every training, by name; those of compressed and pruned experts too.
      packages: of every honest expert, by name, the demo's first; they exist once `stages` ran.
      stages: to run.
    """

    demo: Stage
    trained: dict[str, Stage]
    packages: dict[str, Path]
    stages: list[Stage]


def make_cohort(
    demo: Path, root: Path, wanted: Mapping[str, Honest] = HONEST, owners: Words = OWNERS
) -> Cohort:
    """The stages of the honest experts.

    Args:
      demo: the folder of a demo: anchor, experts/OWNER.
      root: the study's folder.
      wanted: the experts to train.
      owners: whose packages of the demo are in the cohort, too.
    """
    anchor = demo_stage(demo, root)
    trained = {
        name: train_stage(f"honest/{name}", name, own, anchor, write_text(own.text, root))
        for name, own in wanted.items()
    }
    packages = {name: demo.absolute() / "experts" / name for name in owners}
    stages = [anchor, *trained.values()]
    for name, own in wanted.items():
        last = trained[name]
        if own.made:
            last = _made_stage(name, own, trained[name], anchor, write_text(own.text, root))
            stages.append(last)
        packages[name] = last.folder / PACKAGE
    return Cohort(anchor, trained, packages, stages)


def demo_stage(demo: Path, root: Path) -> Stage:
    """The demo's anchor as a stage that others need: it depends on the anchor's digest."""

    def work(folder: Path) -> None:
        link = folder / ANCHOR
        link.unlink(missing_ok=True)  # of an interrupted run
        link.symlink_to((demo / "anchor").absolute(), target_is_directory=True)

    digest = read_manifest(demo / "anchor", kind="anchor")["digest"]
    return Stage("demo", root, {"anchor": digest}, (), work)


def train_stage(stage: str, name: str, own: Honest, anchor: Stage, text: Path) -> Stage:
    """The training of an expert, by the command line.

    Args:
      stage: its name.
      name: of the expert.
      own: how it is trained.
      anchor: what `demo_stage` made.
      text: a file of it.
    """
    words = ["expert", own.config, "--name", name, *own.words]
    is_private = "--dp-epsilon" in own.words
    reads = {"--anchor": (anchor, ANCHOR)}
    return training_stage(stage, anchor.root, words, reads, data=str(text), is_private=is_private)


def _made_stage(name: str, own: Honest, trained: Stage, anchor: Stage, text: Path) -> Stage:
    made = own.made or {}

    def work(folder: Path) -> None:
        place = folder / PACKAGE
        if place.exists():
            return
        source, base = trained.folder / PACKAGE, anchor.folder / ANCHOR
        if "width" in made:
            prune(source, place, made["width"], str(text), base)
        else:
            compress(source, place, anchor=base, rank=made.get("rank"), bits=made.get("bits"))

    return Stage(f"made/{name}", anchor.root, dict(made), (trained, anchor), work)


def write_text(text: str, root: Path, change: Callable[[str], str] = str, tag: str = "") -> Path:
    """Writes a text as root/texts/NAME.jsonl, if it is not there.

    Args:
      text: as in `Honest`.
      root: the study's folder.
      change: of every document's text.
      tag: of the file, if there is a change.
    """
    name = text.replace("/", "_") + (f"-{tag}" if tag else "")
    file = root / "texts" / f"{name}.jsonl"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_documents(file, [d._replace(text=change(d.text)) for d in documents_of(text)])
    return file


def documents_of(text: str) -> list[Document]:
    """The documents of a text, as `Honest.text` names it; groups stay together in a half."""
    found = []
    for part in text.split("+"):
        corpus, _, half = part.partition("/")
        numbers: dict[str, int] = {}
        for document in read_documents(f"corpus:{corpus}"):
            number = numbers.setdefault(document.group, len(numbers))
            if not half or number % 2 == int(half):
                found.append(document)
    return found
