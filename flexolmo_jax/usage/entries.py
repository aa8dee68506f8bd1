"""The lines of a usage ledger: what each says, and what of it an owner sees.

A *use* is a request that generated tokens; a *sample* is one answer of it for which the
counterfactual was computed too. No line has text, token ids, or a time finer than an hour.
"""

import datetime
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

USE, SAMPLE, CHECKPOINT, LEDGER = "use", "sample", "checkpoint", "ledger"
ROUNDING = 1e-3  # of masses: float32 sums, then 4 digits
_CHAIN = ("number", "time", "before", "digest")  # of storage/hash_chain.py
_FIELDS = {
    USE: {"kind", "model", "prompt_tokens", "tokens", "mass"},
    SAMPLE: {"kind", "model", "tokens", "mass", "bits"},
}


class State(NamedTuple):
    """What an owner's lines add up to.

    Attributes:
      lines: uses and samples.
      requests, tokens, mass: of the uses. Tokens are those of the answers that the owner's expert
        had a part in, mass is that part.
      head: the digest of the owner's own chain.
    """

    lines: int
    requests: int
    tokens: int
    mass: float
    head: str


def use(
    model: str,
    prompt_tokens: int,
    tokens: int,
    mass: Mapping[str, float],
    asker: str | None = None,
) -> dict[str, Any]:
    """The line of a request.

    Args:
      model: the digest of the model that answered.
      prompt_tokens, tokens: read, and generated.
      mass: tokens by the name of the expert, more than 0 (`inference/mass.py`).
      asker: whose request it was; None where the coordinator does not record it.
    """
    own = {} if asker is None else {"asker": asker}
    entry = {"kind": USE, "model": model, "prompt_tokens": prompt_tokens, "tokens": tokens}
    return {**entry, "mass": dict(mass), **own}


def sample(
    model: str, tokens: int, mass: Mapping[str, float], bits: Mapping[str, float]
) -> dict[str, Any]:
    """The line of an answer whose counterfactual was computed.

    Args:
      model, tokens, mass: of the answer.
      bits: by expert, the bits per token that the answer costs more without it.
    """
    rounded = {name: round(x, 4) for name, x in bits.items()}
    return {"kind": SAMPLE, "model": model, "tokens": tokens, "mass": dict(mass), "bits": rounded}


def check(record: Mapping[str, Any], where: str) -> None:
    """Raises ValueError if a record is no use or sample as these functions make them."""
    kind = record.get("kind")
    names = set(record) - set(_CHAIN)
    if kind not in _FIELDS or names - {"asker"} != _FIELDS[kind]:
        raise ValueError(f"{where}: no line of a usage ledger: {', '.join(sorted(names))}")
    is_sound = isinstance(record["model"], str) and isinstance(record.get("asker", ""), str)
    counts = [record["tokens"], record.get("prompt_tokens", 1)]
    is_sound &= all(type(count) is int and count >= 1 for count in counts)
    is_sound &= _are_numbers(record["mass"], above=0) and bool(record["mass"])
    is_sound &= _are_numbers(record.get("bits", {}))
    if not is_sound or record.get("bits", {}).keys() - record["mass"].keys():
        raise ValueError(f"{where}: a {kind} with an impossible value")
    total, tokens = sum(record["mass"].values()), record["tokens"]
    if total > tokens * (1 + ROUNDING) + ROUNDING:
        raise ValueError(f"{where}: a {kind} of {tokens:,} tokens with a mass of {total:,.4f}")


def _are_numbers(value: Any, above: float = -math.inf) -> bool:
    return isinstance(value, dict) and all(
        type(x) is float and math.isfinite(x) and x > above for x in value.values()
    )


def seen_by(owner: str, record: Mapping[str, Any]) -> dict[str, Any] | None:
    """What an owner sees of a line: nothing of other owners and askers; None: not its line."""
    if owner not in record["mass"]:
        return None
    shared = ("kind", "time", "model", "prompt_tokens", "tokens")
    own = {name: record[name] for name in shared if name in record}
    own["mass"] = record["mass"][owner]
    if owner in record.get("bits", {}):
        own["bits"] = record["bits"][owner]
    return own


def hour() -> str:
    """Now, rounded down to the hour: all that a line says of the time of a request."""
    now = datetime.datetime.now(datetime.UTC).replace(minute=0, second=0, microsecond=0)
    return now.isoformat(timespec="minutes")
