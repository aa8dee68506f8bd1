"""The paper's claims beside the full study's figures: writes docs/reproduction.md.

    flexolmo study configs/study/full.py --out STUDY --texts flexmix --seeds 0 1 2
    .venv/bin/python flexolmo_jax/studies/reproduction.py STUDY [--tasks ANCHOR.json MERGED.json]

Copies the report and its pictures to docs/study_full, and reads them there; so too what
`flexolmo evaluate --harness ... --json` found of the anchor and of the merged model of a seed.
"""

import argparse
import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np

DOCS = Path(__file__).parent
STUDY = DOCS / "study_full"
OURS, PAPER = "flexolmo", "paper_topall"
PICTURES = ("methods.png", "removal.png", "routing.png", "owners.png", "top_k.png")
MARGIN = 0.002  # bits per byte


@dataclasses.dataclass(frozen=True)
class Claim:
    """That `better` beats `worse`; figures of the paper are means over tasks, higher is better."""

    what: str
    paper: str
    better: str  # methods of the study
    worse: str
    why: str
    are_equal: bool = False  # the paper's figures


CLAIMS = (
    Claim("merged, against the public model", "47.8 : 36.9 (t. 1), 52.4 : 42.4 (t. 2)", OURS,
          "anchor", "The first claim, and the one that matters."),
    Claim("..., against a uniform soup", "47.8 : 39.6 (t. 1)", OURS, "soup_uniform",
          "Averaged weights help where owners are alike; math, the strangest, pays."),
    Claim("..., against a weighted soup", "47.8 : 42.2 (t. 1)", OURS, "soup_weighted",
          "Weights that are good for one domain are bad for another."),
    Claim("..., against BTM (top-2)", "47.8 : 43.4 (t. 1), 52.4 : 47.6 (t. 2)", OURS,
          "btm_running_top2",
          "Held-out text is of one domain, so a few tokens tell BTM whose it is, and whole models "
          "learn more of it than feed-forward networks. On mixed documents see below."),
    Claim("..., against prompt routing", "47.8 : 40.8 (t. 1)", OURS, "prompt_routing",
          "As BTM; the paper's classifier had to route tasks, ours text like its training text."),
    Claim("..., against BTX", "47.8 : 40.0 (t. 1)", OURS, "btx_best",
          "BTX has the same kind of rows, memory and tuning here, so this is what coordination is "
          "worth."),
    Claim("..., against unrestricted training, 1x FLOPs", "47.8 : 46.3 (t. 1)", OURS,
          "unrestricted_1x",
          "It trains attention too, and on everybody's text; in the paper it had half of the data, "
          "here the same tokens."),
    Claim("unrestricted training, 2x FLOPs, against merged", "51.5 : 47.8 (t. 1)",
          "unrestricted_2x", OURS, "What not sharing data costs."),
    Claim("router bias", "46.7 : 45.8 (t. 1)", OURS, "flexolmo_without_bias",
          "A fitted bias keeps experts away from public text."),
    Claim("router bias, paper's form", "46.7 : 45.8 (t. 1)", PAPER, "paper_without_bias",
          "Learned on the owner's text alone, the bias is pushed up and ends at 0, where it does "
          "nothing; the paper's code gives it no start."),
    Claim("domain embedding as the first row, paper's form", "45.8 : 44.4 (t. 1), "
          "46.7 : 43.5 (t. 3, hidden states)", PAPER, "paper_plain",
          "Ours is hashed TF-IDF, not GritLM, and training moves the rows far from it."),
    Claim("coordination (training beside the frozen anchor)", "46.7 : 38.8 (t. 1)", OURS,
          "flexolmo_uncoordinated", "Networks of models trained apart do not fit the anchor's."),
    Claim("router tuning on proxies, paper's form", "47.8 : 46.7 (t. 1), 52.4 : 51.3 (t. 2)",
          "paper_tuned", PAPER,
          "Proxies are picked from public text, which has no math like the owner's: that expert is "
          "tuned away, the others gain."),
    Claim("top-4 against top-1 (fig. 3)", "60.4 : 50.9 (MMLU)", "flexolmo_top4", "flexolmo_top1",
          "One expert a token is too hard a choice."),
    Claim("top-4 against all (fig. 3)", "60.4 : 60.4 (MMLU)", "flexolmo_top4", "flexolmo_topall",
          "More than 4 bring nothing.", are_equal=True),
)  # fmt: skip

BEYOND = (  # what the paper does not look at; columns "owners" or "mixed"
    ("mixed", Claim("merged, against BTM, 32-token prefix", "", OURS, "btm_prefix_top2",
                    "What the prefix told is wrong after the change.")),
    ("mixed", Claim("merged, against BTM, running posterior", "", OURS, "btm_running_top2",
                    "Evidence of the first half has to be outweighed.")),
    ("mixed", Claim("merged, against BTM whose evidence decays", "", OURS, "btm_decay_top2",
                    "The best of all on changing text, at the price of running whole models.")),
    ("mixed", Claim("merged, against BTX", "", OURS, "btx_best", "As above.")),
    ("owners", Claim("our rows and memory, against the paper's form", "", OURS, PAPER,
                     "See below.")),
    ("owners", Claim("the same, router tuned on proxies, against not tuned", "", "flexolmo_tuned",
                     OURS, "Rows that were fitted to the owner's own text lose by it.")),
    ("owners", Claim("biases folded into rows, against biases", "", "flexolmo_bias_folded", OURS,
                     "What a gate without biases costs, as Hugging Face's.")),
)  # fmt: skip


class Report:
    """report.json of the full study."""

    def __init__(self) -> None:
        self.all = json.loads((STUDY / "report.json").read_text())
        self.bits = self.all["bits_per_byte"]
        self.owners = self.all["config"]["owners"]

    def seeds(self, method: str, columns: list[str]) -> np.ndarray:
        """Bits per byte of each seed, averaged over columns."""
        return np.mean([self.bits[method][c]["seeds"] for c in columns], axis=0)

    def row(self, claim: Claim, columns: list[str]) -> list[str]:
        """The two methods' figures, their difference by seed, and which one is lower."""
        better, worse = (self.seeds(m, columns) for m in (claim.better, claim.worse))
        change = better - worse
        lower = (
            "first" if (change < -MARGIN).all() else "second" if (change > MARGIN).all() else "-"
        )
        spread = ", ".join(f"{one:+.3f}" for one in change)
        return [f"{better.mean():.3f} : {worse.mean():.3f}", spread, lower]

    def claim(self, claim: Claim) -> str:
        figures, spread, lower = self.row(claim, self.owners)
        same = "yes" if lower == ("-" if claim.are_equal else "first") else "no"
        cells = [claim.what, claim.paper, figures, spread, same, claim.why]
        return f"| {' | '.join(cells)} |"

    def beyond(self, where: str, claim: Claim) -> str:
        row = self.row(claim, self.owners if where == "owners" else [where])
        return f"| {' | '.join([claim.what, where, *row, claim.why])} |"

    def removal(self) -> list[str]:
        lines = []
        for owner in self.owners:
            found = {c: self.change(owner, c) for c in (*self.owners, "public")}
            others = {c: v for c, v in found.items() if c != owner}
            worst, best = max(others, key=others.get), min(others, key=others.get)
            anchor = self.mean(f"without.{owner}", owner) / self.mean("anchor", owner) - 1
            lines.append(
                f"| {owner} | {found[owner]:+.1%} | {anchor:+.1%} | {worst} {others[worst]:+.1%} | "
                f"{best} {others[best]:+.1%} |"
            )
        return lines

    def tasks(self) -> list[str]:
        rows = []
        for task, (anchor, merged) in json.loads((STUDY / "tasks.json").read_text()).items():
            metric = "acc_norm,none" if "acc_norm,none" in anchor else "acc,none"
            error = metric.replace(",", "_stderr,")
            cells = [f"{one[metric]:.3f} ±{one[error]:.3f}" for one in (anchor, merged)]
            rows.append(f"| `{task}` | {metric.split(',')[0]} | {' | '.join(cells)} |")
        return rows

    def mean(self, method: str, column: str) -> float:
        return float(self.seeds(method, [column]).mean())

    def change(self, owner: str, column: str) -> float:
        return self.mean(f"without.{owner}", column) / self.mean(OURS, column) - 1


def page(report: Report) -> str:
    minutes = sum(sum(one.values()) for one in report.all["minutes"].values())
    config = report.all["config"]
    tokens = config["expert"]["steps"] * config["expert"]["data"]["batch_size"]
    tokens *= config["expert"]["data"]["length"]
    kept = np.mean([report.all["kept"][OURS][owner] for owner in report.owners])
    return "\n".join(
        [
            "# The paper's claims, at a scale that anyone can run",
            "",
            "    flexolmo data fetch FETCHED && flexolmo data flexmix FETCHED flexmix",
            "    flexolmo study configs/study/full.py --out STUDY --texts flexmix --seeds 0 1 2",
            "    python flexolmo_jax/studies/reproduction.py STUDY",
            "",
            f"Seeds {', '.join(map(str, report.all['seeds']))}, {report.all['machine']}, "
            f"{minutes:.0f} minutes of one core. The paper: a 7B anchor, experts of 50B tokens, 24 "
            "tasks (table 1) or 31 (table 2), accuracies and the like, higher is better, one run. "
            f"Ours: a model of width {config['anchor']['model']['width']}, {tokens:,} tokens an "
            "expert, seven owners, bits per byte on held-out documents, lower is better, mean over "
            "the owners' domains. So directions can be compared, sizes of effects cannot; and text "
            "like an owner's is the easiest case for a router, which tasks are not. Method by "
            "method: [study.md](study.md); all figures, intervals and pictures: "
            "[the report](study_full/report.md).",
            "",
            "*merged* is our default: experts trained alone beside the anchor, rows that each "
            "owner fits alone, a router that remembers; it is what the study chose among its "
            f"options, on a tuning split. Differences of {MARGIN} and less count as none.",
            "",
            "| claim | paper | ours | by seed | same direction | why, as far as is known |",
            "| --- | --- | ---: | ---: | --- | --- |",
            *(report.claim(claim) for claim in CLAIMS),
            "",
            "## What the paper does not look at",
            "",
            "*mixed*: documents that change their domain in the middle.",
            "",
            "| first : second | on | bits per byte | by seed | lower | why |",
            "| --- | --- | ---: | ---: | --- | --- |",
            *(report.beyond(*one) for one in BEYOND),
            "",
            "## The paper's form, and ours",
            "",
            "The paper's rows are learned on the owner's text alone, and nothing in that text says "
            "what is *not* the owner's; merged, they swamp each other and the public expert: "
            f"{report.mean(PAPER, 'public'):.3f} bits per byte on public text, where the anchor "
            f"has {report.mean('anchor', 'public'):.3f}, ours {report.mean(OURS, 'public'):.3f}. "
            f"Of what the experts gain alone, ours keeps {kept:.0%} on average; 80% on every "
            "domain was the aim, and is not reached. The second gap, of an expert to a dense "
            "model at equal tokens: [expert_training.md](expert_training.md).",
            "",
            "## Switching off (fig. 4)",
            "",
            "The paper switches off news alone: its news generation falls from 80.7 to 71.5, below "
            "the public model's 76.0, its other scores hardly change. Here, every owner in turn:",
            "",
            "| switched off | its domain | the same, against the anchor | worst change elsewhere | "
            "best change elsewhere |",
            "| --- | ---: | ---: | ---: | ---: |",
            *report.removal(),
            "",
            "Same direction: what an expert brought goes with it, the rest stays, or gains where "
            "the expert stood in the way of another.",
            "",
            "## Not compared",
            "",
            "Table 4 (a larger anchor), hidden states as first rows (table 3), and the tasks: "
            "models of this size answer them by chance. Seed 0, no examples, the first 500 "
            "documents of each; PIQA has answers longer than the 128 tokens that these models "
            "were made for.",
            "",
            "    flexolmo data tasks task_data",
            "    flexolmo merge --anchor STUDY/seed0/anchor-*/package --active 4 --out merged \\",
            "        --expert STUDY/seed0/expert/*/package",
            "    flexolmo evaluate --model MODEL --task-data task_data --limit 500 --shots 0 \\",
            "        --json --harness arc_easy arc_challenge boolq commonsense_qa openbookqa \\",
            "        social_iqa winogrande hellaswag > MODEL.json   # of the anchor, and of merged",
            "    python flexolmo_jax/studies/reproduction.py STUDY --tasks ANCHOR.json MERGED.json",
            "",
            "| task | metric | anchor | merged |",
            "| --- | --- | ---: | ---: |",
            *report.tasks(),
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("study", type=Path, nargs="?", help="leave out to use what is in docs")
    parser.add_argument("--tasks", type=Path, nargs=2, metavar=("ANCHOR", "MERGED"))
    args = parser.parse_args()
    if args.tasks:
        anchor, merged = (json.loads(file.read_text())["results"] for file in args.tasks)
        both = {task: [anchor[task], merged[task]] for task in anchor}
        (STUDY / "tasks.json").write_text(json.dumps(both, indent=1) + "\n")
    if args.study:
        STUDY.mkdir(exist_ok=True)
        for file in (
            args.study / "report.md",
            args.study / "report.json",
            *args.study.glob("*.png"),
        ):
            shutil.copy(file, STUDY)
    (DOCS / "reproduction.md").write_text(page(Report()))


if __name__ == "__main__":
    main()
