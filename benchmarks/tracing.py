"""How long tracing takes: making an index, opening it, and the spans of a text, beside infini-gram.

    python -m benchmarks.tracing --out docs/results/tracing.json --peer

The text is the Python sources of this machine (`benchmarks/tracing_text.py`). Indexes of 1/16, 1/4,
1 and 4 times `--tokens` are made from token ids, and once `flexolmo trace index` makes one from
text. The texts that are traced, of 512 tokens each, are of files that no index holds; each is
traced several times, and its fastest time counts, so that other programs disturb less.
`--peer` needs `pip install --no-deps infini-gram==2.6.0`.
"""

import argparse
import itertools
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import commit, machine, versions
from benchmarks.tracing_page import plot, table
from benchmarks.tracing_peer import ALL, Peer
from benchmarks.tracing_text import Text, read_text, write_rows
from flexolmo_jax.studies.loading import evict
from flexolmo_jax.tracing.index import Index
from flexolmo_jax.tracing.layout import FORMAT, TOKENIZER, entry, read_tokenizer, write_index
from flexolmo_jax.tracing.shard_writer import ShardWriter
from flexolmo_jax.tracing.spans import rarest
from flexolmo_jax.tracing.trace import find_matches, trace

LENGTH, TEXTS, REPEATS = 512, 40, 8
SIZES = (1 / 16, 1 / 4, 1, 4)
KEPT = math.ceil(0.05 * LENGTH)
BARS = {
    "spans_ms": ("at most", 4.0),
    "times_faster_than_infini_gram": ("at least", 15.0),
    "first_touch_ms": ("at most", 500.0),
    "index_seconds": ("at most", 12.0),
}


def make_index(folder: Path, text: Text, documents: int) -> tuple[float, float]:
    """Makes an index of the first documents from their ids; returns seconds: in all, and of CPU."""
    _, vocabulary, digest = read_tokenizer(text.tokenizer, folder)
    folder.mkdir()
    begun, used = time.perf_counter(), time.process_time()
    (folder / TOKENIZER).write_text(text.tokenizer, encoding="utf-8")
    writer = ShardWriter(folder / "00000", vocabulary)
    for document, ids in itertools.islice(zip(text.documents, text.ids, strict=True), documents):
        writer.add(document, ids)
    files = {TOKENIZER: entry(folder / TOKENIZER), **writer.close()}
    write_index(
        folder,
        {
            "format": FORMAT, "owner": "benchmark", "tokenizer": digest,
            "vocabulary_size": vocabulary, "shards": ["00000"], "unused": [], "building": None,
            "files": files,
        },
    )  # fmt: skip
    return time.perf_counter() - begun, time.process_time() - used


def maximal(index: Index, ids: np.ndarray) -> list[tuple[int, int]]:
    """The maximal spans of a text, as infini-gram's attribution defines them."""
    ends = np.arange(len(ids)) + index.longest_matches(ids)
    before = np.maximum.accumulate(np.concatenate([[0], ends[:-1]]))
    is_kept = (ends > np.arange(len(ids))) & (ends > before)
    return [(int(start), int(ends[start])) for start in np.flatnonzero(is_kept)]


def kept_spans(index: Index, ids: np.ndarray) -> list[tuple[tuple[int, int], int]]:
    """Of the maximal spans the rarest, with how often they occur: what a trace shows first."""
    log_probability = np.log(np.maximum(index.counts[ids], 1))
    total = np.concatenate([[0], np.cumsum(log_probability)])
    spans = sorted(maximal(index, ids), key=lambda span: total[span[1]] - total[span[0]])[:KEPT]
    return [(span, index.find(ids[slice(*span)], most=0)[0]) for span in spans]


def every_span(index: Index, ids: np.ndarray) -> list[tuple[tuple[int, int], int]]:
    """All that infini-gram's attribution gives: every maximal span, with up to ten places."""
    spans = maximal(index, ids)
    return [(span, index.find(ids[slice(*span)], most=10)[0]) for span in spans]


def rules(index: Index, text: str) -> list[int]:
    """What a trace does before it looks at documents: from characters to kept spans and counts."""
    found, length = find_matches(text, [index])
    return [
        sum(index.find(form, most=0)[0] for form in match.forms)
        for match in rarest(found, index.counts, length)
    ]


def milliseconds(work: Callable, texts: list) -> dict[str, float]:
    """Median and 95th percentile over texts of the fastest of several times for each, warm."""
    taken = [math.inf] * len(texts)
    for _ in range(REPEATS):
        for number, one in enumerate(texts):
            begun = time.perf_counter()
            work(one)
            taken[number] = min(taken[number], 1000 * (time.perf_counter() - begun))
    return {name: round(float(np.percentile(taken, int(name[1:]))), 2) for name in ("p50", "p95")}


def first_time(folder: Path, ids: np.ndarray, is_dropped: bool) -> float:
    """Milliseconds of the first question after opening; with the pages of all files dropped."""
    index = Index.open(folder)
    if is_dropped:
        evict(folder)
    begun = time.perf_counter()
    kept_spans(index, ids)
    return round(1000 * (time.perf_counter() - begun), 1)


def asked_texts(text: Text, first: int) -> list[np.ndarray]:
    """512 tokens of each of the documents that no index holds."""
    long = [ids for ids in text.ids[first:] if len(ids) >= 2 * LENGTH]
    if len(long) < TEXTS:
        raise SystemExit(f"only {len(long)} documents are left to trace")
    return [ids[len(ids) // 2 - LENGTH // 2 :][:LENGTH] for ids in long[:TEXTS]]


def measured(folder: Path, text: Text, documents: int, asked: list[np.ndarray]) -> dict[str, Any]:
    """The row of one size; the index stays in `folder`."""
    row: dict[str, Any] = {"documents": documents}
    seconds = make_index(folder, text, documents)
    row["index_seconds"], row["index_cpu_seconds"] = (round(x, 1) for x in seconds)
    begun = time.perf_counter()
    index = Index.open(folder)
    row["open_seconds"] = round(time.perf_counter() - begun, 2)
    row["tokens"] = index.num_tokens
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    row["bytes_per_token"] = round(size / index.num_tokens, 1)
    row["first_touch_ms"] = first_time(folder, asked[0], is_dropped=False)
    row["dropped_pages_ms"] = first_time(folder, asked[1], is_dropped=True)
    lengths = [index.longest_matches(ids).mean() for ids in asked]
    row["mean_longest_match"] = round(float(np.mean(lengths)), 1)
    row["spans_ms"] = milliseconds(partial(kept_spans, index), asked)
    row["copied_text_ms"] = milliseconds(partial(kept_spans, index), asked_texts(text, 0))
    return row


def by_command(folder: Path, text: Text, documents: int) -> dict[str, float]:
    """`flexolmo trace index` from text to index: seconds, and peak memory."""
    peaks, seconds = [], []
    tokenizer = folder / TOKENIZER
    tokenizer.write_text(text.tokenizer, encoding="utf-8")
    program = "import sys; from flexolmo_jax.commands.main import main; main(sys.argv[1:]); "
    program += "print(open('/proc/self/status').read())"
    for number, count in enumerate((1, documents)):  # the first: what the process needs anyway
        write_rows(text, count, folder / "rows.jsonl")
        words = ("--data", "rows.jsonl", "--tokenizer", TOKENIZER, "--out", f"made_{number}")
        begun = time.perf_counter()
        command = [sys.executable, "-c", program, "trace", "index", *words]
        done = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
        seconds.append(time.perf_counter() - begun)
        peaks.append(1024 * int(re.search(r"VmHWM:\s*(\d+) kB", done.stdout)[1]))  # type: ignore
    tokens = sum(len(ids) + 1 for ids in text.ids[:documents])
    return {
        "seconds": round(seconds[1], 1),
        "peak_megabytes": round(peaks[1] / 1e6),
        "of_which_for_one_document": round(peaks[0] / 1e6),
        "bytes_per_token_above_that": round((peaks[1] - peaks[0]) / tokens, 1),
    }


def beside_peer(
    folder: Path, index: Index, text: Text, documents: int, asked: list[np.ndarray]
) -> dict[str, Any]:
    """infini-gram on the same tokens: how long it takes, and that both find the same."""
    folder.mkdir()
    peer = Peer(folder, text.ids[:documents], index.counts)
    ours = milliseconds(partial(kept_spans, index), asked)["p50"]
    theirs = milliseconds(peer.attribute, asked)["p50"]
    is_equal = all(
        [((span["l"], span["r"]), span["count"]) for span in peer.attribute(ids, ALL)]
        == every_span(index, ids)
        for ids in asked[:10]
    )
    return {
        "attribute_ms": round(theirs, 1),
        "ours_ms": ours,
        "ours_all_spans_with_places_ms": milliseconds(partial(every_span, index), asked)["p50"],
        "times_faster_than_infini_gram": round(theirs / ours, 1),
        "spans_and_counts_are_equal": is_equal,
        "suffix_array_seconds": round(peer.seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tracing", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--tokens", type=int, default=16_000_000, help="default: %(default)s")
    parser.add_argument("--peer", action="store_true", help="measure infini-gram too")
    parser.add_argument("--out", required=True, help="JSON; a figure goes beside it")
    args = parser.parse_args()
    largest = int(args.tokens * max(SIZES))
    text = read_text(largest + 4 * TEXTS * LENGTH + 2_000_000)
    ends = np.cumsum([len(ids) for ids in text.ids])
    counts = [int(np.searchsorted(ends, args.tokens * size)) + 1 for size in SIZES]
    asked = asked_texts(text, counts[-1])
    about = {
        "machine": machine(), "date": time.strftime("%Y-%m-%d"),
        "versions": versions("numpy", "pydivsufsort", "tokenizers", "infini-gram"),
        "commit": commit(), "text": text.about, "tokens_asked": LENGTH,
    }  # fmt: skip
    result: dict[str, Any] = {"about": about, "growth": []}
    with tempfile.TemporaryDirectory() as scratch:
        for number, documents in enumerate(counts):
            folder = Path(scratch) / f"index_{number}"
            row = measured(folder, text, documents, asked)
            result["growth"].append(row)
            print(row, flush=True)
            if SIZES[number] != 1:
                continue
            index = Index.open(folder)
            written = [index.tokenizer.decode(ids.tolist()) for ids in asked]
            result["from_characters_ms"] = milliseconds(partial(rules, index), written)
            result["whole_trace_ms"] = milliseconds(partial(trace, indexes=[index]), written)
            if args.peer:
                place = Path(scratch) / "peer"
                result["infini-gram"] = beside_peer(place, index, text, documents, asked)
            about["load"] = round(os.getloadavg()[0], 1)  # of other programs, too
            result["command"] = by_command(Path(scratch), text, documents)
            print(json.dumps(result, indent=1), flush=True)
    Path(args.out).write_text(json.dumps(result, indent=2) + "\n")
    plot(result, Path(args.out).with_suffix(".png"))
    print(table(result), "", *verdicts(result), sep="\n")


def verdicts(result: dict[str, Any]) -> list[str]:
    """Whether the bars are met, at `--tokens`."""
    row = result["growth"][SIZES.index(1)]
    values = {**row, "spans_ms": row["spans_ms"]["p50"], **result.get("infini-gram", {})}
    lines = []
    for name, (which, bar) in BARS.items():
        if name in values:
            is_met = values[name] <= bar if which == "at most" else values[name] >= bar
            lines.append(f"{name} {values[name]}, {which} {bar:g}: {'met' if is_met else 'MISSED'}")
    return lines


if __name__ == "__main__":
    main()
