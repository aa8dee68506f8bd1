"""What a stage checks and reads before it trains."""

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from flexolmo_jax.config import DataConfig, ExpertTraining, ModelConfig, Training, check_rank
from flexolmo_jax.data.sources import bytes_of, fingerprint
from flexolmo_jax.data.tokenizer import Tokenizer
from flexolmo_jax.federation.anchor import LoadedAnchor, read_anchor
from flexolmo_jax.modeling.experts import Experts, Ranks, with_parts
from flexolmo_jax.modeling.low_rank import FeedForwardRanks, LowRankFeedForward
from flexolmo_jax.privacy.canaries import Canaries
from flexolmo_jax.storage.outputs import check_room
from flexolmo_jax.training.optimizer import make_optimizer
from flexolmo_jax.training.run import describe_run, package_facts


def in_float32(tree: Any) -> Any:
    """A float32 copy: weights are trained, and expert packages written, in float32."""
    return jax.tree.map(lambda x: jnp.array(x, jnp.float32), tree)


def initial_expert(config: ExpertTraining, model: ModelConfig, public: Experts) -> Experts:
    """The public expert, with new heads, and perhaps low-rank deltas, of the config's ranks.

    An evidence head begins as the public one if that has the same rank, so that it learns only what
    the owner's text has more of. All owners draw the same initial heads, so that no package tells
    its owner's seed.

    Args:
      config: the stage's config.
      model: of the anchor.
      public: the anchor's expert, in memory or on disk.

    Raises:
      ValueError: a rank is above the anchor's width.
    """
    ranks = Ranks(config.head_rank, config.evidence_rank)
    for name, rank in ranks._asdict().items():
        check_rank(f"{name}_rank", rank, model)
    expert = with_parts(public, head=None, evidence=None)
    expert.set_heads(model, ranks, jax.random.key(0))
    if ranks.evidence and ranks.evidence == public.ranks.evidence:
        expert = with_parts(expert, evidence=public.evidence)
    if config.ffn_rank:
        check_rank("ffn_rank", config.ffn_rank, model)
        sizes = model.num_layers, 1, model.width, model.ffn_width
        own_ranks = FeedForwardRanks(*[config.ffn_rank] * 3)
        deltas = LowRankFeedForward(*sizes, own_ranks, jax.random.key(1))
        expert = with_parts(expert, feed_forward=deltas)
    return expert


def anchor_to_train_beside(
    path: Path, data: DataConfig, separator: str | None = None
) -> tuple[LoadedAnchor, Tokenizer]:
    """An anchor whose weights stay on disk, and its tokenizer.

    Args:
      path: an anchor package, or a Hugging Face directory of an OLMo 2 model.
      data: how text becomes batches.
      separator: as in `read_anchor`.

    Raises:
      ValueError: as `read_anchor`; the anchor has no tokenizer, or was made for shorter windows.
    """
    loaded = read_anchor(path, on_disk=True, separator=separator)
    if loaded.tokenizer is None:
        raise ValueError(f"{path}: there is no tokenizer.json; training needs one")
    check_length(data, loaded.config, path)
    return loaded, loaded.tokenizer


def check_length(data: DataConfig, model: ModelConfig, where: Path) -> None:
    """Raises ValueError if training windows are longer than a model's longest sequence."""
    if data.length > model.max_length:
        raise ValueError(
            f"data.length={data.length} is longer than what {where} was made for, max_length="
            f"{model.max_length}; set data.length to {model.max_length} or less"
        )


def check_room_for(
    config: Training, data: str, out: Path, run: Path, trained: Any, packaged: Any = None
) -> None:
    """Raises ValueError if the disk has no room for a training (`check_room`).

    Args:
      config, data, out, run: of the training.
      trained: the trained weights, or their shapes.
      packaged: the weights in the package; default: `trained`.
    """

    def count(tree: Any) -> int:
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))

    weights = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), trained)
    state = jax.eval_shape(make_optimizer(config.optimizer, config.steps).init, weights)
    check_room(
        out, run, text=bytes_of(data), state=4 * count((weights, state)),
        packaged=count(trained if packaged is None else packaged),
        saves=-(-config.steps // config.checkpoint_every),
    )  # fmt: skip


def expert_facts(
    config: ExpertTraining, drawn: Canaries | None, separator: str | None, **more: Any
) -> dict[str, Any]:
    """What an expert package's manifest says about its training (`package_facts`).

    Args:
      config: the stage's config.
      drawn: the canaries of the run, if there are any.
      separator: as in `train_expert`.
      more: fields of one way of training.
    """
    if drawn:
        more |= drawn.facts()
    if separator:
        more["separator"] = separator
    return package_facts(config, gating=config.gating, **more)


def describe_expert_run(
    config: ExpertTraining,
    anchor: LoadedAnchor,
    *,
    name: str,
    data: str,
    public: str | None,
    canaries: int,
    separator: str | None,
    **more: Any,
) -> dict[str, Any]:
    """The description of an expert's run (`describe_run`); arguments as in `train_expert`."""
    if separator:
        more["separator"] = separator
    return describe_run(
        config,
        data,
        name=name,
        anchor=anchor.identity,
        public=fingerprint(public) if public else None,
        canaries=canaries or None,
        **more,
    )
