"""What is measured on a device, in order of importance, and how long each part may take.

A *part* is one process: it runs a few cases for one side, and each result counts as soon as it is
printed. So a crash, too little memory or a time limit costs what comes after it in that part only.
"""

import dataclasses
from typing import NamedTuple

from benchmarks.cases import CASES, Case, Decode, MergedForward, Run
from benchmarks.sizes import SUITES, Size
from flexolmo_jax.modeling import flops

PARITY, FIRST = "parity", "first"
OURS, THEIRS = "ours", "transformers"
REFERENCE, MODEL, COMPILED = "reference.npz", "model", "compiled"  # in the folder of the parts
TOY = SUITES["smoke"]["smoke"]
TOY = TOY._replace(config=TOY.config.replace(dtype="bfloat16"))
SIZES = {"1B": SUITES["gpu"]["1B"], "toy": TOY}
ROUNDS = {"1B": 10, "toy": 2}
BATCHES = (1, 8, 64)  # of decoding


class Layers(MergedForward):
    """The layers of a merged model without its head; the option is the expert compute."""

    def flops(self, size: Size) -> float:
        head = 2.0 * size.config.width * size.config.vocab_size
        per_token = flops.forward_flops(size.config, size.length, size.active) - head
        return per_token * self.tokens(size)

    def jax(self, size: Size, option: str) -> Run:
        from benchmarks import flexolmo

        return flexolmo.merged_forward(size, option, with_head=False)

    def pytorch(self, size: Size, option: str) -> Run:
        from benchmarks import pytorch

        return pytorch.merged_forward(size, option, with_head=False)


@dataclasses.dataclass(frozen=True)
class StaticDecode(Decode):
    """Generation, in PyTorch with a static cache, which transformers compiles on a GPU."""

    def pytorch(self, size: Size, option: str) -> Run:
        from benchmarks import pytorch

        return pytorch.generate(size, self.batch, option, cache="static")


DEVICE_CASES: dict[str, Case] = {
    **{name: CASES[name] for name in ("gemm", "stream", "expert_step", "anchor_step")},
    "merged_layers": Layers("merged_layers"),
    **{f"decode_{n}": StaticDecode(f"decode_{n}", batch=n) for n in BATCHES},
}
FIRST_CASE = CASES["decode_1"]  # with transformers' own cache, which it does not compile
DECODE = tuple(f"decode_{n}" for n in BATCHES)


class Part(NamedTuple):
    """One process.

    Attributes:
      label: of the side, as the table shows it.
      cases: names of DEVICE_CASES, or PARITY or FIRST.
      option: what the cases of this side do differently.
      is_pytorch: which side it is.
      limit: seconds, at full size.
      environment: variables that only this process has.
      makes: what it writes into the folder of the parts, for later ones.
    """

    label: str
    cases: tuple[str, ...]
    option: str
    is_pytorch: bool
    limit: int
    environment: tuple[tuple[str, str], ...] = ()
    makes: str = ""


def _ragged_flag(name: str) -> tuple[tuple[str, str], ...]:
    return (("XLA_FLAGS", f"--xla_gpu_experimental_use_ragged_dot_{name}=true"),)


CACHED = (  # relative to the folder of the parts, in which all of them run
    ("JAX_COMPILATION_CACHE_DIR", COMPILED), ("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0"),
)  # fmt: skip
PARTS = (
    Part(THEIRS, (PARITY,), "", True, 60, makes=REFERENCE),
    Part(OURS, (PARITY,), "", False, 100),
    Part("the device", ("gemm", "stream"), "", False, 40),
    Part(OURS, ("expert_step", "anchor_step"), "", False, 90),
    Part(f"{THEIRS}, grouped_mm", ("expert_step", "anchor_step"), "grouped_mm", True, 70),
    Part(OURS, DECODE, "bfloat16", False, 90),
    Part(f"{THEIRS}, grouped_mm", DECODE, "grouped_mm", True, 120),
    Part(f"{OURS}, grouped", ("merged_layers",), "grouped", False, 45),
    Part(f"{OURS}, dense", ("merged_layers",), "dense", False, 45),
    Part(f"{THEIRS}, grouped_mm", ("merged_layers",), "grouped_mm", True, 40),
    Part(f"{OURS}, no cache", (FIRST,), "bfloat16", False, 50, CACHED, COMPILED),
    Part(f"{OURS}, filled cache", (FIRST,), "bfloat16", False, 40, CACHED),
    Part(f"{THEIRS}, grouped_mm", (FIRST,), "grouped_mm", True, 40),
    Part(
        f"{OURS}, grouped, fusion", ("merged_layers",), "grouped", False, 45,
        _ragged_flag("fusion"),
    ),
    Part(
        f"{OURS}, grouped, GEMM", ("merged_layers",), "grouped", False, 45,
        _ragged_flag("grouped_gemm"),
    ),
    Part(f"{THEIRS}, eager", ("expert_step",), "eager", True, 60),
)  # fmt: skip
ON_GPU_ONLY = ("fusion", "GEMM")  # ends of labels
QUICKLY = (("JAX_DISABLE_MOST_OPTIMIZATIONS", "1"),)  # a toy run mostly compiles


def parts_of(size: str) -> list[Part]:
    """The parts at a size: a toy run leaves out kernels that only a GPU has, and large batches."""
    if size != "toy":
        return list(PARTS)
    return [
        part._replace(
            cases=tuple(case for case in part.cases if case not in DECODE[1:]),
            environment=(*part.environment, *QUICKLY),
        )
        for part in PARTS
        if not part.label.endswith(ON_GPU_ONLY)
    ]


def number_of(part: Part) -> int:
    """Where a part, or its toy form, stands in PARTS."""
    (number,) = (
        i for i, x in enumerate(PARTS) if x.label == part.label and part.cases[0] in x.cases
    )
    return number
