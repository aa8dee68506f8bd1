"""Published peak rates of TPU chips.

Sources: the pages "TPU v4", "TPU v5e", "TPU v5p" and "TPU v6e" of the Cloud TPU documentation
(docs.cloud.google.com/tpu/docs, read in November 2026).
"""

import math
from typing import NamedTuple


class Chip(NamedTuple):
    flops: float  # bfloat16, a second
    memory: float  # bytes of HBM
    bandwidth: float  # of HBM, bytes a second
    links: float  # bytes a second that a chip receives from its neighbours: half of bidirectional


CHIPS = {
    "v4": Chip(275e12, 32 * 2**30, 1228e9, 300e9),
    "v5e": Chip(197e12, 16 * 2**30, 819e9, 200e9),
    "v5p": Chip(459e12, 95 * 2**30, 2765e9, 600e9),
    "v6e": Chip(918e12, 32 * 2**30, 1638e9, 400e9),
}


def chip_of(topology: str) -> tuple[Chip, int]:
    """The chip of a topology such as "v5p:4x4x4", and how many there are.

    Raises:
      ValueError: it is not one that we know.
    """
    kind, _, shape = topology.partition(":")
    sizes = shape.split("x")
    if kind not in CHIPS or not all(size.isdigit() and int(size) for size in sizes):
        raise ValueError(
            f"no topology {topology!r}: expected one of {', '.join(CHIPS)}, a colon and the shape "
            "in chips, as in v5p:4x4x4, v5e:16x16"
        )
    return CHIPS[kind], math.prod(map(int, sizes))
