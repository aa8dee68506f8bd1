"""What a compiled program costs: FLOPs, bytes, collectives.

XLA's own cost analysis counts the body of a loop once; this one counts it as often as it runs. TPU
kernels (custom calls) are opaque to both; those of attention and of ragged matmuls are counted
from their shapes. Everything else that is unknown raises an error, because a plan with a missing
part looks like a plan.
"""

import dataclasses
import math
from collections.abc import Iterator

import numpy as np

from flexolmo_jax.planning import trips
from flexolmo_jax.planning.hlo import Computation, Instruction, Program, Shape, unreadable

FREE = {  # opcodes that only name, order or wait for results
    "add-dependency", "after-all", "all-gather-done", "all-reduce-done", "async-done",
    "async-update", "bitcast", "collective-permute-done", "constant", "copy-done", "domain",
    "get-dimension-size", "get-tuple-element", "iota", "opt-barrier", "optimization-barrier",
    "parameter", "partition-id", "replica-id", "tuple",
}  # fmt: skip
ELEMENTWISE = {  # opcodes that read all operands and write all results; their FLOPs are negligible
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
PACKS_INDICES = "GatherScatterIndicesBitpacked"  # of a gather: reads and writes, without FLOPs
BITCASTS = {"bitcast", "fusion", "parameter"}  # opcodes of a fusion that only bitcasts
KERNEL = "tpu_custom_call"  # the target of all TPU kernels; their names differ
ATTENTION = {  # by the kernel's name: matmuls of S x S, names of its query and key block sizes
    "splash_mha_fwd": (2, "block_q", "block_kv"),
    "splash_mha_dkv": (4, "block_q_dkv", "block_kv_dkv"),
    "splash_mha_dq": (3, "block_q_dq", "block_kv_dq"),
}


@dataclasses.dataclass
class Cost:
    """Per device; bytes are those that HBM and ICI carry if nothing stays on the chip."""

    flops: float = 0.0
    bytes: float = 0.0
    collectives: dict[str, float] = dataclasses.field(default_factory=dict)  # received, by kind

    def add(self, other: "Cost", times: float = 1.0) -> None:
        """Adds another cost, `times` times."""
        self.flops += times * other.flops
        self.bytes += times * other.bytes
        for kind, size in other.collectives.items():
            self.collectives[kind] = self.collectives.get(kind, 0.0) + times * size


def cost(program: Program, turns: int | None = None) -> Cost:
    """What one run of a compiled program costs each device.

    Args:
      program: after all passes of the compiler.
      turns: iterations of the one loop whose length the program does not say; None: there is no
        such loop.

    Raises:
      ValueError: the program has an operation that cannot be counted, or a loop of unknown length
        although `turns` is None; or `turns` is given, but there is not exactly one such loop.
    """
    counter = _Counter(program, turns)
    total = counter.of(program.entry)
    if turns is not None and len(counter.unknown) != 1:
        loops = ", ".join(sorted(loop.name for loop in counter.unknown)) or "none"
        raise unreadable(
            f"not exactly one loop of unknown length (but {loops})", program.entry.root
        )
    return total


class _Counter:
    """Counts every computation of a program once, and adds it as often as it runs."""

    def __init__(self, program: Program, turns: int | None):
        self.computations, self.turns = program.computations, turns
        self.known: dict[int, Cost] = {}
        self.unknown: set[Instruction] = set()  # loops of unknown length
        self.started = {  # channels of the collectives that a fusion starts
            part.proto.channel_id
            for computation in program.computations.values()
            for op in computation.instructions.values()
            if op.kind == "fusion"
            for fused in self.called(op)
            if _starts(fused)
            for part in fused.instructions.values()
            if _collective(part.kind)
        }

    def of(self, computation: Computation) -> Cost:
        if id(computation) not in self.known:
            total = self.known[id(computation)] = Cost()
            for op in computation.instructions.values():
                total.add(self.of_instruction(op, computation))
            self.add_fused_collectives(computation, total)
        return self.known[id(computation)]

    def called(self, op: Instruction) -> list[Computation]:
        return [self.computations[number] for number in op.called]

    def of_instruction(self, op: Instruction, computation: Computation) -> Cost:
        spent, kind, inputs = Cost(), op.kind, computation.inputs(op)
        if kind == "while":
            times = trips.count(op, computation, self.computations)
            if times is None:
                self.unknown.add(op)
                times = self.turns
                if times is None:
                    raise unreadable("a loop whose length it does not say", op)
            for part in self.called(op):
                spent.add(self.of(part), times)
        elif kind == "conditional":
            spent.add(
                max(
                    map(self.of, self.called(op)),
                    key=lambda part: (part.flops, part.bytes),
                )
            )
        elif kind in ("call", "async-start") or kind == "custom-call" and op.called:
            for part in self.called(op):
                spent.add(self.of(part))
        elif kind == "fusion":
            (fused,) = self.called(op)
            spent.flops = self.of(fused).flops / _groups(op)
            spent.bytes = self.fusion_bytes(op, inputs, fused)
        elif base := _collective(kind):
            spent.collectives[base] = COLLECTIVES[base] * _received(base, op, inputs)
        elif kind in FREE or op.proto.custom_call_target in FREE_CALLS:
            pass
        elif kind in ("dynamic-slice", "gather"):
            spent.bytes = 2 * _bytes(op.shapes)
        elif kind == "dynamic-update-slice":
            spent.bytes = 2 * _bytes(inputs[1].shapes)
        elif kind == "copy-start":
            spent.bytes = _bytes(op.shapes[:2])
        else:
            if kind in ("dot", "convolution"):
                spent.flops = _product_flops(op, inputs)
            elif kind == "custom-call":
                spent = _kernel(op, inputs)
            elif kind not in ELEMENTWISE:
                raise unreadable("an operation", op)
            spent.bytes += _bytes(op.shapes) + sum(_bytes(given.shapes) for given in inputs)
        return spent

    def add_fused_collectives(self, computation: Computation, total: Cost) -> None:
        """Adds collectives that the compiler spreads over several fusions.

        The first fusion starts the collective, the next compute meanwhile, perhaps in a loop, and
        the last ends it. Each names the collective, which happens once.
        """
        for op in computation.instructions.values():
            for fused in self.called(op) if op.kind == "fusion" else ():
                for part in fused.instructions.values():
                    if _collective(part.kind) is None:
                        continue
                    if _starts(fused):
                        total.add(Cost(collectives=self.of_instruction(part, fused).collectives))
                    elif part.proto.channel_id not in self.started:
                        raise unreadable(f"a collective in %{op.name} that no fusion starts", part)

    def fusion_bytes(self, op: Instruction, inputs: list[Instruction], fused: Computation) -> float:
        """Bytes that a fusion reads and writes; of a stack, the slice that it reads or sets."""
        total, written = 0.0, [shape.bytes for shape in op.shapes]
        for number, given in enumerate(inputs):
            whole = _bytes(given.shapes)
            touched, is_set = self.touched(number, fused)
            total += min(whole, touched)
            if is_set and whole in written:  # the result reuses the stack's memory
                written.remove(whole)
        return total + sum(written)

    def touched(self, number: int, fused: Computation) -> tuple[float, bool]:
        """Bytes of a parameter that a fused computation reads or sets; whether it sets a slice."""
        table = fused.instructions
        total, is_set = 0.0, False
        ids = [
            given for given, op in table.items()
            if op.kind == "parameter" and op.proto.parameter_number == number
        ]  # fmt: skip
        while ids:
            given = ids.pop()
            for at, user in ((at, user) for at, user in table.items() if given in user.operands):
                inside = self.called(user)[0].instructions.values() if user.kind == "fusion" else ()
                if {user.kind, *(part.kind for part in inside)} <= BITCASTS:
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


def _starts(fused: Computation) -> bool:
    """Whether a fusion starts a collective that others continue."""
    return any(part.proto.custom_call_target == STARTS for part in fused.instructions.values())


def _collective(kind: str) -> str | None:
    base = kind.removesuffix("-start")
    return base if base in COLLECTIVES else None


def _received(base: str, op: Instruction, inputs: list[Instruction]) -> float:
    """The bytes of the larger side of a collective, its operands or its results."""
    given = sum(shape.size for operand in inputs for shape in operand.shapes)
    if base in ("reduce-scatter", "all-reduce", "all-to-all", "collective-permute"):
        return given
    result = sum(shape.size for shape in op.shapes)
    # The result of a start repeats its operands.
    return result - given if op.kind.endswith("-start") else result


def _groups(op: Instruction) -> int:
    """The number of groups of a ragged matmul; 1 for other operations.

    It multiplies all rows with each group's matrix, but skips the rows of other groups.
    """

    def values(config: object) -> Iterator[tuple[str, object]]:
        for key, value in config.items() if isinstance(config, dict) else ():
            yield key, value
            yield from values(value)

    notes = dict(values(op.config))
    skips = notes.get("iteration_skipper_mode") == "ITERATION_SKIPPER_MODE_GROUP_STARTS"
    return int(str(notes.get("num_groups_in_ragged_dot", 1))) if skips else 1


def _product_flops(op: Instruction, inputs: list[Instruction]) -> float:
    out, (left, right) = op.shapes[0].dims, (given.shapes[0].dims for given in inputs[:2])
    if op.kind == "dot":
        summed = op.proto.dot.lhs_contracting_dimensions
        return 2.0 * math.prod(out) * math.prod(left[number] for number in summed)
    labels = op.proto.convolution
    total = 2.0 * right[labels.kernel_input_feature_dimension]
    total *= out[labels.output_batch_dimension] * out[labels.output_feature_dimension]
    spatial = (
        labels.input_spatial_dimensions, labels.kernel_spatial_dimensions,
        labels.output_spatial_dimensions, op.proto.window.dimensions,
    )  # fmt: skip
    for in_axis, kernel_axis, out_axis, window in zip(*spatial, strict=True):
        total *= _pairs(left[in_axis], right[kernel_axis], out[out_axis], window)
    return total / max(op.proto.batch_group_count, 1)


def _pairs(size: int, kernel: int, out: int, window) -> int:
    """Pairs of output and kernel positions that meet an input, not a hole or the padding."""
    at = np.arange(out)[:, None] * window.stride + np.arange(kernel) * window.window_dilation
    at, holes = at - window.padding_low, window.base_dilation
    return int(np.sum((at % holes == 0) & (at >= 0) & (at // holes < size)))


def _kernel(op: Instruction, inputs: list[Instruction]) -> Cost:
    """FLOPs of a TPU kernel, and the bytes that it reads beyond its operands, once each."""
    if op.proto.custom_call_target == PACKS_INDICES:
        return Cost()
    if op.proto.custom_call_target != KERNEL:
        raise unreadable("a call", op)
    for name, (products, *names) in ATTENTION.items():
        if op.name.startswith(name):
            block, other = (op.kernel.get(name) for name in names)
            if not isinstance(block, int) or block != other:
                raise unreadable("attention in blocks of an unknown size", op)
            tensor = max(op.shapes, key=lambda shape: math.prod(shape.dims))
            length = tensor.dims[-2]
            # Blocks on the diagonal are computed whole; for each block of queries (or keys),
            # two tensors of the other kind are read up to the diagonal.
            again = 2 * ((length / block + 1) / 2 - 1) * tensor.size
            return Cost(products * math.prod(tensor.dims) * (length + block), again)
    if op.name.startswith("ragged-dot-metadata"):  # where each group starts
        return Cost()
    if op.name.startswith("ragged-dot") and len(op.shapes) == 1:
        # Rows [R, A] and [R, B] and the experts' matrices [E, A, B], one of the three the result.
        sizes = (shape.dims for given in inputs for shape in given.shapes)
        three = [dims for dims in (*sizes, op.shapes[0].dims) if len(dims) > 1]
        experts = next(dims[0] for dims in three if len(dims) == 3)
        return Cost(2.0 * math.sqrt(math.prod(map(math.prod, three)) / experts))
    raise unreadable("a TPU kernel", op)
