"""The stages of a study that train the models of one seed, or fit their router rows."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flexolmo_jax.config import ExpertTraining
from flexolmo_jax.storage.files import replace_file
from flexolmo_jax.studies.baselines import models
from flexolmo_jax.studies.baselines.config import Router, StudyConfig
from flexolmo_jax.studies.baselines.datasets import TOKENIZER
from flexolmo_jax.studies.baselines.families import Family, Packages
from flexolmo_jax.studies.baselines.models import merged, trained
from flexolmo_jax.studies.baselines.shared_stages import EMBEDDING, POOL, WINDOWS, Shared
from flexolmo_jax.studies.engine.commands import PACKAGE
from flexolmo_jax.studies.engine.stages import Stage
from flexolmo_jax.training.stages.anchor import train_anchor
from flexolmo_jax.training.stages.evidence import train_evidence
from flexolmo_jax.training.stages.expert import train_expert
from flexolmo_jax.training.stages.joint import train_jointly
from flexolmo_jax.training.stages.router import train_router


@dataclasses.dataclass
class Seed:
    """One seed of a study, and its stages as far as they are planned, in order."""

    config: StudyConfig
    shared: Shared
    seed: int
    stages: list[Stage] = dataclasses.field(default_factory=list)

    def add(
        self, name: str, needs: Sequence[Stage], work: Callable[[Path], None], **made_from: Any
    ) -> Stage:
        """Adds a stage; arguments as in `Stage`."""
        root = self.shared.pool.root
        stage = Stage(f"seed{self.seed}/{name}", root, made_from, tuple(needs), work)
        self.stages.append(stage)
        return stage

    def train(
        self, name: str, needs: Sequence[Stage], train: Callable, training: Any, /, **inputs: Any
    ) -> Stage:
        """Adds a stage that runs a training function."""
        return self.add(
            name, needs,
            lambda folder: trained(train, folder, config=training, **inputs),
            training=config_values(training),
        )  # fmt: skip

    @property
    def tokenizer(self) -> str:
        """The file of the study's tokenizer."""
        return str(self.shared.tokenizer.folder / TOKENIZER)

    def text(self, domain: str) -> str:
        """The training text of a domain."""
        return str(self.shared.texts[domain].folder / "train.jsonl")

    def windows(self, owner: str) -> Path:
        """The training windows of an owner."""
        return self.shared.windows[owner].folder / WINDOWS


@dataclasses.dataclass(frozen=True)
class Trained:
    """The trainings of one seed; those in mappings by owner, packages by the kind of their rows.

    Attributes:
      anchor: the public model.
      dense: whole models, fine-tuned from the anchor.
      experts: in our form without heads, routed by rows.
      headed: with heads; empty if the study has none.
      paper, plain: experts in the paper's form; plain ones without domain embedding.
      rows: packages of the experts.
      btx, btx_rows: the averaged backbone of the dense models, and packages of their networks.
      uncoordinated: packages of the dense models' networks, beside the anchor.
    """

    anchor: Stage
    dense: Mapping[str, Stage]
    experts: Mapping[str, Stage]
    headed: Mapping[str, Stage]
    paper: Mapping[str, Stage]
    plain: Mapping[str, Stage]
    rows: Mapping[str, Packages]
    btx: Stage
    btx_rows: Mapping[str, Packages]
    uncoordinated: Packages

    @property
    def anchor_path(self) -> Path:
        """The anchor's package."""
        return package(self.anchor)

    @property
    def btx_anchor(self) -> Path:
        """What BTX's packages stand beside."""
        return btx_anchor(self.btx)


def plan_trainings(seed: Seed) -> Trained:
    """Adds the trainings of one seed."""
    config, owners = seed.config, seed.config.owners
    anchor = _anchor(seed)
    dense = {name: _dense(seed, anchor, name) for name in owners}
    experts = {name: _expert(seed, anchor, name) for name in owners}
    headed = {name: _headed(seed, anchor, name) for name in owners if config.has_heads}
    paper = {name: _paper(seed, anchor, name, "paper", True) for name in owners}
    plain = {name: _paper(seed, anchor, name, "plain", False) for name in owners}
    rows: dict[str, Packages] = {config.expert.router: packages_of(experts)}
    for router in config.routers:
        if router not in rows:
            rows[router] = _refitted(seed, "rows", router, anchor, package(anchor), experts, False)
    btx = _btx(seed, anchor, dense)
    btx_rows: dict[str, Packages] = {
        router: _refitted(seed, "btx_rows", router, btx, btx_anchor(btx), dense, True)
        for router in config.routers
    }
    uncoordinated = _refitted(
        seed, "uncoordinated", config.expert.router, anchor, package(anchor), dense, True
    )
    return Trained(anchor, dense, experts, headed, paper, plain, rows, btx, btx_rows, uncoordinated)


def trainings_of(seed: Seed, kind: str, owners: Sequence[str]) -> dict[str, Stage]:
    """Adds the trainings of one kind alone, and the anchor's.

    Args:
      seed: of the study.
      kind: one of `config.KINDS`.
      owners: whose, of kinds that each owner trains.

    Returns:
      by owner; a kind that is trained once is of "public".
    """
    anchor = _anchor(seed)
    if kind == "anchor":
        return {"public": anchor}
    if kind == "unrestricted":
        return {"public": unrestricted_stage(seed, anchor, min(seed.config.unrestricted_flops))}
    train = {"dense": _dense, "expert": _expert, "headed": _headed}[kind]
    return {name: train(seed, anchor, name) for name in owners}


def package(stage: Stage) -> Path:
    """The package that a training leaves."""
    return stage.folder / PACKAGE


def packages_of(trainings: Mapping[str, Stage]) -> Packages:
    """The packages that some trainings leave."""
    places = {name: package(stage) for name, stage in trainings.items()}
    return Packages(places, tuple(trainings.values()))


def btx_folder(btx: Stage) -> Path:
    """The folder of BTX's anchor and packages."""
    return btx.folder / "btx"


def btx_anchor(btx: Stage) -> Path:
    """The averaged backbone."""
    return btx_folder(btx) / "anchor"


def _anchor(seed: Seed) -> Stage:
    shared = seed.shared
    embedding = shared.embeddings["public"]
    training = dataclasses.replace(
        seed.config.anchor_training(seed.tokenizer, seed.seed),
        domain_embedding=str(embedding.folder / EMBEDDING),
    )
    needs = (shared.texts["public"], shared.tokenizer, embedding)
    return seed.train("anchor", needs, train_anchor, training, data=seed.text("public"))


def _dense(seed: Seed, anchor: Stage, owner: str) -> Stage:
    training = seed.config.dense_training(seed.tokenizer, seed.seed)
    return seed.train(
        f"dense/{owner}", (anchor, seed.shared.windows[owner]), train_anchor, training,
        data=seed.text(owner), windows=seed.windows(owner), start=package(anchor),
    )  # fmt: skip


def _expert(seed: Seed, anchor: Stage, owner: str) -> Stage:
    return _beside(seed, anchor, owner, "expert", seed.config.expert_training(seed.seed))


def _headed(seed: Seed, anchor: Stage, owner: str) -> Stage:
    return _beside(seed, anchor, owner, "headed", seed.config.headed_training(seed.seed))


def _beside(
    seed: Seed,
    anchor: Stage,
    owner: str,
    kind: str,
    training: ExpertTraining,
    more_needs: Sequence[Stage] = (),
) -> Stage:
    """An owner's expert, trained beside the anchor."""
    return seed.train(
        f"{kind}/{owner}", (anchor, seed.shared.windows[owner], *more_needs), train_expert,
        training,
        data=seed.text(owner), windows=seed.windows(owner), anchor=package(anchor), name=owner,
    )  # fmt: skip


def _paper(seed: Seed, anchor: Stage, owner: str, kind: str, has_embedding: bool) -> Stage:
    embedding = seed.shared.embeddings[owner]
    row = str(embedding.folder / EMBEDDING) if has_embedding else None
    training = seed.config.paper_training(row, seed.seed)
    return _beside(seed, anchor, owner, kind, training, [embedding] if has_embedding else [])


def _refitted(
    seed: Seed,
    kind: str,
    router: Router,
    anchor: Stage,
    anchor_path: Path,
    experts: Mapping[str, Stage],
    are_dense: bool,
) -> Packages:
    """Rows that owners fit alone, for experts that have other rows or none."""
    training = dataclasses.replace(seed.config.expert_training(seed.seed), router=router)
    places = {name: package(stage) for name, stage in experts.items()}
    texts = {domain: stage.folder for domain, stage in seed.shared.texts.items()}
    windows = {owner: seed.windows(owner) for owner in seed.shared.windows}

    def work(folder: Path) -> None:
        if are_dense:
            networks = models.dense_experts(places)
        else:
            networks = models.experts_of(anchor_path, places)
        models.refit(anchor_path, networks, texts, windows, training, folder)

    needs = (anchor, *experts.values(), *(seed.shared.windows[name] for name in experts))
    fit = {name: getattr(training, name) for name in ("fit_tokens", "fit_prior", "fit_ridge")}
    stage = seed.add(f"{kind}/{router}", needs, work, router=router, **fit)
    return Packages({name: stage.folder / name for name in experts}, (stage, *needs))


def _btx(seed: Seed, anchor: Stage, dense: Mapping[str, Stage]) -> Stage:
    places = {name: package(stage) for name, stage in dense.items()}

    def work(folder: Path) -> None:
        models.write_btx(package(anchor), places, folder / "btx")

    return seed.add("btx", (anchor, *dense.values()), work)


def headed_btx(seed: Seed, models_of_seed: Trained) -> tuple[Path, Packages]:
    """Adds BTX with heads, for evidence routing: its anchor, and the packages.

    All evidence heads are trained beside the averaged backbone, on as many tokens as those of
    experts with heads, and the public one as the anchor's. The others begin as the public one, as
    those of experts with heads do.
    """
    config, dense = seed.config, models_of_seed.dense
    public = seed.train(
        "btx_evidence/public", [models_of_seed.btx, seed.shared.texts["public"]], train_evidence,
        config.evidence_training(seed.seed, config.anchor.steps),
        anchor=models_of_seed.btx_anchor, data=seed.text("public"),
    )  # fmt: skip
    anchor = package(public)
    heads = {
        name: seed.train(
            f"btx_evidence/{name}", [public, seed.shared.windows[name]], train_evidence,
            config.evidence_training(seed.seed, config.expert.steps),
            anchor=anchor, data=seed.text(name), windows=seed.windows(name), begin_as_public=True,
        )
        for name in dense
    }  # fmt: skip
    places = {name: package(stage) for name, stage in dense.items()}
    evidence = {name: package(stage) for name, stage in heads.items()}

    def work(folder: Path) -> None:
        btx = btx_folder(models_of_seed.btx)
        models.write_headed_btx(anchor, btx, places, evidence, config.head_rank, folder)

    needs = (models_of_seed.btx, *dense.values(), public, *heads.values())
    stage = seed.add("btx_headed", needs, work, rank=config.head_rank)
    return anchor, Packages({name: stage.folder / name for name in dense}, (stage, *needs))


def tuned_stages(seed: Seed, trained_models: Trained, ours: Family) -> tuple[Stage, Stage]:
    """Adds router tuning on proxies: of the paper's form, and of the chosen one."""
    paper = packages_of(trained_models.paper)
    training = dataclasses.replace(seed.config.router, seed=seed.seed)
    proxies = seed.shared.proxies

    def tuned(name: str, needs: Sequence[Stage], merge: Callable[[Path], Path]) -> Stage:
        def work(folder: Path) -> None:
            data = folder / "proxies"
            data.mkdir(exist_ok=True)
            for domain, stage in proxies.items():
                file = f"{domain}.jsonl"
                replace_file(data / file, (stage.folder / file).read_text(encoding="utf-8"))
            trained(train_router, folder, config=training, model=merge(folder), data=str(data))

        needs = (*proxies.values(), *needs)
        return seed.add(f"tuned/{name}", needs, work, training=config_values(training))

    def merge_paper(folder: Path) -> Path:
        return merged(ours.anchor, paper.paths, folder)

    return (
        tuned("paper", paper.needs, merge_paper),
        tuned("flexolmo", ours.needs, ours.merged),
    )


def unrestricted_stage(seed: Seed, anchor: Stage, flops: float) -> Stage:
    """Adds the unrestricted mixture that costs `flops` times what all owners' experts cost."""
    steps = models.unrestricted_steps(seed.config, flops)
    training = seed.config.unrestricted_training(seed.tokenizer, steps, seed.seed)
    pool = seed.shared.pool
    return seed.train(
        f"unrestricted/{flops:g}x", [anchor, pool], train_jointly, training,
        anchor=package(anchor), data=str(pool.folder / POOL),
    )  # fmt: skip


def config_values(training: Any) -> dict[str, Any]:
    """A training's values as JSON, without the folders of stages that it needs."""
    values = json.loads(json.dumps(dataclasses.asdict(training)))
    for name in ("tokenizer", "domain_embedding"):
        if values.get(name):
            values[name] = Path(values[name]).name
    return values
