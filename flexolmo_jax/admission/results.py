"""What a check found: a figure, its bound, a verdict, and a sentence for people."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

Consequence = Literal["reject", "review", "note"]  # of a failed check, by the policy
Verdict = Literal["passed", "not judged", "note", "review", "reject"]
Decision = Literal["admitted", "review", "rejected"]
Unit = Literal["share", "change", "number", "text"]


@dataclasses.dataclass(frozen=True)
class Result:
    """One thing that was measured.

    Attributes:
      check: the section of the policy that it belongs to.
      measured: what it is, in a few words.
      value: the figure; None where there is none.
      bound: what it may be at most; None where there is none.
      verdict: "passed"; "not judged", where something was missing; or what a failure means by the
        policy.
      explanation: a sentence.
      unit: how to print value and bound: a share of 1, a relative change, a number, or no figure.
      details: JSON values behind the figure: of layers, domains, matrices, subsets.
    """

    check: str
    measured: str
    value: float | None
    bound: float | None
    verdict: Verdict
    explanation: str
    unit: Unit = "number"
    details: dict[str, Any] = dataclasses.field(default_factory=dict)

    def shown(self, figure: float | None) -> str:
        """`value` or `bound` as people read it."""
        if figure is None:
            return "-"
        if not math.isfinite(figure):
            return "NaN"
        return {"share": "{:.1%}", "change": "{:+.1%}"}.get(self.unit, "{:.3g}").format(figure)

    def to_json(self) -> dict[str, Any]:
        """JSON values; a figure that is not finite is null."""
        return _finite(dataclasses.asdict(self))


def judged(
    check: str, measured: str, value: float, bound: float, fails: Consequence, explanation: str,
    unit: Unit = "number", **details: Any,
) -> Result:  # fmt: skip
    """A result that passes if the value is a number of at most the bound."""
    verdict: Verdict = "passed" if value <= bound else fails  # NaN fails
    return Result(check, measured, float(value), bound, verdict, explanation, unit, details)


def not_judged(check: str, measured: str, why: str, **details: Any) -> Result:
    """A result of something that could not be judged, and the sentence that says why."""
    return Result(check, measured, None, None, "not judged", why, "text", details)


def decide(results: Sequence[Result]) -> Decision:
    """The worst of all results decides; a note and what was not judged do not count."""
    verdicts = {result.verdict for result in results}
    if "reject" in verdicts:
        return "rejected"
    return "review" if "review" in verdicts else "admitted"


@dataclasses.dataclass(frozen=True)
class Report:
    """What an examination found.

    Attributes:
      package: the folder that was examined.
      facts: what its manifest says of it (name, digest, licence, contact, ...); empty if it could
        not be read. A stranger wrote these.
      anchor: the anchor's identity.
      cohort: names of the admitted experts that it was compared with.
      policy: the digest of the policy.
      results: of all checks, in the order of their cost.
      seconds: {check: how long it took}.
      made_at: the time, UTC, ISO 8601.
    """

    package: str
    facts: dict[str, Any]
    anchor: str
    cohort: tuple[str, ...]
    policy: str
    results: tuple[Result, ...]
    seconds: dict[str, float]
    made_at: str

    @property
    def verdict(self) -> Decision:
        return decide(self.results)

    def to_json(self) -> dict[str, Any]:
        """JSON values: all of it, the verdict first."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        results = [result.to_json() for result in self.results]
        return {"verdict": self.verdict, **fields, "cohort": list(self.cohort), "results": results}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
