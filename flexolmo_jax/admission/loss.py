"""Loss: bits per byte by the expert alone, and by the model with it against the model without."""

from collections.abc import Sequence
from typing import Any

from flexolmo_jax.admission.policy import Loss
from flexolmo_jax.admission.results import Result, judged, not_judged
from flexolmo_jax.admission.routing import Texts
from flexolmo_jax.data.sources import Document
from flexolmo_jax.evaluation.bits_per_byte import score
from flexolmo_jax.federation.names import PUBLIC
from flexolmo_jax.model import FlexOlmo

ALONE = "public text, it alone"
PUBLIC_RISE = "public text, beside others"
DOMAIN_RISE = "domains, beside others"


def check_loss(model: FlexOlmo, name: str, texts: Texts, bounds: Loss) -> list[Result]:
    """Compares bits per byte; rises are relative, 0.02 for 2% more.

    Args:
      model: the cohort's experts and the new one, merged.
      name: of the new expert.
      texts: public text, and proxies of each admitted domain.
      bounds: of the policy.
    """

    def bits(documents: Sequence[Document], **experts: Any) -> float:
        try:
            return score(model, documents, **experts).bits_per_byte
        except FloatingPointError:
            return float("nan")

    anchor, alone = bits(texts.public, only=[PUBLIC]), bits(texts.public, only=[name])
    without, beside = bits(texts.public, without=[name]), bits(texts.public)
    results = [
        judged(
            "loss", ALONE, alone / anchor - 1, bounds.alone, bounds.fails,
            f"Public text takes {alone:.3f} bits per byte with this expert alone, and {anchor:.3f} "
            "with the anchor alone.", "change", with_it=alone, without_it=anchor,
        ),
        judged(
            "loss", PUBLIC_RISE, beside / without - 1, bounds.public, bounds.fails,
            f"Public text takes {beside:.3f} bits per byte with it, and {without:.3f} without.",
            "change", with_it=beside, without_it=without,
        ),
    ]  # fmt: skip
    if not texts.domains:
        why = "The policy names no proxies of admitted domains."
        return [*results, not_judged("loss", DOMAIN_RISE, why)]
    rows = {
        domain: {"with": bits(documents), "without": bits(documents, without=[name])}
        for domain, documents in texts.domains.items()
    }
    rises = {domain: row["with"] / row["without"] - 1 for domain, row in rows.items()}
    # A rise that is not a number is the worst.
    worst = max(rises, key=lambda domain: (rises[domain] != rises[domain], rises[domain]))
    why = (
        f"Of {len(rows)} domains it harms {worst} most: {rows[worst]['with']:.3f} bits per byte "
        f"with it, {rows[worst]['without']:.3f} without."
        if not rises[worst] <= 0
        else f"It harms none of {len(rows)} domains."
    )
    return [
        *results,
        judged(
            "loss",
            DOMAIN_RISE,
            rises[worst],
            bounds.domain,
            bounds.fails,
            why,
            "change",
            domains=rows,
        ),
    ]  # fmt: skip
