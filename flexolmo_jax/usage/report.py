"""The month's report: requests, tokens and mass of every owner, and what mass is worth."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from flexolmo_jax.storage.files import new_directory
from flexolmo_jax.usage import entries
from flexolmo_jax.usage.agreement import Agreement, Answer, agreement
from flexolmo_jax.usage.ledger import check_signatures, replay


class OwnerMonth(NamedTuple):
    """What a month's lines say of one owner.

    Attributes:
      requests, tokens: in which its expert had mass, and of all new tokens of these.
      mass: tokens.
      share: of all owners' mass.
      sampled: answers whose counterfactual without this expert was computed.
      bits: mean counterfactual of these, in bits per token; None: there are none.
    """

    requests: int
    tokens: int
    mass: float
    share: float
    sampled: int
    bits: float | None


class Report(NamedTuple):
    """A month.

    Attributes:
      month: "2026-11".
      requests, tokens: of all owners together.
      owners: by name, the largest mass first.
      days: mass by day and owner.
      answers: that were sampled.
      agreement: of mass and counterfactual; None: too few were sampled.
    """

    month: str
    requests: int
    tokens: int
    owners: dict[str, OwnerMonth]
    days: dict[str, dict[str, float]]
    answers: list[Answer]
    agreement: Agreement | None

    def to_json(self) -> dict[str, Any]:
        """As JSON values, without the single answers."""
        fields = self._asdict()
        del fields["answers"]
        fields["owners"] = {name: own._asdict() for name, own in self.owners.items()}
        if self.agreement is not None:
            parts = self.agreement._asdict()
            fields["agreement"] = {
                name: x if isinstance(x, int) else x._asdict() for name, x in parts.items()
            }
        return fields


def read_report(file: Path, month: str | None = None) -> Report:
    """The report of a month of a ledger, all of whose signed lines are checked.

    Args:
      file: the ledger.
      month: "2026-11"; None: the last that has a line.

    Raises:
      ValueError: the ledger is damaged, or has no line of this month.
    """
    by_month: dict[str, list[dict[str, Any]]] = {}

    def see(record: dict[str, Any]) -> None:
        own = record["time"][:7]
        if month is None and max(by_month, default="") < own:
            by_month.clear()  # a clock may have been set back: no earlier month takes its place
            by_month[own] = []
        if own in by_month or own == month:
            by_month.setdefault(own, []).append(record)

    contents = replay(file, see)
    if contents.signed is not None:
        check_signatures(contents, file)
    if not by_month:
        raise ValueError(f"{file}: no request{f' in {month}' if month else ''}")
    ((found, records),) = by_month.items()
    return make_report(found, records)


def make_report(month: str, records: Sequence[Mapping[str, Any]]) -> Report:
    """The report of a month's lines (`ledger.replay`)."""
    uses = [record for record in records if record["kind"] == entries.USE]
    answers = [
        Answer(record["mass"], record["bits"])
        for record in records
        if record["kind"] == entries.SAMPLE
    ]
    mass: dict[str, float] = {}
    days: dict[str, dict[str, float]] = {}
    for record in uses:
        day = days.setdefault(record["time"][:10], {})
        for owner, own in record["mass"].items():
            mass[owner] = mass.get(owner, 0.0) + own
            day[owner] = day.get(owner, 0.0) + own
    owners = {}
    for owner in sorted(mass, key=lambda name: -mass[name]):
        own_uses = [record for record in uses if owner in record["mass"]]
        bits = [answer.bits[owner] for answer in answers if owner in answer.bits]
        owners[owner] = OwnerMonth(
            len(own_uses), sum(record["tokens"] for record in own_uses), round(mass[owner], 4),
            mass[owner] / sum(mass.values()), len(bits), sum(bits) / len(bits) if bits else None,
        )  # fmt: skip
    tokens = sum(record["tokens"] for record in uses)
    return Report(month, len(uses), tokens, owners, days, answers, agreement(answers))


def table(report: Report) -> list[dict[str, Any]]:
    """The rows of the month's table; 80 columns wide with names of up to 21 characters."""
    return [
        {
            "owner": name,
            "requests": own.requests,
            "tokens": own.tokens,
            "mass": f"{own.mass:,.1f}",
            "share": f"{own.share:.1%}",
            "bits": "" if own.bits is None else f"{own.bits:+.3f}",
        }
        for name, own in report.owners.items()
    ]


def sentences(report: Report) -> list[str]:
    """What the table cannot say."""
    said = [
        "Mass is not credit: it says where the router sent tokens, not what the answer would "
        "have been without the expert. That is bits: what a token costs more without it."
    ]
    found = report.agreement
    if found is None:
        count = len(report.answers)
        sampled = "1 answer was" if count == 1 else f"{count} answers were"
        return [*said, f"{sampled} sampled: too few to compare the two."]
    return [
        *said,
        f"On {found.answers:,} sampled answers they agree so far: rank correlation "
        f"{found.rank_correlation}; the owner with the most mass is the one that was missed most "
        f"in {found.same_first.value:.0%}; {found.negative.value:.0%} of the mass is of experts "
        "that made the answer less likely.",
    ]


def write_report(report: Report, out: Path) -> None:
    """Writes report.json and month.png into a new folder.

    Raises:
      ValueError: `out` is there, and not empty.
      OSError: it cannot be written.
    """
    with new_directory(out) as folder:
        text = json.dumps(report.to_json(), indent=1) + "\n"
        (folder / "report.json").write_text(text, encoding="utf-8")
        plot(report, folder / "month.png")


def plot(report: Report, file: Path) -> None:
    """Draws mass by day and owner, and each sampled answer's share beside its counterfactual."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    names, below = list(report.days), [0.0] * len(report.days)
    for owner in report.owners:
        heights = [day.get(owner, 0.0) for day in report.days.values()]
        left.bar([name[8:] for name in names], heights, bottom=below, label=owner)
        below = [a + b for a, b in zip(below, heights, strict=True)]
    left.set(title=f"routing mass, {report.month}", xlabel="day", ylabel="tokens")
    left.legend(fontsize=8)
    for number, owner in enumerate(report.owners):
        own = [x for x in report.answers if owner in x.bits]
        shares = [x.share(owner) for x in own]
        bits = [x.bits[owner] for x in own]
        right.plot(shares, bits, ".", color=f"C{number}", alpha=0.6)
    right.axhline(0, color="grey", linewidth=0.8)
    right.set(
        title=f"{len(report.answers):,} sampled answers", xlabel="share of the mass",
        ylabel="bits per token more without the expert",
    )  # fmt: skip
    figure.savefig(file, dpi=130)
