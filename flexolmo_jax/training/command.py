"""What `flexolmo train` does and shows, stage by stage."""

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from flexolmo_jax.config import AnchorTraining, ExpertTraining, RouterTraining, Training
from flexolmo_jax.distributed import is_first
from flexolmo_jax.evaluation.domains import heldout_documents, score
from flexolmo_jax.federation.package import MANIFEST
from flexolmo_jax.model import load
from flexolmo_jax.privacy.command import privacy_asked_for, train_with_privacy
from flexolmo_jax.training.anchor import train_anchor
from flexolmo_jax.training.expert import train_expert
from flexolmo_jax.training.router_tuning import train_router

console = Console()


def anchor(args: argparse.Namespace, config: AnchorTraining) -> None:
    """Stage 1."""
    places = _places(args, config)
    train_anchor(config, **places)
    _show(places, {"anchor": (places["out"], None)}, config)


def expert(args: argparse.Namespace, config: ExpertTraining) -> None:
    """Stage 2, with differential privacy if that is asked for."""
    places = _places(args, config)
    beside = Path(args.anchor)
    privacy = privacy_asked_for(args)
    more = {"anchor": beside, "name": args.name, "public": args.public, **places}
    more["canaries"] = args.canaries
    if privacy is None:
        train_expert(config, **more)
    else:
        config = privacy.applied_to(config)
        train_with_privacy(config, privacy, args.dp_ledger, **more)
    _show(places, {"anchor": (beside, None), f"with {args.name}": (places["out"], beside)}, config)


def router(args: argparse.Namespace, config: RouterTraining) -> None:
    """Stage 3."""
    places = _places(args, config)
    model = Path(args.model)
    train_router(config, model=model, **places)
    _show(places, {"merged": (model, None), "tuned": (places["out"], None)}, config)


def _show(places: dict[str, Any], models: dict[str, tuple], config: Training) -> None:
    """The result in a table: what it says of documents that no training saw."""
    if not is_first():
        return
    data = config.data
    heldout = heldout_documents(places["data"], data)
    if heldout:
        table = Table(title=f"{len(heldout)} held-out documents")
        table.add_column("model")
        table.add_column("bits per byte", justify="right")
        for name, (path, anchor) in models.items():
            value = score(load(path, anchor=anchor), heldout, length=data.length).bits_per_byte
            table.add_row(name, f"{value:.3f}")
        console.print(table)
    where = f"wrote {places['out']}; metrics and loss.png are in {places['run']}"
    console.print(where, markup=False, soft_wrap=True)


def _places(args: argparse.Namespace, config: Training) -> dict[str, Any]:
    """Where a stage reads and writes. Raises ValueError if it could not, before any work."""
    out = Path(args.out)
    source = args.source or config.data.source
    if source is None:
        raise ValueError("no text to train on: name it with --data")
    finished = args.resume and (out / MANIFEST).exists()  # `check_run` says whether it is this one
    if out.exists() and not finished and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: already there; choose another --out, or take it away first")
    run = Path(args.run) if args.run else out.absolute().with_name(out.absolute().name + ".run")
    return {"data": source, "out": out, "run": run, "resume": args.resume}
