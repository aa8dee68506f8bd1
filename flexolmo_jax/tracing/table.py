"""A trace in the terminal: the text with its spans in colour, then counts, then documents."""

from flexolmo_jax.runtime.console import coloured, columns, console, cropped, tell, visible
from flexolmo_jax.tracing.page import rarity_levels
from flexolmo_jax.tracing.results import Passage, Span, Trace
from flexolmo_jax.tracing.similar import SIMILAR_NOTE
from flexolmo_jax.tracing.spans import stretches

COLOURS = ("", "bold cyan", "bold yellow", "bold red")  # by level of rarity
SOFT = "dim"
DOCUMENTS = 3  # shown of a span

Part = str | tuple[str, str]


def show_trace(trace: Trace, prompt: str = "") -> None:
    """Prints a trace, wrapped to the screen; each span has a number, for screens without colour.

    Args:
      prompt: what the text answers, printed before it.
    """
    levels, numbers = rarity_levels(trace.spans), _numbers(trace)
    if prompt:
        _show((prompt, SOFT))
    _show(*_text(trace, levels, numbers))
    print()
    tell(summary(trace))
    shown: set[int] = set()
    for span, level, number in zip(trace.spans, levels, numbers, strict=True):
        if number in shown:
            continue
        shown.add(number)
        print()
        _show(f"[{number}] ", (_one_line(trace.text[span.start : span.stop]), COLOURS[level]))
        tell(f"    {counts(span)}")
        for passage in span.passages[:DOCUMENTS]:
            _show_passage(passage, COLOURS[level])
        hidden = len(span.passages) - DOCUMENTS
        if hidden > 0:
            tell(f"    and {hidden} more; --page FILE and --json show all")
    if trace.similar:
        print()
        tell(f"Similar, not verbatim ({SIMILAR_NOTE}):")
        for passage in trace.similar:
            _show_passage(passage, SOFT)


def summary(trace: Trace) -> str:
    """What a trace found, and which owners were asked, in sentences."""
    count, asked = len(set(_numbers(trace))), ", ".join(trace.asked)
    if count == 1:
        said = "The rarest span of the text that stands verbatim in documents"
    elif count:
        said = f"The {count} rarest spans of the text that stand verbatim in documents"
    elif trace.missing and set(trace.asked) <= set(trace.missing):
        said = "Nobody answered, so nothing is known of the text"
    else:
        said = "No word of the text stands verbatim in a document"
    missing = "".join(f" No answer from {name} ({why})." for name, why in trace.missing.items())
    cause = " The same words are no proof of a cause." if count else ""
    return f"{said}; asked: {asked}.{missing}{cause}"


def counts(span: Span) -> str:
    """How often a span occurs, in all and with each owner."""
    total = sum(span.counts.values())
    owners = ", ".join(f"{name} {count:,}" for name, count in span.counts.items())
    return f"{total:,} time{'' if total == 1 else 's'}: {owners}"


def _numbers(trace: Trace) -> list[int]:
    """The number of each span, from 1; where the text repeats one, the same."""
    known: dict[str, int] = {}
    words = [trace.text[span.start : span.stop] for span in trace.spans]
    return [known.setdefault(own, len(known) + 1) for own in words]


def _text(trace: Trace, levels: list[int], numbers: list[int]) -> list[Part]:
    parts: list[Part] = []
    end = 0
    for group in stretches([(span.start, span.stop) for span in trace.spans]):
        start = min(trace.spans[i].start for i in group)
        stop = max(trace.spans[i].stop for i in group)
        colour = COLOURS[max(levels[i] for i in group)]
        labels = ",".join(map(str, dict.fromkeys(numbers[i] for i in group)))
        parts += [trace.text[end:start], (trace.text[start:stop], colour), (f"[{labels}]", SOFT)]
        end = stop
    return [*parts, trace.text[end:]]


def _show_passage(passage: Passage, colour: str) -> None:
    named = passage.document or "a document that its owner does not name"
    about = [passage.owner, passage.source, passage.licence and f"licence {passage.licence}"]
    tell(f"    {named} ({', '.join(filter(None, about))})")
    if passage.match:
        before, match, after = _within(passage, max(40, console.width - 8))
        _show("      ", (before, SOFT), (match, colour), (after, SOFT))


def _within(passage: Passage, width: int) -> tuple[str, str, str]:
    """What fits on a line: the match, and as much around it."""
    parts = (passage.before, passage.match, passage.after)
    before, match, after = (visible(_one_line(part)) for part in parts)
    if columns(match) > width:
        return "", f"{cropped(match, width - 1)}…", ""
    side = (width - columns(match)) // 2
    if columns(before) > side:
        before = f"…{cropped(before[::-1], side - 1)[::-1]}" if side else ""
    if columns(after) > side:
        after = f"{cropped(after, side - 1)}…" if side else ""
    return before, match, after


def _one_line(text: str) -> str:
    """White space, line ends included, as single spaces; one at each end stays."""
    words = " ".join(text.split())
    return f"{' ' * text[:1].isspace()}{words}{' ' * text[-1:].isspace()}" if words else " "


def _show(*parts: Part) -> None:
    shown: list[Part] = [
        visible(part) if isinstance(part, str) else (visible(part[0]), part[1]) for part in parts
    ]
    console.print(coloured(*shown))
