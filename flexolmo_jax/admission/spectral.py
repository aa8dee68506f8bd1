"""Spectral figures of what an expert changed in each matrix, against those of admitted experts.

The five figures are those of arXiv 2602.15195, which found poisoned adapters by them, without data
and without running a model. An attacker who knows them can train within them.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from flexolmo_jax.admission.cohort import Cohort
from flexolmo_jax.admission.deltas import deltas, form_of, head_of
from flexolmo_jax.admission.policy import Spectral
from flexolmo_jax.admission.results import Result, judged, not_judged
from flexolmo_jax.federation.package import Package
from flexolmo_jax.modeling.experts import Experts
from flexolmo_jax.storage.tensors import named

SIZES = ("largest", "norm")  # figures that say how much was changed
TINY = 1e-12  # below any figure of weights that were trained; the logarithm of 0 is that of this
NORMAL = 1.4826  # a normal distribution's standard deviation, in units of its MAD


class Figures(NamedTuple):
    """Of one matrix D = W - W_public with singular values s; all are 0 or more.

    Attributes:
      largest: the largest s.
      norm: Frobenius norm of D.
      energy: share of the largest s squared in the sum of all s squared; 1 if D is 0.
      entropy: of the shares of all s squared, over its largest value, ln(min(I, O)): 0 to 1.
      kurtosis: of the entries: 3 for normal ones, 0 if D is 0.
    """

    largest: float
    norm: float
    energy: float
    entropy: float
    kurtosis: float


def figures(matrix: np.ndarray) -> Figures:
    """The figures of a matrix [I, O].

    The singular values are roots of the eigenvalues of the smaller Gram matrix, in float64: for
    the largest ones, and for sums over all, that is exact enough, and much faster than an SVD.
    """
    x = matrix.astype(np.float64)
    gram = x @ x.T if x.shape[0] <= x.shape[1] else x.T @ x
    squares = np.clip(np.linalg.eigvalsh(gram), 0, None)
    total = float(squares.sum())
    if total == 0:
        return Figures(0.0, 0.0, 1.0, 0.0, 0.0)
    shares = squares[squares > 0] / total
    entropy = float(-np.sum(shares * np.log(shares))) / max(np.log(len(squares)), TINY)
    centred = x - x.mean()
    variance = float(np.mean(centred**2))
    kurtosis = float(np.mean(centred**4)) / variance**2 if variance > 0 else 0.0
    largest = float(np.sqrt(squares[-1]))
    return Figures(largest, total**0.5, float(shares[-1]), max(entropy, 0.0), kurtosis)


def profile(package: Package, public: Experts) -> dict[str, Figures]:
    """{"gate.0": figures} of all matrices of an expert; a matrix is in memory at a time."""
    return {
        f"{delta.name}.{delta.layer}": figures(delta.matrix)
        for delta in deltas(package.weights, public)
    }


def norms(package: Package) -> dict[str, float]:
    """{"row.0": norm} of router rows, layer by layer, and of heads a b and their biases.

    "bias.0" is e^bias, the factor that a router bias puts on the expert's weight; a bias above 0
    counts as 0.
    """
    leaves = named(package.weights)
    rows = np.asarray(leaves["router.row"], np.float64)[:, 0]
    biases = np.minimum(np.asarray(leaves["router.bias"], np.float64)[:, 0], 0)
    found = {f"row.{layer}": float(np.linalg.norm(row)) for layer, row in enumerate(rows)}
    found |= {f"bias.{layer}": float(np.exp(bias)) for layer, bias in enumerate(biases)}
    for name in ("head", "evidence"):
        head = head_of(package, name)
        if head is not None:
            squared = np.sum((head.a.T @ head.a) * (head.b @ head.b.T))
            found[name] = float(np.sqrt(max(squared, 0.0)))
            found[f"{name}.bias"] = float(np.linalg.norm(head.bias))
    return found


def robust_z(value: float, others: Sequence[float], spread: float) -> float:
    """How far a figure is from the others': (log value - median) over the spread of logarithms.

    Args:
      value, others: 0 or more.
      spread: the least spread, since a few experts that were trained alike are nearer to each other
        than the next honest one will be to them.
    """
    logs = np.log(np.maximum(others, TINY))
    median = float(np.median(logs))
    scale = NORMAL * float(np.median(np.abs(logs - median)))
    return (float(np.log(max(value, TINY))) - median) / max(scale, spread)


def check_spectral(package: Package, cohort: Cohort, bounds: Spectral) -> list[Result]:
    """Figures of all matrices, and norms of router and heads, against the cohort's.

    Experts of another form (low-rank, pruned, integers, private) have other figures. So an expert
    is compared with those of its own form, if there are enough; and else with all, by the size of
    what it changed only. A size below the cohort's is no fault: a short or private training changes
    little.
    """
    public = cohort.anchor.weights.public
    members, among, compared = comparable(package, cohort, bounds.members)
    own, all_members = profile(package, public), [profile(m, public) for m in members]
    flat = {f"{name}.{k}": v for name, x in own.items() for k, v in x._asdict().items()}
    others = {
        f"{name}.{k}": [getattr(x[name], k) for x in all_members]
        for name in own
        for k in Figures._fields
    }
    own_norms, all_norms = norms(package), [norms(member) for member in members]
    of_others = {name: [x[name] for x in all_norms if name in x] for name in own_norms}
    titles = "matrices out of the cohort", "norms out of the cohort"
    if len(members) < bounds.members:
        few = f"{len(members)} admitted packages: {bounds.members} are needed to say what is usual."
        return [
            not_judged("spectral", titles[0], f"There are {few}", figures=_rows(flat, others, {})),
            not_judged(
                "spectral", titles[1], f"There are {few}", figures=_rows(own_norms, of_others, {})
            ),
        ]
    z: dict[str, float] = {}
    for name in flat:
        kind = name.rpartition(".")[2]
        if kind in compared:
            own_z = robust_z(flat[name], others[name], bounds.spread)
            z[name] = max(own_z, 0.0) if kind in SIZES else abs(own_z)
    of_matrix = {name: max((z[f"{name}.{k}"], k) for k in compared) for name in own}
    worst = max(of_matrix, key=lambda name: of_matrix[name])
    out = sum(most > bounds.z for most, _ in of_matrix.values())
    why = (
        f"{out} of {len(own)} matrices have a figure at a robust z above {bounds.z:g} from {among}"
        f"; the farthest is the {of_matrix[worst][1]} of {worst}, at {of_matrix[worst][0]:.1f}."
    )
    # A head that most of the cohort lacks is compared with nothing: routing and loss judge it.
    z_norms = {
        name: abs(robust_z(own_norms[name], values, bounds.spread))
        for name, values in of_others.items()
        if len(values) >= bounds.members
    }
    return [
        judged("spectral", titles[0], out / len(own), bounds.matrices, bounds.fails, why, "share",
               figures=_rows(flat, others, z)),
        _of_norms(titles[1], own_norms, of_others, z_norms, bounds, among),
    ]  # fmt: skip


def comparable(
    package: Package, cohort: Cohort, least: int
) -> tuple[tuple[Package, ...], str, tuple[str, ...]]:
    """The admitted packages that an expert is compared with, who they are, and in which figures."""
    form = form_of(package)
    same = tuple(member for member in cohort.members if form_of(member) == form)
    if len(same) >= least or len(same) == len(cohort.members):
        return same, f"{len(same)} admitted {form} experts", Figures._fields
    among = f"{len(cohort.members)} admitted experts, by size only, since {len(same)} are {form}"
    return cohort.members, among, SIZES


def _of_norms(
    title: str,
    own: Mapping[str, float],
    others: Mapping[str, list[float]],
    z: Mapping[str, float],
    bounds: Spectral,
    among: str,
) -> Result:
    out = [name for name in z if z[name] > bounds.z]
    farthest = max(z, key=lambda name: z[name])
    why = (
        f"{len(out)} of {len(z)} norms are at a robust z above {bounds.z:g} from {among}; the "
        f"farthest is that of {farthest}, at {z[farthest]:.1f}."
    )
    share, rows = len(out) / len(z), _rows(own, others, z)
    return judged("spectral", title, share, bounds.parts, bounds.fails, why, "share", figures=rows)


def _rows(
    own: Mapping[str, float], others: Mapping[str, list[float]], z: Mapping[str, float]
) -> dict[str, dict[str, Any]]:
    """For JSON and plots: the figure of each matrix, the cohort's, and how far it is."""
    return {
        name: {"value": value, "cohort": others.get(name, []), "z": z.get(name)}
        for name, value in own.items()
    }
