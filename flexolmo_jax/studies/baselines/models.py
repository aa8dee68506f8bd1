"""The models of a study that none of the three training stages makes: baselines and ablations.

Soups, BTX (whole models fine-tuned separately, their attention averaged, their feed-forward
networks the experts of a mixture), and packages with refitted router rows.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from flexolmo_jax.config import ExpertTraining
from flexolmo_jax.data.window_store import prepare
from flexolmo_jax.evaluation.folding import fold_biases
from flexolmo_jax.federation.anchor import LoadedAnchor, read_anchor, write_anchor
from flexolmo_jax.federation.expert import read_expert, write_expert
from flexolmo_jax.federation.merge import merge
from flexolmo_jax.model import FlexOlmo, load
from flexolmo_jax.modeling.experts import Experts, with_parts
from flexolmo_jax.modeling.flops import forward_flops
from flexolmo_jax.modeling.heads import LowRankHead
from flexolmo_jax.modeling.transformer import Anchor
from flexolmo_jax.storage.locks import private_folder
from flexolmo_jax.studies.baselines.config import StudyConfig
from flexolmo_jax.studies.baselines.costs import expert_step_flops
from flexolmo_jax.studies.engine.commands import PACKAGE, RUN
from flexolmo_jax.studies.engine.stages import discard
from flexolmo_jax.training.public_data import public_batch
from flexolmo_jax.training.stages.expert import fit_rows


def trained(
    train: Callable[..., None], folder: Path, *, windows: Path | None = None, **more
) -> None:
    """Runs one of the training functions in a stage's folder, or resumes it.

    Args:
      train: accepts out, run, resume and `more`.
      folder: of the stage; afterwards it holds the package and metrics, no checkpoints.
      windows: a folder of training windows, which are then not made again.
    """
    out, run = folder / PACKAGE, folder / RUN
    discard(out)  # of an interrupted write
    if windows is not None and not (run / "data").is_symlink():
        private_folder(run)
        (run / "data").symlink_to(windows)
    train(out=out, run=run, resume=(run / "config.json").exists(), **more)
    discard(run / "checkpoints")
    if windows is None:
        discard(run / "data")
    else:
        (run / "data").unlink()


def unrestricted_steps(config: StudyConfig, times: float) -> int:
    """Steps of the unrestricted mixture that cost `times` the FLOPs of all owners' experts.

    Of experts with heads, if the study has them: they cost more.
    """
    steps = len(config.owners) * config.expert.steps
    all_experts = steps * expert_step_flops(config)
    one_step = 3 * forward_flops(config.model, config.length, config.unrestricted_active)
    return max(1, round(times * all_experts / one_step))


def average(models: Sequence[FlexOlmo], weights: Sequence[float]) -> FlexOlmo:
    """A soup: one model whose every weight is the weighted mean of the models' weights."""
    first = models[0]

    def mean(*leaves):
        return sum(w * leaf for w, leaf in zip(weights, leaves, strict=True))

    trees = [(model.backbone, model.experts) for model in models]
    backbone, experts = jax.tree.map(mean, *trees)
    return dataclasses.replace(first, backbone=backbone, experts=experts)


def write_btx(anchor: Path, dense: Mapping[str, Path], folder: Path) -> None:
    """Writes BTX as an "anchor" with the averaged backbone, and packages beside it.

    The public model is one of those averaged, and its feed-forward network one of the experts.

    Args:
      anchor: the public model.
      dense: whole models by owner, fine-tuned from it.
      folder: gets anchor/ and OWNER/, with equal rows: the uniform router.
    """
    discard(folder)
    public = read_anchor(anchor)
    models = {name: read_anchor(path) for name, path in dense.items()}
    backbones = [model.weights.backbone for model in (public, *models.values())]
    mean = jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *backbones)
    assert public.tokenizer is not None
    expert = with_parts(public.weights.public, evidence=None)  # made for the anchor's embedding
    write_anchor(
        folder / "anchor", Anchor(mean, expert), public.config, public.tokenizer,
        public.public_text, {"licence": "unspecified", "contact": "unspecified"},
    )  # fmt: skip
    together = read_anchor(folder / "anchor")
    router = public.weights.public.router
    for name, model in models.items():
        expert = with_parts(model.weights.public, router=router)
        _write_package(folder, name, expert, together)


def write_headed_btx(
    anchor: Path,
    btx: Path,
    dense: Mapping[str, Path],
    evidence: Mapping[str, Path],
    rank: int,
    folder: Path,
) -> None:
    """Writes FOLDER/OWNER: BTX's packages with heads, for evidence routing.

    An owner's output head is what its dense model's differs by from the averaged one, as the best
    matrices of that rank.

    Args:
      anchor: BTX's, with a public evidence head.
      btx: the folder of `write_btx`.
      dense: the whole models by owner.
      evidence: by owner, BTX's anchor with an evidence head that was trained on the owner's text.
      rank: of the output heads.
      folder: gets the packages.
    """
    together = read_anchor(anchor)
    mean = together.weights.backbone.head_matrix(together.config)
    networks = experts_of(anchor, {name: btx / name for name in dense})
    for name, expert in networks.items():
        own = read_anchor(dense[name]).weights.backbone.head_matrix(together.config)
        head = low_rank(own - mean, rank)
        part = read_anchor(evidence[name]).weights.public.evidence
        discard(folder / name)
        _write_package(folder, name, with_parts(expert, head=head, evidence=part), together)


def low_rank(matrix: jax.Array, rank: int) -> LowRankHead:
    """The head of one expert whose product is the nearest of this rank to a matrix [D, V]."""
    left, values, right = jnp.linalg.svd(matrix, full_matrices=False)
    width, vocab_size = matrix.shape
    head = LowRankHead(1, width, vocab_size, rank, jax.random.key(0))
    head.a[...] = (left[:, :rank] * values[:rank])[None, None]
    head.b[...] = right[None, None, :rank]
    return head


def _write_package(folder: Path, name: str, expert: Experts, anchor: LoadedAnchor) -> None:
    facts = {"licence": "unspecified", "contact": "unspecified"}
    write_expert(folder / name, expert, name, anchor, facts)


def refit(
    anchor: Path,
    experts: Mapping[str, Experts],
    texts: Mapping[str, Path],
    windows: Mapping[str, Path],
    training: ExpertTraining,
    folder: Path,
) -> None:
    """Writes FOLDER/OWNER: packages of experts whose router rows each owner fits alone.

    Args:
      anchor: the model that the experts extend.
      experts: by owner; their rows are replaced.
      texts: folders of `write_texts` by owner.
      windows: folders of the training windows by owner; written if they are missing.
      training: how rows are fitted.
    """
    loaded = read_anchor(anchor)
    assert loaded.tokenizer is not None
    for name, expert in experts.items():
        text = str(texts[name] / "train.jsonl")
        source, _ = prepare(text, training.data, loaded.tokenizer, windows[name])
        length = training.data.length
        public = public_batch(
            loaded.public_text, loaded.tokenizer, length, training.fit_tokens // length
        )
        fitted = fit_rows(expert, loaded, source, public, training)
        discard(folder / name)
        _write_package(folder, name, fitted, loaded)


def experts_of(anchor: Path, packages: Mapping[str, Path]) -> dict[str, Experts]:
    """The experts of packages that were made for an anchor."""
    loaded = read_anchor(anchor)
    return {name: read_expert(path, loaded) for name, path in packages.items()}


def dense_experts(dense: Mapping[str, Path]) -> dict[str, Experts]:
    """The feed-forward networks of whole models, as experts."""
    return {name: read_anchor(path).weights.public for name, path in dense.items()}


def merged(
    anchor: Path, packages: Sequence[Path], folder: Path, memory=None, evidence=None
) -> Path:
    """Rebuilds FOLDER/merged, routed by rows with a memory, or by evidence."""
    out = folder / "merged"
    discard(out)
    # Every expert is the study's own, so that no limit of its share has to protect the others.
    merge(anchor, packages, out, memory=memory, evidence=evidence, allow_share=None)
    return out


def routed(model: FlexOlmo, *, active: int | None = None, memory=None, evidence=None) -> FlexOlmo:
    """The model with this number of active experts, and this memory or evidence to route by.

    A model is loaded without evidence heads, unless it was merged with them.
    """
    config = model.config.replace(active_experts=active, memory=memory, evidence=evidence)
    return dataclasses.replace(model, config=config)


def without_bias(model: FlexOlmo) -> FlexOlmo:
    """The model with all router biases at 0."""
    experts = jax.tree.map(jnp.array, model.experts)
    experts.router.bias[...] = jnp.zeros_like(experts.router.bias[...])
    return dataclasses.replace(model, experts=experts)


def bias_folded(model: FlexOlmo, anchor: Path) -> FlexOlmo:
    """The model with its router biases folded into the rows, for a router that has none.

    Args:
      model: merged.
      anchor: its anchor; from its public text follows the row that gives about 1 for every input.
    """
    return fold_biases(model, read_anchor(anchor))


def load_all(anchor: Path, dense: Mapping[str, Path]) -> list[FlexOlmo]:
    """The public model, then the owners' dense ones."""
    return [load(anchor), *(load(path) for path in dense.values())]
