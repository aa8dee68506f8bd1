"""Identity: is a package an admitted one under another name, or nearly."""

import itertools
import math
from collections.abc import Iterator

import numpy as np

from flexolmo_jax.admission.cohort import Cohort
from flexolmo_jax.admission.deltas import (
    NAMES,
    Head,
    at_units,
    deltas,
    head_of,
    likeness,
    matrices,
    origins,
    overlap,
    products,
)
from flexolmo_jax.admission.policy import Identity
from flexolmo_jax.admission.results import Result, judged, not_judged
from flexolmo_jax.federation.names import look
from flexolmo_jax.federation.package import Package
from flexolmo_jax.modeling.experts import Experts
from flexolmo_jax.storage.tensors import named

JUDGED = ("feed_forward", "head")
# An evidence head is a bigram model of its owner's text, so that of two honest experts of the same
# text is at a distance of 0.25: it is shown, and not judged.
PARTS = (*JUDGED, "evidence")


def check_identity(package: Package, cohort: Cohort, bounds: Identity) -> list[Result]:
    """Compares names, and what the package's weights add, with those of each admitted package.

    The distance of two packages in a part is the sine of the angle between what each adds to the
    public weights: 0 for a copy, times any factor, also a negative one; near 1 for experts that
    were trained apart. A small noise on a copy gives a small distance. A tensor with the same bytes
    is a copy too.
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
    pairs = [(row[part], part, row) for row in rows for part in JUDGED if row[part] is not None]
    same = max(rows, key=lambda row: row["identical_tensors"])
    if same["identical_tensors"]:
        nearest = 0.0
        count = same["identical_tensors"]
        why = f"{count} of its tensors are those of {same['expert']}, bit for bit."
    elif pairs:
        nearest, part, row = min(pairs, key=lambda pair: pair[0])
        why = (
            f"Its part {part} is at a distance of {nearest:.3f} from that of {row['expert']} (0 is "
            f"a copy, 1 is unrelated; at least {bounds.distance:g} is expected)."
        )
    else:
        return not_judged("identity", measured, "It adds nothing to the public weights.", rows=rows)
    return judged(
        "identity", measured, 1 - nearest, 1 - bounds.distance, bounds.fails, why, "share",
        rows=rows,
    )  # fmt: skip


def distances(package: Package, member: Package, cohort: Cohort) -> dict[str, float | None]:
    """{part: sine of the angle between what two packages add}; None where one adds nothing.

    Of the feed-forward networks the smaller one of two: with hidden units in their places, and
    with each unit of the package beside the member's most similar one, since a copy whose units
    are in another order computes the same.
    """
    public = cohort.anchor.weights.public
    in_place = itertools.starmap(
        overlap,
        zip(deltas(package.weights, public), deltas(member.weights, public), strict=True),
    )
    found = [_sine(in_place), _sine(_of_matched_units(package, member, public))]
    measured = [sine for sine in found if sine is not None]
    parts = {"feed_forward": min(measured, default=None)}
    for name in PARTS[1:]:
        heads = [head_of(x, name) for x in (package, member)]
        parts[name] = None if None in heads else _sine(iter([_of_heads(*heads)]))  # type: ignore
    return parts


def _of_matched_units(
    package: Package, member: Package, public: Experts
) -> Iterator[tuple[float, float, float]]:
    """As `overlap`, of each matrix, after each hidden unit was matched with one of the member's."""
    layers = zip(
        matrices(package.weights, public), matrices(member.weights, public),
        matrices(public, public), strict=True,
    )  # fmt: skip
    for own, theirs, base in layers:
        match = np.argmax(np.abs(likeness(own, theirs)), axis=1)
        of_member = origins(theirs, base)
        units = match if of_member is None else of_member[match]
        for name in NAMES:
            before = at_units(base, name, units)
            yield products(own[name] - before, at_units(theirs, name, match) - before)


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
    """How many tensors have the same bytes; zeros, which many share, do not count."""
    own, theirs = package.manifest["tensors"], member.manifest["tensors"]
    same = [x for x in own.keys() & theirs.keys() if own[x]["sha256"] == theirs[x]["sha256"]]
    leaves = named(package.weights)
    return sum(name not in leaves or bool(np.any(np.asarray(leaves[name]))) for name in same)
