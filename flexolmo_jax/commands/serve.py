"""`flexolmo serve` and `flexolmo keys`: a model for many clients, each with its experts."""

import argparse
from pathlib import Path

from flexolmo_jax.commands.parser import Commands
from flexolmo_jax.commands.shared_arguments import (
    add_anchor,
    add_json,
    add_processes,
    add_separator,
    make_key,
    need_packages,
    optional_path,
    remove_key,
)
from flexolmo_jax.runtime.console import print_json, show_table


def add_to(commands: Commands) -> None:
    parser = commands.add(
        "serve",
        run,
        "serve a model: OpenAI's interface, and a page",
        "Serves a model over OpenAI's interface, and a page at /. Every request may choose its "
        'experts: "experts": {"without": ["news"]}, or a model\'s name such as ours:without-news. '
        "What `flexolmo experts add` and `remove` do to the model takes effect while it runs.",
    )  # fmt: skip
    parser.add_argument(
        "--model", required=True, metavar="DIR",
        help="a merged model, a package, or a Hugging Face folder",
    )  # fmt: skip
    add_anchor(parser)
    add_separator(parser)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "int8"), help="of the weights")
    parser.add_argument("--host", default="127.0.0.1", help="default: %(default)s")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--name", metavar="NAME", help="of the model, for clients (default: its folder's)"
    )
    parser.add_argument(
        "--experts-as", action="append", default=[], metavar="NAME=EXPERT,...",
        help="a further name of the model, NAME after a colon, which stands for these experts; may "
        "be repeated. There is one for each expert without asking: without-EXPERT",
    )  # fmt: skip
    parser.add_argument(
        "--keys", metavar="FILE", help="serve only those whose API key `flexolmo keys add` made"
    )
    parser.add_argument(
        "--require-signed", metavar="REGISTRY",
        help="serve only packages that are signed by whom this registry says, and follow it and "
        "its log: what is revoked is not used any more, within a minute",
    )  # fmt: skip
    parser.add_argument(
        "--chat-template", metavar="FILE",
        help="Jinja, for /v1/chat/completions (default: that of a Hugging Face folder)",
    )  # fmt: skip
    parser.add_argument(
        "--usage", metavar="LEDGER",
        help="append to this file how much every expert took part in each request (without texts); "
        "see `flexolmo usage`",
    )  # fmt: skip
    parser.add_argument(
        "--usage-key", metavar="FILE", help="of `flexolmo usage keygen`: signs the ledger"
    )
    parser.add_argument(
        "--usage-askers", action="store_true", help="name in the ledger whose key a request had"
    )
    parser.add_argument(
        "--counterfactual", type=float, default=0.0, metavar="SHARE",
        help="of the answers, chosen at random, that are scored again without each expert, for the "
        "ledger; while slots are free (default: none)",
    )  # fmt: skip
    parser.add_argument(
        "--trace-owners", metavar="FILE",
        help='owners to ask where the words of an answer stand ("trace": true, and a button on the '
        "page); see docs/tracing_service.md",
    )  # fmt: skip
    parser.add_argument(
        "--slots", type=int, default=16, metavar="N",
        help="how many requests run at a time (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--length", type=int, metavar="N",
        help="tokens of a prompt and its answer (default: what the model was made for)",
    )  # fmt: skip
    parser.add_argument(
        "--waiting", type=int, default=256, metavar="N",
        help="how many requests may wait for a slot (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--timeout", type=float, default=300, metavar="SECONDS",
        help="what a request may take, and at SIGTERM what those in flight still may "
        "(default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--expert-parallel", type=int, metavar="N",
        help="spread the model over all devices: N of them share the experts, and all of them the "
        "requests",
    )  # fmt: skip
    add_processes(parser)
    keys = commands.group("keys", "API keys for `flexolmo serve`")
    parser = keys.add("add", add, "make a key, and print it once")
    parser.add_argument("file")
    parser.add_argument("name", help="whose key it is")
    parser.add_argument(
        "--experts", nargs="+", metavar="NAME", help="that it may use (default: all)"
    )
    parser.add_argument(
        "--always-on", nargs="+", default=[], metavar="NAME", help="that it may not switch off"
    )
    parser.add_argument("--tokens-per-minute", type=int, metavar="N")
    parser.add_argument("--concurrency", type=int, metavar="N", help="requests at a time")
    parser.add_argument(
        "--expert-mass", choices=("token", "request", "none"), default="request",
        help="what answers may say of the experts' shares (default: of a whole request; the share "
        "in each token tells much of a text)",
    )  # fmt: skip
    parser = keys.add("remove", remove, "remove a key")
    parser.add_argument("file")
    parser.add_argument("name")
    parser = keys.add("list", list_keys, "list the keys' names and what they permit")
    parser.add_argument("file")
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    need_packages("flexolmo serve", "serve", "fastapi", "uvicorn")
    if not 0 < args.timeout < float("inf"):
        raise ValueError(f"--timeout: expected seconds above 0, found {args.timeout}")
    from flexolmo_jax.serving.run import serve
    from flexolmo_jax.serving.service import Settings

    _check_usage(args)
    settings = Settings(
        path=Path(args.model),
        name=args.name or Path(args.model).resolve().name,
        anchor=optional_path(args.anchor),
        dtype=args.dtype,
        separator=args.separator,
        slots=_at_least_one("--slots", args.slots),
        length=args.length and _at_least_one("--length", args.length),
        waiting=_at_least_one("--waiting", args.waiting),
        seconds=args.timeout,
        expert_parallel=args.expert_parallel,
        keys=optional_path(args.keys),
        profiles=dict(map(_profile, args.experts_as)),
        usage=optional_path(args.usage),
        usage_key=optional_path(args.usage_key),
        usage_askers=args.usage_askers,
        counterfactual=args.counterfactual,
        trace_owners=optional_path(args.trace_owners),
        chat_template=_read_template(args.chat_template),
        require_signed=optional_path(args.require_signed),
    )
    serve(settings, args.host, args.port)


def _check_usage(args: argparse.Namespace) -> None:
    """Before the model is loaded."""
    if not 0 <= args.counterfactual <= 1:
        raise ValueError(f"--counterfactual: expected 0 to 1, found {args.counterfactual}")
    if args.usage is None:
        for option in ("usage_key", "usage_askers", "counterfactual"):
            if getattr(args, option):
                raise ValueError(f"--{option.replace('_', '-')} needs --usage LEDGER")
        return
    if args.usage_key is None:
        raise ValueError("--usage needs --usage-key FILE; `flexolmo usage keygen FILE` makes one")
    from flexolmo_jax.usage.signing import read_private

    read_private(Path(args.usage_key))


def _read_template(file: str | None) -> str | None:
    if file is None:
        return None
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--chat-template: expected a file of Jinja text ({error})") from error


def _at_least_one(option: str, value: int) -> int:
    if value < 1:
        raise ValueError(f"{option}: expected at least 1, found {value}")
    return value


def _profile(text: str) -> tuple[str, tuple[str, ...]]:
    name, _, experts = text.partition("=")
    if not name or not experts or ":" in name:
        raise ValueError(f"--experts-as: expected NAME=EXPERT,EXPERT, found {text!r}")
    return name, tuple(experts.split(","))


def add(args: argparse.Namespace) -> None:
    from flexolmo_jax.serving.keys import KEYS, Policy

    policy = Policy(
        args.name,
        experts=None if args.experts is None else tuple(args.experts),
        always_on=tuple(args.always_on),
        tokens_per_minute=args.tokens_per_minute,
        concurrency=args.concurrency,
        expert_mass=args.expert_mass,
    )
    make_key(KEYS, args.file, args.name, policy)


def remove(args: argparse.Namespace) -> None:
    from flexolmo_jax.serving.keys import KEYS

    remove_key(KEYS, args.file, args.name)


def list_keys(args: argparse.Namespace) -> None:
    from flexolmo_jax.serving.keys import KEYS

    rows = [
        {
            "name": policy.name,
            "experts": None if policy.experts is None else list(policy.experts),
            "always on": list(policy.always_on),
            "tokens a minute": policy.tokens_per_minute,
            "concurrency": policy.concurrency,
            "expert mass": policy.expert_mass,
        }
        for policy in KEYS.read(Path(args.file))
    ]
    if args.json:
        print_json(rows)
        return
    for row in rows:
        row["experts"] = "all" if row["experts"] is None else ", ".join(row["experts"])  # type: ignore[arg-type]
        row["always on"] = ", ".join(row["always on"])  # type: ignore[arg-type]
    show_table(rows, title=f"keys of {args.file}", empty="no keys")
