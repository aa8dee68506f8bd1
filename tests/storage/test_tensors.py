"""Named tensors on disk: any part of any of them, alone or joined, is what NumPy would take."""

import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from orbax.checkpoint import v1 as ocp

from flexolmo_jax.storage import on_disk, tensors

SHAPES = {"one": (3, 1, 40, 200), "two": (3, 1, 40, 200), "plain": (7,), "square": (130, 140)}


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tensors") / "params"
    rng = np.random.default_rng(0)
    named = {name: rng.standard_normal(shape, np.float32) for name, shape in SHAPES.items()}
    named["nothing"] = np.zeros((2, 3), np.float32)
    named["half"] = np.asarray(jnp.asarray(named["square"], jnp.bfloat16))
    tensors.save(folder, named)
    return named, folder


def test_nothing_is_said_on_the_way(tmp_path):
    """A library's warnings at every package would be all that a user reads."""
    script = (
        "import numpy as np; from pathlib import Path;"
        "from flexolmo_jax.storage import on_disk, tensors;"
        "named = {'a': np.ones((2, 3), np.float32)}; path = Path('params');"
        "tensors.save(path, named); on_disk.open_tensors(path, named)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


def a_part(draw, shape):
    ends = [sorted(draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in shape]
    whole = draw(st.integers(0, len(shape)))  # how many of the last axes are taken whole
    return tuple(
        slice(None) if axis >= len(shape) - whole else slice(*two) for axis, two in enumerate(ends)
    )


def test_what_is_saved_is_loaded(stored):
    """Orbax reads the same numbers from the same files."""
    named, folder = stored
    for found in (ocp.load(folder), on_disk.open_tensors(folder, named)):
        for name, value in named.items():
            assert found[name].dtype == value.dtype
            np.testing.assert_array_equal(np.asarray(found[name]), value)


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_a_part_of_a_file(stored, data):
    named, folder = stored
    name = data.draw(st.sampled_from(sorted(named)))
    part = a_part(data.draw, named[name].shape)
    found = on_disk.open_tensors(folder, named)[name][part]
    np.testing.assert_array_equal(found, named[name][part])


@settings(deadline=None, max_examples=60)
@given(data=st.data(), small_run=st.sampled_from([1, on_disk.SMALL_RUN]))
def test_a_part_of_several_end_to_end(stored, data, small_run):
    """Files, arrays in memory and empty ones; also with every run read by a call of its own."""
    named, folder = stored
    opened = on_disk.open_tensors(folder, named)
    joined = on_disk.Joined((opened["one"], named["two"], opened["two"]), padding=2, fill=-1.0)
    whole = [named[name] for name in ("one", "two", "two")]
    expected = np.concatenate([*whole, np.full((3, 2, 40, 200), -1.0, np.float32)], axis=1)
    assert joined.shape == expected.shape
    part = a_part(data.draw, expected.shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(on_disk, "SMALL_RUN", small_run)
        np.testing.assert_array_equal(joined[part], expected[part])


def test_a_file_that_ends_too_early(stored, tmp_path):
    named, folder = stored
    one = on_disk.open_tensors(folder, named)["one"]
    short = tmp_path / "short"
    short.write_bytes(one.file.read_bytes()[:-200_000])
    broken = on_disk.OnDisk(short, one.offset, one.dtype, one.shape)
    with pytest.raises(ValueError, match="it ends too early"):
        np.asarray(broken)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="how memory is mapped is in /proc")
def test_memory_of_weights_can_have_large_pages():
    """Linux gives none to shared memory, which is what Python's `mmap` takes by default."""
    array = on_disk.page_aligned((1024, 1024), np.dtype(np.float32))
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, permissions = line.split()[:2]
        begin, end = (int(address, 16) for address in addresses.split("-"))
        if begin <= array.ctypes.data < end:
            assert permissions == "rw-p"
            return
    raise AssertionError("the array is in no mapping")
