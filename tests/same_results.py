"""Compares what two commits compute, bit for bit.

    python tests/same_results.py OLD [NEW]

Checks out both commits (NEW: HEAD), and with each trains an anchor and two experts from fixed
seeds, merges them, tunes the router, and evaluates and generates. Losses, gradient norms, digests
of all tensors, logits and generated tokens must be equal; NEW must also compute the same logits
from the packages that OLD wrote. Takes about two minutes on two cores.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

CONFIG = """
import dataclasses, typing
from flexolmo_jax.config import *

data = DataConfig(batch_size=4, length=64, heldout=0.1)
common = dict(
    data=data, optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=2), steps=12, log_every=1
)
model = ModelConfig(
    vocab_size=512, width=32, num_layers=2, num_heads=4, num_kv_heads=2, ffn_width=48, max_length=64
)
fields = {field.name: field for field in dataclasses.fields(ExpertTraining)}
gatings = typing.get_args(fields["gating"].type)  # their names differ between commits
config = """
CONFIGS = {
    "anchor": "AnchorTraining(**common, model=model)",
    "first": "ExpertTraining(**common, gating=gatings[0])",
    "second": "ExpertTraining(**common, gating=gatings[1])",
    "router": "RouterTraining(**common)",
}
# Of what runs in a process of its own, with the code of one commit: an editable install would give
# it the modules that this commit lacks.
PATH = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
"""
COMMAND = """
import importlib.util
new = importlib.util.find_spec("flexolmo_jax.commands")
from importlib import import_module
main = import_module("flexolmo_jax.commands.main" if new else "flexolmo_jax.cli").main
sys.exit(main(sys.argv[1:]))
"""
LOGITS = """
import hashlib, json
import numpy as np
import flexolmo_jax
model = flexolmo_jax.load(sys.argv[1])
tokens = np.random.default_rng(0).integers(0, 512, (3, 40))
digests = {}
for without in ([], ["first"]):
    logits = np.asarray(model.logits(tokens, without=without), np.float32)
    digests[str(without)] = hashlib.sha256(logits.tobytes()).hexdigest()
print(json.dumps(digests))
"""
PROMPTS = ("The integral of", "def main():", "Once upon a time")


class Commit:
    """A commit's code, and what it computes in a folder of its own."""

    def __init__(self, root: Path, name: str, commit: str):
        self.code, self.out = root / f"{name}.code", root / name
        git("worktree", "add", "--detach", "--quiet", self.code, commit)
        self.out.mkdir()
        # Each checkout is imported from its own folder, whatever is installed.
        state = {"XDG_STATE_HOME": str(self.out / "state"), "PYTHONPATH": str(self.code)}
        self.environment = {**os.environ, "JAX_PLATFORMS": "cpu", **state}

    def python(self, program: str, *arguments: object) -> str:
        """The output of a program that runs with this commit's code."""
        command = [sys.executable, "-c", PATH + program, *map(str, arguments)]
        ran = subprocess.run(
            command,
            cwd=self.out,
            env=self.environment,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        return ran.stdout

    def results(self) -> dict[str, object]:
        """{what: value} of a whole life of a model."""
        for name, text in CONFIGS.items():
            (self.out / f"{name}.py").write_text(CONFIG + text)
        results: dict[str, object] = {}

        def train(stage, name, *more):
            self.python(COMMAND, "train", stage, f"./{name}.py", "--out", name, *more)
            results[f"{name}: metrics of each step"] = self._metrics(name)
            results[f"{name}: tensors"] = self._tensors(name)

        train("anchor", "anchor", "--data", "corpus:public")
        for name, domain in (("first", "math"), ("second", "code")):
            train(
                "expert", name, "--data", f"corpus:{domain}", "--anchor", "anchor", "--name", name
            )
        self.python(
            COMMAND, "merge", "--anchor", "anchor", "--expert", "first", "second", "--out", "merged"
        )
        results["merged: logits"] = self.logits(self.out)
        for dtype in ("float32", "int8"):
            answer = self.python(
                COMMAND, "generate", "--model", "merged", "--max-new-tokens", 24, "--json",
                "--dtype", dtype, "--prompt", *PROMPTS,
            )  # fmt: skip
            results[f"merged: generated, {dtype}"] = json.loads(answer)
        answer = self.python(
            COMMAND, "evaluate", "--model", "merged", "--data", "math=corpus:math", "--json"
        )
        results["merged: bits per byte"] = json.loads(answer)[0]["bits_per_byte"]
        train("router", "router", "--data", "corpus:public", "--model", "merged")
        return results

    def logits(self, folder: Path) -> dict[str, str]:
        """Digests of the logits of the models in a folder, with all experts and without one."""
        return json.loads(self.python(LOGITS, folder / "merged"))

    def _metrics(self, name: str) -> list[dict[str, float]]:
        lines = (self.out / f"{name}.run" / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        return [{key: row[key] for key in ("step", "loss", "grad_norm")} for row in rows]

    def _tensors(self, name: str) -> dict[str, str]:
        tensors = json.loads((self.out / name / "manifest.json").read_text())["tensors"]
        return {tensor: entry["sha256"] for tensor, entry in tensors.items()}


def git(*arguments: object) -> None:
    subprocess.run(["git", "-C", Path(__file__).parents[1], *map(str, arguments)], check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("old")
    parser.add_argument("new", nargs="?", default="HEAD")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        try:
            old, new = Commit(root, "old", args.old), Commit(root, "new", args.new)
            before, after = old.results(), new.results()
            before["logits of OLD's packages"] = before["merged: logits"]
            after["logits of OLD's packages"] = new.logits(old.out)
        finally:
            for name in ("old.code", "new.code"):
                git("worktree", "remove", "--force", root / name)
    table = Table("", f"{args.old} and {args.new}")
    for what in before:
        table.add_row(what, "equal" if before[what] == after[what] else "DIFFERENT")
    Console().print(table)
    return int(before != after)


if __name__ == "__main__":
    sys.exit(main())
