"""What a compiled program costs: FLOPs, bytes, collectives.

XLA's own cost analysis counts the body of a loop once; here it counts as often as it runs. TPU
kernels (custom calls) are unknown to both; those of attention and of ragged products are counted
from their shapes. What is not known is an error: a plan with a part left out looks like a plan.
"""

import dataclasses
import math
from collections.abc import Iterator

import numpy as np

from flexolmo_jax.planning import trips
from flexolmo_jax.planning.hlo import Computation, Instruction, Program, Shape, unreadable

FREE = {  # they name, order or wait for what others compute
    "add-dependency", "after-all", "all-gather-done", "all-reduce-done", "async-done",
    "async-update", "bitcast", "collective-permute-done", "constant", "copy-done", "domain",
    "get-dimension-size", "get-tuple-element", "iota", "opt-barrier", "optimization-barrier",
    "parameter", "partition-id", "replica-id", "tuple",
}  # fmt: skip
PASSES = {  # over all of their operands and results; no products, so no FLOPs worth counting
    "abs", "acos", "acosh", "add", "and", "asin", "asinh", "atan2", "atanh", "bitcast-convert",
    "broadcast", "cbrt", "ceil", "clamp", "compare", "complex", "concatenate", "convert", "copy",
    "cosh", "cosine", "count-leading-zeros", "divide", "erf", "exponential",
    "exponential-minus-one", "floor", "imag", "is-finite", "log", "log-plus-one", "logistic",
    "map", "maximum", "minimum", "multiply", "negate", "not", "or", "pad", "popcnt", "power",
    "real", "reduce", "reduce-precision", "reduce-window", "remainder", "reshape", "reverse",
    "rng-bit-generator", "rng-get-and-update-state", "round-nearest-afz", "round-nearest-even",
    "rsqrt", "scatter", "select", "select-and-scatter", "shift-left", "shift-right-arithmetic",
    "shift-right-logical", "sign", "sine", "sinh", "slice", "sort", "sqrt", "subtract", "tan",
    "tanh", "topk", "transpose", "xor",
}  # fmt: skip
COLLECTIVES = {  # bytes that a device receives, as a multiple of the largest shape
    "all-gather": 1.0, "reduce-scatter": 1.0, "all-reduce": 2.0, "all-to-all": 1.0,
    "collective-permute": 1.0, "ragged-all-to-all": 1.0,
}  # fmt: skip
STARTS, ENDS = "AsyncCollectiveStart", "AsyncCollectiveDone"  # of a collective in several fusions
FREE_CALLS = {"AllocateBuffer", "AssumeGatherIndicesInBound", "ConcatBitcast", STARTS, ENDS}
PASSING = {"bitcast", "fusion", "parameter"}  # of a fusion that only bitcasts
KERNEL = "tpu_custom_call"  # the target of all of them: their names say which
ATTENTION = {  # by the kernel's name: products of S x S; how it names its blocks of queries, keys
    "splash_mha_fwd": (2, "block_q", "block_kv"),
    "splash_mha_dkv": (4, "block_q_dkv", "block_kv_dkv"),
    "splash_mha_dq": (3, "block_q_dq", "block_kv_dq"),
}


@dataclasses.dataclass
class Cost:
    """Of a device; bytes are those that HBM and links carry if nothing stays on the chip."""

    flops: float = 0.0
    bytes: float = 0.0
    collectives: dict[str, float] = dataclasses.field(default_factory=dict)  # received, by kind

    def add(self, other: "Cost", times: float = 1.0) -> None:
        self.flops += times * other.flops
        self.bytes += times * other.bytes
        for kind, size in other.collectives.items():
            self.collectives[kind] = self.collectives.get(kind, 0.0) + times * size


def cost(program: Program, turns: int | None = None) -> Cost:
    """What one run of a compiled program costs each device.

    Args:
      program: after all passes of the compiler.
      turns: how often the loop runs whose length the program does not know; None: there is none.

    Raises:
      ValueError: the program has something that is not known here, and so cannot be counted; or
        a loop of unknown length without `turns`; or `turns`, and not one such loop.
    """
    reading = _Reading(program, turns)
    whole = reading.of(program.entry)
    if turns is not None and len(reading.unknown) != 1:
        loops = ", ".join(sorted(one.name for one in reading.unknown)) or "none"
        raise unreadable(
            f"not exactly one loop of unknown length (but {loops})", program.entry.root
        )
    return whole


class _Reading:
    """One walk over a program; every computation is counted once, and used as often as it runs."""

    def __init__(self, program: Program, turns: int | None):
        self.computations, self.turns = program.computations, turns
        self.known: dict[int, Cost] = {}
        self.unknown: set[Instruction] = set()  # loops of unknown length

    def of(self, computation: Computation) -> Cost:
        if id(computation) not in self.known:
            total = self.known[id(computation)] = Cost()
            for one in computation.instructions.values():
                total.add(self.instruction(one, computation))
            self.add_fused_collectives(computation, total)
        return self.known[id(computation)]

    def called(self, one: Instruction) -> list[Computation]:
        return [self.computations[number] for number in one.called]

    def instruction(self, one: Instruction, computation: Computation) -> Cost:
        made, kind, inputs = Cost(), one.kind, computation.inputs(one)
        if kind == "while":
            times = trips.count(one, computation, self.computations)
            if times is None:
                self.unknown.add(one)
                times = self.turns
                if times is None:
                    raise unreadable("a loop whose length it does not say", one)
            for part in self.called(one):
                made.add(self.of(part), times)
        elif kind == "conditional":
            made.add(max(map(self.of, self.called(one)), key=lambda part: (part.flops, part.bytes)))
        elif kind in ("call", "async-start") or kind == "custom-call" and one.called:
            for part in self.called(one):
                made.add(self.of(part))
        elif kind == "fusion":
            (fused,) = self.called(one)
            made.flops = self.of(fused).flops / _groups(one)
            made.bytes = self.fusion_bytes(one, inputs, fused)
        elif base := _collective(kind):
            made.collectives[base] = COLLECTIVES[base] * _received(base, one, inputs)
        elif kind in FREE or one.said.custom_call_target in FREE_CALLS:
            pass
        elif kind in ("dynamic-slice", "gather"):
            made.bytes = 2 * _bytes(one.shapes)
        elif kind == "dynamic-update-slice":
            made.bytes = 2 * _bytes(inputs[1].shapes)
        elif kind == "copy-start":
            made.bytes = _bytes(one.shapes[:2])
        else:
            if kind in ("dot", "convolution"):
                made.flops = _product_flops(one, inputs)
            elif kind == "custom-call":
                made = _kernel(one, inputs)
            elif kind not in PASSES:
                raise unreadable("an operation", one)
            made.bytes += _bytes(one.shapes) + sum(_bytes(given.shapes) for given in inputs)
        return made

    def add_fused_collectives(self, computation: Computation, total: Cost) -> None:
        """Adds collectives that the compiler spreads over fusions: the one that starts, those that
        compute meanwhile, the one that ends. Each names the collective, which happens once."""
        started: set[int] = set()
        for one in computation.instructions.values():
            for fused in self.called(one) if one.kind == "fusion" else ():
                inside = fused.instructions.values()
                starts = any(part.said.custom_call_target == STARTS for part in inside)
                for part in inside:
                    if _collective(part.kind) is None:
                        continue
                    if starts:
                        started.add(part.said.channel_id)
                        total.add(Cost(collectives=self.instruction(part, fused).collectives))
                    elif part.said.channel_id not in started:
                        raise unreadable(f"a collective in %{one.name} that no fusion starts", part)

    def fusion_bytes(
        self, one: Instruction, inputs: list[Instruction], fused: Computation
    ) -> float:
        """What a fusion reads and writes; of a stack, the slice that it takes or sets."""
        total, written = 0.0, [shape.bytes for shape in one.shapes]
        for number, given in enumerate(inputs):
            whole = _bytes(given.shapes)
            touched, is_set = self.touched(number, fused)
            total += min(whole, touched)
            if is_set and whole in written:  # the result takes the place of the stack
                written.remove(whole)
        return total + sum(written)

    def touched(self, number: int, fused: Computation) -> tuple[float, bool]:
        """Bytes of a parameter that a fused computation reads or sets; whether it sets a slice."""
        table = fused.instructions
        total, is_set = 0.0, False
        ids = [
            given for given, one in table.items()
            if one.kind == "parameter" and one.said.parameter_number == number
        ]  # fmt: skip
        while ids:
            given = ids.pop()
            for at, user in ((at, user) for at, user in table.items() if given in user.operands):
                inside = self.called(user)[0].instructions.values() if user.kind == "fusion" else ()
                if {user.kind, *(part.kind for part in inside)} <= PASSING:
                    ids.append(at)
                elif user.kind in ("dynamic-slice", "gather") and user.operands[0] == given:
                    total += _bytes(user.shapes)
                elif user.kind == "dynamic-update-slice" and user.operands[0] == given:
                    total += _bytes(table[user.operands[1]].shapes)
                    is_set = True
                elif user.kind == "fusion":
                    more, sets = self.touched(user.operands.index(given), self.called(user)[0])
                    total, is_set = total + more, is_set or sets
                else:
                    return math.inf, is_set
        return total, is_set


def _bytes(shapes: tuple[Shape, ...]) -> float:
    return sum(shape.bytes for shape in shapes)


def _collective(kind: str) -> str | None:
    base = kind.removesuffix("-start")
    return base if base in COLLECTIVES else None


def _received(base: str, one: Instruction, inputs: list[Instruction]) -> float:
    """The bytes of the larger side of a collective, its operands or its results."""
    given = sum(shape.size for operand in inputs for shape in operand.shapes)
    if base in ("reduce-scatter", "all-reduce", "all-to-all", "collective-permute"):
        return given
    result = sum(shape.size for shape in one.shapes)
    return result - given if one.kind.endswith("-start") else result  # it repeats its operands


def _groups(one: Instruction) -> int:
    """Of a ragged product of all rows with each group's matrix, how many groups share the rows:
    each product skips the rows of the others."""

    def values(config: object) -> Iterator[tuple[str, object]]:
        for key, value in config.items() if isinstance(config, dict) else ():
            yield key, value
            yield from values(value)

    said = dict(values(one.config))
    skips = said.get("iteration_skipper_mode") == "ITERATION_SKIPPER_MODE_GROUP_STARTS"
    return int(str(said.get("num_groups_in_ragged_dot", 1))) if skips else 1


def _product_flops(one: Instruction, inputs: list[Instruction]) -> float:
    out, (left, right) = one.shapes[0].dims, (given.shapes[0].dims for given in inputs[:2])
    if one.kind == "dot":
        summed = one.said.dot.lhs_contracting_dimensions
        return 2.0 * math.prod(out) * math.prod(left[number] for number in summed)
    labels = one.said.convolution
    total = 2.0 * right[labels.kernel_input_feature_dimension]
    total *= out[labels.output_batch_dimension] * out[labels.output_feature_dimension]
    spatial = (
        labels.input_spatial_dimensions, labels.kernel_spatial_dimensions,
        labels.output_spatial_dimensions, one.said.window.dimensions,
    )  # fmt: skip
    for in_axis, kernel_axis, out_axis, window in zip(*spatial, strict=True):
        total *= _pairs(left[in_axis], right[kernel_axis], out[out_axis], window)
    return total / max(one.said.batch_group_count, 1)


def _pairs(size: int, kernel: int, out: int, window) -> int:
    """Pairs of output and kernel positions that meet an input, not a hole or the padding."""
    at = np.arange(out)[:, None] * window.stride + np.arange(kernel) * window.window_dilation
    at, holes = at - window.padding_low, window.base_dilation
    return int(np.sum((at % holes == 0) & (at >= 0) & (at // holes < size)))


def _kernel(one: Instruction, inputs: list[Instruction]) -> Cost:
    """FLOPs of a TPU kernel, and the bytes that it reads beyond its operands, once each."""
    if one.said.custom_call_target != KERNEL:
        raise unreadable("a call", one)
    for name, (products, *names) in ATTENTION.items():
        if one.name.startswith(name):
            block, other = (one.kernel.get(name) for name in names)
            if not isinstance(block, int) or block != other:
                raise unreadable("attention in blocks of an unknown size", one)
            tensor = max(one.shapes, key=lambda shape: math.prod(shape.dims))
            length = tensor.dims[-2]
            # Blocks on the diagonal are computed whole; for each block of the one side, two tensors
            # of the other are read up to the diagonal.
            again = 2 * ((length / block + 1) / 2 - 1) * tensor.size
            return Cost(products * math.prod(tensor.dims) * (length + block), again)
    if one.name.startswith("ragged-dot-metadata"):  # where each group starts
        return Cost()
    if one.name.startswith("ragged-dot") and len(one.shapes) == 1:
        # Rows [R, A] and [R, B] and the experts' matrices [E, A, B], one of the three the result.
        sizes = (shape.dims for given in inputs for shape in given.shapes)
        three = [dims for dims in (*sizes, one.shapes[0].dims) if len(dims) > 1]
        experts = next(dims[0] for dims in three if len(dims) == 3)
        return Cost(2.0 * math.sqrt(math.prod(map(math.prod, three)) / experts))
    raise unreadable("a TPU kernel", one)
