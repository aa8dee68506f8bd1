"""Words of the command line: help, version, and what was probably meant."""

import platform

import jax
import pytest

import flexolmo_jax as fo

COMMANDS = [
    (), ("demo",), ("plan",), ("privacy",), ("privacy", "verify"), ("privacy", "budget"),
    ("train",), ("train", "anchor"), ("train", "expert"), ("train", "router"),
    ("merge",), ("experts",), ("experts", "list"), ("experts", "add"), ("experts", "remove"),
    ("inspect",), ("evaluate",), ("generate",), ("data",), ("data", "fetch"), ("data", "flexmix"),
    ("data", "tasks"), ("data", "proxies"), ("study",), ("audit",), ("audit", "extraction"),
    ("audit", "membership"), ("audit", "removal"), ("audit", "twin"),
]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_help(flexolmo, command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = flexolmo(*command, "--help")
    assert code == 0 and out.startswith(f"usage: {' '.join(('flexolmo', *command))} ")
    assert max(map(len, out.splitlines())) <= 80


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
