"""Compiled programs of one command are there for the next, and never in its way."""

import os
import subprocess
import sys

import pytest

from flexolmo_jax.runtime import compilation_cache

PROGRAM = """
import sys, warnings
from flexolmo_jax.runtime.compilation_cache import is_of_cache, keep_compiled_programs

keep_compiled_programs()
warnings.showwarning = lambda message, *_, **__: is_of_cache(str(message)) or print(message)
import jax
import jax.numpy as jnp

jax.monitoring.register_event_listener(lambda event, **_: print(event, file=sys.stderr))
print(jax.jit(lambda x: jnp.sin(x @ x.T).sum())(jnp.arange(12.0).reshape(3, 4)))
"""
HIT = "/jax/compilation_cache/cache_hits"
MISS = "/jax/compilation_cache/cache_misses"


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """Of a user whose cache directory is empty; this process sees the same."""
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    return monkeypatch


def start(*arguments, program=PROGRAM):
    command = [sys.executable, *(arguments or ("-c", program))]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, **pipes)


def result(process) -> tuple[str, str]:
    out, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    return out, error


def entries():
    return sorted(compilation_cache.cache_folder().glob("*-cache"))


def test_a_second_process_compiles_nothing(environment):
    out, error = result(start())
    assert MISS in error and HIT not in error
    assert compilation_cache.cache_folder().stat().st_mode & 0o777 == 0o700
    again, error = result(start())
    assert again == out and HIT in error and MISS not in error


def test_two_processes_at_once(environment):
    (one, _), (two, _) = [result(process) for process in [start(), start()]]
    third, error = result(start())
    assert one == two == third and MISS not in error


def test_damaged_entries_are_replaced(environment):
    out, _ = result(start())
    whole = {path: path.stat().st_size for path in entries()}
    for path in whole:
        path.write_bytes(path.read_bytes()[:-7])
    again, error = result(start())
    assert again == out and HIT not in error  # and no warning, which would be in `again`
    assert {path: path.stat().st_size for path in entries()} == pytest.approx(whole, abs=16)
    assert HIT in result(start())[1]


def test_a_folder_of_the_user_stays(environment, tmp_path):
    environment.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "own"))
    result(start())
    assert any((tmp_path / "own").iterdir()) and not (tmp_path / "cache").exists()
    assert not compilation_cache.is_of_cache(
        "Error reading persistent compilation cache entry for 'jit_f': error: incomplete"
    )


@pytest.mark.parametrize("place", ["file", "unwritable", "of all", "no home"])
def test_without_a_folder_nothing_is_kept(environment, tmp_path, place):
    cache = tmp_path / "cache"
    if place == "file":
        cache.touch()
    elif place == "no home":
        environment.setenv("XDG_CACHE_HOME", "relative")
    else:
        folder = compilation_cache.cache_folder()
        folder.mkdir(parents=True)
        folder.chmod(0o777 if place == "of all" else 0o500)
        if place == "unwritable":  # access(2) allows root everything
            environment.setattr(os, "access", lambda *_: False)
    compilation_cache.keep_compiled_programs()
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ


def test_other_cpus_have_other_folders(environment):
    environment.delenv("NPROC", raising=False)
    mine = compilation_cache.cache_folder()
    environment.setenv("NPROC", "1")
    assert compilation_cache.cache_folder() != mine
    environment.delenv("NPROC")
    assert compilation_cache.cache_folder() == mine
    environment.setattr(compilation_cache, "OF_CPU", ("model",))
    assert compilation_cache.cache_folder() != mine


def test_the_oldest_entries_go_first(tmp_path):
    for age, name in enumerate(("one/newest", "two/middle", "one/oldest")):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(100))
        os.utime(path, (1e9 - age, 1e9 - age))
    compilation_cache.remove_oldest(tmp_path, limit=300)
    assert len(list(tmp_path.glob("*/*"))) == 3
    compilation_cache.remove_oldest(tmp_path, limit=299)
    assert {path.name for path in tmp_path.glob("*/*")} == {"newest", "middle"}


def test_commands_keep_their_programs_unless_told_not_to(environment, world):
    command = ("-m", "flexolmo_jax", "generate", "--model", str(world.merged), "--prompt", "The")
    environment.setenv("JAX_EXPLAIN_CACHE_MISSES", "1")
    result(start("-m", "flexolmo_jax", "inspect", str(world.merged), "--no-cache"))
    assert not compilation_cache.cache_folder().exists()
    out, error = result(start(*command))
    missed = error.count("PERSISTENT COMPILATION CACHE MISS")
    assert missed >= len(entries()) > 0
    again, error = result(start(*command))
    assert again == out and "PERSISTENT COMPILATION CACHE MISS" not in error
