"""Words of the command line: help, version, and what was probably meant."""

import platform
import subprocess
import sys

import jax
import pytest

import flexolmo_jax as fo
from flexolmo_jax.studies.registry import STUDIES

COMMANDS = [
    (), ("demo",), ("plan",), ("privacy",), ("privacy", "verify"), ("privacy", "budget"),
    ("train",), ("train", "anchor"), ("train", "expert"), ("train", "router"),
    ("merge",), ("experts",), ("experts", "list"), ("experts", "add"), ("experts", "remove"),
    ("inspect",), ("evaluate",), ("generate",), ("data",), ("data", "fetch"), ("data", "flexmix"),
    ("data", "tasks"), ("data", "proxies"), ("study",), ("audit",), ("audit", "extraction"),
    ("audit", "membership"), ("audit", "evidence"), ("audit", "removal"), ("audit", "twin"),
    ("trace",), ("trace", "find"),
]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_help(flexolmo, command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = flexolmo(*command, "--help")
    assert code == 0 and out.startswith(f"usage: {' '.join(('flexolmo', *command))} ")
    assert max(map(len, out.splitlines())) <= 80


HELP_ALONE = """
import contextlib, io, sys
from flexolmo_jax.commands.main import main
for command in sys.argv[1:]:
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        main([*command.split(), "--help"])
    heavy = {"flax", "jax", "jaxlib", "matplotlib", "numpy", "tensorflow_datasets", "tyro"}
    assert not heavy & set(sys.modules), (command, heavy & set(sys.modules))
"""


def test_help_is_quick_as_it_imports_no_large_library():
    words = [sys.executable, "-c", HELP_ALONE, *map(" ".join, COMMANDS)]
    ran = subprocess.run(words, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


STUDY = """'''A study of nothing.

It counts.
'''

def add_arguments(parser):
    parser.add_argument("out")
    parser.add_argument("--count", type=int, default=1)

def run(args):
    print(args.out, args.count)
"""


def test_a_single_study_is_a_command_whose_module_is_imported_when_it_is_called(
    flexolmo, refused, monkeypatch, tmp_path
):
    (tmp_path / "study_of_nothing.py").write_text(STUDY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(STUDIES, "nothing", "study_of_nothing")
    out = " ".join(flexolmo("study", "--help")[1].split())
    assert "nothing" in out.partition("NAME is one of")[2]
    assert "study_of_nothing" not in sys.modules
    assert flexolmo("study", "nothing", "DIR", "--count", "3") == (0, "DIR 3\n", "")
    code, out, _ = flexolmo("study", "nothing", "--help")
    assert code == 0 and out.startswith("usage: flexolmo study nothing ") and "It counts.\n" in out
    assert "did you mean --count" in refused("study", "nothing", "DIR", "--cuont", "3")
    assert "the following arguments are required: out" in refused("study", "nothing")


def test_help_says_how_to_start(flexolmo):
    assert "flexolmo demo" in flexolmo("--help")[1]
    assert "flexolmo demo" in flexolmo()[2]


def test_the_version_is_that_of_all_that_matters_in_a_report(flexolmo):
    code, out, _ = flexolmo("--version")
    versions = (fo.__version__, f"JAX {jax.__version__}", f"Python {platform.python_version()}")
    assert code == 0 and all(version in out for version in versions)


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        ("trian anchor", "train"),
        ("experts lsit m", "list"),
        ("privacy verfiy x", "verify"),
        ("merge --anchor a --out b --expertt c", "--expert"),
        ("evaluate --modl m --data x=y", "--model"),
        ("generate --model m --prompt p --top_k 3", "--top-k"),
        ("generate --model m --prompt p --max-new-token=3", "--max-new-tokens"),
        ("generate --model m --prompt p --dtype float23", "float32"),
        ("train anchor demo_anchor --data corpus:public --out OUT --stpes 4", "--steps"),
        ("train anchor demo_anchor --data corpus:public --out OUT --resum", "--resume"),
        ("study ci --out OUT --sede 1", "--seeds"),
    ],
)
def test_a_slip_of_the_finger_is_answered_with_what_was_meant(refused, tmp_path, words, meant):
    said = refused(*words.replace("OUT", str(tmp_path / "out")).split())
    assert f"did you mean {meant}" in said
    assert not (tmp_path / "out").exists()


def test_a_word_that_is_like_no_command_is_answered_with_all_of_them(refused):
    said = refused("xyzzy")
    assert "demo" in said and "inspect" in said and "did you mean" not in said
