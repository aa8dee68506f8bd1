"""Changes one merged model from two processes at a time, and checks that nothing is undone.

    python tests/chaos/races.py --rounds 200 --seed 0

In each round two processes act at the same moment: each takes its own expert out of the model or
puts it back, or both merge into the same new folder. What reports success must have happened, and
the model must be whole.
"""

import argparse
import json
import multiprocessing
import random
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.progress import track

CONTEXT = multiprocessing.get_context("spawn")
NAMES = ("left", "right")  # the expert of each process; a third one always stays


def make_world(root: Path) -> None:
    """root/anchor and root/experts/NAME, with random weights."""
    import jax

    from flexolmo_jax.config import ModelConfig
    from flexolmo_jax.data.tokenizer import Tokenizer
    from flexolmo_jax.federation.anchor import read_anchor, write_anchor
    from flexolmo_jax.federation.expert import write_expert
    from flexolmo_jax.federation.merge import merge
    from flexolmo_jax.modeling.transformer import init_anchor

    texts = ["the river walks under the stone house", "a quiet engine of small numbers"]
    tokenizer = Tokenizer.train(texts, 300, "<|endoftext|>")
    config = ModelConfig(vocab_size=300, width=16, num_layers=1, num_heads=2, ffn_width=16)
    facts = {"licence": "CC0-1.0", "contact": "owner@example.org"}
    weights = init_anchor(config, jax.random.key(0))
    write_anchor(root / "anchor", weights, config, tokenizer, texts, facts)
    anchor = read_anchor(root / "anchor")
    for name in (*NAMES, "third"):
        write_expert(root / "experts" / name, anchor.weights.public, name, anchor, facts)
    experts = [root / "experts" / name for name in (*NAMES, "third")]
    merge(root / "anchor", experts, root / "model")


def act(root: Path, name: str, what: str) -> None:
    """One change, by the process of the expert `name`."""
    from flexolmo_jax.federation.merge import add_expert, merge, remove_expert

    package = root / "experts" / name
    if what == "merge":
        merge(root / "anchor", [package], root / "new")
    elif what == "add":
        add_expert(root / "model", package)
    else:
        remove_expert(root / "model", name)


def work(root: Path, name: str, jobs, results, moment) -> None:
    """A process: acts when it is told to, at the same moment as the other one."""
    while (what := jobs.get()) is not None:
        moment.wait()
        try:
            act(root, name, what)
            results.put((name, None))
        except Exception as error:
            results.put((name, f"{type(error).__name__}: {error}"))


def names_in(model: Path) -> set[str]:
    from flexolmo_jax.federation.merged import check_package

    check_package(model)
    return {one["name"] for one in json.loads((model / "manifest.json").read_text())["experts"]}


def race(rounds: int, seed: int) -> list[str]:
    """Runs the rounds; what went wrong in them."""
    rng, faults = random.Random(seed), []
    moment, results = CONTEXT.Barrier(2), CONTEXT.Queue()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_world(root)
        jobs = {name: CONTEXT.Queue() for name in NAMES}
        processes = [
            CONTEXT.Process(target=work, args=(root, name, jobs[name], results, moment))
            for name in NAMES
        ]
        for process in processes:
            process.start()
        expected = set(NAMES)
        for number in track(range(rounds), "racing", console=Console(stderr=True)):
            merging = rng.random() < 0.25
            for name in NAMES:
                change = "remove" if name in expected else "add"
                jobs[name].put("merge" if merging else change)
            said = dict(results.get(timeout=120) for _ in NAMES)
            done = {name for name, error in said.items() if error is None}
            if merging:
                if len(done) != 1 or names_in(root / "new") != done:
                    faults.append(f"round {number}: merged into one folder: {said}")
                (root / "new" / "manifest.json").unlink()
                (root / "new").rmdir()
                continue
            expected ^= done
            if done != set(NAMES) or names_in(root / "model") != expected | {"third"}:
                faults.append(f"round {number}: expected {expected}, found {said}")
                expected = names_in(root / "model") - {"third"}
        for name in NAMES:
            jobs[name].put(None)
        for process in processes:
            process.join()
        left = {path.name for path in root.iterdir()} - {"anchor", "experts", "model"}
        if left:
            faults.append(f"left behind: {left}")
    return faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=200, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    faults = race(args.rounds, args.seed)
    for fault in faults:
        print(fault)
    print(f"seed {args.seed}: {args.rounds} rounds, {len(faults)} with a change undone or lost")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
