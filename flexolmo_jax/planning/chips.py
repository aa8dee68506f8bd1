"""Published peak rates of TPU chips, per device that JAX sees.

Sources: the pages "TPU v4", "TPU v5e", "TPU v5p", "TPU v6e" and "TPU7x (Ironwood)" of the Cloud TPU
documentation (docs.cloud.google.com/tpu/docs, read in November 2026). The ICI bandwidth of v4 comes
from "TPU v4: An Optically Reconfigurable Supercomputer for Machine Learning" (arXiv 2304.01433):
six links of 50 GB/s each way. The names are libtpu's. JAX's attention kernel does not compile for
v2 and v3, so they are missing.
"""

import math
from typing import NamedTuple


class Chip(NamedTuple):
    """A kind of chip; rates and memory are per device."""

    flops: float  # bfloat16, per second
    memory: float  # bytes of HBM
    bandwidth: float  # of HBM, bytes per second
    ici: float  # bytes per second received from neighbours: half of the bidirectional bandwidth
    smallest: str  # the shape of a host's slice
    devices: int = 1  # per chip
    config: str | None = None  # libtpu's mode of the chip, if not the default


CHIPS = {
    # Two cores are one device, as on Cloud TPUs, and as JAX's meshes require.
    "v4": Chip(275e12, 32 * 2**30, 1228e9, 300e9, "2x2x1", config="megacore"),
    "v5e": Chip(197e12, 16 * 2**30, 819e9, 200e9, "2x2"),
    "v5p": Chip(459e12, 95 * 2**30, 2765e9, 600e9, "2x2x1"),
    "v6e": Chip(918e12, 32 * 2**30, 1638e9, 400e9, "2x2"),
    # Half of 2307 TFLOP/s, 7380 GB/s and 1200 GB/s (both ways); the compiler leaves 94.74 of half
    # of 192 GiB to programs.
    "tpu7x": Chip(1153.5e12, 94.74 * 2**30, 3690e9, 300e9, "2x2x1", devices=2),
}
KINDS = ", ".join(f"{kind}:{chip.smallest}" for kind, chip in CHIPS.items())


def chip_of(topology: str) -> tuple[Chip, int]:
    """The chip of a topology such as "v5p:4x4x4", and the number of chips.

    Raises:
      ValueError: the topology is unknown.
    """
    kind, _, shape = topology.partition(":")
    sizes = shape.split("x")
    if kind not in CHIPS or not all(size.isdecimal() and int(size) for size in sizes):
        raise ValueError(
            f"no topology {topology!r}: expected a kind of TPU, a colon and the shape in chips; "
            f"the kinds, each with its smallest slice of four chips: {KINDS}"
        )
    return CHIPS[kind], math.prod(map(int, sizes))
