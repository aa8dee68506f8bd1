"""The command `flexolmo`: parses, calls, prints. Errors are one line and exit code 2."""

import argparse
import contextlib
import io
import json
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from flexolmo_jax.arguments import make_parser
from flexolmo_jax.json_output import print_json
from flexolmo_jax.process import keep_freed_memory, leave_libtpu_alone, use_large_pages

if TYPE_CHECKING:
    from flexolmo_jax.federation.shares import Shares

console = Console()
INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code.

    0 when all went well, also when training was asked to stop and saved its state; 2 after an
    error; 130 when interrupted with nothing saved.
    """
    parser = make_parser()
    words = list(sys.argv[1:] if arguments is None else arguments)
    args, rest = parser.parse_known_args([word for word in words if word != "--debug"])
    args.debug = "--debug" in words
    leave_libtpu_alone()
    if args.command in ("train", "study"):
        if arguments is None:
            use_large_pages()
        keep_freed_memory()
    if rest and args.command not in ("train", "plan", "study"):
        parser.error(f"unknown argument {rest[0]}; see flexolmo {args.command} --help")
    args.overrides = rest
    warnings.showwarning = _show_warning
    try:
        if args.command == "train" and args.resume and (Path(args.out) / "manifest.json").exists():
            console.print(f"{args.out}: already done", markup=False, soft_wrap=True)
        else:
            if args.command == "train":
                _join(args)
            with _profile(getattr(args, "profile", None)):
                COMMANDS[args.run_command](args)
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        from flexolmo_jax.training.loop import Interrupted

        if isinstance(error, Interrupted):
            print(f"flexolmo: {error}", file=sys.stderr)
            return 0
        if args.debug:
            traceback.print_exc()
        else:
            print(f"flexolmo: error: {_one_line(error)}", file=sys.stderr)
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
        print(f"flexolmo: warning: {message}", file=sys.stderr)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    if "No space left on device" in text:
        return "the disk is full (no space left on device): make room, and run it again"
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
    raise ValueError(message.split(" For full helptext")[0] or "a value of the config is wrong")


def _demo(args: argparse.Namespace) -> None:
    from flexolmo_jax.demo import run_demo

    run_demo(Path(args.out), args.seed)


def _join(args: argparse.Namespace) -> None:
    """Joins the other processes, if there are any; only the first one prints."""
    explicit = (args.coordinator, args.processes, args.process)
    if not args.distributed and explicit == (None, None, None):
        return
    from flexolmo_jax import distributed
    from flexolmo_jax.training import loop

    distributed.start(*explicit, wait=args.wait)
    loop.console.quiet = not distributed.is_first()


def _leave_the_others() -> None:
    """Ends this process at once if it is one of several; a tidy end would wait for them."""
    import jax

    if jax.distributed.is_initialized():
        sys.stderr.flush()
        os._exit(2)  # the others are told so by JAX, and end too


def _train_anchor(args: argparse.Namespace) -> None:
    from flexolmo_jax.config import AnchorTraining
    from flexolmo_jax.training import command

    command.anchor(args, _config(args, AnchorTraining))


def _train_expert(args: argparse.Namespace) -> None:
    from flexolmo_jax.config import ExpertTraining
    from flexolmo_jax.training import command

    command.expert(args, _config(args, ExpertTraining))


def _train_router(args: argparse.Namespace) -> None:
    from flexolmo_jax.config import RouterTraining
    from flexolmo_jax.training import command

    command.router(args, _config(args, RouterTraining))


def _plan(args: argparse.Namespace) -> None:
    from flexolmo_jax.config import Training
    from flexolmo_jax.planning.plan import make_plan, model_of, stage_of

    config = _config(args, Training)
    stage = stage_of(config, args.stage)
    plan = make_plan(config, model_of(args.config, config), stage, args.topology)
    if args.json:
        print_json(plan.values())
        return
    table = Table("of one chip", "", title=f"{args.config}: {stage} on {args.topology}")
    for row in plan.rows():
        table.add_row(*row)
    console.print(table)


def _privacy_verify(args: argparse.Namespace) -> None:
    from flexolmo_jax.privacy.command import verify

    verify(Path(args.package), args.json)


def _privacy_budget(args: argparse.Namespace) -> None:
    from flexolmo_jax.privacy.command import budget

    budget(Path(args.ledger), args.json)


def _audit_extraction(args: argparse.Namespace) -> None:
    from flexolmo_jax.privacy.audit_command import audit_extraction

    audit_extraction(args)


def _audit_membership(args: argparse.Namespace) -> None:
    from flexolmo_jax.privacy.audit_command import audit_membership

    audit_membership(args)


def _audit_removal(args: argparse.Namespace) -> None:
    from flexolmo_jax.privacy.audit_command import audit_removal

    audit_removal(args)


def _audit_twin(args: argparse.Namespace) -> None:
    from flexolmo_jax.twin import check_twin, run_twin

    anchor = args.anchor and Path(args.anchor)
    report = run_twin(Path(args.out), anchor, args.dp_epsilon, quiet=args.json)
    if args.json:
        print_json(report)
    check_twin(report)


def _merge(args: argparse.Namespace) -> None:
    from flexolmo_jax.federation.merge import merge

    memory = args.memory and tuple(args.memory)
    shares = merge(
        args.anchor, args.experts, args.out, active_experts=args.active, memory=memory,
        allow_share=args.allow_share,
    )  # fmt: skip
    remembering = f"router memory {memory[0]:g} {memory[1]:g}" if memory else "no router memory"
    console.print(
        f"wrote {args.out}: public + {len(args.experts)} experts, {remembering}",
        markup=False,
        soft_wrap=True,
    )
    _tell_shares(shares)


def _tell_shares(shares: "Shares | None") -> None:
    """What each expert takes of the anchor's public text, layer by layer."""
    if shares is None:
        console.print(
            "no public text came with the anchor, so nothing is known of the share of it that each "
            "expert would take"
        )
        return
    layers = [str(number) for number in range(len(shares.of_layers))]
    table = Table(
        "expert", "mean", *(f"layer {number}" for number in layers[:8]),
        *(["largest"] if layers[8:] else []),
        title=f"shares of {shares.tokens:,} tokens of the anchor's public text",
    )  # fmt: skip
    for row in shares.rows():
        more = [row["largest"]] if layers[8:] else []
        table.add_row(
            row["expert"], *(f"{x:.1%}" for x in (row["mean"], *row["layers"][:8], *more))
        )
    console.print(table)


def _experts_list(args: argparse.Namespace) -> None:
    from flexolmo_jax.federation.merge import open_part
    from flexolmo_jax.federation.package import privacy_summary, read_manifest

    model = Path(args.model)
    rows = []
    for entry in read_manifest(model, kind="merged")["experts"]:
        about = open_part(model, entry).manifest
        rows.append(
            {
                "name": entry["name"],
                "path": str(model / entry["path"]),
                **{key: about.get(key) for key in ("tokens_seen", "licence", "contact", "privacy")},
            }
        )
    if not args.json:
        rows = [{**row, "privacy": privacy_summary(row["privacy"])} for row in rows]
    _show_rows(rows, args.json)


def _show_rows(rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print_json(rows)
        return
    table = Table(*(rows[0] if rows else ["no experts"]))
    for row in rows:
        table.add_row(*(f"{v:,}" if isinstance(v, int) else str(v) for v in row.values()))
    console.print(table)


def _experts_add(args: argparse.Namespace) -> None:
    from flexolmo_jax.federation.merge import add_expert

    added = add_expert(args.model, *args.packages, allow_share=args.allow_share)
    _tell_undone(added.undone)
    _tell_shares(added.shares)


def _experts_remove(args: argparse.Namespace) -> None:
    from flexolmo_jax.federation.merge import remove_expert

    _tell_undone(remove_expert(args.model, *args.names))


def _tell_undone(undone: bool) -> None:
    if undone:
        console.print(
            "the router had been tuned with the old set of experts: it is back to the owners' own "
            "rows; run `flexolmo train router` again if you want it tuned"
        )


def _inspect(args: argparse.Namespace) -> None:
    from flexolmo_jax.federation.merge import check_merged, check_package, shares_of
    from flexolmo_jax.federation.package import read_manifest

    path, shares = Path(args.path), None
    if is_merged := read_manifest(path)["kind"] == "merged":
        opened = check_merged(path)
        manifest, shares = dict(opened.manifest), shares_of(opened)
    else:
        manifest = check_package(path)
    described = manifest.pop("tensors", {})
    files = manifest.pop("files")
    if args.json:
        found = {"shares": shares and shares.rows()} if is_merged else {}
        print_json({**manifest, "tensors": described, "files": files, **found})
        return
    table = Table("field", "value", title=f"{path}: every file is as it was written")
    for key, value in manifest.items():
        text = value if isinstance(value, str) else json.dumps(value)
        table.add_row(key, text)
    console.print(table)
    if described:
        table = Table("tensor", "shape", "dtype")
        for name, entry in described.items():
            table.add_row(name, "x".join(map(str, entry["shape"])), entry["dtype"])
        console.print(table)
    if is_merged and manifest["experts"]:
        _tell_shares(shares)


def _named_sources(pairs: Sequence[str]) -> dict[str, str]:
    sources = {}
    for pair in pairs:
        name, equals, source = pair.partition("=")
        if not equals or not name or not source:
            raise ValueError(f"--data {pair}: expected NAME=SOURCE")
        sources[name] = source
    return sources


def _evaluate(args: argparse.Namespace) -> None:
    for option, goes_with in (
        ("heldout", "data"), ("task_data", "harness"), ("limit", "harness"), ("shots", "harness"),
        ("download", "harness"), ("run_code", "harness"),
    ):  # fmt: skip
        if getattr(args, option) not in (None, False) and getattr(args, goes_with) is None:
            raise ValueError(f"--{option.replace('_', '-')} is for --{goes_with}; leave it out")
    if args.harness is not None:
        from flexolmo_jax.evaluation.command import evaluate_harness

        evaluate_harness(args)
        return
    from flexolmo_jax.data.sources import Report
    from flexolmo_jax.evaluation.domains import bits_per_byte
    from flexolmo_jax.model import load

    sources = _named_sources(args.data)
    model = load(args.model, anchor=args.anchor, dtype=args.dtype)
    rows = []
    for name, source in sources.items():
        report = Report()
        found = bits_per_byte(
            model, source, without=args.without, only=args.only, heldout=args.heldout,
            text_field=args.text_field, report=report,
        )  # fmt: skip
        report.tell()
        rows.append({"data": name, **found._asdict(), "bad_rows": len(report.bad_rows)})
    if not args.json:
        rows = [{**row, "bits_per_byte": f"{row['bits_per_byte']:.4f}"} for row in rows]
    _show_rows(rows, args.json)


def _study(args: argparse.Namespace) -> None:
    from flexolmo_jax.evaluation.study import run_study
    from flexolmo_jax.evaluation.study_config import StudyConfig

    config = _config(args, StudyConfig, "study")
    run_study(config, Path(args.out), args.seeds, args.resume)
    console.print(
        f"wrote {args.out}/report.md, report.json and pictures", markup=False, soft_wrap=True
    )


def _generate(args: argparse.Namespace) -> None:
    from flexolmo_jax.model import load

    model = load(args.model, anchor=args.anchor, dtype=args.dtype)
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
    from flexolmo_jax.data.fetch import fetch

    card = fetch(args.folder)
    rows = [
        {"domain": name, "documents": entry["documents"], "bytes": entry["bytes"]}
        for name, entry in card["domains"].items()
    ]
    _show_rows(rows, as_json=False)


def _data_flexmix(args: argparse.Namespace) -> None:
    from flexolmo_jax.data.flexmix_mini import make_flexmix

    card = make_flexmix(Path(args.fetched), Path(args.out))
    rows = [
        {
            "domain": name,
            **{f"{split} bytes": one["bytes"] for split, one in entry["splits"].items()},
            "near-duplicates": entry["near_duplicates"],
        }
        for name, entry in card["domains"].items()
    ]
    _show_rows(rows, as_json=False)
    console.print(f"{args.out}/card.md says what is in it", markup=False, soft_wrap=True)


def _data_tasks(args: argparse.Namespace) -> None:
    from flexolmo_jax.evaluation.task_data import fetch_task_data

    rows = [
        {"task": name, "documents": count} for name, count in fetch_task_data(args.folder).items()
    ]
    _show_rows(rows, as_json=False)


def _data_proxies(args: argparse.Namespace) -> None:
    from flexolmo_jax.data.proxies import pick_proxies

    picked = pick_proxies(args.source, args.public, Path(args.out), share=args.share)
    console.print(
        f"wrote {args.out}: {picked.documents} of {picked.of_public} public documents; the "
        f"classifier tells yours from public ones with {picked.accuracy:.0%} accuracy",
        markup=False,
        soft_wrap=True,
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

if __name__ == "__main__":
    sys.exit(main())
