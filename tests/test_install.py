"""Installing: what make needs; importing: no warnings, few packages, and no private names."""

import ast
import configparser
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
IMPORT_ALL = """
import importlib, pkgutil
import flexolmo_jax
for module in pkgutil.walk_packages(flexolmo_jax.__path__, "flexolmo_jax."):
    importlib.import_module(module.name)
"""


def test_no_module_warns_on_import():
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", IMPORT_ALL], capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr


# A machine with jax, flax, optax, jaxtyping, PyTorch and transformers can measure the model, and
# train and decode with it, though it lacks what reads texts, writes packages and parses commands.
BARE = """
import importlib.abc, sys

MISSING = {
    "array_record", "chex", "dp_accounting", "grain", "jax_privacy", "matplotlib", "orbax",
    "pyarrow", "sklearn", "tensorflow_datasets", "tyro",
}

class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in MISSING:
            raise ModuleNotFoundError(f"{name} is not on this machine")

sys.meta_path.insert(0, Missing())
import flexolmo_jax.interop.hf_import
from benchmarks import flexolmo
from benchmarks.sizes import SUITES

(size,) = SUITES["smoke"].values()
flexolmo.expert_step(size, "softmax", None)()
print(*map(len, flexolmo.generate(size, 2, "float32")()))
"""


def test_a_machine_without_tfds_and_the_like_trains_and_decodes():
    ran = subprocess.run(
        [sys.executable, "-c", BARE], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == ["8", "8"]


NAMES_OF_FIELDS = "_fields"  # of a NamedTuple: public in spite of its name


def private_names(source: str) -> list[str]:
    """Names of the project that begin with `_` and that a file takes from another one."""
    tree = ast.parse(source)
    imported, private = set(), []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("flexolmo_jax"):
            names = [alias.name for alias in node.names]
            imported |= {alias.asname or alias.name for alias in node.names}
            private += [name for name in names if name.startswith("_") and not name.endswith("__")]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            is_private = node.attr[0] == "_" and not node.attr.endswith("__")
            if node.value.id in imported and is_private and node.attr != NAMES_OF_FIELDS:
                private.append(f"{node.value.id}.{node.attr}")
    return private


def test_a_private_name_is_found_in_an_import_and_behind_a_module():
    source = "from flexolmo_jax.inference import decode\nfrom flexolmo_jax.a import _b\ndecode._c\n"
    assert private_names(source) == ["_b", "decode._c"]


def test_no_private_name_crosses_a_file():
    files = [
        f
        for folder in ("flexolmo_jax", "benchmarks", "configs")
        for f in (ROOT / folder).rglob("*.py")
    ]
    crossing = {
        str(file.relative_to(ROOT)): names
        for file in files
        if (names := private_names(file.read_text(encoding="utf-8")))
    }
    assert len(files) > 100 and not crossing


def fake_python(folder: Path, name: str, version: str, venv: bool = True) -> None:
    """A program that answers as Python of a version would, with or without the module venv."""
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / name
    program.write_text(
        f"#!{sys.executable}\nimport sys\n"
        f"sys.version_info = ({version.replace('.', ', ')}, 0)\n"
        + ("" if venv else "sys.modules['venv'] = None\n")
        + "exec(sys.argv[2])\n"
    )
    program.chmod(0o755)


def which_python(tmp_path: Path) -> subprocess.CompletedProcess:
    """What `make demo` would run, on a machine with the Pythons in `bin` and under pyenv."""
    for name in ("Makefile", "setup.cfg", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "bin").mkdir(exist_ok=True)
    for tool in ("make", "sh"):
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))
    return subprocess.run(
        ["make", "-n", "demo"], cwd=tmp_path, capture_output=True, text=True,
        env={"PATH": str(tmp_path / "bin"), "PYENV_ROOT": str(tmp_path / "pyenv")},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("pythons", "chosen"),
    [
        ({"bin/python3.11": "3.11"}, "python3.11"),
        ({"bin/python3.13": "3.13", "bin/python3.11": "3.11"}, "python3.13"),
        ({"bin/python3": "3.12"}, "python3"),
        ({"bin/python3": "3.9", "pyenv/versions/3.12.1/bin/python3.12": "3.12"}, "python3.12"),
    ],
)
def test_make_takes_the_newest_supported_python(tmp_path, pythons, chosen):
    for place, version in pythons.items():
        fake_python((tmp_path / place).parent, Path(place).name, version)
    ran = which_python(tmp_path)
    assert f"{chosen} -m venv .venv" in ran.stdout, ran.stdout + ran.stderr


@pytest.mark.parametrize(("version", "venv"), [("3.9", True), ("3.12", False)])
def test_make_says_what_it_needs_where_no_python_will_do(tmp_path, version, venv):
    fake_python(tmp_path / "bin", "python3", version, venv)
    ran = which_python(tmp_path)
    assert ran.returncode
    assert "3.14 3.13 3.12 3.11" in ran.stderr and "make PYTHON=" in ran.stderr, ran.stderr
    assert not (tmp_path / ".venv").exists()


def test_each_python_that_setup_cfg_names_has_its_constraints():
    classified = [
        line.split("::")[-1].strip()
        for line in (ROOT / "setup.cfg").read_text().splitlines()
        if "Python :: 3." in line
    ]
    assert {f.stem.removeprefix("python") for f in (ROOT / "constraints").glob("*.txt")} == {
        *classified
    }
    supported = (ROOT / "Makefile").read_text().split("SUPPORTED ?= ")[1].splitlines()[0]
    assert sorted(supported.split()) == sorted(classified)


BY_DEVICE = {"cuda", "tpu"}  # extras that one machine has and another has not


def test_each_requirement_has_its_pin_for_each_python():
    """Else `make bench`, say, takes a version that nobody tried, or finds none that fits."""
    setup = configparser.ConfigParser(interpolation=None)
    setup.read(ROOT / "setup.cfg")
    extras = {n: x for n, x in setup["options.extras_require"].items() if n not in BY_DEVICE}
    wanted = "\n".join([setup["options"]["install_requires"], *extras.values()])
    names = {
        re.match(r"[\w.-]+", line)[0].lower().replace("_", "-")
        for line in wanted.split("\n")
        if line and not line.startswith(("#", "%")) and not re.match(r"[\w.-]+==", line)
    }
    for file in (ROOT / "constraints").glob("*.txt"):
        pins = (line.split("==")[0] for line in file.read_text().splitlines())
        pinned = {name.lower().replace("_", "-") for name in pins}
        assert names <= pinned, f"{file.name}: {sorted(names - pinned)}"
