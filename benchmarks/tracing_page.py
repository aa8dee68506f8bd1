"""The table and the figure of the benchmark of tracing, from its results."""

from pathlib import Path
from typing import Any


def table(result: dict[str, Any]) -> str:
    """Markdown: one row for each size, then what was measured at one size only."""
    about = result["about"]
    lines = [
        f"{about['date']}, {about['machine']}, load average {about['load']} (its own work "
        f"included), {about['versions']}. Text: {about['text']}. Texts of "
        f"{about['tokens_asked']} tokens are traced.",
        "",
        "| tokens indexed | index from ids, s (CPU) | bytes a token | open, all hashed, s "
        "| spans, ms | spans of a copied text, ms | first question, ms | pages dropped, ms |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in result["growth"]:
        cells = (
            f"{row['tokens'] / 1e6:.1f}M",
            f"{row['index_seconds']} ({row['index_cpu_seconds']})",
            row["bytes_per_token"],
            row["open_seconds"],
            row["spans_ms"]["p50"],
            row["copied_text_ms"]["p50"],
            row["first_touch_ms"],
            row["dropped_pages_ms"],
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    command, peer = result["command"], result.get("infini-gram")
    lines += ["", "| with the third row's index | |", "| --- | ---: |"]
    facts = {
        "spans from characters, by the rules above": f"{result['from_characters_ms']['p50']} ms",
        "a whole trace, documents ranked": f"{result['whole_trace_ms']['p50']} ms",
        "`flexolmo trace index`, tokenizer included": f"{command['seconds']} s",
        "its memory above that for one document": f"{command['bytes_per_token_above_that']} bytes "
        "a token",
    }
    if peer:
        facts |= {
            "infini-gram's attribute()": f"{peer['attribute_ms']} ms",
            "ours, the kept spans and their counts": f"{peer['ours_ms']} ms, "
            f"{peer['times_faster_than_infini_gram']} times faster",
            "ours, every span with up to 10 places": f"{peer['ours_all_spans_with_places_ms']} ms",
            "spans and counts are equal": "yes" if peer["spans_and_counts_are_equal"] else "NO",
        }
    return "\n".join([*lines, *(f"| {name} | {value} |" for name, value in facts.items())])


def plot(result: dict[str, Any], file: Path) -> None:
    """The growth from the smallest to the largest index."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    rows = result["growth"]
    tokens = [row["tokens"] / 1e6 for row in rows]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for label, key in (("of other files", "spans_ms"), ("that is indexed", "copied_text_ms")):
        left.plot(tokens, [row[key]["p50"] for row in rows], "o-", label=f"of text {label}")
    left.set_ylabel(f"spans of {result['about']['tokens_asked']} tokens, ms")
    left.set_ylim(bottom=0)
    seconds = {
        "index, from ids": "index_seconds",
        "its CPU time": "index_cpu_seconds",
        "open, all hashed": "open_seconds",
    }
    for label, key in seconds.items():
        right.plot(tokens, [row[key] for row in rows], "o-", label=label)
    right.set_ylabel("seconds")
    right.set_yscale("log")
    for axis in (left, right):
        axis.set_xscale("log", base=4)
        axis.set_xticks(tokens, [f"{x:.0f}" for x in tokens])
        axis.set_xlabel("million tokens indexed")
        axis.legend()
    figure.savefig(file, dpi=120)
