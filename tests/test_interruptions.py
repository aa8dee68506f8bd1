"""What comes from outside: a full disk, signals, and the start of the process itself."""

import os
import re
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

import flexolmo_jax as fo
from flexolmo_jax.federation.package import read_manifest
from flexolmo_jax.training import starting_point

# A full disk.


@pytest.fixture
def tiny_disk(tmp_path):
    """fill(free) -> a folder on a disk with that many bytes left; None if none can be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    try:
        mounted = os.geteuid() == 0 and not subprocess.run(command, capture_output=True).returncode
    except OSError:
        mounted = False
    if not mounted:
        yield None
        return

    def fill(free: int) -> Path:
        (folder / "filler").unlink(missing_ok=True)
        room = shutil.disk_usage(folder).free
        (folder / "filler").write_bytes(bytes(room - free))
        return folder

    yield fill
    subprocess.run(["umount", "-l", str(folder)], check=True)


def limited(arguments, size):
    """Runs a command in a process that may write no file larger than `size`."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return subprocess.run(
        [sys.executable, "-m", "flexolmo_jax", *map(str, arguments)],
        capture_output=True, text=True, preexec_fn=limit,
    )  # fmt: skip


def is_clear(error, message):
    """Whether what was said ends in one line; a progress bar may stand before it."""
    *before, last = error.strip().splitlines()
    assert "Traceback" not in error and not any("rror" in line for line in before), error
    assert last.startswith("flexolmo: error: ") and message in last, error
    return True


@pytest.fixture
def filled_later(monkeypatch):
    """As if the disk had room when that was checked, and somebody else had filled it since."""
    return lambda: monkeypatch.setattr(starting_point, "check_room", lambda *_, **__: None)


@pytest.mark.parametrize("free", [0, 40_000])
def test_a_full_disk_while_an_expert_is_written(
    world, tmp_path, tiny_disk, flexolmo, filled_later, free
):
    run = tmp_path / "run"
    if tiny_disk is None:
        done = limited(
            world.expert_words(tmp_path / "disk" / "mine", "--steps", "2", run=run), 10_000
        )
        assert done.returncode == 2 and is_clear(done.stderr, "arge")
        assert not (tmp_path / "disk" / "mine").exists()
        return
    disk = tiny_disk(free)
    words = world.expert_words(disk / "mine", "--steps", "2", run=run)
    code, _, error = flexolmo(*words)
    assert code == 2 and is_clear(error, "not enough room on the disk")
    assert not run.exists()
    filled_later()
    code, _, error = flexolmo(*words)
    assert code == 2 and is_clear(error, "the disk is full")
    assert [p.name for p in disk.iterdir()] == ["filler"]
    (disk / "filler").unlink()
    assert flexolmo(*world.expert_words(disk / "mine", "--steps", "2", "--resume", run=run))[0] == 0
    assert fo.load(disk / "mine", anchor=world.anchor).expert_names == ("public", "mine")


@pytest.mark.parametrize("free", [0, 16_000, 300_000])
def test_a_full_disk_while_training(world, tmp_path, tiny_disk, flexolmo, filled_later, free):
    """First the windows do not fit, then the checkpoints."""
    if tiny_disk is None:
        done = limited(world.expert_words(tmp_path / "mine", run=tmp_path / "disk" / "run"), 10_000)
        assert done.returncode == 2 and is_clear(done.stderr, "arge")
        return
    disk = tiny_disk(free)
    arguments = world.expert_words(tmp_path / "mine", run=disk / "run")
    filled_later()
    code, _, error = flexolmo(*arguments)
    assert code == 2 and is_clear(error, "the disk is full")
    assert not (tmp_path / "mine").exists()
    (disk / "filler").unlink()
    assert flexolmo(*arguments, "--resume")[0] == 0
    theirs, ours = (read_manifest(p)["tensors"] for p in (world.experts["math"], tmp_path / "mine"))
    assert ours == theirs


def test_a_full_disk_while_merging(copied, tmp_path, tiny_disk, refused):
    if tiny_disk is None:
        done = limited(("experts", "remove", copied.merged, "math"), 100)
        assert done.returncode == 2 and is_clear(done.stderr, "arge")
        assert fo.load(copied.merged).expert_names == ("public", "math", "code")
        return
    disk = tiny_disk(1_000_000)
    shutil.move(copied.merged, disk / "merged")
    before = (disk / "merged" / "manifest.json").read_bytes()
    tiny_disk(0)
    said = refused(
        "merge",
        "--anchor",
        copied.anchor,
        "--expert",
        copied.experts["math"],
        "--out",
        disk / "new",
    )
    assert "the disk is full (no space left on device): make room" in said
    assert sorted(p.name for p in disk.iterdir()) == ["filler", "merged"]
    assert (disk / "merged" / "manifest.json").read_bytes() == before


# Processes that are stopped from outside.


def saved(run):
    """The steps of the checkpoints that are complete."""
    return [int(p.name) for p in (run / "checkpoints").glob("*") if p.name.isdigit()]


def started(arguments):
    """A command in a process of its own, once it has taken its first steps."""
    run = Path(arguments[arguments.index("--run") + 1])
    process = subprocess.Popen(
        [sys.executable, "-m", "flexolmo_jax", *map(str, arguments)],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if saved(run):
            return process
        time.sleep(0.02)
    process.kill()
    raise AssertionError(process.communicate()[1])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_process_that_is_stopped_goes_on_where_it_was(world, flexolmo, tmp_path, number):
    long = ("--steps", "3000", "--checkpoint-every", "20", "--log-every", "1")
    arguments = world.expert_words(tmp_path / "mine", *long, run=tmp_path / "run")
    process = started(arguments)
    process.send_signal(number)
    error = process.communicate(timeout=60)[1]
    assert not (tmp_path / "mine").exists()
    done = max(saved(tmp_path / "run"))
    assert 20 <= done < 3000
    if number != signal.SIGKILL:
        assert process.returncode == (130 if number == signal.SIGINT else 0)
        assert f"stopped after step {done}; continue with --resume" in error
    else:
        assert process.returncode == -signal.SIGKILL
        assert done % 20 == 0
    assert "Traceback" not in error
    # Standard error is no terminal here, as under nohup or Slurm.
    lines = [line for line in error.splitlines() if "expert mine: step " in line]
    assert lines[0].startswith("expert mine: step 1/3000, loss ")
    for line in lines:
        assert re.fullmatch(
            r"expert mine: step \d+/3000, loss \d+\.\d+, [\d,]+ tokens/s(, \d+:\d\d:\d\d left)?",
            line,
        )


def test_a_second_interrupt_ends_at_once(world, tmp_path):
    """Also while a step never ends: the device, or the disk, may hang."""
    hanging = tmp_path / "hanging.py"
    hanging.write_text(
        "import ctypes, sys\n"
        "from flexolmo_jax.training import loop\n"
        "def take(*_):\n"
        "    print('hanging', file=sys.stderr, flush=True)\n"
        "    ctypes.PyDLL(None).sleep(600)  # holds the interpreter: no Python handler can run\n"
        "class Steps(loop.StandardSteps):\n"
        "    def take(self, step, *more):\n"
        "        import os, signal\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "        take()\n"
        "from flexolmo_jax.training.stages import expert\n"
        "expert.StandardSteps = Steps\n"
        "from flexolmo_jax.commands.main import main\n"
        "sys.exit(main())\n"
    )
    words = [str(word) for word in world.expert_words(tmp_path / "mine", run=tmp_path / "run")]
    process = subprocess.Popen(
        [sys.executable, hanging, *words], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
        text=True,
    )  # fmt: skip
    said = ""
    while "hanging" not in said:
        line = process.stderr.readline()
        assert line, said
        said += line
    assert "saving after this step; Ctrl-C again ends at once" in said
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == -signal.SIGINT
    assert not (tmp_path / "mine").exists()


def test_training_runs_with_large_pages(world, tmp_path):
    """The program restarts itself, with all its arguments."""
    out = tmp_path / "out"
    script = tmp_path / "sitecustomize.py"
    script.write_text(
        "import os, sys\n"
        f"open({str(tmp_path / 'starts')!r}, 'a').write(os.environ.get('GLIBC_TUNABLES', '') + '|')"
    )
    ran = subprocess.run(
        [sys.executable, "-m", "flexolmo_jax", *map(str, world.expert_words(out))],
        capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path), "GLIBC_TUNABLES": "glibc.malloc.check=0"},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert read_manifest(out)["name"] == "mine"
    first, second, *_ = (tmp_path / "starts").read_text().split("|")
    assert first == "glibc.malloc.check=0"
    assert second == "glibc.malloc.check=0:glibc.malloc.hugetlb=1"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_training_takes_no_more_memory_with_every_step(world, tmp_path):
    """glibc reuses or returns the buffers of a step, which are larger than all other memory."""

    def start(steps, folder):
        words = world.expert_words(
            folder / f"after{steps}", "--steps", steps, "--data.batch-size", 256,
            run=folder / f"run{steps}",
        )  # fmt: skip
        return subprocess.Popen(
            [sys.executable, "-m", "flexolmo_jax", *map(str, words)], stdout=subprocess.DEVNULL
        )

    def growth(number):
        folder = tmp_path / str(number)
        folder.mkdir()
        short, long = running = [start(2, folder), start(20, folder)]
        peaks = {}
        while working := [process for process in running if process.poll() is None]:
            for process in working:
                status = Path(f"/proc/{process.pid}/status").read_text()
                if found := re.search(r"VmHWM:\s*(\d+) kB", status):  # not once it has ended
                    peaks[process] = int(found[1])
            time.sleep(0.01)
        assert short.returncode == long.returncode == 0
        return peaks[long] - peaks[short]

    # The median: now and then, on a busy machine, one process has an arena of glibc more, 64 MB.
    assert statistics.median(map(growth, range(3))) < 60_000
