"""The weight files of a Hugging Face directory: which are read, and what tensors they hold."""

import contextlib
import functools
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
INDEX_SUFFIX = ".safetensors.index.json"
NOT_JSON = (json.JSONDecodeError, UnicodeDecodeError)
SUFFIXES = (".safetensors", INDEX_SUFFIX)
OTHER_WEIGHTS = ("*.safetensors", "*.index.json", "*.bin", "*.gguf", "*.pth")


class Tensor(NamedTuple):
    """A tensor in a file; nothing of it is in memory."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]


@contextlib.contextmanager
def reading(file: Path) -> Iterator[None]:
    """Inside, whatever is wrong with the file becomes a ValueError that names it."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file}: missing or damaged ({error}); get it again") from error


def open_tensors(path: Path, stack: contextlib.ExitStack) -> dict[str, Tensor]:
    """Opens the folder's safetensors and lists what they hold; `stack` closes them."""
    found: dict[str, Tensor] = {}
    for file in _weight_files(path):
        with reading(file):
            opened = stack.enter_context(safe_open(file, framework="numpy"))
        for name in opened.keys():
            header, read = opened.get_slice(name), functools.partial(opened.get_tensor, name)
            kind = header.get_dtype()
            if kind not in DTYPES:
                raise ValueError(f"{file}: {name}: expected {'/'.join(DTYPES)}, found {kind}")
            if name in found:
                raise ValueError(f"{file}: {name} is also in {found[name].file}")
            found[name] = Tensor(file, tuple(header.get_shape()), DTYPES[kind], read)
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
