"""A trace as one HTML page that needs no network: spans, documents, and which belong together."""

import json
from pathlib import Path

from flexolmo_jax.tracing.results import Span, Trace
from flexolmo_jax.tracing.similar import SIMILAR_NOTE
from flexolmo_jax.tracing.spans import stretches

LEVELS = 3  # shades of rarity


def rarity_levels(spans: tuple[Span, ...]) -> list[int]:
    """1, 2 or 3 for each span, a third of them each; 3 are the rarest."""
    order = sorted({span.log_probability for span in spans}, reverse=True)
    rank = {probability: i for i, probability in enumerate(order)}
    return [1 + ((rank[s.log_probability] + 1) * LEVELS - 1) // len(order) for s in spans]


def trace_page(trace: Trace, prompt: str = "") -> str:
    """The page: HTML with style, script and the trace inside.

    The text of documents is data there: whatever it spells, none of it is run or loaded.

    Args:
      prompt: what the text answers, shown before it.
    """
    content = trace.to_json()
    for span, level in zip(content["spans"], rarity_levels(trace.spans), strict=True):
        span["level"] = level
    content["stretches"] = stretches([(span.start, span.stop) for span in trace.spans])
    content["prompt"], content["similar_note"] = prompt, SIMILAR_NOTE
    text = json.dumps(content)  # in ASCII, so that half of a character is no error
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    template = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
    return template.replace(">TRACE<", f">{text}<", 1)
