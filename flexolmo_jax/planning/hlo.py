"""A compiled program: computations, instructions and shapes, read from XLA's protobuf.

XLA also prints its programs, but that text changes: JAX 0.12 omits the instructions
`get-tuple-element`. The numbers of protobuf fields do not change. Those below come from
xla/service/hlo.proto and xla/xla_data.proto of github.com/openxla/xla.
"""

import dataclasses
import functools
import importlib.metadata
import json
import math
from collections.abc import Iterator
from typing import Any

import jax
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

MESSAGES: dict[str, dict[str, tuple[int, str]]] = {  # message: field: (number, type)
    "Dump": {"hlo_module": (1, "Module")},  # XLA: HloProto
    "Module": {
        "name": (1, "string"), "computations": (3, "Computation[]"),
        "entry_computation_id": (6, "int64"),
    },
    "Computation": {
        "name": (1, "string"), "instructions": (2, "Instruction[]"), "id": (5, "int64"),
        "root_id": (6, "int64"),
    },
    "Instruction": {
        "name": (1, "string"), "opcode": (2, "string"), "shape": (3, "Shape"),
        "literal": (8, "Literal"), "parameter_number": (9, "int64"), "tuple_index": (13, "int64"),
        "window": (15, "Window"), "convolution": (16, "Convolution"),
        "channel_id": (26, "int64"), "custom_call_target": (28, "string"), "dot": (30, "Dot"),
        "id": (35, "int64"),
        "operand_ids": (36, "int64[]"), "called_computation_ids": (38, "int64[]"),
        "backend_config": (43, "bytes"), "batch_group_count": (58, "int64"),
        "comparison_direction": (63, "string"), "frontend_attributes": (68, "Attributes"),
    },
    "Attributes": {"map": (1, "Attribute[]")},
    "Attribute": {"key": (1, "string"), "value": (2, "string")},
    "Shape": {
        "element_type": (2, "int32"), "dimensions": (3, "int64[]"), "tuple_shapes": (4, "Shape[]"),
        "layout": (5, "Layout"),
    },
    "Layout": {"memory_space": (8, "int64")},
    "Literal": {"s32s": (4, "int32[]"), "s64s": (5, "int64[]"), "u32s": (6, "uint32[]")},
    "Window": {"dimensions": (1, "WindowDimension[]")},
    "WindowDimension": {
        "stride": (2, "int64"), "padding_low": (3, "int64"), "window_dilation": (5, "int64"),
        "base_dilation": (6, "int64"),
    },
    "Convolution": {
        "kernel_input_feature_dimension": (3, "int64"),
        "kernel_spatial_dimensions": (6, "int64[]"), "output_batch_dimension": (9, "int64"),
        "output_feature_dimension": (10, "int64"), "input_spatial_dimensions": (11, "int64[]"),
        "output_spatial_dimensions": (12, "int64[]"),
    },
    "Dot": {"lhs_contracting_dimensions": (1, "int64[]")},
}  # fmt: skip
BITS = {  # of XLA's PrimitiveType
    1: 8, 2: 8, 3: 16, 4: 32, 5: 64, 6: 8, 7: 16, 8: 32, 9: 64, 10: 16, 11: 32, 12: 64, 15: 64,
    16: 16, 18: 128, 19: 8, 20: 8, 21: 4, 22: 4, 23: 8, 24: 8, 25: 8, 26: 2, 27: 2, 28: 8, 29: 8,
    30: 1, 31: 1, 32: 4, 33: 8,
}  # fmt: skip
TUPLE, OPAQUE, TOKEN, BUFFER = 13, 14, 17, 34
HBM, ON_CHIP = 0, {1, 2, 3, 4, 6, 8, 10, 11, 12, 15}  # memory spaces of libtpu 0.0.52


@dataclasses.dataclass(frozen=True)
class Shape:
    """An array of a program."""

    dims: tuple[int, ...]
    bits: int  # per element
    on_chip: bool  # in a memory space other than HBM

    @property
    def size(self) -> float:
        """Bytes, in any memory."""
        return math.prod(self.dims) * self.bits / 8

    @property
    def bytes(self) -> float:
        """Bytes of HBM."""
        return 0 if self.on_chip else self.size


@dataclasses.dataclass(frozen=True, eq=False)
class Instruction:
    """An operation of a program."""

    kind: str  # the opcode, such as "dot"
    shapes: tuple[Shape, ...]  # of the result, or of the leaves of a tuple
    operands: tuple[int, ...]  # ids of instructions
    called: tuple[int, ...]  # ids of computations
    proto: Any  # the message, for fields that only some opcodes have

    @property
    def name(self) -> str:
        return self.proto.name

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """The notes of the backend's compiler."""
        return self._json("backend_config", self.proto.backend_config)

    @functools.cached_property
    def kernel(self) -> dict[str, Any]:
        """The notes of a kernel's author, such as block sizes; empty if there are none."""
        notes = {note.key: note.value for note in self.proto.frontend_attributes.map}
        outer = self._json("kernel_metadata", notes.get("kernel_metadata"))
        return self._json("xprof_metadata", outer.get("xprof_metadata"))

    def _json(self, what: str, text: str | bytes | None) -> dict[str, Any]:
        try:
            return json.loads(text or "{}")
        except ValueError as error:
            raise unreadable(f"{what} that is not JSON", self) from error


@dataclasses.dataclass(frozen=True, eq=False)
class Computation:
    """A function of a program."""

    instructions: dict[int, Instruction]  # operands come before their users
    root: Instruction

    def inputs(self, op: Instruction) -> list[Instruction]:
        return [self.instructions[number] for number in op.operands]


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A compiled program."""

    computations: dict[int, Computation]
    entry: Computation


def unreadable(what: str, op: Any) -> ValueError:
    """The error for an instruction that cannot be counted: no count is better than a wrong one."""
    proto = getattr(op, "proto", op)
    target = f" to {proto.custom_call_target}" if proto.custom_call_target else ""
    return ValueError(
        f"JAX {jax.__version__}, {compiler()}: the compiled program has {what}, which "
        f"flexolmo_jax cannot count, at %{proto.name} = {proto.opcode}{target}; plan with a "
        "version of JAX and libtpu that setup.cfg names"
    )


def compiler() -> str:
    """The version of libtpu."""
    try:
        return f"libtpu {importlib.metadata.version('libtpu')}"
    except importlib.metadata.PackageNotFoundError:
        return "without libtpu"


def read(data: bytes, kind: str = "Dump") -> Program:
    """Reads a program from a protobuf.

    Args:
      data: an HloProto, as XLA dumps it (`xla_dump_hlo_as_proto`); or an HloModuleProto, as
        `as_serialized_hlo_module_proto` returns it.
      kind: "Dump" for the former, "Module" for the latter.

    Raises:
      ValueError: there is no program in it, or one with an unknown type.
    """
    message = _messages()[kind]()
    try:
        message.ParseFromString(data)
    except DecodeError as error:
        raise ValueError(f"JAX {jax.__version__}, {compiler()}: no protobuf: {error}") from error
    module = message.hlo_module if kind == "Dump" else message
    computations = {proto.id: _computation(proto) for proto in module.computations}
    if module.entry_computation_id not in computations:
        raise ValueError(
            f"JAX {jax.__version__}, {compiler()}: no program in the compiler's protobuf of "
            f"{len(data)} bytes"
        )
    for computation in computations.values():
        for op in computation.instructions.values():
            if not set(op.called) <= computations.keys():
                raise unreadable("a call of a computation that it does not have", op)
    return Program(computations, computations[module.entry_computation_id])


@functools.cache
def _messages() -> dict[str, Any]:
    types = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="hlo", package="hlo", syntax="proto3")
    for name, fields in MESSAGES.items():
        message = file.message_type.add(name=name)
        for field, (number, kind) in fields.items():
            single = kind.removesuffix("[]")
            label = types.LABEL_OPTIONAL if kind == single else types.LABEL_REPEATED
            added = message.field.add(name=field, number=number, label=label)
            if single in MESSAGES:
                added.type, added.type_name = types.TYPE_MESSAGE, f".hlo.{single}"
            else:
                added.type = getattr(types, f"TYPE_{single.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"hlo.{name}"))
        for name in MESSAGES
    }


def _computation(proto: Any) -> Computation:
    instructions: dict[int, Instruction] = {}
    for op in proto.instructions:
        if not set(op.operand_ids) <= instructions.keys():
            raise unreadable("an operand that does not come before its user", op)
        instructions[op.id] = Instruction(
            op.opcode, tuple(_shapes(op.shape, op)), tuple(op.operand_ids),
            tuple(op.called_computation_ids), op,
        )  # fmt: skip
    if proto.root_id not in instructions:
        raise ValueError(f"JAX {jax.__version__}, {compiler()}: {proto.name} has no root")
    return Computation(instructions, instructions[proto.root_id])


def _shapes(shape: Any, op: Any) -> Iterator[Shape]:
    kind, space = shape.element_type, shape.layout.memory_space
    if kind in (TUPLE, BUFFER):
        for leaf in shape.tuple_shapes:
            yield from _shapes(leaf, op)
    elif kind in BITS:
        if space != HBM and space not in ON_CHIP:
            raise unreadable(f"memory space {space}", op)
        yield Shape(tuple(shape.dimensions), BITS[kind], space != HBM)
    elif kind not in (OPAQUE, TOKEN):
        raise unreadable(f"element type {kind} of XLA's PrimitiveType", op)
