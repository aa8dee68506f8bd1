"""How often a loop of a compiled program runs."""

from flexolmo_jax.planning.hlo import Computation, Instruction

SAME = {"bitcast", "convert", "copy", "copy-done", "copy-start", "optimization-barrier", "reshape"}
Value = tuple[int | None, int]  # (an index into the loop's state or None, a constant), their sum


def count(
    loop: Instruction, around: Computation, computations: dict[int, Computation]
) -> int | None:
    """How often a loop runs; None if that depends on what it computes.

    Either the compiler noted it, or it follows from a counter with a constant start and limit, as
    in the loops of `lax.scan`.

    Args:
      loop: an instruction `while`.
      around: the computation that contains it.
      computations: of the program, by id.
    """
    noted = loop.config.get("known_trip_count")
    if noted:
        return int(noted["n"])
    body, condition = (computations[number] for number in loop.called)
    given, root = None, condition
    while root.root.kind == "fusion":  # the compiler may wrap the comparison
        given = [_value(number, root, computations, given) for number in root.root.operands]
        root = computations[root.root.called[0]]
    if root.root.kind != "compare":
        return None
    sides = [_value(number, root, computations, given) for number in root.root.operands]
    direction = root.root.proto.comparison_direction
    if direction == "GT":
        direction, sides = "LT", sides[::-1]
    index, limit = sides
    if direction != "LT" or index is None or index[0] is None:
        return None
    limit = _at_start(limit, loop, around, body, computations)
    start = _at_start((index[0], 0), loop, around, body, computations, changes=True)
    step = _after_iteration(index[0], body, computations)
    if limit is None or start is None or step is None or step[0] != index[0] or step[1] < 1:
        return None
    return max(0, -(-(limit[1] - start[1] - index[1]) // step[1]))


def _at_start(
    value: Value | None, loop, around, body, computations, changes: bool = False
) -> Value | None:
    """The constant that a value has before the first iteration, or None.

    An element of the state must not change in the loop, unless `changes`.
    """
    if value is None or value[0] is None:
        return value
    if not changes and _after_iteration(value[0], body, computations) != (value[0], 0):
        return None
    (number,) = loop.operands
    state = around.instructions[number]
    if state.kind != "tuple":
        return None
    first = _value(state.operands[value[0]], around, computations, None)
    return (None, first[1] + value[1]) if first and first[0] is None else None


def _after_iteration(
    element: int, body: Computation, computations: dict[int, Computation]
) -> Value | None:
    """An element of the state after one iteration."""
    if body.root.kind != "tuple":
        return None
    return _value(body.root.operands[element], body, computations, None)


def _value(
    number: int,
    where: Computation,
    computations: dict[int, Computation],
    given: list[Value | None] | None,
) -> Value | None:
    """An integer as a constant, or as an element of the state plus a constant; or None.

    Args:
      number: the id of an instruction.
      where: its computation; if `given` is None, its parameter is the state.
      computations: of the program.
      given: the values of the parameters of a fused computation.
    """
    op = where.instructions[number]
    if op.kind == "constant":
        literal = op.proto.literal
        numbers = [*literal.s32s, *literal.s64s, *literal.u32s]
        return (None, numbers[0]) if len(numbers) == 1 else None
    if op.kind == "parameter":
        return given[op.proto.parameter_number] if given is not None else None
    if op.kind == "get-tuple-element":
        (source,) = where.inputs(op)
        if source.kind == "tuple":
            element = source.operands[op.proto.tuple_index]
            return _value(element, where, computations, given)
        return (op.proto.tuple_index, 0) if source.kind == "parameter" and given is None else None
    if op.kind in SAME:
        return _value(op.operands[0], where, computations, given)
    if op.kind == "add":
        left, right = (_value(given_, where, computations, given) for given_ in op.operands)
        if left is None or right is None or (left[0] is not None and right[0] is not None):
            return None
        return (left[0] if right[0] is None else right[0], left[1] + right[1])
    if op.kind == "fusion":
        inside = computations[op.called[0]]
        values = [_value(operand, where, computations, given) for operand in op.operands]
        root = next(at for at, part in inside.instructions.items() if part is inside.root)
        return _value(root, inside, computations, values)
    return None
