"""What differential privacy costs: own-domain bits per byte after merging, for several epsilons.

    .venv/bin/python flexolmo_jax/studies/privacy_curve.py OUT --size ci
    .venv/bin/flexolmo data fetch CORPUS
    .venv/bin/python flexolmo_jax/studies/privacy_curve.py OUT --size large --corpus CORPUS

What is in OUT already is not done again. The two sizes write docs/privacy_curve_SIZE.json and .png
and their part of docs/privacy.md; `--size smallest` runs the same path in minutes, to see that it
works, and writes into OUT only.

For each epsilon, batch, clip norm, steps and learning rate are chosen on the text of an owner that
the curve is not about, so that the choice costs the others no budget.
"""

import argparse
import dataclasses
import datetime
import itertools
import json
import math
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from flexolmo_jax.runtime.startup import leave_libtpu_alone

leave_libtpu_alone()  # before JAX is imported

from flexolmo_jax.config import ExpertTraining, load_config  # noqa: E402
from flexolmo_jax.evaluation.bits_per_byte import heldout_documents, score  # noqa: E402
from flexolmo_jax.federation.merge import merge  # noqa: E402
from flexolmo_jax.federation.package import read_manifest  # noqa: E402
from flexolmo_jax.model import FlexOlmo, load  # noqa: E402
from flexolmo_jax.storage.files import replace_file  # noqa: E402

DOCS = Path(__file__).parent
NEVER = math.inf  # epsilon of an ordinary run


@dataclasses.dataclass(frozen=True)
class Choice:
    """What is tuned on another owner's text."""

    batch: int  # documents in the mean batch
    clip: float
    steps: int
    rate: float

    def words(self) -> list[str]:
        return [
            "--data.batch-size", str(self.batch), "--dp-clip", str(self.clip),
            "--steps", str(self.steps), "--optimizer.learning-rate", str(self.rate),
        ]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Size:
    closed: tuple[str, ...]  # owners
    tuned_on: str | None  # None: there is one choice, made elsewhere
    tuned_unit: str  # of privacy, there; such that about as many are protected as in the curve
    grid: tuple[Choice, ...]
    seeds: tuple[int, ...]
    epsilons: tuple[float, ...]
    windows: int  # of a document in a step
    anchor: tuple[str, ...] = ()  # words for `train anchor demo_anchor`
    ordinary: tuple[str, ...] = ()  # for `train expert demo_expert` without privacy


def grid(batches, clips, steps, rates) -> tuple[Choice, ...]:
    return tuple(Choice(*one) for one in itertools.product(batches, clips, steps, rates))


SIZES = {
    "smallest": Size(
        ("math",), "educational", "document", grid((16,), (0.1,), (4, 8), (1.5e-3,)), (0,),
        (8.0, NEVER), 1, ("--steps", "60"), ("--steps", "30"),
    ),
    "ci": Size(
        ("math", "educational"), "creative", "sequence",
        grid((128,), (0.1,), (40,), (5e-3, 1.5e-2, 4.5e-2)), (0, 1, 2),
        (1.0, 2.0, 8.0, NEVER), 1, ("--steps", "400"),
    ),
    "large": Size(
        ("math", "news"), None, "document",
        grid((192,), (0.1,), (40,), (1.5e-2,)), (0, 1, 2),
        (1.0, 2.0, 8.0, NEVER), 1, ("--steps", "2400"), ("--steps", "500"),
    ),
}  # fmt: skip


class Study:
    """The runs of a size, each in a folder of its own below OUT."""

    def __init__(self, out: Path, size: Size, corpus: Path | None):
        self.out, self.size, self.corpus = out, size, corpus
        data = load_config("demo_expert", ExpertTraining).data
        domains = ("public", *size.closed, *([size.tuned_on] if size.tuned_on else []))
        self.texts = {name: heldout_documents(self.source(name), data) for name in domains}

    def source(self, domain: str) -> str:
        return str(self.corpus / f"{domain}.jsonl") if self.corpus else f"corpus:{domain}"

    def anchor(self, seed: int) -> Path:
        path = self.out / f"anchor{seed}"
        words = ["anchor", "demo_anchor", "--data", self.source("public"), *self.size.anchor]
        return self.train(path, [*words, "--seed", str(seed)])

    def expert(
        self, seed: int, owner: str, epsilon: float, choice: Choice | None, unit: str = "document"
    ) -> Path:
        path = self.out / f"expert{seed}_{owner}_{self.name(epsilon, choice)}"
        words = ["expert", "demo_expert", "--data", self.source(owner), "--name", owner]
        words += ["--anchor", str(self.anchor(seed)), "--seed", str(seed)]
        if choice is None:
            return self.train(path, [*words, *self.size.ordinary])
        # A ledger for each run, where a text has only one otherwise: these owners publish nothing.
        if self.corpus:
            (self.corpus / f".{owner}.jsonl.ledger").unlink(missing_ok=True)
        private = ["--dp-epsilon", str(epsilon), "--dp-ledger", f"{path}.budget.json"]
        private += ["--dp-windows", str(self.size.windows), "--dp-unit", unit]
        return self.train(path, [*words, *private, *choice.words()])

    @staticmethod
    def name(epsilon: float, choice: Choice | None) -> str:
        if choice is None:
            return "ordinary"
        return "_".join(f"{value:g}" for value in (epsilon, *dataclasses.astuple(choice)))

    def train(self, path: Path, words: list[str]) -> Path:
        if not (path / "manifest.json").exists():
            command = [sys.executable, "-m", "flexolmo_jax", "train", *words]
            compiled = {"JAX_COMPILATION_CACHE_DIR": str(self.out / "compiled")}
            compiled["XDG_STATE_HOME"] = str(self.out / "state" / path.name)
            words = [*command, "--out", str(path), "--resume"]
            subprocess.run(words, check=True, env={**os.environ, **compiled})
        return path

    def merged(
        self, seed: int, private: dict[str, float], choices: dict[float, Choice | None]
    ) -> dict[str, float]:
        """Bits per byte of each domain, where each owner has asked for such an epsilon."""
        names = [self.name(epsilon, choices[epsilon]) for epsilon in private.values()]
        path = self.out / "_".join([f"merged{seed}", *private, *names])
        experts = [self.expert(seed, owner, e, choices[e]) for owner, e in private.items()]
        if not path.exists():
            merge(self.anchor(seed), experts, path)
        return kept(path, lambda: self.scores(load(path)))

    def scores(self, model: FlexOlmo) -> dict[str, float]:
        return {name: score(model, texts).bits_per_byte for name, texts in self.texts.items()}

    def tune(self, epsilon: float) -> tuple[Choice, list[dict[str, Any]]]:
        """The best choice for the expert alone, of an owner that the curve is not about; and all.

        Where there is no such owner there is one choice, and nothing is tried.
        """
        owner, seed, tried = self.size.tuned_on, self.size.seeds[0], []
        if owner is None:
            (choice,) = self.size.grid
            return choice, []
        for choice in self.size.grid:
            package = self.expert(seed, owner, epsilon, choice, self.size.tuned_unit)
            tried.append({"epsilon": epsilon, **vars(choice), **self.alone(package, owner, seed)})
        best = min(range(len(tried)), key=lambda number: tried[number]["bits_per_byte"])
        return self.size.grid[best], tried

    def alone(self, package: Path, owner: str, seed: int) -> dict[str, float]:
        def of_expert() -> dict[str, float]:
            model = load(package, anchor=self.anchor(seed))
            found = score(model, self.texts[owner], only=[owner])
            return {"bits_per_byte": found.bits_per_byte}

        return kept(package, of_expert)

    def run(self, seeds: Sequence[int]) -> dict[str, Any]:
        closed, points, noise = self.size.closed, [], {}
        private_ones = [epsilon for epsilon in self.size.epsilons if epsilon != NEVER]
        tuned = {epsilon: self.tune(epsilon) for epsilon in private_ones}
        choices: dict[float, Choice | None] = {e: choice for e, (choice, _) in tuned.items()}
        choices[NEVER] = None
        for seed in seeds:
            anchor = self.anchor(seed)
            of_anchor = kept(anchor, lambda anchor=anchor: self.scores(load(anchor)))
            points.append({"seed": seed, "epsilon": None, "bits_per_byte": of_anchor})
            together = [dict.fromkeys(closed, epsilon) for epsilon in self.size.epsilons]
            alone = [
                {**dict.fromkeys(closed, NEVER), owner: epsilon}
                for owner in closed
                for epsilon in self.size.epsilons
            ]
            for private in together + [one for one in alone if one not in together]:
                asked = {owner: shown(epsilon) for owner, epsilon in private.items()}
                found = self.merged(seed, private, choices)
                points.append({"seed": seed, "epsilon": asked, "bits_per_byte": found})
        for owner, epsilon in itertools.product(closed, private_ones):
            package = self.expert(seeds[0], owner, epsilon, choices[epsilon])
            noise[f"{owner} {epsilon:g}"] = read_manifest(package)["privacy"]
        setting = dataclasses.asdict(self.size)
        return {
            "setting": {**setting, "epsilons": [shown(one) for one in self.size.epsilons]},
            "chosen": {shown(epsilon): vars(choice) for epsilon, (choice, _) in tuned.items()},
            "tried": [one for _, tried in tuned.values() for one in tried],
            "points": points, "statements": noise, "machine": machine(),
        }  # fmt: skip


def shown(epsilon: float) -> str:
    return "none" if epsilon == NEVER else f"{epsilon:g}"


def machine() -> str:
    """What this runs on, and when."""
    about = f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}"
    return f"{about}, {datetime.date.today()}"


def kept(model: Path, compute: Callable[[], dict[str, float]]) -> dict[str, float]:
    """A model's scores: from the file beside it, or computed and kept there."""
    file = model.with_name(f"{model.name}.scores.json")
    if not file.exists():
        save(file, compute())
    return json.loads(file.read_text())


def save(file: Path, value: Any) -> None:
    replace_file(file, json.dumps(value, indent=1) + "\n")


def values(found: dict, epsilon: dict[str, str] | None, domain: str) -> list[float]:
    """Of each seed."""
    return [p["bits_per_byte"][domain] for p in found["points"] if p["epsilon"] == epsilon]


def changes(found: dict, epsilon: dict[str, str], domain: str) -> list[float]:
    """Of each seed, against its anchor."""
    here, anchor = (values(found, one, domain) for one in (epsilon, None))
    return [a / b - 1 for a, b in zip(here, anchor, strict=True)]


def cell(found: dict, epsilon: dict[str, str], domain: str) -> str:
    """Mean over seeds, and the change from the anchor: mean, smallest and largest."""
    shares, here = changes(found, epsilon, domain), values(found, epsilon, domain)
    spread = f"; {min(shares):+.1%} {max(shares):+.1%}" if len(shares) > 1 else ""
    return f"{statistics.mean(here):.3f} ({statistics.mean(shares):+.1%}{spread})"


def choice_of(found: dict) -> str:
    """How the setting was chosen."""
    setting = found["setting"]
    if found["tried"]:
        return (
            f"Chosen for each epsilon, of {len(setting['grid'])} settings, by what they give an "
            f"expert on {setting['tuned_on']} (unit: {setting['tuned_unit']}) alone:"
        )
    (one,) = setting["grid"]
    return (
        f"Batch {one['batch']}, clip norm {one['clip']:g}, {one['steps']} steps and learning rate "
        f"{one['rate']:g}: steps, clip norm and rate as chosen at the other size, the batch larger "
        "as there are more documents. Nothing was tuned on this text."
    )


def tuning_table(found: dict) -> list[str]:
    """Of each epsilon what was chosen, and what the others came to."""
    lines = ["| epsilon | batch | clip norm | steps | learning rate | bits per byte |"]
    lines += ["| ---: | ---: | ---: | ---: | ---: | ---: |"]
    for one in found["tried"]:
        chosen = found["chosen"][shown(one["epsilon"])].items() <= one.items()
        cells = [
            shown(one["epsilon"]), str(one["batch"]), f"{one['clip']:g}", str(one["steps"]),
            f"{one['rate']:g}", f"{one['bits_per_byte']:.3f}" + " (chosen)" * chosen,
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def page(found: dict, size: str) -> list[str]:
    """The part of docs/privacy.md about one size."""
    setting = found["setting"]
    closed, epsilons = setting["closed"], setting["epsilons"]
    domains = ["public", *closed]
    head = ["", "| | " + " | ".join(domains) + " |", "| --- |" + " ---: |" * len(domains)]
    corpus = " --corpus CORPUS" if size == "large" else ""
    anchor = (f"{statistics.mean(values(found, None, domain)):.3f}" for domain in domains)
    lines = [
        f"`python flexolmo_jax/studies/privacy_curve.py OUT --size {size}{corpus}`, {found['machine']}. Held-out "
        f"bits per byte (lower is better), mean of {len(setting['seeds'])} seeds, and the change "
        "from the anchor (mean; smallest and largest of the seeds). Unit: document; windows of one "
        f"in a step, at most: {setting['windows']}. {choice_of(found)}",
        *(["", *tuning_table(found)] if found["tried"] else []),
        "",
        "All owners ask for the same epsilon (delta "
        + ", ".join(sorted({f"{one['delta']:.2g}" for one in found["statements"].values()}))
        + "):",
        *head,
        "| anchor | " + " | ".join(anchor) + " |",
    ]  # fmt: skip
    for epsilon in epsilons:
        cells = (cell(found, dict.fromkeys(closed, epsilon), domain) for domain in domains)
        lines.append(f"| epsilon {epsilon} | " + " | ".join(cells) + " |")
    if len(closed) > 1:
        lines += ["", "One owner asks for privacy, the others for none:", *head]
        for owner, epsilon in itertools.product(closed, epsilons):
            asked = {**dict.fromkeys(closed, "none"), owner: epsilon}
            cells = (cell(found, asked, domain) for domain in domains)
            lines.append(f"| {owner}: epsilon {epsilon} | " + " | ".join(cells) + " |")
    units = ", ".join(
        f"{owner} {found['statements'][f'{owner} {epsilons[0]}']['units']:,}" for owner in closed
    )
    noises = ", ".join(
        f"{key}: {one['noise_multiplier']:g}" for key, one in found["statements"].items()
    )
    lines += ["", f"Documents: {units}. Noise multipliers (owner and epsilon): {noises}."]
    return lines


def draw(found: dict, picture: Path) -> None:
    setting = found["setting"]
    figure = Figure(figsize=(3.6 * len(setting["closed"]), 3.2), layout="constrained")
    panels = figure.subplots(1, len(setting["closed"]), squeeze=False)[0]
    for axes, owner in zip(panels, setting["closed"], strict=True):
        shares = [
            changes(found, dict.fromkeys(setting["closed"], epsilon), owner)
            for epsilon in setting["epsilons"]
        ]
        for of_seed in zip(*shares, strict=True):
            axes.plot([100 * share for share in of_seed], "o-", color="C0", alpha=0.6)
        axes.axhline(0, ls="--", color="grey")
        axes.set_xticks(range(len(setting["epsilons"])), setting["epsilons"])
        axes.set(title=owner, xlabel="epsilon", ylabel="bits per byte, change in %")
    figure.suptitle("merged, against the anchor (dashed), each seed")
    figure.savefig(picture, dpi=130)


def write_part(mark: str, lines: list[str]) -> None:
    """Replaces what stands between the marks of a part in docs/privacy.md."""
    file = DOCS / "privacy.md"
    start, end = f"<!-- {mark} -->", f"<!-- end of {mark} -->"
    before, _, rest = file.read_text().partition(start)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"{file}: expected the lines {start} and {end}")
    file.write_text("\n".join([before + start, *lines, end + after]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", choices=SIZES, required=True)
    parser.add_argument("--corpus", type=Path, help="of `flexolmo data fetch`, for large")
    parser.add_argument(
        "--seeds", type=int, nargs="+", help="work on these only, and write no page: processes may "
        "share seeds, once the first one has come to its merged models",
    )  # fmt: skip
    args = parser.parse_args()
    if (args.size == "large") != (args.corpus is not None):
        parser.error("--corpus goes with --size large")
    args.out.mkdir(parents=True, exist_ok=True)
    found = Study(args.out, SIZES[args.size], args.corpus).run(args.seeds or SIZES[args.size].seeds)
    if args.seeds:
        return
    where = args.out if args.size == "smallest" else DOCS
    save(where / f"privacy_curve_{args.size}.json", found)
    draw(found, where / f"privacy_curve_{args.size}.png")
    lines = page(found, args.size)
    if args.size == "smallest":
        print("\n".join(lines))
    else:
        write_part(f"curve {args.size}", [f"![](privacy_curve_{args.size}.png)", "", *lines])


if __name__ == "__main__":
    main()
