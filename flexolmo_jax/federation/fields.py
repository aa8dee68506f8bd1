"""The fields of a manifest, which a stranger may have written: parsed strictly, each type checked.

Nothing that is read from a manifest is used before `check_fields` has seen it.
"""

import json
import math
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from flexolmo_jax.config import ModelConfig, check_evidence, check_memory
from flexolmo_jax.federation.names import PUBLIC, check_distinct, check_name
from flexolmo_jax.storage.integers import LARGEST

FORMAT = 2
INTEGERS = 3  # the format of experts with matrices of integers; older versions refuse it
MAX_BYTES = 16 * 2**20  # of a manifest; real ones have a few thousand
MAX_DEPTH = 32  # of nested objects and lists
DTYPES = ("float32", "bfloat16", "float16")  # that weights are stored in
EXPERT_DTYPES = (*DTYPES, *LARGEST)
_LARGEST_INTEGER = 2**63 - 1


def parse(data: bytes, where: Path, what: str = "a manifest") -> dict[str, Any]:
    """A JSON object from bytes.

    Args:
      data: in UTF-8.
      where: the file, to be named in errors.
      what: what the object should be, for errors.

    Raises:
      ValueError: it is not a JSON object, has a key twice, or holds NaN or infinity.
    """
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_object,
            parse_constant=_no_constant,
            parse_float=_finite,
        )
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: damaged, not {what} ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where}: damaged, not {what} (expected an object, found {_kind(value)})")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} appears twice in one object")
    return value


def _no_constant(word: str) -> Any:
    raise ValueError(f"{word} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:40]} is too large")
    return value


# Values that format 1 had other words for.
_GATING = {"alone": "fixed", "pair": "softmax"}
_REMAT = {"products": "matmuls", "wide": "wide_matmuls"}


def upgrade(manifest: dict[str, Any]) -> dict[str, Any]:
    """A manifest of format 1 in the words of format 2; any other as it is.

    The fields may not have been checked yet. The digest of a manifest is that of its bytes, so it
    is compared before.
    """
    if manifest.get("format") is True or manifest.get("format") != 1:
        return manifest
    upgraded = {**manifest, "format": 2}
    if isinstance(gating := manifest.get("gating"), str):
        upgraded["gating"] = _GATING.get(gating, gating)
    model = manifest.get("model")
    if isinstance(model, dict) and isinstance(remat := model.get("remat"), str):
        upgraded["model"] = {**model, "remat": _REMAT.get(remat, remat)}
    return upgraded


def check_fields(manifest: dict[str, Any], where: Path) -> None:
    """Checks every field of a manifest of any kind.

    Args:
      manifest: without its own digest.
      where: the file, to be named in errors.

    Raises:
      ValueError: names the first field that is missing or wrong.
    """
    _check_values(manifest, where, "", 0)
    found = manifest.get("format")
    if isinstance(found, bool) or found not in (FORMAT, INTEGERS):
        raise ValueError(
            f"{where}: expected package format {FORMAT} or {INTEGERS}, found {found!r:.100}; "
            "another version of flexolmo_jax wrote it"
        )
    kind = manifest.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(
            f"{where}: field 'kind': expected one of {', '.join(KINDS)}, found {kind!r:.100}"
        )
    _check_object(manifest, {**COMMON, **KINDS[kind]}, where, "")
    try:
        _check_format(manifest)
        if kind == "expert":
            check_name(manifest["name"])
        if kind == "merged":
            check_distinct([check_name(entry["name"]) for entry in manifest["experts"]])
            memory = manifest.get("memory")
            if memory is not None:
                check_memory(memory["decay"], memory["weight"])
            evidence = manifest.get("evidence")
            if evidence is not None:
                check_evidence(evidence["decay"], evidence["strength"], evidence["shift"])
        elif kind == "anchor" and manifest["name"] != PUBLIC:
            raise ValueError(f"an anchor's name is {PUBLIC!r}, found {manifest['name']!r:.100}")
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if kind == "merged" and not manifest.get("tensors") and manifest["files"]:
        raise ValueError(f"{where}: field 'files': expected none without a tuned router")


def _check_format(manifest: dict[str, Any]) -> None:
    dtypes = {entry["dtype"] for entry in (manifest.get("tensors") or {}).values()}
    integers = bool(dtypes & LARGEST.keys())
    if integers != (manifest["format"] == INTEGERS):
        raise ValueError(
            f"format {manifest['format']}: expected {INTEGERS} with matrices of integers, and "
            f"{FORMAT} without; found them {'there' if integers else 'missing'}"
        )


def _check_values(value: Any, where: Path, name: str, depth: int) -> None:
    """Checks what every value must be, whatever its name: bounded, finite, plain text."""
    if depth > MAX_DEPTH:
        raise ValueError(f"{where}: field {name!r:.100}: nested deeper than {MAX_DEPTH}")
    if isinstance(value, str):
        bad = next((c for c in value if unicodedata.category(c) in ("Cc", "Cs")), None)
        if bad is not None and bad not in "\n\t":
            raise ValueError(
                f"{where}: field {name!r:.100}: a control character, {bad!r}, in {value!r:.100}"
            )
    elif isinstance(value, int):
        if abs(value) > _LARGEST_INTEGER:
            raise ValueError(f"{where}: field {name!r:.100}: a number above 2^63")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{where}: field {name!r:.100}: expected a number, found {value}")
    elif isinstance(value, dict):
        for key, part in value.items():
            _check_values(key, where, f"{name}.{key}"[:200].lstrip("."), depth + 1)
            _check_values(part, where, f"{name}.{key}"[:200].lstrip("."), depth + 1)
    elif isinstance(value, list | tuple):
        for part in value:
            _check_values(part, where, name, depth + 1)


class Field(NamedTuple):
    """What a field must be."""

    expected: str
    fits: Callable[[Any], bool]
    optional: bool = False


def _check_object(value: dict[str, Any], fields: dict[str, Field], where: Path, name: str) -> None:
    for key, field in fields.items():
        if key not in value:
            if field.optional:
                continue
            raise ValueError(
                f"{where}: field {name + key!r}: expected {field.expected}, found none"
            )
        if not field.fits(value[key]):
            raise ValueError(
                f"{where}: field {name + key!r}: expected {field.expected}, found "
                f"{_shown(value[key])}"
            )


def _shown(value: Any) -> str:
    return f"{value!r:.100}" if isinstance(value, str | int | float | None) else _kind(value)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", tuple: "a list", str: "text", bool: "true or false"}
    return names.get(type(value), "nothing" if value is None else "a number")


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _is_integer(value: Any, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_size(value: Any) -> bool:
    return _is_integer(value, 1) and value < 2**31


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None


def _or_none(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or fits(value)


def _all(value: Any, kind: type, fits: Callable[[Any], bool]) -> bool:
    parts: Any = value.values() if isinstance(value, dict) else value
    return isinstance(value, kind) and all(map(fits, parts))


def _has(value: Any, fields: dict[str, Callable[[Any], bool]]) -> bool:
    """An object of exactly these fields."""
    return (
        isinstance(value, dict)
        and value.keys() == fields.keys()
        and all(fits(value[key]) for key, fits in fields.items())
    )


# No part of a path may begin with a dot: neither `..` nor what a killed write left.
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*")


def _are_files(value: Any) -> bool:
    return _all(value, dict, _is_digest) and all(
        _FILE.fullmatch(name) and not name.endswith(".partial") and name != "manifest.json"
        for name in value
    )


def _is_tensor(value: Any, dtypes: tuple[str, ...] = DTYPES) -> bool:
    return _has(
        value,
        {
            "shape": lambda x: _all(x, list, _is_size) and len(x) <= 8,
            "dtype": lambda x: x in dtypes,
            "sha256": _is_digest,
        },
    )


def _is_experts_tensor(value: Any) -> bool:
    return _is_tensor(value, EXPERT_DTYPES)


def _is_compressed(value: Any) -> bool:
    sizes: list[dict[str, Callable[[Any], bool]]] = [{"rank": _is_size}, {"energy": _is_positive}]
    bits: list[dict[str, Callable[[Any], bool]]] = [
        {"bits": lambda x: _is_size(x) and x == 8},
        {"bits": lambda x: _is_size(x) and x == 4, "group": _is_size},
    ]
    both = [{**size, **form} for size in sizes for form in bits]
    forms: list[dict[str, Callable[[Any], bool]]] = [{"width": _is_size}, *sizes, *bits, *both]
    return any(_has(value, {"from": _is_digest, **chosen}) for chosen in forms)


_MODEL: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("vocab_size", "width", "num_layers", "num_heads", "ffn_width"), _is_size),
    **dict.fromkeys(("num_experts", "max_length", "loss_chunk", "unroll"), _is_size),
    **dict.fromkeys(("num_kv_heads", "head_width", "active_experts"), _or_none(_is_size)),
    **dict.fromkeys(("renormalize", "tie_embeddings"), lambda x: isinstance(x, bool)),
    **dict.fromkeys(("rope_theta", "norm_eps"), _is_positive),
    **dict.fromkeys(("dtype", "expert_compute", "attention", "remat"), _is_text),
    **dict.fromkeys(("memory", "evidence"), lambda x: x is None),
}


def model_of(manifest: dict[str, Any], where: Path) -> ModelConfig:
    """The config of an anchor, or the one that an expert was made for.

    Raises:
      ValueError: a value is missing, unknown or impossible.
    """
    values = manifest["model"]
    for key, value in values.items():
        if key in _MODEL and not _MODEL[key](value):
            raise ValueError(f"{where}: field 'model.{key}': cannot be {_shown(value)}")
    config = ModelConfig.from_json(values, str(where))
    if config.num_experts != 1 or config.active_experts is not None:
        raise ValueError(f"{where}: field 'model': expected the config of one expert")
    return config


_SOURCE = {"path": _is_text, "digest": _is_digest}
_IS_TEXT, _IS_DIGEST = Field("text", _is_text), Field("a sha256 in hexadecimal digits", _is_digest)
_TENSORS = "an object of tensors, each with a shape, a dtype of {}, a sha256"
_OF_FLOATS = _TENSORS.format(", ".join(DTYPES))
COMMON = {
    "made_by": _IS_TEXT,
    "files": Field("an object of plain relative paths, each with its sha256", _are_files),
    **dict.fromkeys(("licence", "contact"), Field("text", _is_text, optional=True)),
    "tokens_seen": Field("a whole number", _is_integer, optional=True),
    "heldout": Field(
        "an object of a share in [0, 1) and a group field, or null",
        _or_none(lambda x: _has(x, {"share": _is_share, "group_field": _is_name})),
        optional=True,
    ),
    "separator": Field("text", _is_text, optional=True),
    "canaries": Field(
        "an object of a number of candidates, and a commitment, a sha256",
        lambda x: _has(x, {"candidates": _is_integer, "commitment": _is_digest}),
        optional=True,
    ),
    **dict.fromkeys(
        ("gating", "router", "domain_embedding"),
        Field("text or null", _or_none(_is_text), optional=True),
    ),
}
KINDS = {
    "anchor": {
        "name": _IS_TEXT,
        "identity": _IS_DIGEST,
        "model": Field("an object", lambda x: isinstance(x, dict)),
        "tokenizer": Field(
            "an object of a sha256, digest, and text, separator",
            lambda x: _has(x, {"digest": _is_digest, "separator": _is_text}),
        ),
        "tensors": Field(_OF_FLOATS, lambda x: _all(x, dict, _is_tensor)),
    },
    "expert": {
        "name": _IS_TEXT,
        "anchor": _IS_DIGEST,
        "model": Field("an object", lambda x: isinstance(x, dict)),
        "tokenizer": Field("a sha256 in hexadecimal digits, or null", _or_none(_is_digest)),
        "privacy": Field("text or an object", lambda x: isinstance(x, str | dict)),
        "compressed": Field(
            "an object of from, a sha256; rank, energy, width, bits",
            _is_compressed,
            optional=True,
        ),
        "tensors": Field(
            _TENSORS.format(", ".join(EXPERT_DTYPES)), lambda x: _all(x, dict, _is_experts_tensor)
        ),
    },
    "merged": {
        "anchor": Field(
            "an object of path, identity, and perhaps digest and separator",
            lambda x: (
                isinstance(x, dict)
                and _has(
                    {"digest": None, "separator": None, **x},
                    {
                        **_SOURCE,
                        "identity": _is_digest,
                        "digest": _or_none(_is_digest),
                        "separator": _or_none(_is_text),
                    },
                )
            ),
        ),
        "experts": Field(
            "a list of objects of name, path and digest",
            lambda x: _all(x, list, lambda entry: _has(entry, {"name": _is_text, **_SOURCE})),
        ),
        "active_experts": Field("a whole number above 0, or null", _or_none(_is_size)),
        "memory": Field(
            "an object of numbers, decay and weight, or null",
            _or_none(lambda x: _has(x, {"decay": _is_positive, "weight": _is_positive})),
            optional=True,
        ),
        "evidence": Field(
            "an object of numbers, decay, strength and shift, or null",
            _or_none(
                lambda x: _has(
                    x,
                    {
                        **dict.fromkeys(("decay", "strength"), _is_positive),
                        "shift": lambda x: _is_positive(x) or x == 0,
                    },
                )
            ),
            optional=True,
        ),
        "tensors": Field(_OF_FLOATS, lambda x: _all(x, dict, _is_tensor), optional=True),
    },
}
