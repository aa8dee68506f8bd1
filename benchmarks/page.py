"""The table: Markdown from the results."""

import statistics

from benchmarks.cases import CASES, YARDSTICK
from benchmarks.requirements import targets
from benchmarks.sizes import Size

INTRODUCTION = """\
Each side of a case runs in a process of its own, and the sides are interleaved; each timed run
follows an untimed one, but in lines measured before 5e289b7. Lines of 7f7ee47, 3815971 and afeddf0
are of an older CPU (AMD Zen 4) than the others (Zen 5): compare their ratios, not their rates. The
table shows medians; *spread* is the range of the runs over their median. *Speedup over PyTorch*:
the rate of the line over that of the faster PyTorch line. *Fraction of peak*: the rate of needed
FLOPs (`flexolmo_jax/modeling/flops.py`; no weight gradients of frozen weights) over the rate of a
plain matrix product, or the rate of needed bytes of weights and cache over that of a matrix-vector
product; both are measured interleaved with the case. *First run*: the first one with what comes
before it, imports of the libraries too, but for JAX itself, which every process has imported by
then; mostly compilation. *Memory*: the largest resident size of the process, without that once
libraries are imported. *Layers in a loop*: as `flexolmo train` runs by default; the other training
steps of ours are unrolled (`unroll`), which is faster, compiles longer and takes more memory. *Its
products alone* are matmuls: the nine of a layer, forward and backward, each as one batched matmul
with equally many rows for every expert; or all matmuls with weights of a training step, one after
the other. `load` and `merge` read files that the system has cached in memory. A case whose sides
need more memory than the machine has is missing: at 190M, moe_64_4 needs more than 23 GB.
[profile.md](profile.md) shows where the time of a run goes.

**On a GPU** nothing has been measured yet: none could be had. `benchmarks/device.sh OUT` stands
ready; so far only its toy run on a CPU was made (`--toy`, part of CI). On one bare machine it takes
at most 8 minutes for parity with transformers, training steps, layers, decoding and first runs of a
model of 1B parameters in bfloat16, all beside transformers, and writes a table and JSON. There
PyTorch trains in bfloat16 weights and states; ours are float32."""

LIMITS = """\
*At the machine's rate*: the figure if every needed FLOP ran at the rate of JAX's large matrix
product, or every needed byte at that of its matrix-vector product, and nothing else took time. *At
that of its matmuls*: the figure if the step consisted of its matmuls with weights only, in their
real shapes. No implementation can reach a target above these figures on that machine.

*Where misses come from.* Decoding in 8 bits: XLA for CPU has no matmul of floats and 8-bit
integers. For one sequence, ours is a fused loop that converts each weight, which takes longer than
memory needs to deliver it; for several, each activation becomes three integers, so that three
matmuls run instead of one. Products in 4 bits with scales of groups, which decoding does not offer,
are not reliably faster (`python -m benchmarks.four_bits`, two runs: 34 and 61 us beside 46 and 43
in 8 bits for 512 x 1408, 101 and 130 beside 91 and 84 for 1024 x 2816; 2 cores, 2026-11-30).
Choosing a token with temperature and top_p takes 0.2 ms for one sequence and 8,192 tokens, and 12
ms for 16 sequences and the 100,352 tokens of OLMo 2, where transformers takes 0.6 and 82; greedy
0.02 and 0.6 beside 0.01 and 0.5 (`python -m benchmarks.sampling`, 2 cores, 2026-11-30). In float32,
XLA's product of one row and 512 x 512 numbers runs on one core, at its bandwidth
(`findings/jax_cpu_multiplies_a_row_by_a_small_matrix_on_one_core.sh`). In bfloat16, products with
the copies of matrices that decoding makes read about as many bytes in a second as those in float32
do (15 to 24 beside 19 to 22 GB/s for 512 x 1408, 11 to 14 beside 12 to 13 for 512 x 512), and
nothing that reads matrices as they are stored is reliably faster (`python -m benchmarks.one_row`,
four runs, 2 cores, 2026-11-30 and 2026-12-01). Of a run, products are 74% at 50M and 80% at 190M
(profile.md); the rest is the cache of keys and values, the router, and Python between programs.
Batches of floats: XLA's matmul of a few rows reads weights more slowly than its product with one.
All also count reading the prompt. Memory of decode_1: ours takes 0.1 to 0.2 GB more than PyTorch at
either size. Requests: `decode_16` reads prompts of 64 tokens only, and at the end of the requests
few of them share a batch of 16. An unrolled training step holds more hidden activations than one
with layers in a loop. Loading: every byte is hashed (SHA-256) and copied into stacks of experts;
transformers maps its file, and checks nothing."""


def page(about: dict[str, str], results: dict[str, dict[str, dict]], sizes: dict[str, Size]) -> str:
    """Markdown.

    Args:
      about: the command, the machine and so on.
      results: size -> case -> {date, commit, sides: label -> {seconds, first, peak_bytes}}.
      sizes: by name.
    """
    lines = ["# Benchmarks", "", *(f"- {key}: {value}" for key, value in about.items())]
    lines += ["", INTRODUCTION, "", "## Targets", "", *targets(results, sizes), "", LIMITS]
    for name, cases in results.items():
        c, size = sizes[name].config, sizes[name]
        lines += [
            "",
            f"## {name}: D {c.width}, F {c.ffn_width}, L {c.num_layers}, {c.num_heads} heads, V "
            f"{c.vocab_size}, S {size.length}, B {size.batch}, {c.dtype}",
            "",
            "| case | | rate | spread | speedup over PyTorch | fraction of peak | first run | "
            "memory | measured |",
            "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
        ]
        for case, result in cases.items():
            measured = f"{result['date']}, {result['commit']}"
            for label in result["sides"]:
                cells = " | ".join(_cells(case, label, result, size))
                lines.append(f"| {case} | {cells} | {measured} |")
    return "\n".join(lines) + "\n"


def _cells(name: str, label: str, result: dict, size: Size) -> list[str]:
    case, gemm, stream = CASES[name], CASES["gemm"], CASES["stream"]
    medians = {side: statistics.median(m["seconds"]) for side, m in result["sides"].items()}
    measured, seconds = result["sides"][label], medians[label]
    is_yardstick = label.startswith(YARDSTICK)
    if is_yardstick:
        case = gemm if case.flops(size) else stream
    baselines = [
        medians[s.label] for s in CASES[name].sides() if s.is_pytorch and s.label in medians
    ]
    speedup = f"{min(baselines) / seconds:.2f}x" if baselines and not is_yardstick else ""
    work, read = case.flops(size), case.read_bytes(size, label)
    fraction = ""
    for side, yardstick in medians.items():
        if is_yardstick or not side.startswith(YARDSTICK):
            continue
        if work:
            fraction = f"{work / seconds / (gemm.flops(size) / yardstick):.0%}"
        elif read:
            fraction = f"{read / seconds / (stream.read_bytes(size, '') / yardstick):.0%}"
    if case is gemm:
        rate = f"{work / seconds / 1e9:,.0f} GFLOP/s"
    elif case is stream:
        rate = f"{read / seconds / 1e9:,.1f} GB/s"
    elif case.tokens(size):
        rate = f"{case.tokens(size) / seconds:,.1f} tokens/s"
    else:
        rate = f"{seconds:.2f} s"
    spread = (max(measured["seconds"]) - min(measured["seconds"])) / seconds
    memory = f"{(measured['peak_bytes'] - measured['library_bytes']) / 1e9:.2f} GB"
    first = f"{measured['first']:.1f} s"
    return [label, rate, f"{spread:.0%}", speedup, fraction, first, memory]
