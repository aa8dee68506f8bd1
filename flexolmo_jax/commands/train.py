"""What `flexolmo train` does and shows, stage by stage."""

import argparse
from pathlib import Path
from typing import Any

from flexolmo_jax.commands.privacy import privacy_asked_for, train_with_privacy
from flexolmo_jax.config import AnchorTraining, ExpertTraining, RouterTraining, Training
from flexolmo_jax.evaluation.bits_per_byte import heldout_documents, score
from flexolmo_jax.federation.package import MANIFEST
from flexolmo_jax.model import load
from flexolmo_jax.runtime.console import show_table, tell
from flexolmo_jax.runtime.processes import is_main_process
from flexolmo_jax.storage.outputs import check_training
from flexolmo_jax.training.stages.anchor import train_anchor
from flexolmo_jax.training.stages.expert import train_expert
from flexolmo_jax.training.stages.router import train_router


def anchor(args: argparse.Namespace, config: AnchorTraining) -> None:
    """Stage 1."""
    places = _places(args, config)
    train_anchor(config, **places)
    _show(places, {"anchor": (places["out"], None)}, config)


def expert(args: argparse.Namespace, config: ExpertTraining) -> None:
    """Stage 2, with differential privacy if that is asked for."""
    places = _places(args, config, args.anchor, args.public, ledger=args.dp_ledger)
    beside = Path(args.anchor)
    privacy = privacy_asked_for(args)
    more = {"anchor": beside, "name": args.name, "public": args.public, **places}
    more |= {"canaries": args.canaries, "separator": args.separator}
    if privacy is None:
        train_expert(config, **more)
    else:
        config = privacy.applied_to(config)
        train_with_privacy(config, privacy, args.dp_ledger, **more)
    models = {"anchor": (beside, None), f"with {args.name}": (places["out"], beside)}
    _show(places, models, config, args.separator)


def router(args: argparse.Namespace, config: RouterTraining) -> None:
    """Stage 3."""
    places = _places(args, config, args.model)
    model = Path(args.model)
    train_router(config, model=model, **places)
    _show(places, {"merged": (model, None), "tuned": (places["out"], None)}, config)


def _show(
    places: dict[str, Any],
    models: dict[str, tuple],
    config: Training,
    separator: str | None = None,
) -> None:
    """The result in a table: what it says of documents that no training saw."""
    if not is_main_process():
        return
    data = config.data
    heldout = heldout_documents(places["data"], data)
    if heldout:
        rows, reason = [], ""
        for name, (path, anchor) in models.items():
            model = load(path, anchor=anchor, separator=separator)
            try:
                value = f"{score(model, heldout, length=data.length).bits_per_byte:.3f}"
            except ValueError as error:  # the result is written; this is only what it is worth
                value, reason = "not scored", str(error)
            rows.append({"model": name, "bits per byte": value})
        show_table(rows, title=f"{len(heldout)} held-out documents")
        if reason:
            tell(f"not scored: {reason}")
    tell(f"wrote {places['out']}; metrics and loss.png are in {places['run']}")


def _places(
    args: argparse.Namespace, config: Training, *reads: str | None, ledger: str | None = None
) -> dict[str, Any]:
    """Where a stage reads and writes. Raises ValueError if it could not, before any work."""
    out = Path(args.out)
    source = args.source or config.data.source
    if source is None:
        raise ValueError("no text to train on: name it with --data")
    finished = args.resume and (out / MANIFEST).exists()  # `check_run` says whether it is this one
    run = Path(args.run) if args.run else out.absolute().with_name(out.absolute().name + ".run")
    known = [source, *(one for one in reads if one is not None)]
    if not finished:
        check_training(out, run, known, ledger=ledger, profile=args.profile)
    return {"data": source, "out": out, "run": run, "resume": args.resume}
