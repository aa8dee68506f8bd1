"""The command `flexolmo`: parses, calls, prints. Errors are one line and exit code 2."""

import argparse
import contextlib
import errno
import io
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flexolmo_jax.commands.arguments import make_parser
from flexolmo_jax.commands.parser import UsageError, check_text, check_texts, did_you_mean, parse
from flexolmo_jax.runtime.console import (
    print_json,
    show_fields,
    show_table,
    silence_progress,
    tell,
    visible,
)
from flexolmo_jax.runtime.endings import AlreadyDone, Interrupted
from flexolmo_jax.runtime.startup import (
    end_at_second_interrupt,
    keep_freed_memory,
    leave_libtpu_alone,
    use_large_pages,
)

INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code.

    They are in `arguments.EXIT_CODES`.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        args, rest = parse(make_parser(), [word for word in words if word != "--debug"])
        if rest and args.command not in ("train", "plan", "study"):
            meant = did_you_mean(rest[0].partition("=")[0], args.parser.options())
            more = f"{meant}; see {args.parser.prog} --help"
            raise UsageError(f"unknown argument {rest[0]}{more}")
    except UsageError as error:
        print(f"flexolmo: error: {visible(error)}", file=sys.stderr)
        return 2
    args.debug = "--debug" in words
    leave_libtpu_alone()
    if args.command in ("train", "study"):
        if arguments is None:
            use_large_pages()
        keep_freed_memory()
    args.overrides = rest
    warnings.showwarning = _show_warning
    sys.excepthook = _show_uncaught
    try:
        check_texts(args)
        if args.command == "train":
            _join(args)
        if arguments is None:
            end_at_second_interrupt()
        with _profile(getattr(args, "profile", None)):
            COMMANDS[args.run_command](args)
    except KeyboardInterrupt:
        goes_on = ", and --resume goes on from it" if args.command in ("train", "study") else ""
        print(f"flexolmo: interrupted; what was saved stays{goes_on}", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if isinstance(error, Interrupted):
            print(f"flexolmo: {visible(error)}", file=sys.stderr)
            return INTERRUPTED if error.by_user else 0
        if isinstance(error, AlreadyDone):
            tell(str(error))
            return 0
        if args.debug:
            traceback.print_exc()
        else:
            print(f"flexolmo: error: {visible(_one_line(error))}", file=sys.stderr)
        if args.command == "train":
            _leave_the_others()
        return 2
    return 0


def _profile(folder: str | None) -> contextlib.AbstractContextManager:
    """Writes a trace of the command to a folder, if one is given."""
    if folder is None:
        return contextlib.nullcontext()
    import jax

    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # Python's own calls would fill the trace
    return jax.profiler.trace(folder, profiler_options=options)


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    if category is UserWarning:  # ours to the user; others are for developers
        print(f"flexolmo: warning: {visible(message)}", file=sys.stderr)


def _show_uncaught(kind, error, trace) -> None:
    """All but what TensorStore's threads say where a write has failed, and was told already."""
    if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
        sys.__excepthook__(kind, error, trace)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    if text.startswith("Not enough disk space"):  # of TFDS, with sizes that it does not know
        text = os.strerror(errno.ENOSPC)
    for number, what in ((errno.ENOSPC, "the disk is full"), (errno.EDQUOT, "a quota is used up")):
        if os.strerror(number) in text:
            return (
                f"{what} ({os.strerror(number).lower()}): make room, and run it again; a training "
                "goes on with --resume"
            )
    if not isinstance(error, (ValueError, OSError, FloatingPointError)) and len(text) > 300:
        text = text[:300] + " ..."
    known = (ValueError, OSError, FloatingPointError, RuntimeError)
    return text if isinstance(error, known) else f"{type(error).__name__}: {text}"


def _config(args: argparse.Namespace, kind: type, folder: str = "") -> Any:
    """The config file's values, with what the command line changes; ours are in CONFIGS/folder."""
    import tyro

    from flexolmo_jax.config import CONFIGS, load_config

    config = load_config(args.config, kind, CONFIGS / folder)
    stage = getattr(args, "stage", None)
    prog = " ".join(filter(None, ("flexolmo", args.command, stage, args.config)))
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(type(config), prog=prog, default=config, args=args.overrides)
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
    framed = (line.strip("│╭╮╰╯─ ") for line in said.getvalue().splitlines())
    message = " ".join(" ".join(framed).split())
    message = message.split(" For full helptext")[0].removeprefix("Unrecognized options ")
    message = message.replace(" Perhaps you meant: ", "; did you mean ")
    if message.startswith("Unrecognized") and "; did you mean" not in message:
        for word in args.overrides:  # perhaps an option of the command, not of the config
            if word.startswith("--"):
                message += did_you_mean(word.partition("=")[0], args.parser.options())
    raise ValueError(message or "a value of the config is wrong")


def _demo(args: argparse.Namespace) -> None:
    from flexolmo_jax.studies.demo import run_demo

    run_demo(Path(args.out), args.seed)


def _join(args: argparse.Namespace) -> None:
    """Joins the other processes, if there are any; only the first one prints."""
    explicit = (args.coordinator, args.processes, args.process)
    if not args.distributed and explicit == (None, None, None):
        return
    from flexolmo_jax.runtime import processes

    processes.start(*explicit, wait=args.wait)
    if not processes.is_main_process():
        silence_progress()


def _leave_the_others() -> None:
    """Ends this process at once if it is one of several; a tidy end would wait for them."""
    import jax

    if jax.distributed.is_initialized():
        sys.stderr.flush()
        os._exit(2)  # the others are told so by JAX, and end too


def _train_anchor(args: argparse.Namespace) -> None:
    from flexolmo_jax.commands import train
    from flexolmo_jax.config import AnchorTraining

    train.anchor(args, _config(args, AnchorTraining))


def _train_expert(args: argparse.Namespace) -> None:
    from flexolmo_jax.commands import train
    from flexolmo_jax.config import ExpertTraining

    train.expert(args, _config(args, ExpertTraining))


def _train_router(args: argparse.Namespace) -> None:
    from flexolmo_jax.commands import train
    from flexolmo_jax.config import RouterTraining

    train.router(args, _config(args, RouterTraining))


def _plan(args: argparse.Namespace) -> None:
    from flexolmo_jax.config import Training
    from flexolmo_jax.planning.plan import make_plan, model_of, stage_of

    config = _config(args, Training)
    stage = stage_of(config, args.stage)
    plan = make_plan(config, model_of(args.config, config), stage, args.topology)
    if args.json:
        print_json(plan.values())
        return
    title = f"{args.config}: {stage} on {args.topology}, of one chip"
    show_fields(dict(plan.rows()), title)


def _privacy_verify(args: argparse.Namespace) -> None:
    from flexolmo_jax.commands.privacy import verify

    verify(Path(args.package), args.json)


def _privacy_budget(args: argparse.Namespace) -> None:
    from flexolmo_jax.commands.privacy import budget

    budget(Path(args.ledger), args.json)


def _audit_extraction(args: argparse.Namespace) -> None:
    from flexolmo_jax.commands.audit import audit_extraction

    audit_extraction(args)


def _audit_membership(args: argparse.Namespace) -> None:
    from flexolmo_jax.commands.audit import audit_membership

    audit_membership(args)


def _audit_removal(args: argparse.Namespace) -> None:
    from flexolmo_jax.commands.audit import audit_removal

    audit_removal(args)


def _audit_twin(args: argparse.Namespace) -> None:
    from flexolmo_jax.studies.selftest import check_twin, run_twin

    anchor = args.anchor and Path(args.anchor)
    report = run_twin(Path(args.out), anchor, args.dp_epsilon, quiet=args.json)
    if args.json:
        print_json(report)
    check_twin(report)


def _merge(args: argparse.Namespace) -> None:
    from flexolmo_jax.commands.summary import show_shares
    from flexolmo_jax.federation.merge import merge

    memory = args.memory and tuple(args.memory)
    shares = merge(
        args.anchor, args.experts, args.out, active_experts=args.active, memory=memory,
        separator=args.separator, allow_share=args.allow_share,
    )  # fmt: skip
    remembering = f"router memory {memory[0]:g} {memory[1]:g}" if memory else "no router memory"
    tell(f"wrote {args.out}: public + {len(args.experts)} experts, {remembering}")
    show_shares(shares)


def _experts_list(args: argparse.Namespace) -> None:
    from flexolmo_jax.commands.summary import expert_rows, show_experts

    if args.json:
        print_json(expert_rows(Path(args.model)))
    else:
        show_experts(Path(args.model))


def _experts_add(args: argparse.Namespace) -> None:
    from flexolmo_jax.commands.summary import show_shares
    from flexolmo_jax.federation.merge import add_expert

    added = add_expert(args.model, *args.packages, allow_share=args.allow_share)
    _tell_undone(added.undone)
    show_shares(added.shares)


def _experts_remove(args: argparse.Namespace) -> None:
    from flexolmo_jax.federation.merge import remove_expert

    _tell_undone(remove_expert(args.model, *args.names))


def _tell_undone(undone: bool) -> None:
    if undone:
        tell(
            "the router had been tuned with the old set of experts: it is back to the owners' own "
            "rows; run `flexolmo train router` again if you want it tuned"
        )


def _inspect(args: argparse.Namespace) -> None:
    from flexolmo_jax.commands.summary import show_package, show_shares
    from flexolmo_jax.federation.merged import check_merged, check_package, shares_of
    from flexolmo_jax.federation.package import read_manifest

    path, shares = Path(args.path), None
    if is_merged := read_manifest(path)["kind"] == "merged":
        opened = check_merged(path)
        manifest, shares = dict(opened.manifest), shares_of(opened)
    else:
        manifest = check_package(path)
    if args.json:
        described = {"tensors": manifest.pop("tensors", {}), "files": manifest.pop("files")}
        found = {"shares": shares and shares.rows()} if is_merged else {}
        print_json({**manifest, **described, **found})
        return
    show_package(path, manifest)
    if is_merged and manifest["experts"]:
        show_shares(shares)


def _named_sources(pairs: Sequence[str]) -> dict[str, str]:
    sources: dict[str, str] = {}
    for pair in pairs:
        name, equals, source = pair.partition("=")
        if not equals or not name or not source:
            raise ValueError(f"--data {pair}: expected NAME=SOURCE")
        if name in sources:
            raise ValueError(
                f"--data {pair}: the name {name!r} is given twice, first to {sources[name]}; give "
                "each text a name of its own"
            )
        check_text("--data", name)
        sources[name] = source
    return sources


def _evaluate(args: argparse.Namespace) -> None:
    for option, goes_with in (
        ("heldout", "data"), ("group_field", "data"), ("task_data", "harness"),
        ("limit", "harness"), ("shots", "harness"), ("download", "harness"),
        ("run_code", "harness"),
    ):  # fmt: skip
        if getattr(args, option) not in (None, False) and getattr(args, goes_with) is None:
            raise ValueError(f"--{option.replace('_', '-')} is for --{goes_with}; leave it out")
    if args.harness is not None:
        from flexolmo_jax.commands.evaluate_tasks import evaluate_harness

        evaluate_harness(args)
        return
    from flexolmo_jax.data.sources import Report
    from flexolmo_jax.evaluation.bits_per_byte import bits_per_byte
    from flexolmo_jax.evaluation.split import GROUP_FIELD, chosen_split
    from flexolmo_jax.model import load

    sources = _named_sources(args.data)
    model = load(args.model, anchor=args.anchor, dtype=args.dtype, separator=args.separator)
    splits = {
        name: chosen_split(args.model, name, args.heldout, args.group_field, anchor=args.anchor)
        for name in sources
    }
    rows = []
    for name, source in sources.items():
        report, split = Report(), splits[name]
        found = bits_per_byte(
            model, source, without=args.without, only=args.only, text_field=args.text_field,
            heldout=split and split.share, group_field=split.group_field if split else GROUP_FIELD,
            report=report,
        )  # fmt: skip
        report.tell()
        rows.append({"data": name, **found._asdict(), "bad_rows": len(report.bad_rows)})
    if args.json:
        print_json(rows)
        return
    show_table([{**row, "bits_per_byte": f"{row['bits_per_byte']:.4f}"} for row in rows])


def _study(args: argparse.Namespace) -> None:
    from flexolmo_jax.studies.baselines.config import StudyConfig
    from flexolmo_jax.studies.baselines.run import run_study

    config = _config(args, StudyConfig, "study")
    run_study(config, Path(args.out), args.seeds, args.resume)
    tell(f"wrote {args.out}/report.md, report.json and pictures")


def _generate(args: argparse.Namespace) -> None:
    from flexolmo_jax.model import load

    model = load(args.model, anchor=args.anchor, dtype=args.dtype, separator=args.separator)
    options = {name: getattr(args, name) for name in ("without", "only", "temperature", "seed")}
    options |= {"top_k": args.top_k, "top_p": args.top_p}
    if len(args.prompt) == 1 and not args.json:
        pieces = model.stream(args.prompt[0], args.max_new_tokens, **options)
        first = next(pieces, "")  # a wrong option shows before any output
        print(args.prompt[0], first, sep="", end="", flush=True)
        for piece in pieces:
            print(piece, end="", flush=True)
        print()
        return
    made = model.generate(args.prompt, args.max_new_tokens, **options)
    if args.json:
        rows = [{"prompt": p, "continuation": c} for p, c in zip(args.prompt, made, strict=True)]
        print_json(rows)
        return
    for prompt, continuation in zip(args.prompt, made, strict=True):
        print(f"{prompt}{continuation}")


def _data_fetch(args: argparse.Namespace) -> None:
    from flexolmo_jax.corpora.packages import fetch

    card = fetch(args.folder)
    show_table(
        [
            {"domain": name, "documents": entry["documents"], "bytes": entry["bytes"]}
            for name, entry in card["domains"].items()
        ]
    )


def _data_flexmix(args: argparse.Namespace) -> None:
    from flexolmo_jax.corpora.flexmix import make_flexmix

    card = make_flexmix(Path(args.fetched), Path(args.out))
    rows = [
        {
            "domain": name,
            **{f"{split} bytes": one["bytes"] for split, one in entry["splits"].items()},
            "near-duplicates": entry["near_duplicates"],
        }
        for name, entry in card["domains"].items()
    ]
    show_table(rows)
    tell(f"{args.out}/card.md says what is in it")


def _data_tasks(args: argparse.Namespace) -> None:
    from flexolmo_jax.corpora.tasks import fetch_task_data

    found = fetch_task_data(args.folder)
    show_table([{"task": name, "documents": count} for name, count in found.items()])


def _data_proxies(args: argparse.Namespace) -> None:
    from flexolmo_jax.data.proxies import pick_proxies

    picked = pick_proxies(args.source, args.public, Path(args.out), share=args.share)
    tell(
        f"wrote {args.out}: {picked.documents} of {picked.of_public} public documents; the "
        f"classifier tells yours from public ones with {picked.accuracy:.0%} accuracy"
    )


COMMANDS = {
    "demo": _demo,
    "train anchor": _train_anchor,
    "train expert": _train_expert,
    "train router": _train_router,
    "plan": _plan,
    "privacy verify": _privacy_verify,
    "privacy budget": _privacy_budget,
    "audit extraction": _audit_extraction,
    "audit membership": _audit_membership,
    "audit removal": _audit_removal,
    "audit twin": _audit_twin,
    "merge": _merge,
    "experts list": _experts_list,
    "experts add": _experts_add,
    "experts remove": _experts_remove,
    "inspect": _inspect,
    "evaluate": _evaluate,
    "study": _study,
    "generate": _generate,
    "data fetch": _data_fetch,
    "data flexmix": _data_flexmix,
    "data tasks": _data_tasks,
    "data proxies": _data_proxies,
}
