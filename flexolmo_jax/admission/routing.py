"""Routing: how much of public text, and of admitted domains' proxies, an expert would take."""

import warnings
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from flexolmo_jax.admission.cohort import Cohort
from flexolmo_jax.admission.policy import RoutingBounds
from flexolmo_jax.admission.results import Result, judged, not_judged
from flexolmo_jax.data.sources import Document, first_bytes, read_documents
from flexolmo_jax.federation.names import PUBLIC
from flexolmo_jax.federation.package import Package
from flexolmo_jax.federation.routing import without_evidence_head
from flexolmo_jax.federation.shares import Shares, measure_shares

ROWS, HEAD = "by router row", "by evidence"


class Texts(NamedTuple):
    """What admission reads: public text, and public proxies of each admitted domain."""

    public: Sequence[Document]
    domains: Mapping[str, Sequence[Document]]

    @classmethod
    def read(cls, public: str, domains: Mapping[str, str], size: int) -> "Texts":
        """The first `size` bytes of each source, to the end of a document."""
        first = {name: first_bytes(read_documents(x), size) for name, x in domains.items()}
        return cls(first_bytes(read_documents(public), size), first)


def check_routing(
    package: Package, cohort: Cohort, texts: Texts, bounds: RoutingBounds
) -> list[Result]:
    """The share of each text that the expert would take beside the cohort, in each way of routing.

    By router rows in every layer, on the anchor's activations (federation/shares.py), and by
    evidence heads, whichever of the two a merge with it would use: the coordinator may merge
    either way, and the unused part of a package lies in it as well.
    """
    results = []
    for way in (ROWS, HEAD):
        titles = f"public text, {way}", f"domains, {way}"
        missing = without_evidence_head(cohort.anchor, [package]) if way == HEAD else []
        if missing:
            why = f"There is no evidence head in {', '.join(missing)}."
            results += [not_judged("routing", title, why) for title in titles]
            continue
        public = _measured(package, cohort, texts.public, way, bounds.tokens)
        results.append(_of_public(titles[0], public, bounds))
        domains = {
            name: _measured(package, cohort, documents, way, bounds.tokens)
            for name, documents in texts.domains.items()
        }
        results.append(_of_domains(titles[1], domains, package, bounds))
    return results


def _measured(
    package: Package, cohort: Cohort, documents: Sequence[Document], way: str, tokens: int
) -> Shares | str:
    """The shares; or why there are none."""
    beside = [package, *cohort.members]
    if way == HEAD:
        beside = [one for one in beside if one.weights.ranks.evidence]
    names = (PUBLIC, *(one.manifest["name"] for one in beside))
    experts = [cohort.anchor.weights.public, *(one.weights for one in beside)]
    config = cohort.anchor.config.replace(
        num_experts=len(experts),
        active_experts=cohort.active_experts,
        memory=cohort.memory if way == ROWS else None,
        evidence=cohort.evidence if way == HEAD else None,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of NaN, which is found below
        try:
            found = measure_shares(
                cohort.anchor, experts, names, config, documents=documents, tokens=tokens
            )
        except ValueError as error:
            return str(error)
    return found if found is not None else "The anchor came without a tokenizer."


def _of_public(title: str, shares: Shares | str, bounds: RoutingBounds) -> Result:
    if isinstance(shares, str):
        return Result("routing", title, None, bounds.public, bounds.fails, shares, "share")
    own = shares.of_layers[:, 1]
    why = f"It takes {own.max():.1%} of {shares.tokens:,} tokens of public text"
    if len(own) > 1:
        why += f" in layer {own.argmax()}, {own.mean():.1%} on average"
    return judged(
        "routing", title, own.max(), bounds.public, bounds.fails, f"{why}.", "share",
        shares=shares.rows(),
    )  # fmt: skip


def _of_domains(
    title: str, domains: Mapping[str, Shares | str], package: Package, bounds: RoutingBounds
) -> Result:
    if not domains:
        return not_judged("routing", title, "The policy names no proxies of admitted domains.")
    for name, found in domains.items():
        if isinstance(found, str):
            why = f"{name}: {found}"
            return Result("routing", title, None, bounds.domain, bounds.fails, why, "share")
    measured = {name: x for name, x in domains.items() if isinstance(x, Shares)}
    taken = {name: float(shares.of_layers[:, 1].max()) for name, shares in measured.items()}
    worst = max(taken, key=lambda name: taken[name])
    own = measured[worst].of_layers
    why = f"Of the proxies of {worst} it takes up to {taken[worst]:.1%} in a layer"
    if worst in measured[worst].names:
        theirs = own[:, measured[worst].names.index(worst)].mean()
        why += f" ({own[:, 1].mean():.1%} on average; {worst}'s own expert {theirs:.1%})"
    rows = {name: shares.rows() for name, shares in measured.items()}
    return judged(
        "routing", title, taken[worst], bounds.domain, bounds.fails, f"{why}.", "share",
        shares=rows,
    )  # fmt: skip
