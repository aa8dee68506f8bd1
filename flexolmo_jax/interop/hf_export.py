"""Writes a mixture for Hugging Face: FlexOlmo's layout, or FlexMoRE's if experts are low-rank.

The tables are those that hf_import.py reads by. Every layer is a file of its own, so that memory
holds one layer.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from flexolmo_jax.config import ModelConfig
from flexolmo_jax.interop.hf_files import INDEX
from flexolmo_jax.interop.hf_import import FLEXMORE
from flexolmo_jax.interop.layouts import (
    BACKBONE,
    ROUTER,
    SEPARATE,
    RankGroup,
    Source,
    factors,
    sizes_of,
)
from flexolmo_jax.modeling.experts import FeedForward
from flexolmo_jax.modeling.low_rank import LowRankFeedForward
from flexolmo_jax.modeling.transformer import Backbone
from flexolmo_jax.storage.tensors import named


def write(
    folder: Path,
    backbone: Backbone,
    networks: Sequence[FeedForward | LowRankFeedForward],
    rows: np.ndarray,
    config: ModelConfig,
    ends: Sequence[int] = (),
) -> list[int]:
    """Writes config.json and safetensors into an existing folder.

    Args:
      folder: empty.
      backbone: its leaves may be on disk, as may those of `networks`.
      networks: of each expert, a stack of one; the public one first. Deltas of unlike ranks get
        zeros up to the largest of their expert: the layout has one rank for each expert.
      rows: of the router, [L, E, D]; the layout has no biases.
      config: sizes and routing; memory and evidence have no place in the layout.
      ends: ids that end a text.

    Returns:
      the rank of each expert, 0 of a full one.
    """
    ranks = [max(x.ranks) if isinstance(x, LowRankFeedForward) else 0 for x in networks]
    fields = _fields(config, ranks, ends)
    (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    places: dict[str, str] = {}
    size, count = 0, config.num_layers + 1
    shards = _shards(backbone, networks, ranks, rows, config)
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{count:05d}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        places |= dict.fromkeys(shard, name)
        size += sum(x.nbytes for x in shard.values())
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return ranks


def _fields(config: ModelConfig, ranks: list[int], ends: Sequence[int]) -> dict[str, Any]:
    """config.json, as transformers 4 and 5 read it."""
    kind, name = ("flex_olmo", "FlexOlmoForCausalLM")
    if any(ranks):
        kind, name = FLEXMORE, "FlexMoREForCausalLM"
    return {
        "model_type": kind,
        "architectures": [name],
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.ffn_width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "max_position_embeddings": config.max_length,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
        "attention_bias": False,
        "num_experts": config.num_experts,
        "num_experts_per_tok": config.active_experts or config.num_experts,
        "norm_topk_prob": config.renormalize,
        **({"expert_ranks": ranks} if any(ranks) else {}),
        **({"eos_token_id": list(ends)} if ends else {}),
    }


def _shards(
    backbone: Backbone,
    networks: Sequence[FeedForward | LowRankFeedForward],
    ranks: list[int],
    rows: np.ndarray,
    config: ModelConfig,
) -> Iterator[dict[str, np.ndarray]]:
    """The tensors of the embedding and the head, then those of each layer."""
    sizes, leaves = sizes_of(config), named(backbone)
    shared = {name: source for name, source in BACKBONE.items() if name in leaves}
    yield {
        source.key: source.stored(np.asarray(leaves[name]), sizes)
        for name, source in shared.items()
        if "{l}" not in source.key
    }
    for layer in range(config.num_layers):
        shard = {
            source.key.format(l=layer): source.stored(_part(leaves[name], layer), sizes)
            for name, source in shared.items()
            if "{l}" in source.key
        }
        router = ROUTER["router.row"]
        shard[router.key.format(l=layer)] = router.stored(np.asarray(rows[layer]), sizes)
        for number, (network, rank) in enumerate(zip(networks, ranks, strict=True)):
            own = named(network)
            for name, source in _table(rank).items():
                matrix = _part(own[name], layer)[0]
                stored = source.stored(_padded(matrix, source, sizes), sizes)
                shard[source.key.format(l=layer, e=number)] = stored
        yield shard


def _table(rank: int) -> dict[str, Source]:
    """Where the leaves of an expert are stored."""
    if rank:
        return factors(RankGroup(rank, (0,)))
    return {name.removeprefix("feed_forward."): source for name, source in SEPARATE.items()}


def _part(leaf: Any, layer: int) -> np.ndarray:
    rest = (slice(None),) * (leaf.ndim - 1)
    return np.asarray(leaf[(slice(layer, layer + 1), *rest)])[0]


def _padded(matrix: np.ndarray, source: Source, sizes: dict[str, int]) -> np.ndarray:
    """A factor with zeros up to the rank that is stored; any other matrix as it is."""
    ours = [{**sizes, "R": source.rank}[x] for x in source.axes.split(" -> ")[1].split()]
    widths = [(0, wanted - found) for wanted, found in zip(ours, matrix.shape, strict=True)]
    return np.pad(matrix, widths)
