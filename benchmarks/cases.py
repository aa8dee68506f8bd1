"""The cases: which sides take part in each, how each side runs it, and how much work one run is.

JAX and PyTorch are imported only in the process of a side that needs them.
"""

import dataclasses
import random
from collections.abc import Callable
from typing import NamedTuple

from benchmarks.sizes import LAYERS, Size
from flexolmo_jax.modeling import flops

YARDSTICK = "the machine: "
MATMULS = "its products alone"
VOCABULARY = 100_352  # of the loss at full size
AT_A_TIME = 16  # requests
NUM_BYTES = {"ours, bfloat16": 2, "ours, int8": 1}  # per weight; else 4
Run = Callable[[], object]


class Side(NamedTuple):
    """One contestant of a case."""

    label: str
    case: str
    option: str  # what the case's `jax` or `pytorch` does differently on this side
    is_pytorch: bool = False

    def build(self, size: Size) -> Run:
        """One run, ready to be timed; imports JAX or PyTorch."""
        case = CASES[self.case]
        return (case.pytorch if self.is_pytorch else case.jax)(size, self.option)


EAGER = ("transformers, eager", "eager")
TRANSFORMERS = (EAGER, ("transformers, grouped_mm", "grouped_mm"))


@dataclasses.dataclass(frozen=True)
class Case:
    """Work that is timed.

    Attributes:
      name: in the table and on the command line.
      ours: (label, option) of each side that runs `jax`.
      baselines: (label, option) of each side that runs `pytorch`.
      yardstick: the case that measures the machine's own rate, alternately with this one.
    """

    name: str
    ours: tuple[tuple[str, str], ...] = (("ours", ""),)
    baselines: tuple[tuple[str, str], ...] = ()
    yardstick: str | None = "gemm"

    def sides(self) -> list[Side]:
        """All sides, in the order of the table."""
        found = [Side(label, self.name, option) for label, option in self.ours]
        found += [Side(label, self.name, option, True) for label, option in self.baselines]
        if self.yardstick:
            label = {"gemm": "GEMM", "stream": "matrix-vector product"}[self.yardstick]
            found.append(Side(f"{YARDSTICK}{label}", self.yardstick, ""))
        return found

    def tokens(self, size: Size) -> int:
        """Tokens that one run generates or reads; 0 if it has none."""
        return size.batch * size.length

    def flops(self, size: Size) -> float:
        """FLOPs that one run needs; 0 if bytes are the limit."""
        return 0.0

    def read_bytes(self, size: Size, label: str) -> float:
        """Bytes that one run has to read on the side `label`; 0 if FLOPs are the limit."""
        return 0.0

    def jax(self, size: Size, option: str) -> Run:
        """One run in JAX."""
        raise NotImplementedError(f"{self.name} does not run in JAX")

    def pytorch(self, size: Size, option: str) -> Run:
        """One run in PyTorch."""
        raise NotImplementedError(f"{self.name} does not run in PyTorch")


class MatrixProduct(Case):
    def tokens(self, size: Size) -> int:
        return 0

    def flops(self, size: Size) -> float:
        return 2.0 * size.gemm**3

    def jax(self, size: Size, option: str) -> Run:
        from benchmarks import flexolmo

        return flexolmo.matrix_product(size)

    def pytorch(self, size: Size, option: str) -> Run:
        from benchmarks import pytorch

        return pytorch.matrix_product(size)


class MatrixVectorProduct(Case):
    def tokens(self, size: Size) -> int:
        return 0

    def read_bytes(self, size: Size, label: str) -> float:
        return (2.0 if size.config.dtype == "bfloat16" else 4.0) * size.stream**2

    def jax(self, size: Size, option: str) -> Run:
        from benchmarks import flexolmo

        return flexolmo.matrix_vector_product(size)

    def pytorch(self, size: Size, option: str) -> Run:
        from benchmarks import pytorch

        return pytorch.matrix_vector_product(size)


@dataclasses.dataclass(frozen=True)
class ExpertStep(Case):
    """A training step of an expert; the option is a rematerialization policy, or "loop"."""

    gating: str = "softmax"

    def flops(self, size: Size) -> float:
        return flops.expert_step_flops(size.config, size.length) * self.tokens(size)

    def jax(self, size: Size, option: str) -> Run:
        from benchmarks import flexolmo

        if option == "products":
            return flexolmo.expert_step_matmuls(size)
        if option == "loop":
            return flexolmo.expert_step(size, self.gating, None, unrolled=False)
        return flexolmo.expert_step(size, self.gating, option or None)

    def pytorch(self, size: Size, option: str) -> Run:
        from benchmarks import pytorch

        return pytorch.expert_step(size, option)


class AnchorStep(Case):
    def flops(self, size: Size) -> float:
        return flops.anchor_step_flops(size.config, size.length) * self.tokens(size)

    def jax(self, size: Size, option: str) -> Run:
        from benchmarks import flexolmo

        return flexolmo.anchor_step(size)

    def pytorch(self, size: Size, option: str) -> Run:
        from benchmarks import pytorch

        return pytorch.anchor_step(size)


class MergedForward(Case):
    """Logits of a merged model; the option is the expert compute."""

    def flops(self, size: Size) -> float:
        return flops.forward_flops(size.config, size.length, size.active) * self.tokens(size)

    def jax(self, size: Size, option: str) -> Run:
        from benchmarks import flexolmo

        return flexolmo.merged_forward(size, option)

    def pytorch(self, size: Size, option: str) -> Run:
        from benchmarks import pytorch

        return pytorch.merged_forward(size, option)


@dataclasses.dataclass(frozen=True)
class Decode(Case):
    """Generation; the option is the form of the weights."""

    batch: int = 1

    def tokens(self, size: Size) -> int:
        return self.batch * size.new_tokens

    def read_bytes(self, size: Size, label: str) -> float:
        """Bytes of weights and cache.

        Each step reads the projections, the head and the experts that any sequence uses: A for one
        sequence; for B of them, E (1 - (1 - A/E)^B) of E if each chooses at random. It also reads
        the cached keys and values: those of the prompt, and of half of the new tokens on average.
        """
        c = size.config
        used = size.experts * (1 - (1 - size.active / size.experts) ** self.batch)
        layer: float = 2 * c.width * c.head_size * (c.num_heads + c.kv_heads)
        layer += 3 * used * c.width * c.ffn_width
        weights = c.num_layers * layer + c.width * c.vocab_size
        positions = self.batch * (size.prompt + size.new_tokens / 2)
        cache = 2 * c.num_layers * positions * c.kv_heads * c.head_size
        of_cache = 2 if "bfloat16" in label else 4  # with int8, only weights are rounded
        return (NUM_BYTES.get(label, 4) * weights + of_cache * cache) * size.new_tokens

    def jax(self, size: Size, option: str) -> Run:
        from benchmarks import flexolmo

        return flexolmo.generate(size, self.batch, option)

    def pytorch(self, size: Size, option: str) -> Run:
        from benchmarks import pytorch

        return pytorch.generate(size, self.batch, option)


class Masks(Decode):
    """Generation with all experts, or with some masked in each sequence."""

    def read_bytes(self, size: Size, label: str) -> float:
        return 0.0


class Requests(Case):
    """Generation for requests of many lengths, 16 at a time; the option is how they share a batch.

    A static batch runs until its longest continuation ends; only what was asked for counts.
    """

    def tokens(self, size: Size) -> int:
        return sum(new for _, new in requests(size))

    def jax(self, size: Size, option: str) -> Run:
        from benchmarks import flexolmo

        return flexolmo.requests(size, requests(size), AT_A_TIME, option)

    def pytorch(self, size: Size, option: str) -> Run:
        from benchmarks import pytorch

        return pytorch.requests(size, requests(size), AT_A_TIME, option)


def requests(size: Size) -> list[tuple[int, int]]:
    """Tokens of the prompt and new tokens of 64 requests: 16 to 512, and 16 to 256."""
    draw, most = random.Random(0), min(512, size.length)
    lengths = [(draw.randint(16, most), draw.randint(16, most // 2)) for _ in range(64)]
    return lengths if size.config.width > 64 else lengths[:20]  # fewer in the suite `smoke`


@dataclasses.dataclass(frozen=True)
class MoeLayer(Case):
    """Forward and backward of one mixture of experts; the option is the expert compute."""

    experts: int = 8
    active: int = 4

    def tokens(self, size: Size) -> int:
        return size.tokens

    def flops(self, size: Size) -> float:
        # Forward, and backward to inputs and weights.
        return 3 * 6.0 * size.config.width * size.config.ffn_width * self.active * size.tokens

    def jax(self, size: Size, option: str) -> Run:
        from benchmarks import flexolmo

        if option == "products":
            return flexolmo.moe_layer_matmuls(size, self.experts, self.active)
        return flexolmo.moe_layer(size, self.experts, self.active, option)

    def pytorch(self, size: Size, option: str) -> Run:
        from benchmarks import pytorch

        return pytorch.moe_layer(size, self.experts, self.active, option)


class Loss(Case):
    """The loss at full vocabulary, and its gradient to the hidden states; the head is frozen."""

    def flops(self, size: Size) -> float:
        return 4.0 * size.config.width * VOCABULARY * self.tokens(size)

    def jax(self, size: Size, option: str) -> Run:
        from benchmarks import flexolmo

        return flexolmo.loss(size, VOCABULARY, in_chunks=option == "chunks")

    def pytorch(self, size: Size, option: str) -> Run:
        from benchmarks import pytorch

        return pytorch.loss(size, VOCABULARY)


class Files(Case):
    """Work on packages; the option says what is done with them."""

    def tokens(self, size: Size) -> int:
        return 0

    def jax(self, size: Size, option: str) -> Run:
        from benchmarks import flexolmo

        return flexolmo.packages(size, option)

    def pytorch(self, size: Size, option: str) -> Run:
        from benchmarks import pytorch

        return pytorch.load(size, option)


PLAIN_READ = ("plain read of the files", "read")
COMPUTE = (("ours, dense", "dense"), ("ours, grouped", "grouped"))
FORMS = tuple((f"ours, {form}", form) for form in ("float32", "bfloat16", "int8"))
HOW = (("ours, engine", "engine"), ("ours, static batches", "batches"))
IN_EACH = (("ours, all experts", "all"), ("ours, others off in each", "off"))
POLICIES = tuple((f"ours, {policy}", policy) for policy in ("none", "matmuls", "layer"))
LOSSES = (("ours, 128 positions at a time", "chunks"), ("ours, all logits", ""))
ONLY_MATMULS = (MATMULS, "products")
IN_A_LOOP = ("ours, layers in a loop", "loop")

CASES: dict[str, Case] = {
    case.name: case
    for case in (
        MatrixProduct("gemm", (("jax", ""),), (("torch", ""),), None),
        MatrixVectorProduct("stream", (("jax", ""),), (("torch", ""),), None),
        ExpertStep("expert_step", (("ours", ""), IN_A_LOOP, ONLY_MATMULS), TRANSFORMERS),
        ExpertStep("expert_alone_step", (("ours, gate fixed to 1", ""),), gating="fixed"),
        AnchorStep("anchor_step", baselines=(EAGER,)),
        MergedForward("merged_forward", COMPUTE, TRANSFORMERS),
        *(Decode(f"decode_{n}", FORMS, TRANSFORMERS, "stream", batch=n) for n in (1, 8)),
        Decode("decode_16", FORMS[:1], yardstick="stream", batch=16),
        Requests("requests_64", HOW, TRANSFORMERS[:1], yardstick=None),
        Masks("masks_8", IN_EACH, yardstick=None, batch=8),
        *(
            MoeLayer(f"moe_{e}_{a}", (*COMPUTE, ONLY_MATMULS), TRANSFORMERS, experts=e, active=a)
            for e, a in LAYERS
        ),
        ExpertStep("remat", POLICIES),
        Loss("loss_100352", LOSSES, (("torch, cross_entropy", ""),)),
        Files("load", (("ours", "load"), PLAIN_READ), (EAGER,), None),
        Files("merge", (("ours", "merge"), PLAIN_READ), yardstick=None),
    )
}
