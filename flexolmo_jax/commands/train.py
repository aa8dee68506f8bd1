"""`flexolmo train`: trains an anchor, an expert, or a router, and scores it on held-out text."""

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexolmo_jax.commands.config_options import add_config, read_config
from flexolmo_jax.commands.parser import Commands, Parser
from flexolmo_jax.commands.shared_arguments import SOURCE, add_processes, add_profile, add_separator
from flexolmo_jax.runtime.console import show_fields, show_table, tell

if TYPE_CHECKING:
    from flexolmo_jax.config import PrivacyConfig, Training

DP_OPTIONS: dict[str, tuple[type, str, str]] = {  # field of PrivacyConfig: type, metavar, help
    "epsilon": (float, "E", "privacy budget of this run; makes the training private"),
    "delta": (float, "D", "default: the ledger's, or 0.1 / number of units, at most 1e-5"),
    "clip": (
        float, "C", "maximum L2 norm of a unit's gradient; most should exceed it (default: 0.1)"
    ),
    "unit": (
        str, "UNIT", "unit of privacy: document (default), group:FIELD of the rows (a patient, an "
        "author), or sequence (one window of tokens)"
    ),
    "windows": (
        int, "W", "maximum windows per unit and step; longer units are subsampled (default: 8)"
    ),
    "microbatch_size": (
        int, "N", "units whose gradients a device holds at a time; fewer need less memory "
        "(default: 8)"
    ),
    "limit": (
        float, "E", "limit of epsilon for all runs in the ledger together; a run that would exceed "
        "it does not start (default: the ledger's, or the first run's budget)"
    ),
}  # fmt: skip


def add_to(commands: Commands) -> None:
    stages = commands.group("train", "train an anchor, an expert, or a router", dest="stage")
    parser = stages.add("anchor", anchor, "stage 1: the public model, on public text", trains=True)
    _add_shared(parser)

    parser = stages.add(
        "expert", expert, "stage 2: your expert, on your text, beside a frozen anchor", trains=True
    )
    _add_shared(parser)
    parser.add_argument("--anchor", required=True, metavar="DIR", help="the frozen anchor")
    parser.add_argument("--name", required=True, help="the expert's name")
    parser.add_argument(
        "--public", metavar="SOURCE", help="public text for the router rows (default: the anchor's)"
    )
    parser.add_argument(
        "--rank",
        type=int,
        metavar="R",
        help="train deltas of this rank to the public feed-forward matrices, and write them as the "
        "package (default: the config's ffn_rank; 0 is a full expert)",
    )
    add_separator(parser)
    _add_privacy(parser)

    parser = stages.add(
        "evidence", evidence, "a public evidence head for an anchor without one", trains=True
    )
    _add_shared(parser)
    parser.add_argument("--anchor", required=True, metavar="DIR", help="the anchor")
    add_separator(parser)

    parser = stages.add(
        "router", router, "stage 3, optional: a merged model's router rows, on proxies", trains=True
    )
    _add_shared(parser)
    parser.add_argument("--model", required=True, metavar="DIR", help="a merged model")


def _add_shared(parser: Parser) -> None:
    """The arguments of all stages."""
    add_config(parser, "a Python file that sets `config`, or the name of a bundled config")
    parser.add_argument(
        "--data",
        metavar="SOURCE",
        dest="source",
        help=f"the text: {SOURCE}; skipped files are listed",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the result")
    parser.add_argument(
        "--run",
        metavar="DIR",
        help="windows, checkpoints, metrics; keep it private (default: OUT.run)",
    )
    parser.add_argument("--resume", action="store_true", help="continue a run that was stopped")
    add_profile(parser)
    add_processes(parser)


def _add_privacy(parser: Parser) -> None:
    parser.add_argument(
        "--canaries",
        type=int,
        default=0,
        metavar="N",
        help="draw 2N artificial documents and include each with probability 1/2, for `flexolmo "
        "audit`; the run folder records which ones are included",
    )
    group = parser.add_argument_group(
        "differential privacy",
        "Only the budget is required; the noise is calibrated to it. The config's data.batch-size "
        "is then the mean number of units in a batch; choose it large, as the noise does not grow "
        "with it.",
    )
    for name, (kind, metavar, text) in DP_OPTIONS.items():
        group.add_argument(f"--dp-{name.replace('_', '-')}", type=kind, metavar=metavar, help=text)
    group.add_argument(
        "--dp-ledger",
        metavar="FILE",
        help="the ledger of all runs on this text (default: budget.json beside the run folder)",
    )


def anchor(args: argparse.Namespace) -> None:
    from flexolmo_jax.config import AnchorTraining
    from flexolmo_jax.training.stages.anchor import train_anchor

    config = read_config(args, AnchorTraining)
    places = _places(args, config)
    train_anchor(config, **places)
    _show_scores(places, {"anchor": (places["out"], None)}, config)


def expert(args: argparse.Namespace) -> None:
    from flexolmo_jax.config import ExpertTraining
    from flexolmo_jax.training.stages.expert import train_expert

    config = read_config(args, ExpertTraining)
    if args.rank is not None:
        config = dataclasses.replace(config, ffn_rank=args.rank)
    places = _places(args, config, args.anchor, args.public, ledger=args.dp_ledger)
    anchor = Path(args.anchor)
    options = {"anchor": anchor, "name": args.name, "public": args.public, **places}
    options |= {"canaries": args.canaries, "separator": args.separator}
    privacy = _privacy(args)
    if privacy is None:
        train_expert(config, **options)
    else:
        config = privacy.applied_to(config)
        _train_private_expert(args, config, privacy, options)
    models = {"anchor": (anchor, None), f"with {args.name}": (places["out"], anchor)}
    _show_scores(places, models, config, args.separator)


def evidence(args: argparse.Namespace) -> None:
    from flexolmo_jax.config import EvidenceTraining
    from flexolmo_jax.training.stages.evidence import train_evidence

    config = read_config(args, EvidenceTraining)
    places = _places(args, config, args.anchor)
    train_evidence(config, anchor=Path(args.anchor), separator=args.separator, **places)
    tell(f"wrote {args.out}: the anchor with a public evidence head")


def router(args: argparse.Namespace) -> None:
    from flexolmo_jax.config import RouterTraining
    from flexolmo_jax.training.stages.router import train_router

    config = read_config(args, RouterTraining)
    places = _places(args, config, args.model)
    model = Path(args.model)
    train_router(config, model=model, **places)
    _show_scores(places, {"merged": (model, None), "tuned": (places["out"], None)}, config)


def _places(
    args: argparse.Namespace, config: "Training", *reads: str | None, ledger: str | None = None
) -> dict[str, Any]:
    """The paths that a stage reads and writes.

    Raises:
      ValueError: it could not write there; raised before any work.
    """
    from flexolmo_jax.federation.package import MANIFEST
    from flexolmo_jax.storage.outputs import check_training

    out = Path(args.out)
    source = args.source or config.data.source
    if source is None:
        raise ValueError("no text to train on: name it with --data")
    finished = args.resume and (out / MANIFEST).exists()  # `check_run` compares it with this run
    run = Path(args.run) if args.run else out.absolute().with_name(out.absolute().name + ".run")
    known = [source, *(path for path in reads if path is not None)]
    if not finished:
        check_training(out, run, known, ledger=ledger, profile=args.profile)
    return {"data": source, "out": out, "run": run, "resume": args.resume}


def _privacy(args: argparse.Namespace) -> "PrivacyConfig | None":
    """The --dp options; None without --dp-epsilon.

    Raises:
      ValueError: another --dp option is given without it, or one is out of range.
    """
    from flexolmo_jax.config import PrivacyConfig

    values = {name: getattr(args, f"dp_{name}") for name in DP_OPTIONS}
    given = {name: value for name, value in values.items() if value is not None}
    if args.dp_epsilon is not None:
        return PrivacyConfig(**given)
    names = [f"--dp-{name.replace('_', '-')}" for name in given]
    names += ["--dp-ledger"] * (args.dp_ledger is not None)
    if names:
        raise ValueError(f"{names[0]} without --dp-epsilon, which states the budget; add it")
    return None


def _train_private_expert(
    args: argparse.Namespace, config: Any, privacy: "PrivacyConfig", options: dict[str, Any]
) -> None:
    """Trains with differential privacy, and prints the certificate."""
    from flexolmo_jax.audits.certificate import certificate_fields
    from flexolmo_jax.federation.package import read_manifest
    from flexolmo_jax.privacy.ledger import FILE
    from flexolmo_jax.runtime.processes import is_main_process
    from flexolmo_jax.training.private.expert import train_private_expert

    file = Path(args.dp_ledger) if args.dp_ledger else options["run"].absolute().parent / FILE
    train_private_expert(config, privacy, ledger=file, **options)
    if is_main_process():
        certificate = read_manifest(options["out"])["privacy"]
        show_fields(certificate_fields(certificate), f"{args.name}: privacy")
        tell(
            f"the ledger is {file}; the scores on held-out documents below are for you only: the "
            "certificate does not cover them"
        )


def _show_scores(
    places: dict[str, Any],
    models: dict[str, tuple[Path, Path | None]],
    config: "Training",
    separator: str | None = None,
) -> None:
    """Prints bits per byte of documents that training held out."""
    from flexolmo_jax.evaluation.bits_per_byte import heldout_documents, score
    from flexolmo_jax.model import load
    from flexolmo_jax.runtime.processes import is_main_process

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
            except ValueError as error:  # the result is written; only its score is missing
                value, reason = "not scored", str(error)
            rows.append({"model": name, "bits per byte": value})
        show_table(rows, title=f"{len(heldout)} held-out documents")
        if reason:
            tell(f"not scored: {reason}")
    tell(f"wrote {places['out']}; metrics and loss.png are in {places['run']}")
