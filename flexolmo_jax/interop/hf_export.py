"""Writes models for Hugging Face: config.json, generation_config.json, safetensors, a tokenizer.

The layouts are OLMo 2's, FlexOlmo's, FlexMoRE's where experts are low-rank, and one of our own,
with the PyTorch file that computes it (remote_code/), for what these have no place for. The tables
are those that hf_import.py reads by.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from flexolmo_jax.config import ModelConfig
from flexolmo_jax.data.tokenizer import Tokenizer
from flexolmo_jax.interop.hf_shards import SHARD_BYTES, ToWrite, write_shards
from flexolmo_jax.interop.layouts import (
    BACKBONE,
    BIAS,
    DENSE,
    ROW,
    SEPARATE,
    RankGroup,
    Source,
    factors,
    sizes_of,
)
from flexolmo_jax.modeling.experts import Experts
from flexolmo_jax.modeling.transformer import Backbone
from flexolmo_jax.storage.tensors import named

Kind = Literal["olmo2", "flex_olmo", "flexmore", "flexolmo_jax"]  # as model_type in config.json
CLASSES = {
    "olmo2": "Olmo2ForCausalLM",
    "flex_olmo": "FlexOlmoForCausalLM",
    "flexmore": "FlexMoREForCausalLM",
    "flexolmo_jax": "FlexOlmoJaxForCausalLM",
}
MODELING = "modeling_flexolmo_jax"
_HEADS = {"head": "heads", "evidence": "evidence"}  # parts of an expert, and their names there


class Mixture(NamedTuple):
    """A model to write; its leaves may be on disk.

    Attributes:
      backbone: what all experts share.
      stacks: of one expert each, with a full or a low-rank feed-forward network, and perhaps heads.
      rows: of the router, [L, E, D].
      biases: of the router, [L, E].
      names: of the experts.
      has_public: whether the first of them is the public one, which no shift of evidence routing
        applies to.
      config: sizes and routing.
    """

    backbone: Backbone
    stacks: Sequence[Experts]
    rows: np.ndarray
    biases: np.ndarray
    names: Sequence[str]
    has_public: bool
    config: ModelConfig

    @property
    def ranks(self) -> list[int]:
        """Of each expert's feed-forward network in FlexMoRE's layout; 0 of a full one."""
        return [max(stack.deltas or (0,)) for stack in self.stacks]


def write(
    folder: Path,
    model: Mixture,
    kind: Kind,
    tokenizer: Tokenizer | None = None,
    ends: Sequence[int] = (),
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes all but the model card into an existing folder.

    Args:
      folder: empty.
      model: what to write. In FlexMoRE's layout, deltas of unlike ranks get zeros up to the largest
        of their expert: it has one rank for each expert.
      kind: the layout; what it has no place for is not looked at.
      tokenizer: of the model.
      ends: ids that end a text, beside the tokenizer's separator.
      dtype: of all weights; None: each as it is.
      shard_bytes: as in `write_shards`.
    """
    tensors = list(_tensors(model, kind, dtype))
    ends = list(dict.fromkeys([*ends, *([tokenizer.separator] if tokenizer else [])]))
    widest = jnp.result_type(*{tensor.dtype for tensor in tensors}).name
    fields = {**_fields(model, kind), "dtype": widest, **_special_tokens(ends)}
    _write_json(folder / "config.json", fields)
    padding = {"pad_token_id": ends[-1]} if ends else {}
    _write_json(folder / "generation_config.json", {**_special_tokens(ends), **padding})
    if tokenizer is not None:
        _write_tokenizer(folder, tokenizer, model.config)
    if kind == "flexolmo_jax":
        shutil.copyfile(modeling_file(), folder / modeling_file().name)
    write_shards(folder, tensors, shard_bytes)


def modeling_file() -> Path:
    """The PyTorch file that computes our own layout."""
    return Path(__file__).parent / "remote_code" / f"{MODELING}.py"


def _write_json(file: Path, fields: dict[str, Any]) -> None:
    file.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _special_tokens(ends: Sequence[int]) -> dict[str, Any]:
    """Fields of which transformers' defaults are ids of its own vocabulary: all are given."""
    end = {0: None, 1: ends[0] if ends else None}.get(len(ends), list(ends))
    return {"bos_token_id": None, "eos_token_id": end, "pad_token_id": None}


def _write_tokenizer(folder: Path, tokenizer: Tokenizer, config: ModelConfig) -> None:
    (folder / "tokenizer.json").write_text(tokenizer.json, encoding="utf-8")
    names = {"eos_token": tokenizer.separator_text, "pad_token": tokenizer.separator_text}
    _write_json(folder / "special_tokens_map.json", names)
    fields = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.max_length,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        **names,
    }
    _write_json(folder / "tokenizer_config.json", fields)


def _fields(model: Mixture, kind: Kind) -> dict[str, Any]:
    """config.json, as transformers 4 and 5 read it, without special tokens."""
    config = model.config
    fields: dict[str, Any] = {
        "model_type": kind,
        "architectures": [CLASSES[kind]],
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
    }
    if kind == "olmo2":
        return fields
    count = len(model.stacks)
    fields |= {
        "num_experts": count,
        "num_experts_per_tok": min(config.active_experts or count, count),
        "norm_topk_prob": config.renormalize,
    }
    if kind == "flexmore":
        fields["expert_ranks"] = model.ranks
    return fields | _own_fields(model) if kind == "flexolmo_jax" else fields


def _own_fields(model: Mixture) -> dict[str, Any]:
    """What only our layout has."""
    memory, evidence = model.config.memory, model.config.evidence
    fields: dict[str, Any] = {
        "auto_map": {
            "AutoConfig": f"{MODELING}.FlexOlmoJaxConfig",
            "AutoModelForCausalLM": f"{MODELING}.{CLASSES['flexolmo_jax']}",
        },
        "expert_names": list(model.names),
        "head_ranks": [stack.ranks.head for stack in model.stacks],
        "memory": memory and dict(zip(("decay", "weight"), memory, strict=True)),
        "evidence": None,
        "evidence_ranks": None,
    }
    if evidence:
        decay, strength, shift = evidence
        # Without the public expert, the shift is common to all, and changes nothing.
        own = [0.0, *(shift for _ in model.stacks[1:])]
        shifts = own if model.has_public else [0.0 for _ in own]
        fields["evidence"] = {"decay": decay, "strength": strength, "shifts": shifts}
        fields["evidence_ranks"] = [stack.ranks.evidence for stack in model.stacks]
    return fields


def _tensors(model: Mixture, kind: Kind, dtype: str | None) -> Iterator[ToWrite]:
    """Those of the embedding and the head, then those of each layer, then those of the heads."""
    sizes, leaves = sizes_of(model.config), named(model.backbone)
    ranks = model.ranks if kind == "flexmore" else [0] * len(model.stacks)
    sizes["E"] = len(model.stacks)

    def tensor(key: str, source: Source, leaf: Any, *place: int) -> ToWrite:
        kept = np.dtype(jnp.dtype(dtype or leaf.dtype))

        def read() -> np.ndarray:
            part = _padded(_part(leaf, *place), source, sizes)
            return source.stored(part.astype(kept, copy=False), sizes)

        return ToWrite(key, source.shape(sizes), kept, read)

    shared = {source: leaves[name] for name, source in BACKBONE.items() if name in leaves}
    for source, leaf in shared.items():
        if "{l}" not in source.key:
            yield tensor(source.key, source, leaf)
    for layer in range(model.config.num_layers):
        for source, leaf in shared.items():
            if "{l}" in source.key:
                yield tensor(source.key.format(l=layer), source, leaf, layer)
        if kind != "olmo2":
            yield tensor(ROW.key.format(l=layer), ROW, model.rows, layer)
        if kind == "flexolmo_jax":
            yield tensor(BIAS.key.format(l=layer), BIAS, model.biases, layer)
        for number, (stack, rank) in enumerate(zip(model.stacks, ranks, strict=True)):
            own = named(stack.feed_forward)
            for name, source in _table(kind, rank).items():
                yield tensor(source.key.format(l=layer, e=number), source, own[name], layer, 0)
    if kind == "flexolmo_jax":
        yield from _heads(model, dtype)


def _heads(model: Mixture, dtype: str | None) -> Iterator[ToWrite]:
    """The experts' own heads, and the bigram models of evidence routing."""
    for part, place in _HEADS.items():
        if part == "evidence" and model.config.evidence is None:
            continue
        for number, stack in enumerate(model.stacks):
            for name, leaf in named(getattr(stack, part, {})).items():
                kept = np.dtype(jnp.dtype(dtype or leaf.dtype))

                def read(leaf: Any = leaf, kept: np.dtype = kept) -> np.ndarray:
                    return _part(leaf, 0, 0).astype(kept, copy=False)

                yield ToWrite(f"{place}.{number}.{name}", tuple(leaf.shape[2:]), kept, read)


def _table(kind: Kind, rank: int) -> dict[str, Source]:
    """Where the leaves of an expert's feed-forward network are stored."""
    if rank:
        return factors(RankGroup(rank, (0,)))
    table = DENSE if kind == "olmo2" else SEPARATE
    return {name.removeprefix("feed_forward."): source for name, source in table.items()}


def _part(leaf: Any, *place: int) -> np.ndarray:
    """leaf[place], of which nothing else is read."""
    rest = (slice(None),) * (leaf.ndim - len(place))
    part = leaf[(*(slice(index, index + 1) for index in place), *rest)]
    return np.asarray(part).reshape(part.shape[len(place) :])


def _padded(part: np.ndarray, source: Source, sizes: dict[str, int]) -> np.ndarray:
    """A factor with zeros up to the rank that is stored; any other part as it is."""
    if not source.rank:
        return part
    ours = [{**sizes, "R": source.rank}[x] for x in source.axes.split(" -> ")[1].split()]
    return np.pad(part, [(0, want - own) for want, own in zip(ours, part.shape, strict=True)])
