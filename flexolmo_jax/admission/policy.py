"""A policy of admission: a TOML file of bounds, texts and consequences, parsed strictly."""

import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

from flexolmo_jax.admission.results import Consequence
from flexolmo_jax.federation.names import PUBLIC, check_name
from flexolmo_jax.storage.files import canonical_digest, read_toml

EXAMPLE = """\
# What `flexolmo admit` asks of an expert package. Every line may be left out; the values here are
# the defaults. Paths are relative to this file. A failed check means, by its line `fails`:
# "reject", "review" (a person decides) or "note".

# What was admitted before: expert packages, or one merged model, whose routing is then used.
cohort = []

# Experts that the served model never switches off. All others can be off in a request, so probes
# run in every subset. "public" is the anchor's own.
always_on = ["public"]

[integrity]             # files, digests, tensors, shapes, dtypes, finite values, anchor, tokenizer
fails = "reject"

[identity]              # is it an admitted package under another name
distance = 0.4          # least distance to each: 0 is a copy, whatever its scale; 1 is unrelated
fails = "reject"

[routing]               # the largest share of a text's tokens, in a layer, that it would take
public = 0.4            # of public text
domain = 0.6            # of an admitted domain's own proxies
tokens = 4096           # of each text that are routed
fails = "reject"

[loss]                  # how much bits per byte may rise, as a share
alone = 1.0             # of public text, by this expert with no other; the anchor is 0
public = 0.01           # of public text, by the whole model, with it and without
domain = 0.02           # of an admitted domain's proxies, by the whole model, with it and without
bytes = 20000           # of each text that are read
fails = "reject"

[spectral]              # figures of W - W_public, norms of router and heads, beside the cohort's
z = 8.0                 # robust z (median, MAD of logarithms) beyond which a figure is out
spread = 0.1            # the least relative spread that a cohort is taken to have
matrices = 0.1          # share of the matrices that may be out
parts = 0.1             # share of the norms that may be out
members = 5             # fewer admitted packages than this are no cohort: nothing is judged
fails = "review"

[probes]                # is a forbidden continuation likelier than every allowed one, in any subset
# file = "probes.jsonl" # rows of prompt, allowed, forbidden; docs/admission.md has the format
margin = 0.0            # nats by which the likeliest forbidden one may lead
subsets = 256           # at most; each expert that can be switched off doubles them
fails = "reject"

# Texts of each admitted domain that stand for its owner's: public proxies of them.
# [domains]
# math = "proxies/math.jsonl"
"""


def _number(default: float, least: float, most: float) -> Any:
    """A field with its default and the least and most that it may be."""
    return dataclasses.field(default=default, metadata={"range": (least, most)})


class _Section:
    """A table of the policy, which checks its own values."""

    fails: Consequence

    def __post_init__(self):
        if self.fails not in get_args(Consequence):
            known = get_args(Consequence)
            raise ValueError(f"fails: expected {', '.join(known)}, found {self.fails!r:.100}")
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            if "range" not in field.metadata:
                continue
            value, (least, most) = getattr(self, field.name), field.metadata["range"]
            whole = isinstance(field.default, int)
            fits = type(value) is int or (type(value) is float and not whole)
            if not fits or not math.isfinite(value) or not least <= value <= most:
                kind = "a whole number" if whole else "a number"
                raise ValueError(
                    f"{field.name}: expected {kind} from {least} to {most}, found {value!r:.100}"
                )


@dataclasses.dataclass(frozen=True)
class Integrity(_Section):
    """What a package that is not sound means."""

    fails: Consequence = "reject"


@dataclasses.dataclass(frozen=True)
class Identity(_Section):
    """How near a package may be to an admitted one."""

    distance: float = _number(0.4, 0.0, 1.0)
    fails: Consequence = "reject"


@dataclasses.dataclass(frozen=True)
class RoutingBounds(_Section):
    """How much of a text an expert may take."""

    public: float = _number(0.4, 0.0, 1.0)
    domain: float = _number(0.6, 0.0, 1.0)
    tokens: int = _number(4096, 1, 10**9)
    fails: Consequence = "reject"


@dataclasses.dataclass(frozen=True)
class Loss(_Section):
    """How much bits per byte may rise."""

    alone: float = _number(1.0, 0.0, 1000.0)
    public: float = _number(0.01, 0.0, 1000.0)
    domain: float = _number(0.02, 0.0, 1000.0)
    bytes: int = _number(20_000, 1, 10**12)
    fails: Consequence = "reject"


@dataclasses.dataclass(frozen=True)
class Spectral(_Section):
    """How far figures of the weights may be from the cohort's."""

    z: float = _number(8.0, 0.0, 1e9)
    spread: float = _number(0.1, 1e-6, 1e3)
    matrices: float = _number(0.1, 0.0, 1.0)
    parts: float = _number(0.1, 0.0, 1.0)
    members: int = _number(5, 3, 10**6)
    fails: Consequence = "review"


@dataclasses.dataclass(frozen=True)
class Probes(_Section):
    """Prompts, and in how many subsets of experts they are tried."""

    file: str | None = None
    margin: float = _number(0.0, -1e6, 1e6)
    subsets: int = _number(256, 1, 2**20)
    fails: Consequence = "reject"

    def __post_init__(self):
        super().__post_init__()
        if self.file is not None and not (isinstance(self.file, str) and self.file):
            raise ValueError(f"file: expected a path, found {self.file!r:.100}")


SECTIONS: dict[str, type] = {
    "integrity": Integrity,
    "identity": Identity,
    "routing": RoutingBounds,
    "loss": Loss,
    "spectral": Spectral,
    "probes": Probes,
}


@dataclasses.dataclass(frozen=True)
class Policy:
    """What is asked of a package; `EXAMPLE` explains each field.

    Attributes:
      cohort: folders of admitted packages, or of merged models.
      always_on: names of experts that no request can switch off.
      domains: {name of an admitted domain: SOURCE of its public proxies}, as in `read_documents`.
      the others: one section for each check.

    Raises:
      ValueError: a field has an impossible value; the text names it.
    """

    cohort: tuple[str, ...] = ()
    always_on: tuple[str, ...] = (PUBLIC,)
    domains: Mapping[str, str] = dataclasses.field(default_factory=dict)
    integrity: Integrity = Integrity()
    identity: Identity = Identity()
    routing: RoutingBounds = RoutingBounds()
    loss: Loss = Loss()
    spectral: Spectral = Spectral()
    probes: Probes = Probes()

    def __post_init__(self):
        for name in ("cohort", "always_on"):
            value = getattr(self, name)
            if not isinstance(value, tuple) or not all(isinstance(x, str) and x for x in value):
                raise ValueError(f"{name}: expected a list of texts, found {value!r:.100}")
        for name in self.always_on:
            if name != PUBLIC:
                check_name(name)
        for name, source in self.domains.items():
            check_name(name)
            if not isinstance(source, str) or not source:
                raise ValueError(
                    f"domains.{name}: expected a SOURCE of text, found {source!r:.100}"
                )

    def digest(self) -> str:
        """sha256 of all values, paths included."""
        return canonical_digest(dataclasses.asdict(self))


def read_policy(file: str | Path) -> Policy:
    """Reads a policy; its paths become paths from the working directory.

    Raises:
      ValueError: it is missing, not TOML, has an unknown field or an impossible value.
    """
    file = Path(file)
    what = "a policy in TOML; `flexolmo admit --print-policy` prints one to begin with"
    tables = read_toml(file, what)
    try:
        return _located(parse_policy(tables), file.parent)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def parse_policy(tables: Mapping[str, Any]) -> Policy:
    """A policy from the values of a TOML file.

    Raises:
      ValueError: an unknown field or an impossible value; the text names it, and what was meant.
    """
    _check_known(tables, [field.name for field in dataclasses.fields(Policy)], "")
    values: dict[str, Any] = {}
    for name, value in tables.items():
        if name in SECTIONS or name == "domains":
            if not isinstance(value, dict):
                raise ValueError(f"{name}: expected a table, [{name}], found {value!r:.100}")
            values[name] = _section(name, value) if name in SECTIONS else value
        else:
            values[name] = tuple(value) if isinstance(value, list) else value
    return Policy(**values)


def _section(name: str, values: Mapping[str, Any]) -> Any:
    known = [field.name for field in dataclasses.fields(SECTIONS[name])]
    _check_known(values, known, f"{name}.")
    try:
        return SECTIONS[name](**values)
    except ValueError as error:
        raise ValueError(f"{name}.{error}") from error


def _check_known(found: Iterable[str], known: list[str], prefix: str) -> None:
    for name in found:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            meant = f"did you mean {prefix}{close[0]}?" if close else f"expected {', '.join(known)}"
            raise ValueError(f"unknown field {prefix}{name}: {meant}")


def _located(policy: Policy, folder: Path) -> Policy:
    """The policy with paths that were relative to its folder."""

    def at(path: str) -> str:
        return path if path.startswith(("corpus:", "tfds:")) else str(folder / path)

    file = policy.probes.file
    return dataclasses.replace(
        policy,
        cohort=tuple(map(at, policy.cohort)),
        domains={name: at(source) for name, source in policy.domains.items()},
        probes=dataclasses.replace(policy.probes, file=file and at(file)),
    )
