"""Packages whose matrices are integers: which, how a manifest describes them, and their files.

A tensor `feed_forward.gate` of dtype "int4" has the shape of the matrix that it stands for, and a
tensor `feed_forward.gate.peak` beside it (storage/integers.py). Opened, both are one leaf that is
read as float32; so loading, merging and removal are those of any other package.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from flexolmo_jax.storage import on_disk, tensors
from flexolmo_jax.storage.integers import LARGEST, PEAK, FromCodes, stored_shapes, to_codes

GROUP = 64  # rows that share a scale, of integers of 4 bits
MATRIX_AXES = 4  # [L, E, I, O]: router rows and biases have fewer


class Rounding(NamedTuple):
    """How matrices become integers.

    Attributes:
      bits: 8, with a scale for each output channel; or 4, with one for each group of rows of it.
      group: rows; None with 8 bits.
    """

    bits: int
    group: int | None

    @classmethod
    def of(cls, bits: int, group: int | None) -> "Rounding":
        """Raises ValueError if there is no such form."""
        if bits not in (4, 8):
            raise ValueError(f"bits must be 8 or 4, found {bits}")
        if bits == 8 and group is not None:
            raise ValueError(
                "a group is for 4 bits: with 8, all rows of an output channel share a scale; leave "
                "group out"
            )
        if group is not None and group < 1:
            raise ValueError(f"group must be 1 or more, found {group}")
        return cls(bits, group or GROUP if bits == 4 else None)

    @property
    def dtype(self) -> str:
        return f"int{self.bits}"

    def fields(self) -> dict[str, int]:
        """For the manifest."""
        return {name: value for name, value in self._asdict().items() if value is not None}


def round_matrices(tree: Any, rounding: Rounding) -> tuple[Any, dict[str, float]]:
    """The tree with its matrices as integers, and what rounding changed.

    Args:
      tree: an expert's modules; leaves may be on disk, of which a layer is read at a time.
      rounding: the form.

    Returns:
      the tree; and the norm of each matrix's error over that of the matrix, by name.
    """
    errors = {}

    def round_leaf(path, leaf):
        if leaf.ndim != MATRIX_AXES:
            return leaf
        layers, missed, whole = [], 0.0, 0.0
        for layer in range(leaf.shape[0]):
            matrix = np.asarray(leaf[layer : layer + 1, :, :, :], np.float32)
            own = to_codes(matrix, rounding.dtype, rounding.group)
            layers.append(own)
            back = np.asarray(FromCodes(*own, matrix.shape, rounding.dtype, rounding.group))
            missed += float(np.sum((back - matrix) ** 2, dtype=np.float64))
            whole += float(np.sum(matrix**2, dtype=np.float64))
        errors[tensors.leaf_name(path)] = (missed / whole) ** 0.5 if whole else 0.0
        stacks = (np.concatenate(parts) for parts in zip(*layers, strict=True))
        return FromCodes(*stacks, tuple(leaf.shape), rounding.dtype, rounding.group)

    return jax.tree_util.tree_map_with_path(round_leaf, tree), errors


def files_of(name: str, leaf: Any) -> Iterator[tuple[str, Any]]:
    """What a leaf is stored as: itself, or its codes under its name, and its peaks."""
    if isinstance(leaf, FromCodes):
        yield name, leaf.codes
        yield name + PEAK, leaf.peaks
    else:
        yield name, leaf


def describe(named: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """As `tensors.describe`; a matrix of integers has its own shape, and the dtype of its codes."""
    stored = {own: part for name, leaf in named.items() for own, part in files_of(name, leaf)}
    described = tensors.describe(stored)
    for name, leaf in named.items():
        if isinstance(leaf, FromCodes):
            described[name] |= {"shape": list(leaf.shape), "dtype": leaf.stored}
    return described


def leaves_of(entries: dict[str, Any]) -> dict[str, Any]:
    """{name: shape and dtype} of the leaves that the tensors of a manifest stand for."""
    return {
        name: jax.ShapeDtypeStruct(
            tuple(entry["shape"]), "float32" if entry["dtype"] in LARGEST else entry["dtype"]
        )
        for name, entry in entries.items()
        if entries.get(name.removesuffix(PEAK), entry)["dtype"] not in LARGEST
        or not name.endswith(PEAK)
    }


def open_leaves(folder: Path, params: str, manifest: dict[str, Any]) -> dict[str, Any]:
    """The leaves of a package's tensors, left in their files.

    Raises:
      ValueError: a tensor is missing, or of another shape or dtype; as `on_disk.open_tensors`.
    """
    entries = manifest.get("tensors", {})
    group = manifest.get("compressed", {}).get("group")
    leaves = leaves_of(entries)
    stored, integers = {}, {}
    for name, leaf in leaves.items():
        dtype = entries[name]["dtype"]
        if dtype not in LARGEST:
            stored[name] = leaf
            continue
        if leaf.ndim != MATRIX_AXES:
            raise ValueError(f"{folder}: the tensor {name} is {dtype}, and no matrix: {leaf.shape}")
        codes, peaks = stored_shapes(leaf.shape, dtype, group)
        found = entries.get(name + PEAK, {"shape": None, "dtype": None})
        if found["shape"] != list(peaks) or found["dtype"] != "float32":
            raise ValueError(
                f"{folder}: expected a tensor {name}{PEAK} of shape {list(peaks)}, float32, found "
                f"{found['shape']}, {found['dtype']}"
            )
        integers[name] = dtype
        kind = "int8" if dtype == "int8" else "uint8"
        stored[name] = jax.ShapeDtypeStruct(codes, kind)
        stored[name + PEAK] = jax.ShapeDtypeStruct(peaks, "float32")
    opened = on_disk.open_tensors(folder / params, stored)
    return {
        name: FromCodes(opened[name], opened[name + PEAK], leaf.shape, integers[name], group)
        if name in integers
        else opened[name]
        for name, leaf in leaves.items()
    }
