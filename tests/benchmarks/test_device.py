"""The benchmark of one device: its table, its limits of time, and resuming it."""

import json
import os
import sys
import time
from pathlib import Path

import pytest

from benchmarks.device.__main__ import earlier, failures, run_parts
from benchmarks.device.page import WIDTH, page
from benchmarks.device.process import run
from benchmarks.device.sections import (
    DEVICE_CASES,
    FIRST,
    PARITY,
    PARTS,
    SIZES,
    Part,
    number_of,
    parts_of,
)

ABOUT = {
    "size": "1B", "machine": "16 cores, x86_64, Linux", "commit": "0123abc",
    "gpu": "NVIDIA H200, 143771 MiB, 580.159.03, " + "a long name " * 6,
    "versions": "jax 0.11.2, jaxlib 0.11.2, flax 0.12.13, torch 2.11.0, transformers 5.17.0",
}  # fmt: skip


def result(seconds=0.2):
    return {"seconds": [seconds] * 3, "first": 12.3, "since_start": 20.0, "peak_bytes": 31_000_000}


def everything(parts, seconds=0.2):
    """Made-up results of all parts."""
    found = {}
    for part in parts:
        for case in part.cases:
            check = ["logits, bfloat16, default precision, grouped", "4.2e-03", False]
            own = {"checks": [check]} if case == PARITY else result(seconds)
            found.setdefault(case, {})[part.label] = own
    return found


def record(results):
    return {**ABOUT, "date": "2026-11-28", "wall_seconds": 412, "results": results}


@pytest.mark.parametrize("size", SIZES)
def test_the_table_has_every_part_and_80_columns(size):
    parts = parts_of(size)
    text = page({**record(everything(parts)), "size": size})
    assert max(map(len, text.splitlines())) <= WIDTH == 80
    for part in parts:
        assert f"  {part.label}" in text
    assert "logits, bfloat16, default precision, grouped" in text and "!!" in text
    assert "412 s in all" in text


def test_speedups_shares_and_targets_are_those_of_the_times():
    size = SIZES["1B"]
    work = DEVICE_CASES["expert_step"].flops(size)
    half = work / (0.5 * 989e12)  # seconds at half of the peak
    results = {"expert_step": {"ours": result(half), "transformers, eager": result(1.4 * half)}}
    text = page(record(results))
    assert "1.40x     50%" in text and "target: speedup 1.5x, of peak 45%: missed" in text
    results["expert_step"]["transformers, eager"] = result(1.6 * half)
    assert "of peak 45%: met" in page(record(results))
    assert f"{size.batch * size.length / half:,.0f} tokens/s" in text


def test_the_table_says_what_was_not_measured():
    failed = {"failed": "jax.errors.JaxRuntimeError: RESOURCE_EXHAUSTED: " + "long " * 40}
    results = {"decode_1": {"ours": failed}, FIRST: {"ours, no cache": failed}, PARITY: {}}
    text = page(record(results))
    assert text.count("not measured: jax.errors.JaxRuntimeError: RESOURCE_EXHAUSTED") == 2
    assert "target" not in text
    assert len(failures(results)) == 2
    bad, good = ["logits", "0.5", False], ["tokens", "96 of 96", True]
    assert failures({PARITY: {"ours": {"checks": [bad, good]}}}) == ["ours: logits: 0.5"]
    assert max(map(len, text.splitlines())) <= WIDTH


def test_every_toy_part_finds_its_own_number():
    for part in parts_of("toy"):
        assert PARTS[number_of(part)].label == part.label
        assert set(part.cases) <= set(PARTS[number_of(part)].cases)


def started(script, tmp_path, limit=20.0):
    words = [sys.executable, "-c", script]
    return run(words, tmp_path, dict(os.environ), tmp_path / "log", limit)


def test_what_a_process_printed_before_it_crashed_counts(tmp_path):
    script = """print('{"case": "a", "x": 1}\\nnoise\\n3', flush=True); {}["gone"]"""
    assert started(script, tmp_path) == ({"a": {"x": 1}}, "KeyError: 'gone'")
    found, why = started("import os; os._exit(9)", tmp_path)
    assert (found, why) == ({}, "it ended with exit code 9")


def test_a_process_is_ended_after_its_limit_with_its_children(tmp_path):
    script = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        """print('{"case": "a", "child": %d}' % child.pid, flush=True)\n"""
        "time.sleep(60)"
    )
    found, why = started(script, tmp_path, limit=2.0)
    assert why == "stopped after 2 s"
    state = Path(f"/proc/{found['a']['child']}/stat")

    def is_dead():  # or nobody has taken notice yet
        try:
            return state.read_text().rpartition(")")[2].split()[0] in "ZX"
        except (FileNotFoundError, ProcessLookupError):
            return True

    for _ in range(200):  # a killed process may still be on its way out
        if is_dead():
            return
        time.sleep(0.05)
    pytest.fail("the child of the stopped process still runs")


class Measure:
    """In place of processes: fails where it is told to, and takes notice of what is asked."""

    def __init__(self, fails=()):
        self.fails, self.asked = fails, []

    def __call__(self, part, cases, limit):
        self.asked.append((part.label, *cases))
        return {c: result() for c in cases if (part.label, c) not in self.fails}, "it failed"


TWO = [
    Part("ours", ("gemm", "stream"), "", False, 10, makes="made"),
    Part("transformers", ("gemm",), "", True, 10),
]


def run_two(tmp_path, measure, seconds=100.0):
    about = {**ABOUT, "size": "toy"}
    results = earlier(tmp_path / "device.json", about)
    run_parts(TWO, results, tmp_path, about, tmp_path, seconds, measure)
    return json.loads((tmp_path / "device.json").read_text())["results"]


def test_a_second_run_measures_only_what_is_missing(tmp_path):
    (tmp_path / "made").touch()
    first = Measure(fails={("ours", "stream")})
    found = run_two(tmp_path, first)
    assert found["stream"]["ours"] == {"failed": "it failed"} and len(first.asked) == 2
    assert "not measured: it failed" in (tmp_path / "device.txt").read_text()
    second = Measure()
    assert run_two(tmp_path, second)["stream"]["ours"] == result()
    assert second.asked == [("ours", "stream")]
    (tmp_path / "made").unlink()  # another part would miss it
    third = Measure()
    run_two(tmp_path, third)
    assert third.asked == [("ours", "gemm", "stream")]


def test_when_time_ends_the_rest_is_named_and_nothing_is_lost(tmp_path):
    (tmp_path / "made").touch()
    run_two(tmp_path, Measure(fails={("transformers", "gemm")}))
    late = Measure()
    found = run_two(tmp_path, late, seconds=5.0)
    assert not late.asked
    assert found["gemm"] == {"ours": result(), "transformers": {"failed": "no time was left"}}


def test_results_of_other_code_do_not_count(tmp_path):
    (tmp_path / "device.json").write_text(json.dumps({**ABOUT, "results": {"gemm": {}}}))
    assert earlier(tmp_path / "device.json", ABOUT) == {"gemm": {}}
    assert earlier(tmp_path / "device.json", {**ABOUT, "commit": "other"}) == {}
