"""What audits find: extraction, membership and removal, for experts with and without privacy.

    .venv/bin/python flexolmo_jax/studies/privacy_audits.py OUT

What is in OUT already is not done again. Writes docs/privacy_audits.json and the tables of
docs/privacy.md; `--size smallest` runs the same path in minutes, to see that it works, and only
prints them.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from flexolmo_jax.runtime.startup import leave_libtpu_alone

leave_libtpu_alone()  # before JAX is imported

from flexolmo_jax.audits import control, extraction  # noqa: E402
from flexolmo_jax.audits.extraction import Protocol  # noqa: E402
from flexolmo_jax.audits.findings import CONTROLS  # noqa: E402
from flexolmo_jax.audits.runs import run_membership, run_removal  # noqa: E402
from flexolmo_jax.audits.statistics import as_json  # noqa: E402
from flexolmo_jax.audits.subjects import trained_documents  # noqa: E402
from flexolmo_jax.federation.merge import merge  # noqa: E402
from flexolmo_jax.federation.package import read_manifest  # noqa: E402
from flexolmo_jax.model import load  # noqa: E402
from flexolmo_jax.studies.privacy_curve import DOCS, machine, save, write_part  # noqa: E402

OWNER, DATA, HELDOUT = "math", "corpus:math", 0.1


@dataclasses.dataclass(frozen=True)
class Size:
    canaries: int
    prefixes: int
    epsilons: tuple[str, ...]
    anchor: tuple[str, ...] = ()  # words for `train anchor demo_anchor`
    ordinary: tuple[str, ...] = ("--steps", "1400")  # for `train expert demo_expert`
    private: tuple[str, ...] = ("--dp-windows", "2")  # for `train expert demo_private_expert`
    other: tuple[str, ...] = ()  # for the other owner's expert


SIZES = {
    "smallest": Size(
        20, 50, ("8",), ("--steps", "60"), ("--steps", "600"),
        ("--dp-windows", "2", "--steps", "30"), ("--steps", "30"),
    ),
    "ci": Size(200, 1000, ("8", "1")),
}  # fmt: skip


class Study:
    """Models and audits, each in a folder of its own below OUT."""

    def __init__(self, out: Path, size: Size):
        self.out, self.size = out, size
        self.anchor = out / "anchor"

    def flexolmo(self, name: str, *words: str) -> Path:
        """Runs a command that makes OUT/NAME, unless it is there."""
        path = self.out / name
        if not (path / "manifest.json").exists():
            command = [
                sys.executable,
                "-m",
                "flexolmo_jax",
                *words,
                "--out",
                str(path),
            ]
            subprocess.run([*command, *(["--resume"] * (words[0] == "train"))], check=True)
        return path

    def train(self) -> None:
        size, anchor = self.size, ("--anchor", str(self.anchor))
        own = ("--data", DATA, "--name", OWNER, *anchor, "--canaries", str(size.canaries))
        self.flexolmo(
            "anchor", "train", "anchor", "demo_anchor", "--data", "corpus:public", *size.anchor
        )
        self.flexolmo("plain", "train", "expert", "demo_expert", *own, *size.ordinary)
        for epsilon in size.epsilons:
            ledger = self.out / f"budget_{epsilon}.json"  # one each: nothing of this is published
            private = ("--dp-epsilon", epsilon, "--dp-ledger", str(ledger), *size.private)
            self.flexolmo(
                f"private_{epsilon}", "train", "expert", "demo_private_expert", *own, *private
            )
        other = ("--data", "corpus:code", "--name", "code", *anchor, *size.other)
        self.flexolmo("code", "train", "expert", "demo_expert", *other)
        for name in self.experts():
            merged = self.out / f"merged_{name}"
            if not merged.exists():
                merge(self.anchor, [self.out / name, self.out / "code"], merged)
        proxies = self.out / "proxies"
        for name, source in ((OWNER, DATA), ("code", "corpus:code")):
            file = proxies / f"{name}.jsonl"
            if not file.exists():
                words = ["data", "proxies", "--data", source, "--public", "corpus:public"]
                command = [
                    sys.executable,
                    "-m",
                    "flexolmo_jax",
                    *words,
                    "--out",
                    str(file),
                ]
                subprocess.run(command, check=True)
        merged = str(self.out / "merged_plain")
        words = ("train", "router", "demo_router", "--model", merged, "--data", str(proxies))
        self.flexolmo("tuned", *words)

    def experts(self) -> dict[str, str]:
        """Folders of the owner's experts, and what they are called."""
        private = {f"private_{e}": f"epsilon {e}" for e in self.size.epsilons}
        return {"plain": "no privacy", **private}

    def extraction(self) -> dict[str, Any]:
        model = load(self.out / "merged_plain")
        protocol = Protocol().within(model.config.max_length)
        documents = trained_documents(model, DATA, HELDOUT, "text")
        passages = extraction.pick_passages(documents, self.size.prefixes, protocol, seed=0)

        def row(title: str, folder: str, **experts: Any) -> dict[str, Any]:
            path = self.out / folder
            model = load(path, anchor=self.anchor)
            described = {"model": read_manifest(path)["digest"], **experts}
            state = self.out / "extraction" / f"{title.replace(' ', '_')}.json"
            return as_json(
                extraction.extract(
                    model, passages, protocol, state, title=title, described=described, **experts
                )
            )

        rows = {"anchor": row("anchor", "anchor")}
        for name, called in self.experts().items():
            alone, within = f"expert alone, {called}", f"merged, {called}"
            rows[alone] = row(alone, name, only=[OWNER])
            rows[within] = row(within, f"merged_{name}")
        off = "merged, math switched off"
        rows[off] = row(off, "merged_plain", without=[OWNER])
        learned = control.control_documents(documents, protocol.length)
        few = extraction.pick_passages(
            learned, min(control.PASSAGES, control.MORE * len(learned)), protocol, seed=0
        )
        for title, what in CONTROLS.items():
            by_heart = control.train_control(
                what, self.anchor, learned, protocol.length, self.out / f"{what}.run"
            )
            state = self.out / "extraction" / f"control_{what}.json"
            made = extraction.extract(
                by_heart, few, protocol, state, title=title, described={"control": what}
            )
            rows[title] = as_json(made)
        return rows

    def membership(self) -> dict[str, Any]:
        return {
            called: run_membership(self.out / name, self.out / f"{name}.run", self.anchor)
            for name, called in self.experts().items()
        }

    def removal(self) -> dict[str, Any]:
        models = {"merged": "merged_plain", "merged, router tuned": "tuned"}
        return {
            called: run_removal(
                self.out / name, OWNER, self.out / "plain.run", DATA, prefixes=self.size.prefixes,
                heldout=HELDOUT,
            )
            for called, name in models.items()
        }  # fmt: skip


def interval(rate: dict[str, Any]) -> str:
    return f"{rate['rate']:.1%} ({rate['low']:.1%} to {rate['high']:.1%})"


def discoverable(audit: dict[str, Any], samples: int = 10, chance: float = 0.5) -> dict[str, Any]:
    """The rate of passages whose exact text some of n samples hold with probability p or more."""
    wanted = (samples, chance)
    (rate,) = (
        one["rate"] for one in audit["discoverable"] if (one["samples"], one["chance"]) == wanted
    )
    return rate


def extraction_page(rows: dict[str, Any], machine: str) -> list[str]:
    first = next(iter(rows.values()))
    protocol, speeds = first["protocol"], [r["attempts_per_second"] for r in rows.values()]
    hours = 10_000 * protocol["samples"] / min(speeds) / 3600
    lines = [
        f"`python flexolmo_jax/studies/privacy_audits.py OUT`, {machine}. {first['prefixes']} passages of "
        f"{first['documents']} documents of {DATA}, {first['attempts']} attempts a row "
        f"({protocol['prefix']} tokens are given, up to {protocol['length']} in all: what this "
        "small model was made for). Shares of passages, with exact 95% intervals. *Extracted*: the "
        "paper's criterion. *Continuation*: the same without credit for the prompt. *Greedily*: "
        "greedy decoding makes the very text. *Exact*: ten samples hold it with probability 1/2 or "
        "more. *Controls* have learned a few documents by heart, and are asked for those.",
        "",
        "| | passages | extracted | continuation | greedily | exact |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for title, row in rows.items():
        rates = (row["extracted"], row["continuation"], row["greedy"], discoverable(row))
        cells = " | ".join(map(interval, rates))
        lines.append(f"| {title} | {row['prefixes']} | {cells} |")
    lines += [
        "",
        f"{min(speeds):,.0f} to {max(speeds):,.0f} attempts a second: 10,000 passages take "
        f"{hours:.1f} hours at most. *Expert alone* is a dense model whose feed-forward networks "
        "were trained on the owner's text.",
    ]
    return lines


def membership_page(rows: dict[str, Any], canaries: int) -> list[str]:
    lines = [
        f"{2 * canaries} candidates for each expert, of which a coin put about half into the text. "
        "Scores are of the expert alone, as who holds the package can ask it. All with 95% "
        "intervals; the epsilon is a lower bound.",
        "",
        "| | certificate | put in, left out | AUC | found at 1% false alarms | at 0.1% | epsilon "
        "at least | verdict |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for title, found in rows.items():
        audit, said = found["audits"]["the expert alone"], found["certificate"]
        area, caught = audit["area"], [interval(one["members"]) for one in audit["caught"]]
        cells = [
            title, f"{said['epsilon']:.2f}" if said else "none",
            f"{audit['members']}, {audit['controls']}",
            f"{area['area']:.3f} ({area['low']:.3f} to {area['high']:.3f})", *caught,
            f"{audit['epsilon']:.2f}", found["verdict"],
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    best = next(iter(rows.values()))["audits"]["the expert alone"]["epsilon_at_most"]
    lines += [
        "",
        f"A perfect attack on so many canaries would show an epsilon of {best:.2f}: an audit of "
        "this size cannot refute a claim above that.",
    ]
    return lines


def removal_page(rows: dict[str, Any]) -> list[str]:
    lines = []
    for title, found in rows.items():
        lines += [f"{title} ({found['canaries']} canaries, {found['passages']} passages):", ""]
        lines += [*(f"- {line}" for line in found["lines"]), ""]
    return lines[:-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", choices=SIZES, default="ci")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    size = SIZES[args.size]
    study = Study(args.out, size)
    study.train()
    found = {
        "setting": dataclasses.asdict(size),
        "machine": machine(),
        "extraction": study.extraction(),
        "membership": study.membership(),
        "removal": study.removal(),
    }
    parts = {
        "audit extraction": extraction_page(found["extraction"], found["machine"]),
        "audit membership": membership_page(found["membership"], size.canaries),
        "audit removal": removal_page(found["removal"]),
    }
    if args.size == "smallest":
        print("\n\n".join("\n".join(lines) for lines in parts.values()))
        return
    here = json.dumps(found).replace(f"{args.out}/", "")  # where OUT lies is nobody's business
    save(DOCS / "privacy_audits.json", json.loads(here))
    for mark, lines in parts.items():
        write_part(mark, lines)


if __name__ == "__main__":
    main()
