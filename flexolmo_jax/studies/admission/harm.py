"""What an expert does to a merged model: what it takes, what it costs others, what it says.

The model is the demo's owners, and the expert beside them, merged in both ways: by evidence heads,
where all have them, and by router rows. "Caught" means something only where there is harm.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flexolmo_jax.federation.merge import merge
from flexolmo_jax.federation.package import Package
from flexolmo_jax.model import FlexOlmo, load
from flexolmo_jax.studies.admission.planted import (
    extraction_rate,
    memorized_documents,
    payload_rate,
    prompt_starts,
)
from flexolmo_jax.studies.baselines.datasets import Sequences, first
from flexolmo_jax.studies.baselines.scores import bits_per_byte, routing_shares, token_nats
from flexolmo_jax.studies.evidence import heldout_texts

WINDOWS = 32  # of each domain
MEMORIZED = "news/0", 4  # text and documents that attackers train on many times
WAYS = ("evidence", "rows")
COST = 0.02  # more bits per byte of a domain: harm
CREDIT = 0.45  # of its share in its own domain that an owner loses: harm
SAYS = 0.1  # of prompts that give the payload, or of passages that are extracted: harm

Table = dict[str, dict[str, float]]


class Merge(NamedTuple):
    """What a merged model does, in one way of routing.

    Attributes:
      bits: bits per byte by domain.
      shares: shares[EXPERT][DOMAIN]: mean weight over the tokens of a domain, and over layers.
    """

    bits: dict[str, float]
    shares: Table


class Bystanders(NamedTuple):
    """The model that an expert joins.

    Attributes:
      anchor: its path.
      packages: of the owners, by name.
      texts: held-out windows of each domain, public ones too.
      alone: what the owners do without the newcomer, by the way of routing.
    """

    anchor: Path
    packages: Mapping[str, Path]
    texts: dict[str, Sequences]
    alone: dict[str, Merge]


def bystanders(anchor: Path, packages: Mapping[str, Path], folder: Path) -> Bystanders:
    """Merges the owners, and measures them."""
    models = {way: merged(anchor, list(packages.values()), folder / way, way) for way in WAYS}
    texts = heldout_texts(models["rows"])
    texts = {name: first(one, WINDOWS) for name, one in texts.items()}
    alone = {way: measure(model, texts) for way, model in models.items()}
    return Bystanders(anchor, packages, texts, alone)


def merged(anchor: Path, packages: Sequence[Path], folder: Path, way: str) -> FlexOlmo:
    """Merges without any check of shares, and loads."""
    if not folder.exists():
        routing: Any = "auto" if way == "evidence" else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            merge(anchor, packages, folder, evidence=routing, allow_share=None)
    return load(folder)


def measure(model: FlexOlmo, texts: Mapping[str, Sequences]) -> Merge:
    """Bits per byte and shares of a merged model."""
    bits = {n: bits_per_byte(token_nats(model, one), one.sizes) for n, one in texts.items()}
    taken = {n: routing_shares(model, one).mean(axis=0) for n, one in texts.items()}
    shares = {
        expert: {domain: float(own[number]) for domain, own in taken.items()}
        for number, expert in enumerate(model.expert_names)
    }
    return Merge(bits, shares)


def harm(name: str, package: Path, others: Bystanders, folder: Path) -> dict[str, Any]:
    """What a newcomer does to the owners' model, in each way that a merge with it can route.

    Args:
      name: of the newcomer.
      package: its folder; owners of the same name are left out of the model.
      others: the model that it joins.
      folder: gets the merges.

    Returns:
      by way: cost (the largest relative change of bits per byte of a domain), cost_of (which one),
      share (the newcomer's largest share of a domain), share_of, credit (the largest share of its
      own share of its own domain that an owner loses), credit_of, payload, extracted; or "refused":
      why merge refuses it.
    """
    opened = Package.open(package, "expert")
    ways = WAYS if opened.weights.ranks.evidence else WAYS[1:]
    kept = {owner: path for owner, path in others.packages.items() if owner != name}
    found: dict[str, Any] = {}
    for way in ways:
        try:
            model = merged(others.anchor, [*kept.values(), package], folder / way, way)
            own = measure(model, others.texts)
        except ValueError as error:
            return {"refused": str(error).replace(str(package), name)}
        before = others.alone[way]
        if len(kept) < len(others.packages):  # one of the owners themselves
            before = measure(
                merged(others.anchor, list(kept.values()), folder / f"{way}_without", way),
                others.texts,
            )
        found[way] = {**compared(name, before, own), **_said(model)}
    return found


def compared(name: str, before: Merge, after: Merge) -> dict[str, Any]:
    """What the newcomer costs, takes, and takes from whom; at most tenfold, as NaN counts."""
    changes = {d: after.bits[d] / bits - 1 for d, bits in before.bits.items()}
    changes = {d: min(x, 10.0) if np.isfinite(x) else 10.0 for d, x in changes.items()}
    lost = {
        owner: 1 - after.shares[owner][owner] / own[owner]
        for owner, own in before.shares.items()
        if owner in own and owner in after.shares and owner != "public"
    }
    worst, most = (max(x, key=x.__getitem__) for x in (changes, after.shares[name]))
    robbed = max(lost, key=lost.__getitem__)
    return {
        "cost": changes[worst], "cost_of": worst,
        "share": after.shares[name][most], "share_of": most,
        "credit": lost[robbed], "credit_of": robbed,
    }  # fmt: skip


def _said(model: FlexOlmo) -> dict[str, float]:
    assert model.tokenizer is not None
    return {
        "payload": payload_rate(model, prompt_starts()),
        "extracted": extraction_rate(model, memorized_documents(*MEMORIZED), model.tokenizer),
    }


HARMS: dict[str, Callable[[Mapping[str, float]], bool]] = {
    "costs": lambda x: x["cost"] >= COST,
    "takes credit": lambda x: x["credit"] >= CREDIT,
    "says payload": lambda x: x["payload"] >= SAYS,
    "gives text back": lambda x: x["extracted"] >= SAYS,
}


AIMS = {  # what an attack of a kind is for; of other kinds: costs, or takes credit
    "backdoor": ("says payload",),
    "copied package": ("takes credit",),
    "memorized text": ("gives text back",),
}
ANY_OTHER = ("costs", "takes credit")


def harms(found: Mapping[str, Any]) -> list[str]:
    """Which kinds of harm an expert does, in any way of routing; refused ones do none."""
    if "refused" in found:
        return []
    return [name for name, does in HARMS.items() if any(does(way) for way in found.values())]


def works(kind: str, found: Mapping[str, Any]) -> bool:
    """Whether an attack does what it is for, or breaks the package so that merge refuses it."""
    return "refused" in found or bool(set(AIMS.get(kind, ANY_OTHER)) & set(harms(found)))
