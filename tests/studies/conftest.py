"""How the tests run a study: by its name and words, as `flexolmo study NAME` does."""

import argparse
import importlib
import shutil
from pathlib import Path

import pytest

from flexolmo_jax.studies.engine import commands
from flexolmo_jax.studies.registry import STUDIES


@pytest.fixture
def study(capsys):
    """study(name, *words): runs a study and returns what it printed."""

    def run(name: str, *words: object) -> str:
        module = importlib.import_module(STUDIES[name])
        parser = argparse.ArgumentParser()
        module.add_arguments(parser)
        module.run(parser.parse_args([str(word) for word in words]))
        return capsys.readouterr().out

    return run


@pytest.fixture
def no_training(world, monkeypatch):
    """Commands that would train copy the world's packages; the list of what they were asked."""
    asked: list[list[str]] = []

    def run_command(words, **_):
        asked.append(words)
        options = dict(zip(words, words[1:], strict=False))
        packages = {"anchor": world.anchor, "router": world.merged}
        package = packages.get(words[1]) or world.experts[options["--name"]]
        shutil.copytree(package, Path(options["--out"]))

    monkeypatch.setattr(commands, "run_command", run_command)
    return asked
