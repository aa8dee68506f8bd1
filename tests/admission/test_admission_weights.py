"""What admission finds in weights alone: copies, unusual figures, and shares of texts."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexolmo_jax.admission.deltas import deltas, form_of
from flexolmo_jax.admission.identity import check_identity
from flexolmo_jax.admission.policy import Identity, RoutingBounds, Spectral
from flexolmo_jax.admission.routing import Texts, check_routing
from flexolmo_jax.admission.spectral import check_spectral, figures, norms, robust_z
from flexolmo_jax.data.sources import read_documents
from flexolmo_jax.federation.compress import compress
from flexolmo_jax.federation.package import Package
from flexolmo_jax.modeling.experts import with_parts
from flexolmo_jax.storage.tensors import named, refill

UNITS = {"gate": -1, "up": -1, "down": -2}  # the axis of hidden units


def scaled(expert, anchor, factor):
    """The expert with its difference from the public one times a factor."""
    public = anchor.weights.public.feed_forward
    own = jax.tree.map(lambda x, p: p + factor * (x - p), expert.feed_forward, public)
    return with_parts(expert, feed_forward=own)


def narrowed(expert, kept):
    """The expert with these hidden units only."""
    tensors = named(expert)
    for name, axis in UNITS.items():
        tensors[f"feed_forward.{name}"] = jnp.take(tensors[f"feed_forward.{name}"], kept, axis)
    return refill(expert, tensors)


def texts_of(world):
    def first(name):
        return list(itertools.islice(read_documents(world.texts[name]), 20))

    return Texts(first("public"), {"old0": first("code")})


def test_figures_are_those_of_a_full_svd():
    matrix = np.random.default_rng(0).standard_normal((24, 40)).astype(np.float32)
    matrix[3] *= 9
    s = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
    shares = s**2 / np.sum(s**2)
    found = figures(matrix)
    assert found.largest == pytest.approx(s[0])
    assert found.norm == pytest.approx(np.linalg.norm(matrix), rel=1e-6)
    assert found.energy == pytest.approx(shares[0])
    assert found.entropy == pytest.approx(-np.sum(shares * np.log(shares)) / np.log(24))
    centred = matrix - matrix.mean(dtype=np.float64)
    kurtosis = np.mean(centred**4) / np.mean(centred**2) ** 2
    assert found.kurtosis == pytest.approx(kurtosis, rel=1e-6)
    assert figures(matrix.T).largest == pytest.approx(s[0])
    assert figures(np.zeros((3, 4))) == (0, 0, 1, 0, 0)


def test_robust_z_is_not_moved_by_one_bad_member():
    honest = [1.0, 1.1, 0.9, 1.05, 0.95]
    assert robust_z(1.02, honest, 0.01) < 1
    assert robust_z(3.0, honest, 0.01) > 8
    assert robust_z(3.0, [*honest, 50.0], 0.01) > 8
    assert robust_z(0.0, honest, 0.01) < -8
    assert robust_z(2.0, [1.0] * 5, 0.1) == pytest.approx(np.log(2) / 0.1)


def test_every_form_of_a_package_has_the_deltas_of_its_weights(
    anchor, honest, write, world, tmp_path
):
    public, expert = anchor.weights.public, honest(20)
    full = write(tmp_path / "full", expert)
    kept = np.array([0, 3, 4, 17, 40])
    write(tmp_path / "narrow", narrowed(expert, kept))
    compress(full, tmp_path / "eight", bits=8, anchor=world.anchor)
    compress(full, tmp_path / "whole-rank", rank=32, anchor=world.anchor)
    packages = {
        name: Package.open(tmp_path / name) for name in ("full", "narrow", "eight", "whole-rank")
    }
    forms = ("full", "pruned", "full int8", "low-rank")
    assert tuple(map(form_of, packages.values())) == forms
    for name, package in packages.items():
        for delta in deltas(package.weights, public):
            own, base = (
                np.asarray(named(x.feed_forward)[delta.name])[delta.layer, 0]
                for x in (expert, public)
            )
            expected = own - base
            if name == "narrow":
                np.testing.assert_array_equal(delta.units, kept)
                expected = np.take(expected, kept, UNITS[delta.name])
            tolerance = {"eight": 2e-3, "whole-rank": 1e-5}.get(name, 1e-7)
            np.testing.assert_allclose(delta.matrix, expected, atol=tolerance)


@pytest.mark.parametrize(
    "disguise", ["noise", "scaled", "negated", "int8", "low-rank", "pruned", "permuted"]
)
def test_a_copy_in_disguise_is_found(disguise, anchor, honest, write, cohort, world, tmp_path):
    original, random = honest(3), np.random.default_rng(0)
    path = tmp_path / "mine"
    if disguise == "noise":
        copy = jax.tree.map(
            lambda x: x + 0.001 * random.standard_normal(x.shape, np.float32), original
        )
        write(path, copy)
    elif disguise in ("scaled", "negated"):
        write(path, scaled(original, anchor, 0.5 if disguise == "scaled" else -1.0))
    elif disguise == "pruned":
        write(path, narrowed(original, np.arange(10)))
    elif disguise == "permuted":  # it computes the same
        write(path, narrowed(original, random.permutation(48)))
    else:
        write(tmp_path / "first" / "mine", original)
        how = {"bits": 8} if disguise == "int8" else {"rank": 28}
        compress(tmp_path / "first" / "mine", path, anchor=world.anchor, **how)
    name, weights = check_identity(Package.open(path), cohort, Identity())
    assert name.verdict == "passed"
    assert weights.verdict == "reject" and "old3" in weights.explanation, weights


def test_an_expert_of_its_own_is_no_copy_and_a_name_that_looks_alike_is_refused(
    honest, write, cohort, tmp_path
):
    package = Package.open(write(tmp_path / "a", honest(30), "new"))
    assert [x.verdict for x in check_identity(package, cohort, Identity())] == ["passed", "passed"]
    package = Package.open(write(tmp_path / "b", honest(30), "0ld3"))
    name, weights = check_identity(package, cohort, Identity())
    assert (name.verdict, weights.verdict) == ("reject", "passed")


def test_identical_tensors_are_counted(honest, write, cohort, tmp_path):
    """The original's matrices with rows of its own."""
    copy = with_parts(honest(3), router=honest(31).router)
    _, weights = check_identity(Package.open(write(tmp_path / "a", copy)), cohort, Identity())
    assert weights.verdict == "reject"
    assert "3 of its tensors are those of old3, bit for bit" in weights.explanation


def test_spectral_figures_of_honest_and_changed_experts(anchor, honest, write, cohort, tmp_path):
    def verdicts(name, expert, bounds=None):
        package = Package.open(write(tmp_path / name, expert))
        return [x.verdict for x in check_spectral(package, cohort, bounds or Spectral())]

    assert verdicts("honest", honest(40)) == ["passed", "passed"]
    assert verdicts("scaled", scaled(honest(40), anchor, 4.0)) == ["review", "passed"]
    assert verdicts("little", scaled(honest(40), anchor, 0.2)) == ["passed", "passed"]
    one_layer = honest(40)
    spike = np.zeros(one_layer.feed_forward.gate.shape, np.float32)
    spike[0, 0, 3, 5] = 2.0
    one_layer.feed_forward.gate[...] += spike
    assert verdicts("spike", one_layer) == ["review", "passed"]
    loud = honest(40)
    loud.router.row[...] = 9 * loud.router.row[...]
    assert verdicts("loud", loud) == ["passed", "review"]
    few = verdicts("few", scaled(honest(40), anchor, 4.0), Spectral(members=7))
    assert few == ["not judged", "not judged"]


def test_a_bias_above_zero_is_a_factor_of_one(honest, write, tmp_path):
    expert = honest(41)
    expert.router.bias[...] = jnp.array([[5.0], [-2.0]])
    found = norms(Package.open(write(tmp_path / "a", expert)))
    assert (found["bias.0"], found["bias.1"]) == (1, pytest.approx(np.exp(-2)))


def test_rows_along_the_mean_input_take_all_and_are_refused(
    anchor, world, honest, write, cohort, tmp_path
):
    from flexolmo_jax.training.public_data import public_batch
    from flexolmo_jax.training.router_fit.inputs import of_the_anchor, whitened_by

    def results(name, expert):
        package = Package.open(write(tmp_path / name, expert))
        found = check_routing(package, cohort, texts_of(world), RoutingBounds())
        return {result.measured: result for result in found}

    fair = results("fair", honest(50))
    by_rows = [fair["public text, by router row"], fair["domains, by router row"]]
    assert [x.verdict for x in by_rows] == ["passed", "passed"]
    assert fair["public text, by evidence"].verdict == "not judged"  # there is no head
    batch = public_batch(anchor.public_text, anchor.tokenizer, 32, 16)
    inputs = whitened_by(batch, anchor.weights, of_the_anchor(anchor.config))
    greedy = honest(50)
    greedy.router.row[...] = 10 * jnp.stack([jnp.asarray(x.constant)[None] for x in inputs])
    greedy.router.bias[...] = jnp.zeros_like(greedy.router.bias[...])
    taken = results("greedy", greedy)
    for measured in ("public text, by router row", "domains, by router row"):
        assert taken[measured].verdict == "reject" and taken[measured].value > 0.9
