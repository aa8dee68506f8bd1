"""Identity: is a package an admitted one under another name, or nearly."""

import itertools
import math
from collections.abc import Iterator

import numpy as np

from flexolmo_jax.admission.cohort import Cohort
from flexolmo_jax.admission.deltas import Head, deltas, head_of, overlap
from flexolmo_jax.admission.policy import Identity
from flexolmo_jax.admission.results import Result, judged, not_judged
from flexolmo_jax.federation.names import look
from flexolmo_jax.federation.package import Package

PARTS = ("feed_forward", "head", "evidence")  # parts whose likeness is judged


def check_identity(package: Package, cohort: Cohort, bounds: Identity) -> list[Result]:
    """Compares names, and what the package's weights add, with those of each admitted package.

    The distance of two packages in a part is the sine of the angle between what each adds to the
    public weights: 0 for a copy, times any factor, also a negative one; near 1 for experts that
    were trained apart. A small noise on a copy gives a small distance.
    """
    return [_of_name(package, cohort), _of_weights(package, cohort, bounds)]


def same_names(package: Package, cohort: Cohort) -> list[str]:
    """Admitted experts with the name of a package, or with one that looks like it."""
    own = look(package.manifest["name"])
    return [name for name in cohort.names if look(name) == own]


def _of_name(package: Package, cohort: Cohort) -> Result:
    own, same = package.manifest["name"], same_names(package, cohort)
    if not same:
        why = f"No admitted expert has the name {own}, or one that looks like it."
        return Result("identity", "name", None, None, "passed", why, "text")
    why = f"Its name, {own}, looks like that of the admitted expert {same[0]}: no model holds both."
    return Result("identity", "name", None, None, "reject", why, "text")


def _of_weights(package: Package, cohort: Cohort, bounds: Identity) -> Result:
    measured = "likeness to an admitted one"
    if not cohort.members:
        return not_judged("identity", measured, "No package was admitted before.")
    rows = [
        {
            "expert": member.manifest["name"],
            "identical_tensors": _identical(package, member),
            **distances(package, member, cohort),
        }
        for member in cohort.members
    ]
    pairs = [(row[part], part, row) for row in rows for part in PARTS if row.get(part) is not None]
    if not pairs:
        return not_judged("identity", measured, "It adds nothing to the public weights.", rows=rows)
    nearest, part, row = min(pairs, key=lambda pair: pair[0])
    same = row["identical_tensors"]
    why = (
        f"Its part {part} is at a distance of {nearest:.3f} from that of {row['expert']} (0 is a "
        f"copy, 1 is unrelated; at least {bounds.distance:g} is expected)"
        + (f", and {same} of its tensors are the same, bit for bit." if same else ".")
    )
    likeness, most = 1 - nearest, 1 - bounds.distance
    return judged(
        "identity", measured, likeness, most, bounds.fails, why, "share", rows=rows
    )  # fmt: skip


def distances(package: Package, member: Package, cohort: Cohort) -> dict[str, float | None]:
    """{part: sine of the angle between what two packages add}; None where one adds nothing."""
    public = cohort.anchor.weights.public
    pairs = itertools.starmap(
        overlap,
        zip(deltas(package.weights, public), deltas(member.weights, public), strict=True),
    )
    found = {"feed_forward": _sine(pairs)}
    for name in PARTS[1:]:
        heads = [head_of(x, name) for x in (package, member)]
        found[name] = None if None in heads else _sine(iter([_of_heads(*heads)]))  # type: ignore
    return found


def _sine(sums: Iterator[tuple[float, float, float]]) -> float | None:
    product, left, right = np.sum(list(sums), axis=0, dtype=np.float64)
    if left == 0 or right == 0:
        return None
    return math.sqrt(max(0.0, 1 - product**2 / (left * right)))


def _of_heads(left: Head, right: Head) -> tuple[float, float, float]:
    """As `overlap`, of two low-rank heads a b + bias, which may have different ranks."""

    def product(x: Head, y: Head) -> float:
        return float(np.sum((x.a.T @ y.a) * (x.b @ y.b.T)) + x.bias @ y.bias)

    return product(left, right), product(left, left), product(right, right)


def _identical(package: Package, member: Package) -> int:
    """How many tensors have the same bytes; biases of zeros, which many share, do not count."""
    own, theirs = package.manifest["tensors"], member.manifest["tensors"]
    return sum(
        own[name]["sha256"] == theirs[name]["sha256"]
        for name in own.keys() & theirs.keys()
        if not name.endswith("bias")
    )
