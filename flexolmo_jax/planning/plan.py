"""What a config's step costs on a TPU topology, read off the program compiled for it."""

import dataclasses
import importlib.util
import os
import re
import runpy
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

from flexolmo_jax.config import (
    AnchorTraining,
    ExpertTraining,
    ModelConfig,
    RouterTraining,
    Training,
    find_config,
)
from flexolmo_jax.modeling import flops
from flexolmo_jax.parallel import placement
from flexolmo_jax.parallel.mesh import make_mesh
from flexolmo_jax.planning.chips import Chip, chip_of
from flexolmo_jax.planning.costs import Cost, cost
from flexolmo_jax.planning.hlo import read
from flexolmo_jax.planning.owners import Owners, equal_owners, owners_of_packages, trained
from flexolmo_jax.planning.programs import StageProgram, stage_program
from flexolmo_jax.training.gradients import check_batch

MERGED = ("router", "forward", "decode")  # the stages of a merged model
STAGE_OF_CONFIG = {AnchorTraining: "anchor", ExpertTraining: "expert", RouterTraining: "router"}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one step costs each device, in bytes, seconds and FLOPs; a chip is one device or two."""

    stage: str
    topology: str
    chips: int
    devices: int
    compile_seconds: float
    fits: bool
    because: str  # the reason if it does not fit
    head_rank: int = 0  # of each expert's own head; 0: none
    evidence_rank: int = 0
    owners: str = ""  # the experts beside the public one, in words; none of an anchor
    expert_weights: float = 0  # of one of them: the mean
    arguments: float = 0  # bytes held from step to step: weights, optimizer, batch
    temporaries: float = 0
    output: float = 0  # without what reuses the memory of an argument
    peak: float = 0
    memory: float = 0  # of a device
    needed_flops: float = 0
    compiled_flops: float = 0
    hbm_bytes: float = 0
    collectives: dict[str, float] = dataclasses.field(default_factory=dict)  # bytes received
    compute_seconds: float = 0
    hbm_seconds: float = 0
    link_seconds: float = 0
    tokens_a_step: int = 0
    steps: int = 0

    @property
    def seconds(self) -> float:
        """The roofline: the longest of the three times, as if it hid the other two."""
        return max(self.compute_seconds, self.hbm_seconds, self.link_seconds)

    @property
    def overhead(self) -> float:
        """Compiled FLOPs as a multiple of the needed ones."""
        return self.compiled_flops / self.needed_flops if self.needed_flops else 0.0

    @property
    def mfu(self) -> float:
        """Needed FLOPs over the FLOPs that the device could compute in `seconds`."""
        return self.compute_seconds / self.seconds / self.overhead if self.seconds else 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens_a_step / self.seconds if self.seconds else 0.0

    @property
    def days(self) -> float:
        return self.steps * self.seconds / 86_400

    @property
    def verdict(self) -> str:
        return "fits" if self.fits else f"does not fit, because: {self.because}"

    def values(self) -> dict[str, Any]:
        """For JSON."""
        extra = ("seconds", "mfu", "tokens_per_second", "days", "verdict")
        return {**dataclasses.asdict(self), **{name: getattr(self, name) for name in extra}}

    def rows(self) -> list[tuple[str, str]]:
        """For people: names and values."""
        gib = 2**30
        rows = [("verdict", self.verdict), ("compiled in", f"{self.compile_seconds:.0f} s")]
        if self.devices > self.chips:
            rows.append(("devices", f"{self.devices} on {self.chips} chips"))
        heads = {"head": self.head_rank, "evidence head": self.evidence_rank}
        if any(heads.values()):
            shown = [f"{name} of rank {rank}" for name, rank in heads.items() if rank]
            rows.append(("each expert has", ", ".join(shown)))
        if self.owners:
            rows.append(("experts besides public", self.owners))
            size = f"{self.expert_weights:,.0f} weights, {4 * self.expert_weights / 1e6:,.1f} MB"
            rows.append(("  one of them", f"{size} in a package"))
        if not self.peak:
            return rows
        moved = ", ".join(f"{kind} {size / 1e9:.2f} GB" for kind, size in self.collectives.items())
        rows += [
            ("peak memory", f"{self.peak / gib:.1f} of {self.memory / gib:.0f} GiB"),
            ("  held from step to step", f"{self.arguments / gib:.1f} GiB"),
            ("  temporaries", f"{self.temporaries / gib:.1f} GiB"),
            ("  output", f"{self.output / gib:.1f} GiB"),
            ("needed FLOPs", f"{self.needed_flops / 1e12:,.1f} T"),
            ("compiled FLOPs", f"{self.compiled_flops / 1e12:,.1f} T, {self.overhead:.2f}x"),
            ("bytes of HBM", f"{self.hbm_bytes / 1e9:,.1f} GB"),
            ("bytes received", moved or "none"),
            ("time of compute", f"{self.compute_seconds:.4g} s"),
            ("time of HBM", f"{self.hbm_seconds:.4g} s"),
            ("time of links", f"{self.link_seconds:.4g} s"),
            ("roofline", f"{self.seconds:.4g} s a step, MFU {self.mfu:.0%}"),
            ("all chips", f"{self.tokens_per_second:,.0f} tokens/s"),
        ]
        if self.steps:
            tokens = self.steps * self.tokens_a_step
            rows.append(("the whole stage", f"{self.days:.1f} days, {tokens / 1e9:,.0f}B tokens"))
        return rows


def stage_of(config: Training, wanted: str | None) -> str:
    """The stage to plan: the config's own, or "forward" or "decode" with its model.

    Args:
      config: any config.
      wanted: a stage, or None for the config's own.

    Raises:
      ValueError: `wanted` trains another stage; the config trains an evidence head alone.
    """
    if type(config) not in STAGE_OF_CONFIG:
        raise ValueError(
            f"expected a config of one of the stages {', '.join(STAGE_OF_CONFIG.values())}, found "
            f"{type(config).__name__}; plan an anchor or an expert with evidence_rank instead"
        )
    own = STAGE_OF_CONFIG[type(config)]
    if wanted in STAGE_OF_CONFIG.values() and wanted != own:
        raise ValueError(f"the config is of stage {own}: plan that stage, forward or decode")
    return wanted or own


def model_of(path: str, config: Training) -> ModelConfig:
    """The sizes of the model that a config trains, or trains a part of.

    Raises:
      ValueError: the file does not have them.
    """
    if isinstance(config, AnchorTraining):
        return config.model
    file = find_config(path)
    model = runpy.run_path(str(file)).get("model")
    if not isinstance(model, ModelConfig):
        raise ValueError(
            f"{file}: set `model`, a ModelConfig, beside `config`: the sizes of the model"
        )
    return model


def owners_of(
    config: Training,
    model: ModelConfig,
    stage: str,
    rank: int | None = None,
    packages: Sequence[Path] = (),
) -> Owners:
    """The experts of a planned model beside the public one.

    Args:
      config, model, stage: as in `make_plan`; of an expert, the config has its rank.
      rank: of all experts' deltas; None: as the config says.
      packages: expert packages, in place of equal experts.

    Raises:
      ValueError: the stage has no merged model; or as `equal_owners` and `owners_of_packages`.
    """
    is_merged = stage in MERGED
    if packages and not is_merged:
        raise ValueError(f"packages are merged for the stages {', '.join(MERGED)}; found {stage}")
    if stage == "anchor" and rank:
        raise ValueError("an anchor is not low-rank: leave --rank out, or plan another stage")
    if packages:
        return owners_of_packages(packages, model)
    return equal_owners(config, model, rank) if is_merged else trained(config)


def make_plan(
    config: Training, model: ModelConfig, stage: str, topology: str, owners: Owners | None = None
) -> Plan:
    """Compiles a stage's step for a topology, and computes what it costs.

    Args:
      config: batch, length, microbatches, remat, parallelism.
      model: sizes, dtype.
      stage: one of `programs.STAGES`; "forward" is the loss of merged weights, "decode" one more
        token for each of `data.batch_size` sequences of `data.length` tokens.
      topology: as in `chip_of`.
      owners: the experts beside the public one; default: `owners_of`.

    Raises:
      ValueError: the topology is unknown; libtpu is missing; the chips do not divide the sizes; the
        config has no ranks for a model that is routed by evidence.
    """
    chip, chips = chip_of(topology)
    count = chips * chip.devices
    model = config.computing(model)
    if stage == "decode" and config.tensor_parallel > 1:
        raise ValueError("tensor_parallel is for training and forward passes; leave it out")
    devices = _devices(topology, chip, count)
    mesh = make_mesh(config.expert_parallel, devices, config.tensor_parallel)
    check_batch(config, mesh, "chips" if count == chips else "devices (two a chip)")
    owners = owners_of(config, model, stage) if owners is None else owners
    known: dict[str, Any] = {
        "stage": stage, "topology": topology, "chips": chips, "devices": count,
        "memory": chip.memory, **{f"{k}_rank": v for k, v in owners.ranks._asdict().items()},
        "owners": owners.described() if owners.deltas else "",
        "expert_weights": owners.weights(model) if owners.deltas else 0,
    }  # fmt: skip
    started = time.monotonic()
    program = stage_program(config, model, stage, mesh, owners)
    try:
        with placement.use_mesh(mesh):
            memory, hlo = _compile(program)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        seconds = time.monotonic() - started
        return Plan(compile_seconds=seconds, fits=False, because=_reason(error), **known)
    seconds = time.monotonic() - started
    spent = _cost(hlo, stage)
    output = memory.output_size_in_bytes - memory.alias_size_in_bytes
    peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes + output
    sequences = config.data.batch_size
    tokens = sequences if stage == "decode" else sequences * config.data.length
    return Plan(
        compile_seconds=seconds,
        fits=peak <= chip.memory,
        because="" if peak <= chip.memory else f"{peak / 2**30:.1f} GiB are needed",
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        output=output,
        peak=peak,
        needed_flops=_needed_flops(config, model, stage, owners) * tokens / count,
        compiled_flops=spent.flops,
        hbm_bytes=spent.bytes,
        collectives=dict(spent.collectives),
        compute_seconds=spent.flops / chip.flops,
        hbm_seconds=spent.bytes / chip.bandwidth,
        link_seconds=sum(spent.collectives.values()) / chip.ici,
        tokens_a_step=tokens,
        steps=config.steps if stage in STAGE_OF_CONFIG.values() else 0,
        **known,
    )


def _compile(program: StageProgram) -> tuple[Any, bytes]:
    """Compiles a program: its memory analysis, and the optimized HLO module, serialized."""
    with tempfile.TemporaryDirectory() as dump:
        # Dumped by the compiler: an executable's own copy of its program is incomplete.
        options = {"xla_dump_to": dump, "xla_dump_hlo_as_proto": True}
        compiled = program.lower().compile(compiler_options=options)
        files = [*Path(dump).glob("*.after_optimizations.hlo.pb")]
        if len(files) != 1:
            raise ValueError(
                f"JAX {jax.__version__} with libtpu: expected one program from the compiler, found "
                f"{[file.name for file in files]}; plan with the versions that setup.cfg names"
            )
        return compiled.memory_analysis(), files[0].read_bytes()


def _cost(hlo: bytes, stage: str) -> Cost:
    """The cost of a step: of decoding, of one turn of its loop."""
    program = read(hlo)
    if stage != "decode":
        return cost(program)
    spent = cost(program, turns=2)
    spent.add(cost(program, turns=1), -1)
    return spent


def _devices(topology: str, chip: Chip, count: int) -> Any:
    """Devices of a topology to compile for; none of them has to exist."""
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            "planning needs libtpu, the TPU compiler, which runs on any x86 Linux machine: "
            "in a clone of flexolmo_jax, run pip install -e '.[plan]'"
        )
    # libtpu asks Google Cloud which TPU this machine has; it has none.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    # Only one process may use a TPU; any number may compile.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    mode = {} if chip.config is None else {"chip_config_name": chip.config}
    try:
        devices = topologies.get_topology_desc(topology, "tpu", **mode).devices
    except Exception as error:  # libtpu raises several types, with long messages
        raise ValueError(f"{topology}: {str(error).splitlines()[0]}") from error
    if len(devices) != count:
        raise ValueError(f"{topology}: expected {count} devices, libtpu has {len(devices)}")
    return devices


def _reason(error: Exception) -> str:
    """The compiler's own sentence about memory."""
    message = str(error)
    sentence = re.search(r"(Ran out of memory|Used [\d.]+\w+ of [\d.]+\w+)[^\n]*", message)
    return sentence[0] if sentence else message.splitlines()[0]


def _needed_flops(config: Training, model: ModelConfig, stage: str, owners: Owners) -> float:
    """FLOPs per token."""
    length, active = config.data.length, model.active_experts or model.num_experts
    ranks, low_rank = owners.ranks, owners.low_rank
    if stage == "anchor":
        return flops.anchor_step_flops(model, length, ranks)
    if stage == "expert":
        assert isinstance(config, ExpertTraining)
        deltas = low_rank[0] if low_rank else None
        if config.gating == "fixed":
            return flops.expert_alone_step_flops(model, length, ranks, deltas)
        return flops.expert_step_flops(model, length, ranks, deltas)
    if stage == "router":
        return flops.router_step_flops(model, length, active, low_rank)
    if stage == "forward":
        return flops.forward_flops(model, length, active, ranks, low_rank)
    return flops.decode_flops(model, length, active, ranks, low_rank)
