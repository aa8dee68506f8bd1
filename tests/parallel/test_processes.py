"""Several processes that train one expert, or load one model, together."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from flexolmo_jax.federation.anchor import read_anchor
from flexolmo_jax.federation.expert import read_expert
from flexolmo_jax.model import load
from flexolmo_jax.storage import tensors

PARALLEL = Path(__file__).parent


def a_free_port() -> int:
    """Where the processes meet."""
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return one.getsockname()[1]


def start(arguments, devices):
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)},
    )  # fmt: skip


def start_training(world, out, run, processes, devices, *more):
    """The world's training of an expert, by processes with the given number of devices each."""
    command = [
        "-m", "flexolmo_jax", "train", "expert", world.config_file("alone"), "--name", "math",
        "--anchor", world.anchor, "--data", world.texts["math"], "--out", out, "--run", run, *more,
    ]  # fmt: skip
    if processes == 1:
        return [start(command, devices)]
    meeting = ["--coordinator", f"localhost:{a_free_port()}", "--processes", processes]
    return [start([*command, *meeting, "--process", i], devices) for i in range(processes)]


def end(started, seconds=240):
    """What each process printed; all must end well."""
    printed = [process.communicate(timeout=seconds) for process in started]
    for process, (out, error) in zip(started, printed, strict=True):
        assert process.returncode == 0, out[-2000:] + error[-4000:]
    return printed


def losses(run):
    rows = (run / "metrics.jsonl").read_text().splitlines()
    return {row["step"]: row["loss"] for row in map(json.loads, rows)}


def assert_same_expert(world, one, other):
    anchor = read_anchor(world.anchor)
    found, expected = (tensors.named(read_expert(path, anchor)) for path in (one, other))
    start = tensors.named(anchor.weights.public)
    for name, value in expected.items():
        moved = np.abs(np.asarray(value) - np.asarray(start[name])).max()
        np.testing.assert_allclose(found[name], value, rtol=0, atol=2e-3 * moved, err_msg=name)


@pytest.fixture(scope="module")
def by_four(world, tmp_path_factory):
    """An expert package, and its run, of four processes."""
    folder = tmp_path_factory.mktemp("four")
    printed = end(start_training(world, folder / "out", folder / "run", 4, 1))
    assert "held-out documents" in printed[0][0]
    others = [line for out, _ in printed[1:] for line in out.splitlines()]
    assert all(line.startswith("[Gloo]") for line in others)  # the first one speaks
    return folder


def test_four_processes_train_the_expert_that_one_trains(world, by_four):
    assert_same_expert(world, by_four / "out", world.experts["math"])
    expected, found = losses(world.run("math")), losses(by_four / "run")
    assert found.keys() == expected.keys()
    assert np.allclose(list(found.values()), list(expected.values()), rtol=1e-5)


def test_devices_that_share_layers_train_the_same_expert(world, tmp_path):
    out, run, shared = tmp_path / "out", tmp_path / "run", ("--tensor-parallel", 2)
    end(start_training(world, out, run, 2, 2, *shared))
    assert_same_expert(world, out, world.experts["math"])


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_of_four_processes_goes_on_with_fewer(world, by_four, tmp_path, processes):
    shutil.copytree(by_four / "run", tmp_path / "run")
    for folder in (tmp_path / "run" / "checkpoints").iterdir():
        if folder.name != "6":  # of 6 and 8
            shutil.rmtree(folder)
    printed = end(
        start_training(
            world, tmp_path / "out", tmp_path / "run", processes, 4 // processes, "--resume"
        )
    )
    assert "resuming after step 6" in printed[0][1]
    assert_same_expert(world, tmp_path / "out", by_four / "out")
    assert np.allclose(
        list(losses(tmp_path / "run").values()), list(losses(by_four / "run").values()), rtol=1e-5
    )


def test_processes_stop_together_when_one_is_told(world, tmp_path):
    run = tmp_path / "run"
    long = ("--steps", 5000, "--checkpoint-every", 20, "--log-every", 1)
    started = start_training(world, tmp_path / "out", run, 2, 1, *long)
    saved = run / "checkpoints"
    deadline = time.monotonic() + 120
    while not any(p.name.isdigit() for p in saved.glob("*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    started[1].send_signal(signal.SIGTERM)
    first, _ = end(started, 60)
    last = max(int(p.name) for p in saved.iterdir())
    assert f"stopped after step {last}; continue with --resume" in first[1]
    assert not (tmp_path / "out").exists() and 20 <= last < 5000


def test_processes_load_a_model_together(world, tmp_path):
    meeting = ["localhost:" + str(a_free_port()), 2]
    script = PARALLEL / "one_of_several.py"
    end([start([script, world.merged, tmp_path, *meeting, i], 2) for i in range(2)])
    plain = load(world.merged)
    expected = np.asarray(plain.logits(np.arange(24).reshape(4, 6)))
    found = np.load(tmp_path / "logits.npy")
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    texts = json.loads((tmp_path / "texts.json").read_text())
    assert texts == plain.generate(["one", "and the other"], 8, without=["math"])


def test_processes_refuse_a_damaged_model_together(copied, tmp_path):
    """Each checks its share of the bytes; what one finds, all are told."""
    damaged = copied.experts["math"] / "params" / "state" / "feed_forward.up" / "c/0/0/0/0"
    content = bytearray(damaged.read_bytes())
    content[100] ^= 1
    damaged.write_bytes(content)
    meeting = ["localhost:" + str(a_free_port()), 2]
    script = PARALLEL / "one_of_several.py"
    started = [start([script, copied.merged, tmp_path, *meeting, i], 2) for i in range(2)]
    said = [process.communicate(timeout=120)[1] for process in started]
    assert all(process.returncode != 0 for process in started)
    where = "up/c/0/0/0/0 (tensor feed_forward.up): changed after the package was written"
    assert sum(where in one for one in said) == 1
    assert sum("another process failed; see its error" in one for one in said) == 1
    assert not list(tmp_path.glob("logits*"))


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (1, "no answer from localhost:"),
        (0, "not all processes joined within 3 s"),
    ],
)
def test_a_process_that_waits_in_vain_says_so(world, tmp_path, number, message):
    where = ("--coordinator", f"localhost:{a_free_port()}", "--processes", 2, "--process", number)
    (alone,) = start_training(world, tmp_path / "out", tmp_path / "run", 1, 1, *where, "--wait", 3)
    _, error = alone.communicate(timeout=90)
    assert alone.returncode != 0
    assert message in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("number", [0, 1])
def test_a_process_that_fails_does_not_leave_the_others_waiting(world, tmp_path, number):
    """The last --data counts: one process is told of a file that is not there."""
    started = start_training(world, tmp_path / "out", tmp_path / "run", 2, 1, "--wait", 30)
    started[number].kill()
    started[number].communicate()
    command = started[number].args[1:]
    started[number] = start([*command, "--data", tmp_path / "nothing.jsonl"], 1)
    said = [process.communicate(timeout=120)[1] for process in started]
    assert all(process.returncode != 0 for process in started)
    assert "nothing.jsonl: no such file or folder" in said[number]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--processes", 2], "give all of --coordinator, --processes and --process"),
        (["--coordinator", "x", "--processes", 2, "--process", 0], "must be HOST:PORT, found 'x'"),
        (["--coordinator", "x:1", "--processes", 2, "--process", 2], "must be from 0 to 1"),
    ],
)
def test_processes_that_are_named_wrongly(world, refused, tmp_path, arguments, message):
    assert message in refused(
        "train", "expert", world.config_file("alone"), "--anchor", world.anchor, "--name", "x",
        "--data", world.texts["math"], "--out", tmp_path / "out", *arguments,
    )  # fmt: skip
