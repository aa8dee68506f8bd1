"""Every study can be run by its name, and listing the names costs nothing."""

import argparse
import importlib
import subprocess
import sys

import pytest

from flexolmo_jax.studies.registry import STUDIES


def test_listing_the_studies_imports_none_of_them():
    program = (
        "import sys, flexolmo_jax.studies.registry\n"
        "loaded = [name for name in sys.modules if name.startswith('flexolmo_jax.')]\n"
        "assert {'jax', 'numpy', 'matplotlib'}.isdisjoint(sys.modules), sorted(sys.modules)\n"
        "print(sorted(loaded))"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "studies.engine" not in ran.stdout


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_has_arguments_and_says_how_it_is_run(name):
    module = importlib.import_module(STUDIES[name])
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    assert "usage" in parser.format_help() and callable(module.run)
    assert f"flexolmo study {name}" in module.__doc__
