"""What a compiled program does, read from its HLO text: FLOPs, bytes, collectives.

XLA's own cost analysis counts the body of a loop once; here it counts as often as it runs. TPU
kernels (custom calls) are unknown to both; those of attention and of ragged products are counted
from their shapes.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

import numpy as np

BITS = {"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "bf16": 16, "f16": 16, "s16": 16, "u16": 16}
BITS |= {"f32": 32, "s32": 32, "u32": 32, "f64": 64, "s64": 64, "u64": 64, "c64": 64}
FREE = {
    "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id",
    "copy-done", "async-done", "async-update", "all-gather-done", "all-reduce-done", "iota",
    "collective-permute-done", "optimization-barrier", "opt-barrier",
}  # fmt: skip
FREE_CALLS = ("AllocateBuffer", "AssumeGatherIndicesInBound")
COLLECTIVES = {  # bytes that a device receives, as a multiple of the largest shape in the line
    "all-gather": 1.0, "reduce-scatter": 1.0, "all-reduce": 2.0, "all-to-all": 1.0,
    "collective-permute": 1.0, "ragged-all-to-all": 1.0,
}  # fmt: skip
PASSING = {"bitcast", "fusion", "parameter"}  # of a fusion that only bitcasts
ATTENTION = {"splash_mha_fwd": 2, "splash_mha_dkv": 4, "splash_mha_dq": 3}  # products of S x S
RAGGED = re.compile(r'"num_groups_in_ragged_dot":"(\d+)".*"ITERATION_SKIPPER_MODE_GROUP_STARTS"')
SHAPE = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
LINE = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
CALL = re.compile(r"^([a-z][a-z0-9\-]*)\((.*?)\)(?:, |$)")


@dataclasses.dataclass(frozen=True)
class Shape:
    dtype: str
    dims: tuple[int, ...]
    on_chip: bool  # in a memory space of its own, not in HBM

    @property
    def size(self) -> float:
        """In bytes, wherever it is."""
        return math.prod(self.dims) * BITS[self.dtype] / 8

    @property
    def bytes(self) -> float:
        """Of HBM."""
        return 0 if self.on_chip else self.size


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    kind: str
    shapes: tuple[Shape, ...]  # of what it gives
    operands: tuple[str, ...]
    text: str


@dataclasses.dataclass
class Cost:
    """Of a device; bytes are those that HBM and links carry if nothing stays on the chip."""

    flops: float = 0.0
    bytes: float = 0.0
    collectives: dict[str, float] = dataclasses.field(default_factory=dict)  # received, by kind
    loops_of_unknown_length: int = 0

    def add(self, other: "Cost", times: float = 1.0) -> None:
        self.flops += times * other.flops
        self.bytes += times * other.bytes
        for kind, size in other.collectives.items():
            self.collectives[kind] = self.collectives.get(kind, 0.0) + times * size
        self.loops_of_unknown_length += other.loops_of_unknown_length


def cost(text: str, turns: int = 1) -> Cost:
    """What one run of a compiled program costs each device.

    Args:
      text: of the module after all passes.
      turns: how often a loop runs whose length the program does not know.
    """
    computations, entry = _parse(text)
    known: dict[str, Cost] = {}

    def of(name: str) -> Cost:
        if name not in known:
            known[name] = Cost()
            table = computations[name]
            for one in table.values():
                known[name].add(_instruction(one, table, computations, of, turns))
        return known[name]

    return of(entry)


def _parse(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    computations: dict[str, dict[str, Instruction]] = {}
    current: dict[str, Instruction] = {}
    entry = ""
    for line in text.splitlines():
        if line.startswith(("%", "ENTRY")) and line.rstrip().endswith("{"):
            name = line.removeprefix("ENTRY ").lstrip("%").split(" ", 1)[0]
            current = computations[name] = {}
            if line.startswith("ENTRY"):
                entry = name
        elif match := LINE.match(line):
            name, rest = match.groups()
            kind, shapes, operands = _split(rest)
            current[name] = Instruction(name, kind, shapes, operands, rest)
    return computations, entry


def _split(rest: str) -> tuple[str, tuple[Shape, ...], tuple[str, ...]]:
    """The type, the kind and the operands' names of `type kind(operands), attributes`."""
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shapes = tuple(_shapes(rest[:end]))
    rest = rest[end:].lstrip()
    start = rest.index("(")
    inner = rest[start + 1 : _closing(rest, start)]
    return rest[:start], shapes, tuple(re.findall(r"%([\w.\-]+)", inner))


def _closing(text: str, start: int) -> int:
    depth = 0
    for index in range(start, len(text)):
        depth += (text[index] == "(") - (text[index] == ")")
        if depth == 0:
            return index
    raise ValueError(f"unbalanced: {text[:80]}")


def _shapes(text: str) -> Iterator[Shape]:
    for dtype, dims, layout in SHAPE.findall(text):
        if dtype in BITS:
            sizes = tuple(int(size) for size in dims.split(",") if size)
            yield Shape(dtype, sizes, bool(re.search(r"S\([1-9]", layout)))


def _instruction(one, table, computations, of, turns: int = 1) -> Cost:
    made = Cost()
    kind = one.kind
    called = _called(one)
    if kind == "while":
        trips = _trips(one, computations)
        if trips is None:
            made.loops_of_unknown_length = 1
        for name in called:
            made.add(of(name), turns if trips is None else trips)
        return made
    if kind == "conditional":
        names = re.findall(r"%([\w.\-]+)", _attribute(one.text, "branch_computations"))
        names += re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", one.text)
        branches = [of(name) for name in names]
        made.add(max(branches, key=lambda branch: (branch.flops, branch.bytes)))
        return made
    if kind == "call" or kind.endswith("-start") and called and not _collective(kind):
        for name in called:
            made.add(of(name))
        return made
    if kind == "fusion":
        for name in called:
            made.flops += of(name).flops
        if groups := RAGGED.search(one.text):  # of all rows, each group's product skips the others'
            made.flops /= int(groups[1])
        made.bytes = _fusion_bytes(one, table, computations)
        return made
    if kind in ("dot", "convolution"):
        made.flops = _product_flops(one, table)
    if kind == "custom-call":
        made = _kernel(one, table)
    if base := _collective(kind):
        size = max((shape.size for shape in one.shapes), default=0)
        if len(one.shapes) > 1 and not kind.endswith("-start"):  # several in one
            size = sum(shape.size for shape in one.shapes)
        if base == "reduce-scatter":
            size = sum(s.size for name in one.operands for s in table[name].shapes)
        made.collectives[base] = COLLECTIVES[base] * size
        return made
    if kind in FREE or any(f'custom_call_target="{name}"' in one.text for name in FREE_CALLS):
        return made
    if kind == "dynamic-slice" or kind == "gather":
        made.bytes = 2 * sum(shape.bytes for shape in one.shapes)
    elif kind == "dynamic-update-slice":
        made.bytes = 2 * sum(shape.bytes for shape in table[one.operands[1]].shapes)
    elif kind == "copy-start":
        made.bytes = sum(shape.bytes for shape in one.shapes[:2])
    else:
        inputs = (s for name in one.operands if name in table for s in table[name].shapes)
        made.bytes += sum(s.bytes for s in (*one.shapes, *inputs))
    return made


def _called(one: Instruction) -> list[str]:
    return re.findall(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)", one.text)


def _trips(loop: Instruction, computations: dict[str, dict[str, Instruction]]) -> int | None:
    """How often a loop runs: said by the compiler; or counted up to a constant, as a scan is."""
    said = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.text)
    if said:
        return int(said[1])
    condition = re.search(r"condition=%?([\w.\-]+)", loop.text)
    table = computations[condition[1]] if condition else {}
    limits = [i for i in table.values() if i.kind == "constant" and i.shapes[0].dtype == "s32"]
    compares = [i for i in table.values() if i.kind == "compare" and "direction=LT" in i.text]
    if len(limits) != 1 or len(compares) != 1 or limits[0].name not in compares[0].operands:
        return None
    return int(limits[0].text.split("constant(")[1].split(")")[0])


def _collective(kind: str) -> str | None:
    base = kind.removesuffix("-start")
    return base if base in COLLECTIVES else None


def _attribute(text: str, name: str) -> str:
    match = re.search(name + r"=\{([^}]*)\}", text)
    return match[1] if match else ""


def _fusion_bytes(one, table, computations) -> float:
    """What a fusion reads and writes; of a stack that it takes or sets a slice of, the slice."""
    total, written = 0.0, [shape.bytes for shape in one.shapes]
    for number, name in enumerate(one.operands):
        whole = sum(shape.bytes for shape in table[name].shapes) if name in table else 0.0
        touched, is_set = _touched(number, _called(one)[0], computations)
        total += min(whole, touched)
        if is_set and whole in written:  # the result takes the place of the stack
            written.remove(whole)
    return total + sum(written)


def _touched(number: int, computation: str, computations) -> tuple[float, bool]:
    """Bytes of a parameter that a fused computation reads or sets, and whether it sets a slice."""
    inside = computations[computation]
    names = [i.name for i in inside.values() if f"parameter({number})" in i.text]
    total, is_set = 0.0, False
    while names:
        name = names.pop()
        for user in (i for i in inside.values() if name in i.operands):
            called = computations[_called(user)[0]] if user.kind == "fusion" else {}
            if {user.kind, *(i.kind for i in called.values())} <= PASSING:
                names.append(user.name)
            elif user.kind == "dynamic-slice":
                total += sum(shape.bytes for shape in user.shapes)
            elif user.kind == "dynamic-update-slice" and user.operands[0] == name:
                total += sum(shape.bytes for shape in inside[user.operands[1]].shapes)
                is_set = True
            elif user.kind == "fusion":
                more, sets = _touched(user.operands.index(name), _called(user)[0], computations)
                total, is_set = total + more, is_set or sets
            else:
                return math.inf, is_set
    return total, is_set


def _product_flops(one: Instruction, table: dict[str, Instruction]) -> float:
    out = math.prod(one.shapes[0].dims)
    left, right = (table[name].shapes[0].dims for name in one.operands[:2])
    if one.kind == "dot":
        summed = [int(n) for n in _attribute(one.text, "lhs_contracting_dims").split(",") if n]
        return 2.0 * out * math.prod(left[n] for n in summed)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.text)
    assert labels is not None, one.text
    in_labels, kernel_labels, out_labels = labels.groups()
    channels = right[kernel_labels.index("i")]
    total = 2.0 * channels
    total *= math.prod(
        size for label, size in zip(out_labels, one.shapes[0].dims, strict=True)
        if not label.isdigit()
    )  # fmt: skip
    window = _attribute(one.text, "window")
    for number, label in enumerate(sorted(c for c in out_labels if c.isdigit())):
        sizes = (
            left[in_labels.index(label)], right[kernel_labels.index(label)],
            one.shapes[0].dims[out_labels.index(label)],
        )  # fmt: skip
        total *= _pairs(*sizes, window, number)
    groups = re.search(r"batch_group_count=(\d+)", one.text)
    return total / int(groups[1]) if groups else total


def _pairs(size: int, kernel: int, out: int, window: str, axis: int) -> int:
    """Pairs of output and kernel positions that meet an input, not a hole or the padding."""

    def value(name: str, default: int) -> str:
        found = re.search(rf"(?:^| ){name}=([\d_x\-]+)", window)
        return found[1].split("x")[axis] if found else str(default)

    stride, low = int(value("stride", 1)), int(value("pad", 0).split("_")[0])
    holes, spread = int(value("lhs_dilate", 1)), int(value("rhs_dilate", 1))
    at = np.arange(out)[:, None] * stride + np.arange(kernel) * spread - low
    return int(np.sum((at % holes == 0) & (at >= 0) & (at // holes < size)))


def _kernel(one: Instruction, table: dict[str, Instruction]) -> Cost:
    """FLOPs of a TPU kernel, and the bytes that it reads beyond its operands, once each."""
    for name, products in ATTENTION.items():
        if one.name.startswith(name):
            tensor = max(one.shapes, key=lambda shape: math.prod(shape.dims))
            *_, length, width = tensor.dims
            block = one.shapes[0].dims[-2]  # the first result is room for the sums of a block
            # Blocks on the diagonal are computed whole; for each block of the one side, two tensors
            # of the other are read up to the diagonal.
            again = 2 * ((length / block + 1) / 2 - 1) * tensor.size
            return Cost(products * math.prod(tensor.dims) * (length + block), again)
    if one.name.startswith("ragged-dot") and len(one.shapes) == 1:
        # Rows [R, A] and [R, B] and the experts' matrices [E, A, B], one of the three the result.
        inputs = (s.dims for name in one.operands if name in table for s in table[name].shapes)
        three = [dims for dims in (*inputs, one.shapes[0].dims) if len(dims) > 1]
        experts = next(dims[0] for dims in three if len(dims) == 3)
        return Cost(2.0 * math.sqrt(math.prod(map(math.prod, three)) / experts))
    return Cost()
