"""Reads FlexOlmo and OLMo 2 models in Hugging Face's form (config.json and safetensors).

The tables below map each of our leaves to stored tensors. A leaf is filled in place, one stored
tensor at a time, so that loading needs memory for the model once, plus its largest leaf.
"""

import collections
import contextlib
import functools
import gc
import itertools
import json
import math
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from flexolmo_jax.config import ModelConfig
from flexolmo_jax.data.tokenizer import SEPARATOR
from flexolmo_jax.modeling.experts import Experts
from flexolmo_jax.modeling.transformer import Backbone, abstract_model
from flexolmo_jax.storage.tensors import named, refill


class _Source(NamedTuple):
    """Where a leaf's numbers are stored, and how they are transposed into ours."""

    key: str  # fills leaf[l, e], leaf[l] or the whole leaf, as it has {l} and {e}
    axes: str  # theirs -> ours, letters as in modeling/layers.py; (N H) is one axis of theirs
    half: int | None = None  # of a leading axis of 2, where one tensor holds two leaves

    def places(self, config: ModelConfig) -> Iterator[tuple[tuple[int, ...], str]]:
        """(index into the leaf, name of the tensor that goes there), for all of the leaf."""
        sizes = {"l": config.num_layers, "e": config.num_experts}
        used = [letter for letter in sizes if f"{{{letter}}}" in self.key]
        for place in itertools.product(*(range(sizes[letter]) for letter in used)):
            yield place, self.key.format(**dict(zip(used, place, strict=True)))

    def shape(self, sizes: dict[str, int]) -> tuple[int, ...]:
        """What each of the stored tensors must have."""
        axes = re.findall(r"\(.*?\)|\w", self.axes.split(" -> ")[0])
        return tuple(math.prod(sizes[x] for x in re.findall(r"\w", axis)) for axis in axes)

    def transposed(self, tensor: np.ndarray, sizes: dict[str, int]) -> np.ndarray:
        """A stored tensor as a part of our leaf; a view."""
        theirs, ours = (re.findall(r"\w", side) for side in self.axes.split(" -> "))
        tensor = tensor.reshape([sizes[x] for x in theirs])
        tensor = tensor.transpose([theirs.index(x) for x in ours])
        return tensor if self.half is None else tensor[self.half]


_LAYER = "model.layers.{l}."
_ATTENTION = _LAYER + "self_attn."
_MLP = _LAYER + "mlp."

_BACKBONE = {
    "embed": _Source("model.embed_tokens.weight", "V D -> V D"),
    "layers.attention.q": _Source(_ATTENTION + "q_proj.weight", "(N H) D -> D N H"),
    "layers.attention.k": _Source(_ATTENTION + "k_proj.weight", "(K H) D -> D K H"),
    "layers.attention.v": _Source(_ATTENTION + "v_proj.weight", "(K H) D -> D K H"),
    "layers.attention.o": _Source(_ATTENTION + "o_proj.weight", "D (N H) -> N H D"),
    "layers.attention.q_norm.scale": _Source(_ATTENTION + "q_norm.weight", "(N H) -> N H"),
    "layers.attention.k_norm.scale": _Source(_ATTENTION + "k_norm.weight", "(K H) -> K H"),
    "layers.attention_norm.scale": _Source(_LAYER + "post_attention_layernorm.weight", "D -> D"),
    "layers.experts_norm.scale": _Source(_LAYER + "post_feedforward_layernorm.weight", "D -> D"),
    "norm.scale": _Source("model.norm.weight", "D -> D"),
    "head": _Source("lm_head.weight", "V D -> D V"),
}
_DENSE = {  # OLMo 2: becomes the public expert, alone; its router row stays 0
    "feed_forward.gate": _Source(_MLP + "gate_proj.weight", "F D -> D F"),
    "feed_forward.up": _Source(_MLP + "up_proj.weight", "F D -> D F"),
    "feed_forward.down": _Source(_MLP + "down_proj.weight", "D F -> F D"),
}
_ROUTER = {"router.row": _Source(_MLP + "gate.weight", "E D -> E D")}
_SEPARATE = {  # FlexOlmo as it is released
    "feed_forward.gate": _Source(_MLP + "experts.{e}.gate_proj.weight", "F D -> D F"),
    "feed_forward.up": _Source(_MLP + "experts.{e}.up_proj.weight", "F D -> D F"),
    "feed_forward.down": _Source(_MLP + "experts.{e}.down_proj.weight", "D F -> F D"),
}
_PACKED = {  # FlexOlmo as transformers 5 holds it in memory
    "feed_forward.gate": _Source(_MLP + "experts.gate_up_proj", "E (2 F) D -> 2 E D F", half=0),
    "feed_forward.up": _Source(_MLP + "experts.gate_up_proj", "E (2 F) D -> 2 E D F", half=1),
    "feed_forward.down": _Source(_MLP + "experts.down_proj", "E D F -> E F D"),
}

_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# transformers' defaults for fields that config.json leaves out.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "flex_olmo": {"rope_theta": 5e5, "rms_norm_eps": 1e-6, "max_position_embeddings": 4096},
    "olmo2": {"rope_theta": 1e4, "rms_norm_eps": 1e-5, "max_position_embeddings": 2048},
}
# Fields for which our network has one value only; None: the field must not be set.
_FIXED = {"hidden_act": "silu", "attention_bias": False, "sliding_window": None}


WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
INDEX_SUFFIX = ".safetensors.index.json"
NOT_JSON = (json.JSONDecodeError, UnicodeDecodeError)
SUFFIXES = (".safetensors", INDEX_SUFFIX)
OTHER_WEIGHTS = ("*.safetensors", "*.index.json", "*.bin", "*.gguf", "*.pth")


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
    if model_type == "flex_olmo":
        values |= {
            "num_experts": field("num_experts", int),
            "active_experts": field("num_experts_per_tok", int),
            "renormalize": field("norm_topk_prob", bool, False),
        }
    try:
        return ModelConfig(**values)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def load(path: str | Path, dtype: Any = None) -> tuple[Backbone, Experts, ModelConfig]:
    """Reads a whole model.

    Args:
      path: a folder with config.json and model.safetensors, or the shards that
        model.safetensors.index.json names; where both are there, the first, as transformers does.
      dtype: of the weights; None: as they are stored (the widest, if they differ).

    Returns:
      The backbone, one stack with all experts, and the sizes. Router biases are 0.

    Raises:
      ValueError: a file is missing, damaged, or does not fit: the text names the tensors.
    """
    path, config = Path(path), load_config(path)
    with contextlib.ExitStack() as stack:
        stored = _open(path, stack)
        table = {**_BACKBONE, **_experts_table(config, stored)}
        backbone, experts = abstract_model(config)
        leaves = {**named(backbone), **named(experts)}
        table = {name: source for name, source in table.items() if name in leaves}
        _check(path, config, table, stored)
        dtype = dtype or jnp.result_type(*{x.dtype for x in stored.values()})

        def fill(name: str) -> jax.Array:
            buffer = np.zeros(leaves[name].shape, dtype)
            if name in table:
                for place, key in table[name].places(config):
                    with _reading(stored[key].file):
                        buffer[place] = table[name].transposed(stored[key].read(), _sizes(config))
            leaf = jax.block_until_ready(jnp.asarray(buffer))
            if buffer.nbytes > 2**22:  # JAX lets go of a buffer when Python collects garbage
                del buffer
                gc.collect()
            return leaf

        filled = {name: fill(name) for name in leaves}
    return refill(backbone, filled), refill(experts, filled), config


class _Tensor(NamedTuple):
    """A tensor in a file; nothing of it is in memory."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]


@contextlib.contextmanager
def _reading(file: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file}: missing or damaged ({error}); get it again") from error


def _open(path: Path, stack: contextlib.ExitStack) -> dict[str, _Tensor]:
    """Opens the folder's safetensors and lists what they hold; `stack` closes them."""
    found: dict[str, _Tensor] = {}
    for file in _weight_files(path):
        with _reading(file):
            opened = stack.enter_context(safe_open(file, framework="numpy"))
        for name in opened.keys():
            header, read = opened.get_slice(name), functools.partial(opened.get_tensor, name)
            kind = header.get_dtype()
            if kind not in _DTYPES:
                raise ValueError(f"{file}: {name}: expected {'/'.join(_DTYPES)}, found {kind}")
            if name in found:
                raise ValueError(f"{file}: {name} is also in {found[name].file}")
            found[name] = _Tensor(file, tuple(header.get_shape()), _DTYPES[kind], read)
    return found


def _weight_files(path: Path) -> list[Path]:
    """The files that transformers 5 reads of a folder, and no others that lie beside them.

    They are the file or index that `transformers_weights` in config.json names, else
    model.safetensors, else what model.safetensors.index.json names. An index beside
    model.safetensors is a leftover: transformers 5 deletes old shards when it saves a model,
    and leaves their index.

    Raises:
      ValueError: there is neither; the index cannot be read, or names files outside of the folder.
    """
    fields = json.loads((path / "config.json").read_text(encoding="utf-8"))
    named_by_config = fields.get("transformers_weights")
    if named_by_config is not None:
        file = _inside(path, named_by_config, path / "config.json")
        return _shards(path, file) if file.name.endswith(INDEX_SUFFIX) else [file]
    if (path / WEIGHTS).is_file():
        if _has_shards(path):
            warnings.warn(
                f"{path}: holds two checkpoints; {WEIGHTS} is read, as transformers does, and the "
                f"shards of {INDEX} are not: delete one of them",
                stacklevel=2,
            )
        return [path / WEIGHTS]
    if (path / INDEX).is_file():
        return _shards(path, path / INDEX)
    others = sorted(file.name for pattern in OTHER_WEIGHTS for file in path.glob(pattern))
    raise ValueError(
        f"{path}: expected {WEIGHTS} or {INDEX}, found {', '.join(others[:3]) or 'neither'}; "
        "where the weights have another name or format, load them with transformers and write "
        "them with save_pretrained"
    )


def _has_shards(path: Path) -> bool:
    """Whether the folder has an index, and all files that it names."""
    try:
        return all(file.is_file() for file in _shards(path, path / INDEX))
    except ValueError:
        return False


def _shards(path: Path, index: Path) -> list[Path]:
    """The files that an index names, each once."""
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return sorted(_inside(path, name, index) for name in names)
    except (OSError, KeyError, TypeError, AttributeError, *NOT_JSON) as error:
        raise ValueError(f"{index}: not an index of safetensors ({error!r})") from error


def _inside(path: Path, name: Any, where: Path) -> Path:
    """A file of the folder by its name; links are followed, as in the Hugging Face cache."""
    if not isinstance(name, str) or not name.endswith(SUFFIXES):
        raise ValueError(f"{where}: expected the name of a safetensors file, found {name!r}")
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"{where}: expected files in the folder {path}, found {name!r}")
    return path / name


def _experts_table(config: ModelConfig, names: Iterable[str]) -> dict[str, _Source]:
    """The rows for the experts: dense, or a mixture in one of its two layouts."""
    experts = [name for name in names if ".mlp.experts." in name]
    if config.num_experts == 1 and not experts:
        return _DENSE
    packed = any(name.endswith(".gate_up_proj") for name in experts)
    return {**_ROUTER, **(_PACKED if packed else _SEPARATE)}


def _sizes(config: ModelConfig) -> dict[str, int]:
    """The letters of `_Source.axes`."""
    c = config
    heads = {"N": c.num_heads, "K": c.kv_heads, "H": c.head_size}
    return heads | {"V": c.vocab_size, "D": c.width, "F": c.ffn_width, "E": c.num_experts, "2": 2}


def _check(
    path: Path, config: ModelConfig, table: dict[str, _Source], stored: dict[str, _Tensor]
) -> None:
    """Raises one ValueError with all the tensors that do not fit."""
    shapes = [(source, source.shape(_sizes(config))) for source in table.values()]
    expected = {key: shape for source, shape in shapes for _, key in source.places(config)}
    problems: dict[str, list[str]] = collections.defaultdict(list)
    for name, shape in expected.items():
        if name not in stored:
            problems["missing"].append(f"{name} {list(shape)}")
        elif stored[name].shape != shape:
            found = f"found {list(stored[name].shape)} in {stored[name].file.name}"
            problems["of another shape"].append(f"{name}: expected {list(shape)}, {found}")
    # A tied head may be stored once more under its own name.
    known = expected.keys() | ({_BACKBONE["head"].key} if config.tie_embeddings else set())
    for name in stored.keys() - known:
        problems["unknown"].append(f"{name} {list(stored[name].shape)} in {stored[name].file.name}")
    texts = [
        f"{len(names)} {problem} ({'; '.join(sorted(names)[:3])}{'; ...' if names[3:] else ''})"
        for problem, names in problems.items()
    ]
    if texts:
        raise ValueError(f"{path}: the tensors are not those of config.json: {', '.join(texts)}")
