"""Narrower experts: the least squares fit of the units that stay, and packages that merge."""

import jax
import numpy as np
import pytest

import flexolmo_jax as fo
from flexolmo_jax.federation.compress import compress
from flexolmo_jax.federation.package import read_manifest
from flexolmo_jax.training.prune import prune, remove_units

TOKENS = np.arange(60).reshape(3, 20)


def test_the_rows_that_stay_are_the_least_squares_fit():
    draw = np.random.default_rng(0)
    hidden = draw.standard_normal((200, 9)) @ draw.standard_normal((9, 12))  # of rank 9
    down = draw.standard_normal((12, 5))
    wanted = hidden @ down
    losses = []
    for width in (11, 9, 4):
        found = remove_units(hidden.T @ hidden, down, width)
        fit = np.linalg.lstsq(hidden[:, found.units], wanted, rcond=None)[0]
        missed = np.sum((hidden[:, found.units] @ found.down - wanted) ** 2)
        best = np.sum((hidden[:, found.units] @ fit - wanted) ** 2)
        assert len(found.units) == width and found.down.shape == (width, 5)
        assert missed <= 1.01 * best + 1e-3 * np.sum(wanted**2)
        assert found.kept == pytest.approx(1 - missed / np.sum(wanted**2))
        losses.append(missed)
    assert losses[0] <= losses[1] <= losses[2] and losses[1] < 1e-3 * losses[2]


@pytest.fixture(scope="module")
def narrow(world, tmp_path_factory):
    """The math expert with half of its 48 hidden units."""
    out = tmp_path_factory.mktemp("narrow") / "math"
    done = prune(world.experts["math"], out, 24, str(world.texts["math"]))
    assert all(0.3 < share < 1 for share in done.kept) and done.tokens > 100
    assert done.bytes_after < 0.6 * done.bytes_before
    return out


def test_it_is_stored_narrow_and_merges_with_exactness_kept(world, narrow, make_expert, tmp_path):
    before, after = (read_manifest(path) for path in (world.experts["math"], narrow))
    assert after["tensors"]["feed_forward.down"]["shape"] == [2, 1, 24, 32]
    assert after["compressed"] == {"from": before["digest"], "width": 24}
    noise = make_expert(tmp_path / "noise", "noise", seed=2)
    compress(narrow, tmp_path / "math", bits=8, anchor=world.anchor)
    packages = {"math": tmp_path / "math", "code": world.experts["code"], "noise": noise}
    for package in (narrow, packages["math"]):
        folder = tmp_path / f"all_{package.parent.name}"
        everyone = [package, packages["code"], noise]
        fo.merge(world.anchor, everyone, folder, allow_share=None)
        model = fo.load(folder)
        for off in ("math", "noise"):
            rest = [p for p, name in zip(everyone, packages, strict=True) if name != off]
            fo.merge(world.anchor, rest, folder / f"../{folder.name}_no_{off}", allow_share=None)
            never = fo.load(folder / f"../{folder.name}_no_{off}")
            np.testing.assert_array_equal(model.logits(TOKENS, without=[off]), never.logits(TOKENS))
    spread = fo.load(folder, mesh=fo.make_mesh(devices=jax.devices()[:1]))
    np.testing.assert_allclose(spread.logits(TOKENS), model.logits(TOKENS), atol=1e-4)


def test_the_command_shows_what_each_layer_keeps(world, flexolmo, tmp_path):
    code, printed, error = flexolmo(
        "compress", world.experts["math"], "--out", tmp_path / "out", "--width", "40",
        "--data", world.texts["math"],
    )  # fmt: skip
    assert code == 0, error
    assert "output kept" in printed + error and "the owner's text" in printed + error


def test_what_cannot_be_pruned_is_said(world, narrow, refused, tmp_path):
    words = "compress", world.experts["math"], "--out", tmp_path / "out"
    assert "--width needs --data" in refused(*words, "--width", "8")
    text = "--data", world.texts["math"]
    assert "width must be from 1 to 47" in refused(*words, "--width", "48", *text)
    said = refused("compress", narrow, "--out", tmp_path / "out", "--rank", "2",
                   "--anchor", world.anchor)  # fmt: skip
    assert "has fewer hidden units than the public expert" in said
    small = tmp_path / "small"
    compress(world.experts["math"], small, rank=2)
    assert "is low-rank" in refused(
        "compress", small, "--out", tmp_path / "out", "--width", "8", *text
    )
