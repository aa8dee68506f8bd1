"""One small world for the whole session: an anchor, two owners' packages, and their merge."""

import contextlib
import dataclasses
import datetime
import io
import itertools
import json
import os
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

# Before the first use of JAX: with libtpu on a machine without a TPU, a profile would end it.
jax.config.update("jax_platforms", "cpu")

from flexolmo_jax.commands.main import main  # noqa: E402
from flexolmo_jax.config import AnchorTraining, ExpertTraining, RouterTraining, load_config  # noqa: E402
from flexolmo_jax.data.sources import read_documents  # noqa: E402
from flexolmo_jax.federation.anchor import read_anchor  # noqa: E402
from flexolmo_jax.federation.expert import write_expert  # noqa: E402
from flexolmo_jax.federation.merge import merge  # noqa: E402
from flexolmo_jax.model import FlexOlmo, load  # noqa: E402
from flexolmo_jax.training.stages.anchor import train_anchor  # noqa: E402


def compile_quickly(on: bool) -> None:
    """With or without most of LLVM's optimizations, in this process and those that tests start."""
    jax.config.update("jax_disable_most_optimizations", on)
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = str(int(on))


compile_quickly(True)  # tests compile longer than they run, and so half as long

PARTS = """from flexolmo_jax.config import *

data = DataConfig(batch_size=4, length=32, heldout=0.1)
optimizer = OptimizerConfig(learning_rate=3e-3, warmup_steps=2)
often = dict(checkpoint_every=3, log_every=1)
"""
CONFIGS = {
    "anchor": (
        AnchorTraining,
        "AnchorTraining(data=data, optimizer=optimizer, steps=12, public_tokens=4096, **often,"
        " model=ModelConfig(vocab_size=512, width=32, num_layers=2, num_heads=2, ffn_width=48,"
        " max_length=64))",
    ),
    "alone": (
        ExpertTraining,
        "ExpertTraining(data=data, optimizer=optimizer, steps=8, fit_tokens=2048, **often)",
    ),
    "pair": (
        ExpertTraining,
        "ExpertTraining(data=data, optimizer=optimizer, steps=6, gating='softmax',"
        " router_z_loss=0.001, domain_embedding=str(FOLDER / 'embedding.npy'), **often)",
    ),
    "router": (
        RouterTraining,
        "RouterTraining(data=data, optimizer=optimizer, steps=4, **often)",
    ),
}


SLOWEST_FIRST = (
    "parallel",
    "test_selftest",
    "test_notebook",
    "test_chaos",
    "test_study",
    "planning",
)


def pytest_collection_modifyitems(items):
    """The files that take minutes come first, so that no worker ends with one of them alone."""

    def rank(item):
        names = (item.path.stem, item.path.parent.name)
        return next((i for i, x in enumerate(SLOWEST_FIRST) if x in names), len(SLOWEST_FIRST))

    items.sort(key=rank)


@pytest.fixture(scope="module", autouse=True)
def programs_of_a_file():
    """Each compiled program holds memory maps, of which Linux gives a process 65530 in all."""
    yield
    jax.clear_caches()


@dataclasses.dataclass(frozen=True)
class World:
    """Folders on disk; nobody changes them (`copied` gives a test its own)."""

    root: Path
    texts: dict[str, Path]  # public and each owner's: JSONL
    printed: dict[str, str]  # what each command that made it printed

    @property
    def anchor(self) -> Path:
        return self.root / "anchor"

    @property
    def merged(self) -> Path:
        return self.root / "merged"

    @property
    def experts(self) -> dict[str, Path]:
        return {name: self.root / "experts" / name for name in ("math", "code")}

    def run(self, name: str) -> Path:
        return self.root / "runs" / name

    def config_file(self, stage: str) -> str:
        return str(self.root / "configs" / f"{stage}.py")

    def config(self, stage: str, **changes):
        config = load_config(self.config_file(stage), CONFIGS[stage][0])
        return dataclasses.replace(config, **changes)

    def anchor_with_evidence(self, out: Path, rank: int) -> Path:
        """Trains an anchor with a public evidence head of this rank."""
        train_anchor(
            self.config("anchor", evidence_rank=rank), data=str(self.texts["public"]), out=out,
            run=out.with_name("anchor.run"),
        )  # fmt: skip
        return out

    def expert_words(self, out, *more, name="mine", data="math", config="alone", run=None):
        """The command that trains an expert beside the anchor."""
        run = ("--run", run) if run else ()
        return (
            "train", "expert", self.config_file(config), "--data", self.texts.get(data, data),
            "--anchor", self.anchor, "--name", name, "--out", out, *run, *more,
        )  # fmt: skip


def _slice_of_corpus(name: str, file: Path, count: int) -> Path:
    documents = itertools.islice(read_documents(f"corpus:{name}"), count)
    rows = ({"text": d.text, "group": d.group.removeprefix("group:")} for d in documents)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.fixture(scope="session", autouse=True)
def compiled(tmp_path_factory):
    """A folder of compiled programs, for this process and those that tests start.

    Not for both workers: JAX writes its entries in place, and warns where it reads half of one.
    """
    folder = os.environ.setdefault(
        "JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("compiled"))
    )
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


@pytest.fixture(scope="module")
def optimized():
    """Programs as in use: for kernels, models of the reference, notebooks, and plans for TPUs."""
    jax.clear_caches()  # as at a file's end: JAX would use programs of the other kind
    compile_quickly(False)
    yield
    compile_quickly(True)


@pytest.fixture(scope="session", autouse=True)
def state_home(tmp_path_factory):
    """So that tests leave neither marks of private runs nor programs in the home folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> World:
    """Made once, by the commands that a user would type."""
    root = tmp_path_factory.mktemp("world")
    (root / "configs").mkdir()
    np.save(root / "embedding.npy", np.random.default_rng(0).standard_normal((5, 24), np.float32))
    for name, (_, text) in CONFIGS.items():
        text = f"from pathlib import Path\n\n{PARTS}FOLDER = Path({str(root)!r})\nconfig = {text}\n"
        (root / "configs" / f"{name}.py").write_text(text)
    (root / "texts").mkdir()
    counts = {"public": 100, "math": 50, "code": 50}
    texts = {n: _slice_of_corpus(n, root / "texts" / f"{n}.jsonl", c) for n, c in counts.items()}
    made = World(root, texts, {})

    def flexolmo(key: str, *arguments: object) -> None:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            code = main([str(a) for a in arguments])
        made.printed[key] = printed.getvalue()
        assert code == 0, printed.getvalue()

    def train(stage: str, config: str, name: str, out: Path, *more: object) -> None:
        where = ("--out", out, "--run", made.run(name), "--data", texts[name])
        flexolmo(name, "train", stage, made.config_file(config), *where, *more)

    train("anchor", "anchor", "public", made.anchor)
    for name, config in (("math", "alone"), ("code", "pair")):
        owner = ("--anchor", made.anchor, "--name", name)
        train("expert", config, name, made.experts[name], *owner)
    flexolmo(
        "merge", "merge", "--anchor", made.anchor, "--out", made.merged,
        "--expert", *made.experts.values(),
    )  # fmt: skip
    return made


LEARNED = """from flexolmo_jax.config import *

config = AnchorTraining(
    data=DataConfig(batch_size=8, length=32), optimizer=OptimizerConfig(learning_rate=1e-2),
    steps=300, public_tokens=4096,
    model=ModelConfig(
        vocab_size=512, width=128, num_layers=2, num_heads=2, ffn_width=384, max_length=64
    ),
)
"""


@pytest.fixture(scope="session")
def learned_anchor(world, tmp_path_factory) -> Path:
    """An anchor that has learned something: beside a head of noise, no expert learns anything."""
    folder = tmp_path_factory.mktemp("learned")
    (folder / "config.py").write_text(LEARNED)
    out = folder / "anchor"
    words = ["train", "anchor", folder / "config.py", "--data", world.texts["public"], "--out", out]
    with contextlib.redirect_stdout(io.StringIO()):
        assert main([str(word) for word in words]) == 0
    return out


@pytest.fixture
def copied(world, tmp_path) -> World:
    """The packages and the merged model in a folder of the test's own, to be tampered with."""
    root = tmp_path / "world"
    for name in ("anchor", "experts", "merged", "configs"):
        shutil.copytree(world.root / name, root / name)
    return dataclasses.replace(world, root=root)


@dataclasses.dataclass(frozen=True)
class SignedWorld(World):
    """A copy whose packages are signed, as the registry in it says."""

    @property
    def registry(self) -> Path:
        return self.root / "registry"

    def key(self, name: str) -> Path:
        """The private key of root, or of a signer: pat, mia, carl or cora."""
        return self.root / "keys" / name


@pytest.fixture(scope="session")
def keys_and_registry(tmp_path_factory) -> Path:
    """pat publishes the anchor; mia owns math, carl code; cora coordinates."""
    from flexolmo_jax.trust import keys, registry_changes
    from flexolmo_jax.trust.signers import make_signer, utc_now

    folder = tmp_path_factory.mktemp("signers")
    (folder / "keys").mkdir()
    public = {
        name: keys.read_public(keys.make_keys(folder / "keys" / name))
        for name in ("root", "pat", "mia", "carl", "cora")
    }
    root, day = keys.read_private(folder / "keys" / "root"), datetime.timedelta(days=1)
    registry_changes.create(folder / "registry", [public["root"]], 1, root)
    for name, role, experts in (
        ("pat", "publisher", ()),
        ("mia", "owner", ("math",)),
        ("carl", "owner", ("code",)),
        ("cora", "coordinator", ()),
    ):
        times = utc_now() - day, utc_now() + day
        signer = make_signer(name, public[name], role, experts, *times, where="here")
        registry_changes.add_signer(folder / "registry", signer, root)
    return folder


@pytest.fixture
def signed_world(copied, keys_and_registry) -> SignedWorld:
    """As `copied`, with every package signed."""
    from flexolmo_jax.trust.signatures import sign_package

    shutil.copytree(keys_and_registry, copied.root, dirs_exist_ok=True)
    made = SignedWorld(copied.root, copied.texts, copied.printed)
    signers = {made.anchor: "pat", made.merged: "cora"}
    signers |= {made.experts["math"]: "mia", made.experts["code"]: "carl"}
    for package, name in signers.items():
        sign_package(package, made.key(name))
    return made


@pytest.fixture(scope="session")
def make_expert(world):
    """make_expert(path, name, seed=0, bias=None): a package for the world's anchor, untrained."""
    anchor = read_anchor(world.anchor)

    def make(path: Path, name: str, *, seed: int = 0, bias: float | None = None) -> Path:
        random = np.random.default_rng(seed)  # jax's last bits depend on how it was compiled
        expert = jax.tree.map(
            lambda x: x + 0.1 * random.standard_normal(x.shape, np.float32), anchor.weights.public
        )
        if bias is not None:
            expert.router.bias[...] = jnp.full_like(expert.router.bias[...], bias)
        write_expert(path, expert, name, anchor, {"licence": "CC0-1.0", "contact": "a@b.example"})
        return path

    return make


@pytest.fixture(scope="session")
def model(world, make_expert, tmp_path_factory) -> FlexOlmo:
    """Merged of the public expert, two trained ones, and one that is made up."""
    folder = tmp_path_factory.mktemp("model")
    packages = [*world.experts.values(), make_expert(folder / "loud", "loud", seed=5)]
    merge(world.anchor, packages, folder / "merged")
    return load(folder / "merged")


@pytest.fixture
def flexolmo(capfd):
    """flexolmo(*arguments): exit code, standard output, standard error of one command."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        try:
            code = main([str(a) for a in arguments])
        except SystemExit as stop:  # argparse and tyro leave this way
            code = stop.code
        printed = capfd.readouterr()
        return code, printed.out, printed.err

    return run


@pytest.fixture
def refused(flexolmo):
    """refused(*arguments): the one line of standard error that a command ends in."""

    def run(*arguments: object) -> str:
        code, _, error = flexolmo(*arguments)
        assert code == 2, error
        *before, last = error.splitlines()
        assert last.startswith("flexolmo: error: ") and "Traceback" not in error, error
        # What was read of a text may have been said before.
        assert all(re.search(r": [\d,]+ documents?, |^skipped |^\.\.\. ", b) for b in before), error
        return last

    return run
