"""What a smaller expert costs: bits per byte, bytes, FLOPs and speed over its rank and its bits.

    flexolmo study expert-size flexolmo_demo OUT

DEMO is the folder that `flexolmo demo` wrote. The packages of three of its owners are compressed to
several ranks and energies, to integers of 8 and 4 bits, to both, and to fewer hidden units; with
--train-ranks others are trained low-rank from the start. Every form is scored alone and merged, and
its decoding is timed.
"""

import argparse
import datetime
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from flexolmo_jax.config import ExpertTraining, load_config
from flexolmo_jax.evaluation.bits_per_byte import heldout_documents, score
from flexolmo_jax.federation.compress import compress
from flexolmo_jax.federation.integers import GROUP
from flexolmo_jax.federation.merge import merge
from flexolmo_jax.federation.package import Package
from flexolmo_jax.model import FlexOlmo, load
from flexolmo_jax.modeling.experts import Ranks
from flexolmo_jax.modeling.flops import forward_flops, low_rank_flops, low_rank_head_flops
from flexolmo_jax.storage.tensors import bytes_of
from flexolmo_jax.studies.engine.commands import run_command
from flexolmo_jax.studies.engine.report import add_page_argument, machine, table, write_page
from flexolmo_jax.training.prune import prune

OWNERS = ("math", "code", "creative")
RANKS = (1, 4, 16, 64)
ENERGIES = (0.9,)
BITS = (8, 4)
WIDTHS = (192, 96)  # of 384
TITLE_FULL = "full"
PROMPT, NEW = 16, 96  # tokens
ROUNDS = 12  # of timed generations, one of each form one after another; the fastest counts
DECODED = (None, "int8")  # the dtypes that models are loaded in for decoding
MERGED = "merged"  # the folder of a form's merged model
Make = Callable[[str, Path], None]
Decoded = tuple[str, str | None]  # a form's title, and the dtype of its weights in decoding


class Row(NamedTuple):
    """One form of all three experts.

    Attributes:
      alone: bits per byte of each owner's text by its own expert, at weight 1.
      merged: bits per byte of each owner's and of public text by the merged model.
      megabytes: of a package, the mean of the three.
      megaflops: per token of the merged model's forward pass, all experts active.
    """

    alone: dict[str, float]
    merged: dict[str, float]
    megabytes: float
    megaflops: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `flexolmo study expert-size`."""
    parser.add_argument("demo", type=Path, help="the folder of a demo")
    parser.add_argument("out", type=Path, help="folder of the packages; those in it are kept")
    parser.add_argument(
        "--train-ranks", type=int, nargs="*", default=[], metavar="R",
        help="also train experts of these ranks from the start; a minute or more for each owner",
    )  # fmt: skip
    add_page_argument(parser, "expert_size.md")


def run(args: argparse.Namespace) -> None:
    """Makes what OUT lacks, scores everything, and writes the page."""
    data = load_config("demo_expert", ExpertTraining).data
    texts = {name: heldout_documents(f"corpus:{name}", data) for name in (*OWNERS, "public")}
    anchor = load(args.demo / "anchor")
    scores = {name: score(anchor, text).bits_per_byte for name, text in texts.items()}
    rows, folders = {}, {}
    for title, make in forms(args.demo, args.out, args.train_ranks).items():
        folders[title] = args.out / title.replace(" ", "_")
        packages = {name: folders[title] / name for name in OWNERS}
        for name, package in packages.items():
            if not package.exists():
                package.parent.mkdir(parents=True, exist_ok=True)
                make(name, package)
        rows[title] = measure(args.demo / "anchor", packages, texts)
    models = {
        (title, dtype): load(folder / MERGED, dtype=dtype)
        for title, folder in folders.items()
        for dtype in DECODED
    }
    write_page(args.page, make_page(scores, rows, tokens_per_second(models)))


def forms(demo: Path, out: Path, train_ranks: Sequence[int]) -> dict[str, Make]:
    """How the package of an owner is made in each form, by the form's title."""
    experts, anchor = demo / "experts", demo / "anchor"

    def link(name: str, package: Path) -> None:
        package.symlink_to((experts / name).absolute(), target_is_directory=True)

    def compressed(**size: Any) -> Make:
        def write(name: str, package: Path) -> None:
            compress(experts / name, package, anchor=anchor, **size)

        return write

    def narrow(width: int) -> Make:
        def write(name: str, package: Path) -> None:
            prune(experts / name, package, width, f"corpus:{name}", anchor)

        return write

    def trained(rank: int) -> Make:
        def train(name: str, package: Path) -> None:
            words = ["train", "expert", "demo_expert", "--rank", str(rank), "--name", name]
            words += ["--data", f"corpus:{name}", "--anchor", str(anchor), "--out", str(package)]
            run_command(words, compiled=out / "compiled", quiet=True)

        return train

    return {
        TITLE_FULL: link,
        **{f"rank {rank}": compressed(rank=rank) for rank in RANKS},
        **{f"energy {energy}": compressed(energy=energy) for energy in ENERGIES},
        **{f"int{bits}": compressed(bits=bits) for bits in BITS},
        **{f"width {width}": narrow(width) for width in WIDTHS},
        **{f"rank {RANKS[-1]}, int{bits}": compressed(rank=RANKS[-1], bits=bits) for bits in BITS},
        **{f"trained at rank {rank}": trained(rank) for rank in train_ranks},
    }


def measure(anchor: Path, packages: Mapping[str, Path], texts: Mapping[str, Sequence[Any]]) -> Row:
    """Scores the experts alone and merged, and times decoding.

    Args:
      anchor: theirs.
      packages: of each owner.
      texts: held-out documents of each owner, and public ones.
    """
    alone = {
        name: score(load(path, anchor=anchor), texts[name], only=[name]).bits_per_byte
        for name, path in packages.items()
    }
    folder = next(iter(packages.values())).parent / MERGED
    if not folder.exists():
        merge(anchor, list(packages.values()), folder, allow_share=None)
    model = load(folder)
    merged = {name: score(model, text).bits_per_byte for name, text in texts.items()}
    opened = [Package.open(path, "expert") for path in packages.values()]
    weights = sum(bytes_of(package.weights) for package in opened) / len(opened)
    deltas = [package.weights.deltas for package in opened]
    heads = [package.weights.ranks for package in opened]
    config, full = model.config, 1 + deltas.count(None)
    of_evidence = Ranks(evidence=max(ranks.evidence for ranks in heads))
    flops = forward_flops(config, config.max_length, full, of_evidence)
    flops += sum(low_rank_head_flops(config, ranks.head) for ranks in heads)
    flops += low_rank_flops(config, [own for own in deltas if own is not None])
    return Row(alone, merged, weights / 1e6, flops / 1e6)


def tokens_per_second(models: Mapping[Decoded, FlexOlmo]) -> dict[Decoded, float]:
    """The speed of decoding one sequence, compiling aside; models take turns, as loads change."""
    prompt = [list(range(5, 5 + PROMPT))]
    fastest = dict.fromkeys(models, 0.0)
    for model in models.values():
        model.generate(prompt, NEW)  # compiles
    for _ in range(ROUNDS):
        for title, model in models.items():
            started = time.perf_counter()
            ids = model.generate(prompt, NEW)
            rate = len(ids[0]) / (time.perf_counter() - started)
            fastest[title] = max(fastest[title], rate)
    return fastest


def make_page(
    anchor: Mapping[str, float], rows: Mapping[str, Row], speeds: Mapping[Decoded, float]
) -> list[str]:
    """The page.

    Args:
      anchor: its scores.
      rows, speeds: of each form.
    """
    full = rows[TITLE_FULL]

    def kept(row: Row, name: str) -> str:
        share = (anchor[name] - row.alone[name]) / (anchor[name] - full.alone[name])
        return f"{row.alone[name]:.3f} ({share:.0%})"

    alone = [["anchor", *(f"{anchor[name]:.3f}" for name in OWNERS)]]
    alone += [[title, *(kept(row, name) for name in OWNERS)] for title, row in rows.items()]
    costs = [
        [
            title, *(f"{bits:.3f}" for bits in row.merged.values()), f"{row.megabytes:.2f}",
            f"{row.megaflops:.2f}", *(f"{speeds[title, dtype]:,.0f}" for dtype in DECODED),
        ]
        for title, row in rows.items()
    ]  # fmt: skip
    return [
        "# Experts of any size",
        "",
        f"`flexolmo study expert-size flexolmo_demo OUT`, {datetime.date.today()}, {machine()}. "
        "`flexolmo compress` makes an expert's feed-forward part a low-rank delta to the public "
        "expert's, by a truncated SVD of each of its matrices, or stores all of its matrices as "
        "integers of 8 bits, with a scale for each output channel, or of 4 bits, with one for each "
        f"{GROUP} rows of it, or both, or keeps the hidden units that matter most on the owner's "
        "text, of 384; `flexolmo train expert --rank` trains such deltas from the start. The "
        "anchor, the full experts and the held-out documents are those of `flexolmo demo`: "
        "matrices of 128 by 384, so that a delta has rank 128 at most, and is as large as the "
        "matrix from rank 96 on. Larger networks have other curves.",
        "",
        "Each expert alone, at weight 1: bits per byte of its owner's text, and in brackets how "
        "much it keeps of what the full expert gains over the anchor.",
        "",
        *table(["form", *OWNERS], alone),
        "",
        f"The three merged: bits per byte of each text; the weights of a package; FLOPs a token "
        f"of a forward pass with all four experts active; and decoding of one sequence, {NEW} "
        f"tokens after {PROMPT}, the fastest of {ROUNDS}, on a machine that did other work too.",
        "",
        *table(
            ["form", *full.merged, "MB a package", "MFLOP a token", "tokens/s", "tokens/s, int8"],
            costs,
        ),
        "",
        "Low-rank experts need the public gate, up and down products once more, for all of them "
        "together, and 6 r (D + F) FLOPs each for rank r. Packages in integers are read as "
        "float32, so they compute and decode as floats do; the last column is decoding with "
        "`--dtype int8`, which rounds whatever was loaded.",
    ]
