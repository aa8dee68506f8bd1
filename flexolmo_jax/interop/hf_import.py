"""Reads FlexOlmo, FlexMoRE and OLMo 2 models in Hugging Face's form (config.json, safetensors).

The tables of layouts.py map each of our leaves to stored tensors. A leaf is filled in place, one
stored tensor at a time, so that loading needs memory for the model once, plus its largest leaf.
"""

import collections
import contextlib
import gc
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flexolmo_jax.config import ModelConfig
from flexolmo_jax.data.tokenizer import SEPARATOR
from flexolmo_jax.interop.hf_files import OTHER_WEIGHTS, Tensor, open_tensors, reading
from flexolmo_jax.interop.layouts import (
    BACKBONE,
    Source,
    experts_table,
    rank_groups,
    sizes_of,
)
from flexolmo_jax.modeling.experts import Experts, FeedForward, with_parts
from flexolmo_jax.modeling.low_rank import (
    FeedForwardRanks,
    LowRankFeedForward,
    LowRankGroups,
    MixedFeedForward,
)
from flexolmo_jax.modeling.transformer import Backbone, abstract_model
from flexolmo_jax.storage.tensors import named, refill

FLEXMORE = "flexmore"  # Pedersen et al., 2026: some experts are low-rank deltas to the first one
# transformers' defaults for fields that config.json leaves out.
_DEFAULTS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        ("flex_olmo", FLEXMORE),
        {"rope_theta": 5e5, "rms_norm_eps": 1e-6, "max_position_embeddings": 4096},
    ),
    "olmo2": {"rope_theta": 1e4, "rms_norm_eps": 1e-5, "max_position_embeddings": 2048},
}
# Fields for which our network has one value only; None: the field must not be set.
_FIXED = {"hidden_act": "silu", "attention_bias": False, "sliding_window": None}


def is_hugging_face(path: str | Path) -> bool:
    """Whether `path` is a folder with a config.json and weights beside it, of whatever format.

    Those that cannot be read are refused by `load`. A folder with a manifest.json is a package, in
    which such files have no place: taken for a model, they would escape its digests.
    """
    if os.path.lexists(Path(path) / "manifest.json"):
        return False
    weights = (file for pattern in OTHER_WEIGHTS for file in Path(path).glob(pattern))
    return (Path(path) / "config.json").is_file() and any(weights)


def separator(path: str | Path) -> str:
    """The name of the token that ends a text, which also opens documents in training.

    It is what tokenizer_config.json names, or else special_tokens_map.json; <|endoftext|> where the
    tokenizer has that; or the first end of text of generation_config.json or config.json.

    Raises:
      ValueError: one of the files cannot be read.
    """
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        token = _fields(Path(path) / name).get("eos_token")
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, str) and token:
            return token
    tokenizer = _fields(Path(path) / "tokenizer.json")
    try:
        names = {token["id"]: token["content"] for token in tokenizer.get("added_tokens", ())}
    except (KeyError, TypeError):
        names = {}
    known = (names[end] for end in ends_of_text(path) if end in names)
    return SEPARATOR if SEPARATOR in names.values() else next(known, SEPARATOR)


def ends_of_text(path: str | Path) -> tuple[int, ...]:
    """All ids that end a generated text, by generation_config.json and config.json.

    Raises:
      ValueError: one of the files cannot be read, or holds no ids.
    """
    ends: list[int] = []
    for name in ("generation_config.json", "config.json"):
        file = Path(path) / name
        found = _fields(file).get("eos_token_id")
        given = [] if found is None else found if isinstance(found, list) else [found]
        if not all(isinstance(end, int) and not isinstance(end, bool) for end in given):
            raise ValueError(
                f"{file}: eos_token_id: expected a number or a list of numbers, found {found!r}"
            )
        ends += given
    return tuple(dict.fromkeys(ends))


def _fields(file: Path) -> dict[str, Any]:
    """What a JSON file of the folder holds; nothing if it is not there."""
    if not file.is_file():
        return {}
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: cannot be read as a JSON object ({error})") from error


def tokenizer_file(path: str | Path) -> Path | None:
    """The folder's tokenizer.json, if it has one."""
    file = Path(path) / "tokenizer.json"
    return file if file.is_file() else None


def load_config(path: str | Path) -> ModelConfig:
    """Reads config.json of a FlexOlmo or OLMo 2 model, as transformers 4 or 5 writes it.

    OLMo 2 is a model of one expert. How it is computed (`dtype`, `remat`) stays at the defaults:
    in float32, whatever the weights are stored in, and whatever `dtype` config.json has. So float16
    cannot overflow, and half precision gives what the same weights in float32 give.

    Raises:
      ValueError: the file cannot be read, a field is missing, or has a value that our network
        cannot express; the text has the field, what was expected, what was found, and the file.
    """
    file = Path(path) / "config.json"
    try:
        fields = dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: cannot read the config ({error})") from error

    def require(ok: bool, name: str, expected: str, found: Any) -> None:
        if not ok:
            raise ValueError(f"{file}: {name}: expected {expected}, found {found!r}")

    def field(name: str, kind: type, default: Any = None) -> Any:
        missing = fields.get(name) is None
        value = _DEFAULTS[model_type].get(name, default) if missing else fields[name]
        right = isinstance(value, (int, float) if kind is float else kind)
        require(right and isinstance(value, bool) == (kind is bool), name, kind.__name__, value)
        return kind(value)

    model_type = str(fields.get("model_type"))
    require(model_type in _DEFAULTS, "model_type", " or ".join(_DEFAULTS), model_type)
    for name, only in _FIXED.items():
        found = fields.get(name)
        require(found is None or found == only, name, repr(only), found)
    layers = fields.get("layer_types") or []
    require(all(x == "full_attention" for x in layers), "layer_types", "full_attention", layers)

    # transformers 4 has rope_theta and rope_scaling, transformers 5 one dictionary for both.
    name = "rope_parameters" if fields.get("rope_parameters") else "rope_scaling"
    rope = fields.get(name) or {}
    require(isinstance(rope, dict), name, "an object", rope)
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    require(rope_type == "default", f"{name}.rope_type", "'default'", rope_type)
    more = sorted(rope.keys() - {"rope_type", "type", "rope_theta"})
    require(not more, name, "no more than rope_type and rope_theta", more)
    fields = {**fields, "rope_theta": rope.get("rope_theta", fields.get("rope_theta"))}

    values = {
        "vocab_size": field("vocab_size", int),
        "width": field("hidden_size", int),
        "num_layers": field("num_hidden_layers", int),
        "num_heads": field("num_attention_heads", int),
        "ffn_width": field("intermediate_size", int),
        "num_kv_heads": field("num_key_value_heads", int, 0) or None,
        "head_width": field("head_dim", int, 0) or None,
        "rope_theta": field("rope_theta", float),
        "norm_eps": field("rms_norm_eps", float),
        "tie_embeddings": field("tie_word_embeddings", bool, False),
        "max_length": field("max_position_embeddings", int),
    }
    if model_type in ("flex_olmo", FLEXMORE):
        values |= {
            "num_experts": field("num_experts", int),
            "active_experts": field("num_experts_per_tok", int),
            "renormalize": field("norm_topk_prob", bool, False),
        }
    try:
        return ModelConfig(**values)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def expert_ranks(path: str | Path) -> tuple[int, ...]:
    """Of a FlexMoRE model, the rank of each expert's deltas, 0 for a full one; else nothing.

    Raises:
      ValueError: `expert_ranks` in config.json is not what it must be.
    """
    file = Path(path) / "config.json"
    fields = _fields(file)
    if fields.get("model_type") != FLEXMORE:
        return ()
    ranks, count = fields.get("expert_ranks"), fields.get("num_experts")
    given = ranks if isinstance(ranks, list) else []
    right = all(type(rank) is int and 0 <= rank < 2**31 for rank in given)
    if not right or len(given) != count or given[:1] != [0]:
        raise ValueError(
            f"{file}: expert_ranks: expected {count} ranks, of which the first, the public "
            f"expert's, is 0, found {ranks!r:.200}"
        )
    return tuple(given)


def expert_order(path: str | Path, config: ModelConfig) -> tuple[int, ...]:
    """The numbers of the directory's experts in the order of the loaded stack: full ones first."""
    full, groups = rank_groups(expert_ranks(path) or [0] * config.num_experts)
    return sum((group.experts for group in groups), full)


def _abstract(config: ModelConfig, ranks: tuple[int, ...]) -> tuple[Backbone, Experts]:
    """Shapes of the model; with ranks, low-rank experts of one rank are a stack."""
    backbone, experts = abstract_model(config)
    full, groups = rank_groups(ranks)
    if not groups:
        return backbone, experts
    layers, sizes, key = config.num_layers, (config.width, config.ffn_width), jax.random.key(0)

    def stacks(key: jax.Array) -> MixedFeedForward:
        own = [
            LowRankFeedForward(
                layers, len(group.experts), *sizes, FeedForwardRanks(*[group.rank] * 3), key
            )
            for group in groups
        ]
        return MixedFeedForward(FeedForward(layers, len(full), *sizes, key), LowRankGroups(own))

    return backbone, with_parts(experts, feed_forward=jax.eval_shape(stacks, key))


def load(path: str | Path, dtype: Any = None) -> tuple[Backbone, Experts, ModelConfig]:
    """Reads a whole model.

    Args:
      path: a folder with config.json and model.safetensors, or the shards that
        model.safetensors.index.json names; where both are there, the first, as transformers does.
      dtype: of the weights; None: as they are stored (the widest, if they differ).

    Returns:
      The backbone, one stack with all experts, in `expert_order`, and the sizes. Router biases
      are 0.

    Raises:
      ValueError: a file is missing, damaged, or does not fit: the text names the tensors.
    """
    path, config, ranks = Path(path), load_config(path), expert_ranks(path)
    with contextlib.ExitStack() as stack:
        stored = open_tensors(path, stack)
        table = {**BACKBONE, **experts_table(config, stored, ranks)}
        backbone, experts = _abstract(config, ranks)
        leaves = {**named(backbone), **named(experts)}
        table = {name: source for name, source in table.items() if name in leaves}
        _check(path, config, table, stored)
        dtype = dtype or jnp.result_type(*{x.dtype for x in stored.values()})

        def fill(name: str) -> jax.Array:
            buffer = np.zeros(leaves[name].shape, dtype)
            if name in table:
                for place, key in table[name].places(config):
                    with reading(stored[key].file):
                        buffer[place] = table[name].transposed(stored[key].read(), sizes_of(config))
            leaf = jax.block_until_ready(jnp.asarray(buffer))
            if buffer.nbytes > 2**22:  # JAX lets go of a buffer when Python collects garbage
                del buffer
                gc.collect()
            return leaf

        filled = {name: fill(name) for name in leaves}
    return refill(backbone, filled), refill(experts, filled), config


def _check(
    path: Path, config: ModelConfig, table: dict[str, Source], stored: dict[str, Tensor]
) -> None:
    """Raises one ValueError with all the tensors that do not fit."""
    shapes = [(source, source.shape(sizes_of(config))) for source in table.values()]
    expected = {key: shape for source, shape in shapes for _, key in source.places(config)}
    problems: dict[str, list[str]] = collections.defaultdict(list)
    for name, shape in expected.items():
        if name not in stored:
            problems["missing"].append(f"{name} {list(shape)}")
        elif stored[name].shape != shape:
            found = f"found {list(stored[name].shape)} in {stored[name].file.name}"
            problems["of another shape"].append(f"{name}: expected {list(shape)}, {found}")
    # A tied head may be stored once more under its own name.
    known = expected.keys() | ({BACKBONE["head"].key} if config.tie_embeddings else set())
    for name in stored.keys() - known:
        problems["unknown"].append(f"{name} {list(stored[name].shape)} in {stored[name].file.name}")
    texts = [
        f"{len(names)} {problem} ({'; '.join(sorted(names)[:3])}{'; ...' if names[3:] else ''})"
        for problem, names in problems.items()
    ]
    if texts:
        raise ValueError(f"{path}: the tensors are not those of config.json: {', '.join(texts)}")
