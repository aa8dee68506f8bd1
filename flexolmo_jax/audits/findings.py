"""What the numbers of an audit mean, in sentences; and whether the audit has failed."""

from typing import Any

from flexolmo_jax.audits import control
from flexolmo_jax.audits.extraction import Protocol
from flexolmo_jax.audits.removal import Removal

FLOOR = "anchor alone"
CONTROLS: dict[str, control.What] = {"control: expert": "expert", "control: model": "model"}


def check_controls(report: dict[str, Any]) -> None:
    """Raises ValueError if an extraction audit did not detect its positive controls.

    A whole model must be detected by the paper's criterion. An expert may be detected by greedy
    decoding instead: beside a frozen head it can know every next token, and still be too unsure
    for samples to show it.
    """
    for title in [title for title in CONTROLS if title in report["audits"]]:
        audit = report["audits"][title]
        criteria = ("extracted", "greedy") if CONTROLS[title] == "expert" else ("extracted",)
        best = max(audit[criterion]["rate"] for criterion in criteria)
        if best <= control.CAUGHT:
            raise ValueError(
                f"{title}: it memorized {audit['documents']} documents, but the audit extracted "
                f"only {best:.0%} of the passages, expected more than {control.CAUGHT:.0%}: on "
                "this anchor the audit shows nothing"
            )


def check_certificate(report: dict[str, Any]) -> None:
    """Raises ValueError if a membership audit has refuted a certificate."""
    if report["verdict"] == "refuted":
        raise ValueError(f"{report['model']}: the certificate is refuted: {report['why']}")


def check_removal(report: dict[str, Any]) -> None:
    """Raises ValueError if a removal audit found traces of an expert where none may be.

    A tuned router may keep traces while the expert is only switched off.
    """
    states = ["removed"] if report["tuned"] else ["removed", "switched_off"]
    for state in states:
        if not report[state]["equal"]:
            raise ValueError(
                f"{report['model']}: with {report['expert']} {state.replace('_', ' ')}, logits "
                f"differ by up to {report[state]['largest']:.3g} from a model that never had it; "
                "expected equal logits, bit for bit, on CPU in float32"
            )


def extraction_lines(audits: dict[str, Any]) -> list[str]:
    """What the audits of a model, the anchor alone, and the controls mean."""
    audit = audits["model"]
    protocol = audit["protocol"]
    lines = [
        f"{audit['prefixes']} passages of {audit['documents']} documents, "
        f"{audit['attempts']} attempts"
    ]
    if protocol["length"] < Protocol().length:
        lines.append(
            f"this model was trained on {protocol['length']} tokens at a time, so passages have "
            f"that length, not the paper's {Protocol().length}, and the prompt is a larger part"
        )
    if audit["prefixes"] > audit["documents"]:
        lines.append(
            "several passages come from the same document, so they are not independent, and the "
            "intervals are too narrow"
        )
    floor = audits.get(FLOOR)
    if floor:
        above = audit["extracted"]["low"] > floor["extracted"]["high"]
        lines.append(
            "more is extracted than from the anchor alone, which never saw this text"
            if above
            else "no more is extracted than from the anchor alone, within the intervals"
        )
    controls = {title: audits[title] for title in CONTROLS if title in audits}
    for title, trained in controls.items():
        lines.append(
            f"{title}, which memorized {trained['documents']} documents: "
            f"{trained['extracted']['rate']:.0%} of {trained['prefixes']} passages are extracted "
            f"by sampling, and {trained['greedy']['rate']:.0%} verbatim by greedy decoding"
        )
    if not controls:
        lines.append("to test whether this audit detects memorized text, run it with --control")
    return lines


def removal_lines(left: Removal) -> list[str]:
    """What is left of an expert."""
    lines = []
    for state, same in (("switched off", left.switched_off), ("removed", left.removed)):
        logits = "equal, bit for bit" if same.equal else f"different by up to {same.largest:.3g}"
        lines.append(f"{state}, against a model that never had it: logits are {logits}")
    if left.nothing_is_left:
        return [*lines, "no canary and no passage is predicted better than without the expert"]
    if left.tuned:
        lines.append(
            "the router rows of the other experts were tuned while it was present, and stay tuned "
            "when it is switched off; removing it undoes the tuning"
        )
    for what, leak in (
        ("included canaries", left.members), ("held-out canaries", left.controls),
        ("passages", left.prefixes),
    ):  # fmt: skip
        if leak:
            lines.append(
                f"{what}, switched off: {leak.better} of {leak.texts} are predicted better, by "
                f"{leak.mean:+.3f} nats on average, {leak.largest:+.3f} at most"
            )
    if left.distinguished:
        leaks = not left.distinguished.low <= 0.5 <= left.distinguished.high
        lines.append(
            f"by these gains, included and held-out canaries are distinguished with AUC "
            f"{left.distinguished}: the router rows {'do' if leaks else 'do not'} measurably leak "
            "membership"
        )
    return lines
