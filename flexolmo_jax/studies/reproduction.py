"""The paper's claims beside the full study's results.

    flexolmo study configs/study/full.py --out STUDY --texts flexmix --seeds 0 1 2
    flexolmo study reproduction STUDY [--tasks ANCHOR.json MERGED.json]

Copies the study's report and its figures to the folder of results (study_full) and reads them
there, and likewise what `flexolmo evaluate --harness ... --json` printed for the anchor and for the
merged model of one seed. Without STUDY, the page is made from what was copied earlier.
"""

import argparse
import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from flexolmo_jax.studies.engine.report import (
    add_page_argument,
    add_results_argument,
    link,
    table,
    write_json,
    write_page,
)

OURS, PAPER = "flexolmo", "paper_topall"
EVIDENCE = "evidence"  # experts with heads, routed by evidence
MARGIN = 0.002  # bits per byte; smaller differences count as none


@dataclasses.dataclass(frozen=True)
class Claim:
    """The claim that one method beats another.

    Attributes:
      what: the claim.
      paper: the paper's numbers, means over tasks; higher is better.
      better, worse: methods of the study.
      why: what explains our numbers.
      are_equal: the paper's numbers are equal.
    """

    what: str
    paper: str
    better: str
    worse: str
    why: str
    are_equal: bool = False


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

BEYOND = (  # what the paper does not measure; on the owners' domains or on mixed documents
    ("mixed", Claim("merged, against BTM, 32-token prefix", "", OURS, "btm_prefix_top2",
                    "The evidence of the prefix is wrong after the change.")),
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

BY_EVIDENCE = {  # the same methods with experts that have heads, routed by evidence
    OURS: EVIDENCE,
    **{f"{OURS}_top{k}": f"{EVIDENCE}_top{k}" for k in (1, 2, 4, "all")},
}

AGAINST = {  # what evidence routing is compared with
    "anchor": "public anchor",
    OURS: "merged, routed by rows (above)",
    "headed_rows": "the same experts, routed by rows",
    "evidence_top4": "by evidence, 4 active experts",
    "evidence_top2": "by evidence, 2 active experts",
    "prompt_routing": "prompt routing",
    "btx_best": "BTX",
    "btx_evidence": "BTX + heads, routed by evidence",
    "unrestricted_1x": "unrestricted training, 1x FLOPs",
    "unrestricted_2x": "unrestricted training, 2x FLOPs",
    "btm_running_top2": "BTM (top-2), running posterior",
    "btm_decay_top2": "BTM (top-2), decayed evidence",
    "btm_headed_decay_top2": "the same experts as whole models, BTM, decayed",
}


class Report:
    """The report of the full study, and task scores of two of its models, if there are any.

    Args:
      folder: of report.json and tasks.json.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.all = json.loads((folder / "report.json").read_text())
        scores = folder / "tasks.json"
        self.task_scores = json.loads(scores.read_text()) if scores.exists() else {}
        self.bits = self.all["bits_per_byte"]
        self.owners = self.all["config"]["owners"]

    def seeds(self, method: str, columns: list[str]) -> np.ndarray:
        """Bits per byte of each seed, averaged over columns: float64 [seeds]."""
        return np.mean([self.bits[method][c]["seeds"] for c in columns], axis=0)

    def row(self, better: str, worse: str, columns: list[str]) -> tuple[str, str]:
        """Two methods' numbers with their difference by seed, and which of them is lower."""
        first, second = (self.seeds(method, columns) for method in (better, worse))
        change = first - second
        lower = (
            "first" if (change < -MARGIN).all() else "second" if (change > MARGIN).all() else "-"
        )
        by_seed = ", ".join(f"{value:+.3f}" for value in change)
        return f"{first.mean():.3f} : {second.mean():.3f} ({by_seed})", lower

    def claim(self, claim: Claim) -> list[str]:
        """A row of the table of claims: of experts routed by rows, and of those by evidence."""
        pairs = [(claim.better, claim.worse)]
        if by_evidence := self.has_evidence and _by_evidence(claim):
            pairs.append(by_evidence)
        cells, same = [], []
        for better, worse in pairs:
            numbers, lower = self.row(better, worse, self.owners)
            cells.append(numbers)
            same.append("yes" if lower == ("-" if claim.are_equal else "first") else "no")
        if self.has_evidence and not by_evidence:
            cells.append("")
        return [claim.what, claim.paper, *cells, ", ".join(same), claim.why]

    def beyond(self, where: str, claim: Claim) -> list[str]:
        """A row of the table of what the paper does not measure."""
        columns = self.owners if where == "owners" else [where]
        return [claim.what, where, *self.row(claim.better, claim.worse, columns), claim.why]

    def removal(self, without: str, merged: str) -> list[list[str]]:
        """The table of owners that are switched off, one by one.

        Args:
          without: begins the names of the methods that lack an owner.
          merged: the method that has all of them.
        """
        rows = []
        for owner in self.owners:
            lacking = f"{without}.{owner}"
            changes = {
                c: self.mean(lacking, c) / self.mean(merged, c) - 1
                for c in (*self.owners, "public")
            }
            own = changes.pop(owner)
            worst = max(changes, key=changes.__getitem__)
            best = min(changes, key=changes.__getitem__)
            anchor = self.mean(lacking, owner) / self.mean("anchor", owner) - 1
            others = (f"{column} {changes[column]:+.1%}" for column in (worst, best))
            rows.append([owner, f"{own:+.1%}", f"{anchor:+.1%}", *others])
        return rows

    def tasks(self) -> list[list[str]]:
        """The table of task scores: of the anchor, and of the merged model."""
        rows = []
        for task, (anchor, merged) in self.task_scores.items():
            metric = "acc_norm,none" if "acc_norm,none" in anchor else "acc,none"
            error = metric.replace(",", "_stderr,")
            cells = [f"{scores[metric]:.3f} ±{scores[error]:.3f}" for scores in (anchor, merged)]
            rows.append([f"`{task}`", metric.split(",")[0], *cells])
        return rows

    @property
    def has_evidence(self) -> bool:
        """Whether the study has experts with heads."""
        return EVIDENCE in self.bits

    def evidence(self, other: str) -> list[str]:
        """A row of the table of evidence routing: a method's numbers, and the differences."""
        cells = [AGAINST[other]]
        for columns in (self.owners, ["public"], ["mixed"]):
            theirs, ours = self.seeds(other, columns), self.seeds(EVIDENCE, columns)
            by_seed = ", ".join(f"{value:+.3f}" for value in ours - theirs)
            cells.append(f"{theirs.mean():.3f} ({by_seed})")
        cost = self.all["costs"].get(other)
        if cost is None:
            return [*cells, "", ""]
        return [*cells, f"{cost['flops'] / 1e6:.1f}M", f"{cost['parameters'] / 1e6:.1f}M"]

    def mean(self, method: str, column: str) -> float:
        """Bits per byte on one column, averaged over seeds."""
        return float(self.seeds(method, [column]).mean())


def _by_evidence(claim: Claim) -> tuple[str, str] | None:
    """The two methods of a claim with evidence routing, or None if it is about rows only."""
    better, worse = (BY_EVIDENCE.get(method, method) for method in (claim.better, claim.worse))
    is_of_rows = better.startswith(OURS) or worse.startswith(OURS)
    if is_of_rows or (better, worse) == (claim.better, claim.worse):
        return None
    return better, worse


def make_page(report: Report, page: Path | None = None) -> list[str]:
    """The page, which links the study's own report."""
    return [
        *introduction(report, link(report.folder / "report.md", page)),
        "",
        *claims(report),
        "",
        *evidence(report),
        "",
        *switching_off(report),
        "",
        *tasks(report),
    ]


def introduction(report: Report, full_report: str) -> list[str]:
    """The commands, and how the numbers compare with the paper's."""
    minutes = sum(sum(stages.values()) for stages in report.all["minutes"].values())
    config = report.all["config"]
    tokens = config["expert"]["steps"] * config["expert"]["data"]["batch_size"]
    tokens *= config["expert"]["data"]["length"]
    preset, where = "full", ""
    if not report.has_evidence:
        preset = "paper"
        where = " --results docs/results/paper --page docs/reproduction_paper.md"
    of_older = "" if report.has_evidence else ": without heads, AdamW"
    of_evidence = (
        " *By evidence*, our default: experts with heads of their own (below)."
        if report.has_evidence
        else ""
    )
    return [
        f"# The paper's claims, at a scale that anyone can run{of_older}",
        "",
        "    flexolmo data fetch FETCHED && flexolmo data flexmix FETCHED flexmix",
        f"    flexolmo study configs/study/{preset}.py --out STUDY --texts flexmix --seeds 0 1 2",
        f"    flexolmo study reproduction STUDY{where}",
        "",
        f"Seeds {', '.join(map(str, report.all['seeds']))}, {report.all['machine']}, "
        f"{minutes:.0f} minutes of one core. The paper: a 7B anchor, experts of 50B tokens, 24 "
        "tasks (table 1) or 31 (table 2), accuracies and the like, higher is better, one run. "
        f"Ours: a model of width {config['anchor']['model']['width']}, {tokens:,} tokens an "
        "expert, seven owners, bits per byte on held-out documents, lower is better, mean over "
        "the owners' domains. So directions can be compared, sizes of effects cannot; and text "
        "like an owner's is the easiest case for a router, which tasks are not. Method by "
        "method: [study.md](study.md); all numbers, intervals and figures: "
        f"[the report]({full_report}).",
        "",
        "*By rows*, *merged* in the tables below: experts trained alone beside the anchor, rows "
        "that each owner fits alone, a router with memory; the study chose it among its options, "
        f"on a tuning split.{of_evidence} In brackets, the first minus the second, by seed; "
        f"differences of {MARGIN} and less count as none.",
    ]


def claims(report: Report) -> list[str]:
    """What the paper claims, and what it does not measure."""
    forms = ["by rows", "by evidence"] if report.has_evidence else ["ours"]
    claim_head = ["claim", "paper", *forms, "same direction", "why, as far as is known"]
    beyond_head = ["first : second", "on", "bits per byte", "lower", "why"]
    kept = np.mean([report.all["kept"][OURS][owner] for owner in report.owners])
    return [
        *table(
            claim_head, [report.claim(claim) for claim in CLAIMS], "ll" + "r" * len(forms) + "l"
        ),
        "",
        "## What the paper does not measure",
        "",
        "*mixed*: documents that change their domain in the middle.",
        "",
        *table(beyond_head, [report.beyond(*row) for row in BEYOND], "llrl"),
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
    ]


def evidence(report: Report) -> list[str]:
    """Experts with heads of their own, routed by evidence, which is not in the paper."""
    title = "## Experts with heads, routed by evidence"
    if not report.has_evidence:
        return [
            title,
            "",
            "Not in these results: they are of a study without such experts. "
            "`configs/study/full.py` has them.",
        ]
    cost = report.all["costs"][EVIDENCE]
    ours = [report.seeds(EVIDENCE, c).mean() for c in (report.owners, ["public"], ["mixed"])]
    kept = [report.all["kept"][EVIDENCE][owner] for owner in report.owners]
    rows = [report.evidence(other) for other in AGAINST if other in report.bits]
    return [
        title,
        "",
        "Not in the paper: every expert has a low-rank head of its own, and is routed by how well "
        "a bigram head of its owner's predicted the tokens that were read "
        "([routing.md](routing.md)). Bits per byte: "
        f"{ours[0]:.3f} on the owners' domains, {ours[1]:.3f} on public text, {ours[2]:.3f} on "
        f"mixed documents; {cost['flops'] / 1e6:.1f}M FLOPs a token "
        f"({cost['flops_of_btm']:.0%} of BTM's), {cost['parameters'] / 1e6:.1f}M weights "
        f"({cost['parameters_of_btm']:.0%}). Of what the experts gain alone, {min(kept):.0%} to "
        f"{max(kept):.0%} is kept, by owner. In brackets, evidence routing minus the other "
        "method, by seed.",
        "",
        *table(["against", "owners", "public", "mixed", "FLOPs a token", "weights"], rows),
        "",
        "Switched off, one by one:",
        "",
        *removal_table(report, "evidence_without", EVIDENCE),
    ]


def switching_off(report: Report) -> list[str]:
    """What changes when an owner's expert is switched off."""
    return [
        "## Switching off (fig. 4)",
        "",
        "The paper switches off news alone: its news generation falls from 80.7 to 71.5, below "
        "the public model's 76.0, its other scores hardly change. Here, every owner, one by one:",
        "",
        *removal_table(report, "without", OURS),
        "",
        "Same direction: what an expert brought goes with it, the rest stays, or gains where "
        "the expert stood in the way of another.",
    ]


def removal_table(report: Report, without: str, merged: str) -> list[str]:
    """`Report.removal` as Markdown."""
    head = [
        "switched off", "its domain", "the same, against the anchor", "worst change elsewhere",
        "best change elsewhere",
    ]  # fmt: skip
    return table(head, report.removal(without, merged))


def tasks(report: Report) -> list[str]:
    """Task scores, which models of this size leave at chance."""
    if not report.task_scores:
        return [
            "## Not compared",
            "",
            "Table 4 (a larger anchor), hidden states as first rows (table 3), and the tasks: "
            "models of this size answer them by chance, and these models were not asked.",
        ]
    return [
        "## Not compared",
        "",
        "Table 4 (a larger anchor), hidden states as first rows (table 3), and the tasks: "
        "models of this size answer them by chance. Seed 0, no examples, the first 500 "
        "documents of each; PIQA has answers longer than the 128 tokens that these models "
        "were made for.",
        "",
        "    flexolmo data tasks task_data",
        "    flexolmo evaluate --model MODEL --task-data task_data --limit 500 --shots 0 \\",
        "        --json --harness arc_easy arc_challenge boolq commonsense_qa openbookqa \\",
        "        social_iqa winogrande hellaswag > MODEL.json",
        "    # of STUDY/seed0/choice/flexolmo-*/chosen, and of the anchor that its manifest names",
        "    flexolmo study reproduction STUDY --tasks ANCHOR.json MERGED.json",
        "",
        *table(["task", "metric", "anchor", "merged"], report.tasks(), "llr"),
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `flexolmo study reproduction`."""
    parser.add_argument(
        "study", type=Path, nargs="?", help="the full study's folder; default: what was copied"
    )
    parser.add_argument(
        "--tasks", type=Path, nargs=2, metavar=("ANCHOR", "MERGED"), help="JSON of task scores"
    )
    add_page_argument(parser, "reproduction.md")
    add_results_argument(parser)


def run(args: argparse.Namespace) -> None:
    """Copies what is given, and writes the page."""
    folder = args.results / "study_full"
    folder.mkdir(parents=True, exist_ok=True)
    if args.tasks:
        copy_task_scores(args.tasks, folder)
    if args.study:
        reports = [args.study / "report.md", args.study / "report.json"]
        for file in (*reports, *args.study.glob("*.png")):
            shutil.copy(file, folder)
    write_page(args.page, make_page(Report(folder), args.page))


def copy_task_scores(files: Sequence[Path], folder: Path) -> None:
    """Writes FOLDER/tasks.json from the scores of the anchor and of the merged model."""
    anchor, merged = (json.loads(file.read_text())["results"] for file in files)
    write_json(folder / "tasks.json", {task: [anchor[task], merged[task]] for task in anchor})
