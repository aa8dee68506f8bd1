"""One attempt: a change to a copy of a small model, and what every command makes of it."""

import contextlib
import io
import json
import random
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

import flexolmo_jax as fo
from flexolmo_jax.commands.main import main
from flexolmo_jax.config import COMPUTE, ModelConfig
from flexolmo_jax.data.sources import read_documents
from flexolmo_jax.data.tokenizer import Tokenizer
from flexolmo_jax.federation.anchor import read_anchor, write_anchor
from flexolmo_jax.federation.expert import write_expert
from flexolmo_jax.federation.merge import write_tuned
from flexolmo_jax.modeling.transformer import init_anchor

from . import mutations

TOKENS = np.arange(40).reshape(2, 20) * 7 % 300
OURS = (ValueError, OSError, FloatingPointError)  # what `flexolmo` shows as a plain sentence
REFERENCE: dict[str, np.ndarray] = {}


def make_world(root: Path) -> None:
    """An anchor, packages of three owners, a merge of two, one with a tuned router, a ledger."""
    config = ModelConfig(
        vocab_size=300, width=16, num_layers=2, num_heads=2, ffn_width=24, max_length=64
    )
    texts = [document.text[:400] for document in read_documents("corpus:public")][:40]
    tokenizer = Tokenizer.train(texts, 300)
    for name, seed in (("anchor", 0), ("other_anchor", 1)):
        weights = init_anchor(config, jax.random.key(seed))
        write_anchor(root / name, weights, config, tokenizer, texts, {"licence": "CC0-1.0"})
    anchor = read_anchor(root / "anchor")
    for seed, name in enumerate(("math", "code", "third")):
        rng = np.random.default_rng(seed)
        expert = jax.tree.map(
            lambda x, rng=rng: x + 0.1 * rng.standard_normal(x.shape, np.float32),
            anchor.weights.public,
        )
        facts = {"licence": "CC0-1.0", "contact": "a@b.example", "tokens_seen": 100}
        if name == "code":
            facts["privacy"] = _statement()
        write_expert(root / "experts" / name, expert, name, anchor, facts)
    packages = [root / "experts" / name for name in ("math", "code")]
    fo.merge(root / "anchor", packages, root / "merged", allow_share=1.0)
    router = jax.tree.map(lambda x: x + 0.25, fo.load(root / "merged").experts.router)
    write_tuned(root / "tuned", root / "merged", router)
    (root / "budget.json").write_text(json.dumps(_ledger(), indent=1) + "\n")


def _statement() -> Any:
    from flexolmo_jax.config import PrivacyConfig
    from flexolmo_jax.privacy.accounting import Mechanism
    from flexolmo_jax.privacy.certificate import make_certificate

    mechanism = Mechanism(
        units=1000, mean_batch=10, largest_batch=20, steps=50, noise_multiplier=1.5,
        rows_noise_multiplier=None,
    )  # fmt: skip
    return make_certificate(
        PrivacyConfig(8.0), mechanism, 1e-5, window_tokens=32, rows_clip=None, other_runs=[],
        library="jax-privacy",
    )  # fmt: skip


def _ledger() -> Any:
    planned = {
        "units": 1000, "mean_batch": 10, "largest_batch": 20, "steps": 50, "noise_multiplier": 1.5,
        "rows_noise_multiplier": None,
    }  # fmt: skip
    run = {
        "id": "0" * 32, "name": "code", "folder": "/owner/code.run", "unit": "document",
        "planned": planned, "planned_epsilon": 2.0, "steps": 50, "rows": False,
        "spent_epsilon": 2.0, "finished": True, "started": "2026-11-28T00:00:00",
    }  # fmt: skip
    return {
        "format": 1, "runs": [run], "epsilon_limit": 8.0, "delta": 1e-5, "epsilon_spent": 2.0,
    }  # fmt: skip


def work(pipe, world: Path) -> None:
    """Makes the attempts whose numbers come through a pipe; sends what it is at, and the result."""
    with tempfile.TemporaryDirectory() as folder:
        for target in ("experts/code", "merged"):  # compiles whatever is needed
            _, faults, refused = attempt(world, Path(folder), 0, lambda _: None, target)
            if faults or refused:
                raise RuntimeError(f"the unchanged model is refused: {faults}")
        pipe.send("ready")
        while True:
            number = pipe.recv()
            try:
                pipe.send(attempt(world, Path(folder), number, pipe.send))
            except Exception as error:  # a fault of the attempt itself
                pipe.send((f"attempt {number}", [f"could not be made: {error!r}"], False))


def attempt(
    world: Path, folder: Path, number: int, tell: Callable[[str], None], unchanged: str = ""
) -> tuple[str, list[str], bool]:
    """Makes change `number` and tries every command, or those for what is `unchanged`.

    Returns:
      what was changed, what went wrong, and whether all that was tried was refused.
    """
    root = folder / "world"
    WORLD[:] = [world]
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(world, root)
    draw = random.Random(number)
    targets = {"experts/code": 4, "anchor": 3, "merged": 2, "tuned": 1, "ledger": 1}
    (target,) = draw.choices(list(targets), list(targets.values()))
    sealed, what = False, "nothing"
    if unchanged:
        target = unchanged
    elif target == "ledger":
        what = mutations.ledger(draw, root / "budget.json")
    else:
        try:
            what, sealed = _mutate(draw, root / target, target)
        except OSError:  # something stands where the change would put a file
            shutil.rmtree(root)
            shutil.copytree(world, root)
            what = mutations.flip(draw, root / target)
    what = f"{target}: {what}" + ", sealed" * sealed
    found = Attempt(root, target, sealed, what, tell)
    found.run()
    return what, found.faults, not found.accepted


def _mutate(draw: random.Random, package: Path, target: str) -> tuple[str, bool]:
    kinds: list[tuple[mutations.Mutation, bool]] = [(one, False) for one in mutations.FILES]
    kinds += [(one, True) for one in mutations.FILES]
    if target == "merged":
        kinds = kinds[: len(mutations.FILES)]
        kinds += [(one, True) for one in (mutations.field, mutations.raw)] * 3
        kinds += [(mutations.entries, True)] * 8
    elif target == "tuned":
        kinds += [(one, True) for one in (*mutations.CONTENT, mutations.entries)]
    else:
        kinds += [(one, True) for one in mutations.CONTENT] * 3
    one, sealed = draw.choice(kinds)
    what = one(draw, package)
    if sealed and one in mutations.FILES:
        try:
            mutations.seal(package)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            sealed = False  # nothing is left that could be sealed
    return what, sealed


def _written(package: Path) -> int | None:
    """When the manifest was written; None where there is none."""
    with contextlib.suppress(FileNotFoundError):
        return (package / "manifest.json").lstat().st_mtime_ns
    return None


class Attempt:
    """Tries the commands on a changed world."""

    def __init__(
        self, root: Path, target: str, sealed: bool, what: str, tell: Callable[[str], None]
    ):
        self.root, self.target, self.sealed, self.what, self.tell = root, target, sealed, what, tell
        self.faults: list[str] = []
        self.accepted: list[str] = []

    def run(self) -> None:
        root = self.root
        if self.target == "ledger":
            self.command("privacy", "budget", root / "budget.json")
            return
        merged = root / ("tuned" if self.target == "tuned" else "merged")
        # Its own manifest is the user's, and says which experts are in it and how many are active.
        author = self.sealed and self.target in ("merged", "tuned")
        loaded = self.logits("the merged model", merged, same=not author)
        if author and loaded is not None:
            self.names(loaded)
        if self.command("inspect", merged) and loaded is None:
            self.faults.append("inspect passes what load refuses")
        packages = [root / "experts" / name for name in ("math", "code")]
        if self.target.startswith("experts"):
            # Sealed again by its author it is another package, of which nothing was merged before.
            pair = self.logits("the package", packages[1], same=not self.sealed)
            if self.command("inspect", packages[1]) and pair is None:
                self.faults.append("inspect passes a package that load refuses")
            if self.command("privacy", "verify", packages[1]) and pair is None:
                self.faults.append("verify passes a package that load refuses")
        if self.target == "anchor":
            self.logits("a package beside the anchor", packages[0])
            self.command("inspect", root / "anchor")
        if self.target in ("experts/code", "anchor"):
            words = ("--anchor", root / "anchor", "--expert", *packages, "--allow-share")
            if self.command("merge", *words, "--out", root / "new"):
                other = self.sealed and self.target != "anchor"
                if self.logits("the new merge", root / "new", same=not other) is None:
                    self.faults.append("merge accepts what load refuses")
            elif (root / "new").exists():
                self.faults.append("a refused merge has written something")
            fresh = root / "fresh"
            shutil.copytree(root / "merged", fresh)
        else:
            fresh = merged
        added = packages[1] if self.target == "experts/code" else root / "experts" / "third"
        if self.target == "experts/code":
            fo.remove_expert(fresh, "code")
        before = _written(fresh)
        if self.command("experts", "add", fresh, added, "--allow-share"):
            if self.logits("the model with an added expert", fresh, same=False) is None:
                self.faults.append("experts add accepts what load refuses")
        elif _written(fresh) != before:
            self.faults.append("a refused add has written something")

    def command(self, *words: object) -> bool:
        """Whether a command of the command line accepts; says what is wrong with how it refuses."""
        name = " ".join(str(word) for word in words[:2] if not isinstance(word, Path))
        self.tell(f"{self.what}: {name}")
        out, error = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
            code = main([str(word) for word in words])
        said = error.getvalue()
        lines = [line for line in said.splitlines() if not line.startswith("flexolmo: warning")]
        if code == 0:
            self.accepted.append(name)
        elif code != 2 or len(lines) != 1 or not lines[0].startswith("flexolmo: error: "):
            self.faults.append(f"{name}: exit {code}, {said[-300:]!r}")
        elif re.match(r"flexolmo: error: \w+(Error|Exception|Interrupt)\b", lines[0]):
            self.faults.append(f"{name}: {lines[0][:300]}")
        if "\x1b" in out.getvalue() + said:
            self.faults.append(f"{name}: writes an escape to the terminal")
        return code == 0

    def logits(self, name: str, path: Path, same: bool = True) -> Any:
        """The model if it loads; a fault if its logits are not those of the unchanged one."""
        self.tell(f"{self.what}: load {name}")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = fo.load(path)
        except OURS:
            return None
        except Exception as error:
            self.faults.append(f"load of {name}: {error!r:.300}")
            return None
        self.accepted.append(f"load {name}")
        found = np.asarray(model.logits(TOKENS))
        if not same:
            return model
        key = f"{self.target == 'tuned'} {name}"
        expected = REFERENCE.get(key)
        if expected is None:
            expected = REFERENCE[key] = self.unchanged(name)
        computing = re.search(r"field model\.(\w+)", self.what)
        if computing and computing[1] in COMPUTE:  # the same numbers, up to rounding
            if not np.allclose(found, expected, atol=1e-4):
                self.faults.append(f"load of {name}: accepted, and logits differ")
        elif not np.array_equal(found, expected):
            self.faults.append(f"load of {name}: accepted, and logits differ")
        return model

    def unchanged(self, name: str) -> np.ndarray:
        """Logits of the model of that name in the unchanged world."""
        world = WORLD[0]
        part = "tuned" if self.target == "tuned" else "merged"
        paths = {
            "the merged model": world / part, "the new merge": world / "merged",
            "the package": world / "experts/code",
            "a package beside the anchor": world / "experts/math",
        }  # fmt: skip
        return np.asarray(fo.load(paths[name]).logits(TOKENS))

    def names(self, model: Any) -> None:
        """Each name must be the name of the package whose weights are used for it."""
        for index, name in enumerate(model.expert_names[1:], 1):
            row = mutations.array_of(WORLD[0] / "experts" / name, "feed_forward.up")
            if not np.array_equal(np.asarray(model.experts.feed_forward.up[:, index]), row[:, 0]):
                self.faults.append(f"the expert {name!r} has the weights of another")


WORLD: list[Path] = []
