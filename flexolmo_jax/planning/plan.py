"""The real step of a config, compiled ahead of time for TPUs that are not at hand."""

import dataclasses
import functools
import importlib.util
import os
import re
import runpy
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from flexolmo_jax.config import (
    AnchorTraining,
    ExpertTraining,
    ModelConfig,
    RouterTraining,
    Training,
    find_config,
)
from flexolmo_jax.data.batches import Batch
from flexolmo_jax.inference import decode
from flexolmo_jax.inference.sampling import Sampling
from flexolmo_jax.modeling import flops
from flexolmo_jax.modeling.decode_state import KVCache
from flexolmo_jax.modeling.experts import Experts
from flexolmo_jax.modeling.transformer import Anchor, abstract_model, init_anchor
from flexolmo_jax.parallel import collectives, placement
from flexolmo_jax.parallel.mesh import AXES, BATCH, EXPERT, SERVING, make_mesh, shardings, specs
from flexolmo_jax.planning.chips import Chip, chip_of
from flexolmo_jax.planning.costs import cost
from flexolmo_jax.planning.hlo import read
from flexolmo_jax.training.gradients import check_batch
from flexolmo_jax.training.optimizer import make_optimizer
from flexolmo_jax.training.step import (
    AnchorLoss,
    ExpertAloneLoss,
    ExpertPairLoss,
    RouterLoss,
    RouterRows,
    train_step,
)

STAGES = ("anchor", "expert", "router", "forward", "decode")
OWN = {AnchorTraining: "anchor", ExpertTraining: "expert", RouterTraining: "router"}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a step costs each device: a chip, or one of two on it. Bytes and seconds; FLOPs are of
    one step."""

    stage: str
    topology: str
    chips: int
    devices: int
    compile_seconds: float
    fits: bool
    because: str  # where it does not fit: the compiler's reason
    arguments: float = 0  # bytes held from step to step: weights, optimizer, batch
    temporaries: float = 0
    output: float = 0  # beyond what takes the place of an argument
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
        """The roofline: the longest of the three, as if the others hid behind it."""
        return max(self.compute_seconds, self.hbm_seconds, self.link_seconds)

    @property
    def overhead(self) -> float:
        """Compiled FLOPs as a multiple of the needed ones."""
        return self.compiled_flops / self.needed_flops if self.needed_flops else 0.0

    @property
    def mfu(self) -> float:
        """Needed FLOPs over what the device could do in that time."""
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
        """For people: what, and how much."""
        gib = 2**30
        rows = [("verdict", self.verdict), ("compiled in", f"{self.compile_seconds:.0f} s")]
        if self.devices > self.chips:
            rows.append(("devices", f"{self.devices} on {self.chips} chips"))
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
    """The stage to plan: the config's own, or one that only uses its model.

    Raises:
      ValueError: another stage's training is asked for.
    """
    own = OWN[type(config)]
    if wanted in OWN.values() and wanted != own:
        raise ValueError(f"the config is one of stage {own}: plan that, forward or decode")
    return wanted or own


def model_of(path: str, config: Training) -> ModelConfig:
    """What a config trains, or trains a part of.

    Raises:
      ValueError: the file does not say.
    """
    if isinstance(config, AnchorTraining):
        return config.model
    file = find_config(path)
    model = runpy.run_path(str(file)).get("model")
    if not isinstance(model, ModelConfig):
        raise ValueError(
            f"{file}: set `model`, a ModelConfig, beside `config`: the sizes of what it trains"
        )
    if isinstance(config, RouterTraining) and config.active_experts:
        return model.replace(active_experts=config.active_experts)
    return model


def make_plan(config: Training, model: ModelConfig, stage: str, topology: str) -> Plan:
    """Compiles a stage's step for a topology, and reads off what it costs.

    Args:
      config: batch, length, microbatches, remat, devices for experts.
      model: sizes, dtype.
      stage: one of STAGES; "forward" is the loss of merged weights, "decode" one more token of
        each of `data.batch_size` sequences of `data.length` tokens.
      topology: as in `chip_of`.

    Raises:
      ValueError: an unknown topology; libtpu is missing; sizes that the chips do not divide.
    """
    chip, chips = chip_of(topology)
    count = chips * chip.devices
    model = config.computing(model)
    if stage == "decode" and config.tensor_parallel > 1:
        raise ValueError("tensor_parallel is for training and forward passes; leave it out")
    mesh = make_mesh(
        config.expert_parallel, _devices(topology, chip, count), config.tensor_parallel
    )
    check_batch(config, mesh, "chips" if count == chips else "devices (two a chip)")
    known: dict[str, Any] = {
        "stage": stage, "topology": topology, "chips": chips, "devices": count,
        "memory": chip.memory,
    }  # fmt: skip
    started = time.monotonic()
    run, arguments, named = _step(config, model, stage, mesh)
    with placement.use_mesh(mesh), tempfile.TemporaryDirectory() as dump:
        lowered = run.lower(*arguments, **named)
        try:
            # From the compiler itself: an executable's program is what jaxlib understands of it.
            options = {"xla_dump_to": dump, "xla_dump_hlo_as_proto": True}
            compiled = lowered.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return Plan(
                compile_seconds=time.monotonic() - started, fits=False,
                because=_reason(str(error)), **known,
            )  # fmt: skip
        compile_seconds = time.monotonic() - started
        dumped = [*Path(dump).glob("*.after_optimizations.hlo.pb")]
        if len(dumped) != 1:
            raise ValueError(
                f"JAX {jax.__version__} with libtpu: expected one program from the compiler, found "
                f"{[file.name for file in dumped]}; plan with the versions that setup.cfg names"
            )
        program = read(dumped[0].read_bytes())
    if stage == "decode":  # one turn of the loop, without what comes before and after it
        found = cost(program, turns=2)
        found.add(cost(program, turns=1), -1)
    else:
        found = cost(program)
    used = compiled.memory_analysis()
    output = used.output_size_in_bytes - used.alias_size_in_bytes
    peak = used.argument_size_in_bytes + used.temp_size_in_bytes + output
    sequences = config.data.batch_size
    tokens = sequences if stage == "decode" else sequences * config.data.length
    return Plan(
        compile_seconds=compile_seconds,
        fits=peak <= chip.memory,
        because="" if peak <= chip.memory else f"{peak / 2**30:.1f} GiB are needed",
        arguments=used.argument_size_in_bytes,
        temporaries=used.temp_size_in_bytes,
        output=output,
        peak=peak,
        needed_flops=_needed(config, model, stage) * tokens / count,
        compiled_flops=found.flops,
        hbm_bytes=found.bytes,
        collectives=dict(found.collectives),
        compute_seconds=found.flops / chip.flops,
        hbm_seconds=found.bytes / chip.bandwidth,
        link_seconds=sum(found.collectives.values()) / chip.links,
        tokens_a_step=tokens,
        steps=config.steps if stage in ("anchor", "expert", "router") else 0,
        **known,
    )


def _devices(topology: str, chip: Chip, count: int) -> Any:
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            "planning needs libtpu, the TPU compiler, which runs on any x86 Linux machine: "
            "in a clone of flexolmo_jax, run pip install -e '.[plan]'"
        )
    # libtpu asks Google Cloud which TPU this machine has; here it has none.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    # Only one process may use a TPU; any number may compile.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    mode = {} if chip.config is None else {"chip_config_name": chip.config}
    try:
        devices = topologies.get_topology_desc(topology, "tpu", **mode).devices
    except Exception as error:  # of several kinds, and long
        raise ValueError(f"{topology}: {str(error).splitlines()[0]}") from error
    if len(devices) != count:
        raise ValueError(f"{topology}: expected {count} devices, libtpu has {len(devices)}")
    return devices


def _reason(message: str) -> str:
    """The compiler's own sentence about memory."""
    said = re.search(r"(Ran out of memory|Used [\d.]+\w+ of [\d.]+\w+)[^\n]*", message)
    return said[0] if said else message.splitlines()[0]


def _needed(config: Training, model: ModelConfig, stage: str) -> float:
    """FLOPs a token."""
    length, every = config.data.length, model.active_experts or model.num_experts
    if stage == "anchor":
        return flops.anchor_step_flops(model, length)
    if stage == "expert":
        assert isinstance(config, ExpertTraining)
        of = flops.expert_alone_step_flops if config.gating == "alone" else flops.expert_step_flops
        return of(model, length)
    if stage == "router":
        return flops.router_step_flops(model, length, every)
    if stage == "forward":
        return flops.forward_flops(model, length, every)
    return flops.decode_flops(model, length, every)


def _step(config: Training, model: ModelConfig, stage: str, mesh: Mesh) -> tuple[Any, tuple, dict]:
    """The jitted step, and the shapes of its arguments, placed on the mesh."""
    if stage == "decode":
        return _decode(config, model, mesh)
    shape = (config.data.batch_size, config.data.length)
    rows = functools.partial(jax.ShapeDtypeStruct, shape, sharding=NamedSharding(mesh, BATCH))
    shapes: tuple[Any, ...] = (*(rows(jnp.int32) for _ in range(3)), rows(jnp.float32))
    batch = Batch(*shapes)
    if stage == "forward":
        backbone, experts = _placed(_weights(model, mesh), mesh)
        loss = RouterLoss(model, 0.0, 0.0)
        run = jax.jit(functools.partial(_forward, loss=loss, mesh=mesh))
        return run, (backbone, experts, batch), {}
    trainable, frozen, loss = _stage(config, model, stage, mesh)
    optimizer = make_optimizer(config.optimizer, config.steps)
    state = _placed(jax.eval_shape(optimizer.init, trainable), mesh)
    trainable, frozen = _placed(trainable, mesh), _placed(frozen, mesh)
    named = {"mesh": mesh, "microbatches": config.microbatches}
    return train_step, (loss, optimizer, trainable, state, frozen, batch), named


def _forward(backbone, experts, batch: Batch, *, loss: RouterLoss, mesh: Mesh):
    def local(backbone, experts, batch):
        rows = RouterRows.of(experts.router)
        return collectives.psum_batch(loss(rows, (backbone, experts), batch)[1])

    where = (*specs((backbone, experts), mesh), BATCH)
    return placement.shard_map(local, mesh, where, P())(backbone, experts, batch)


def _stage(config: Training, model: ModelConfig, stage: str, mesh: Mesh) -> tuple[Any, Any, Any]:
    """What is trained, what is frozen, and the loss."""
    z = config.output_z_loss
    if isinstance(config, RouterTraining):
        backbone, experts = _weights(model, mesh)
        rows = jax.eval_shape(RouterRows.of, experts.router)
        return rows, (backbone, experts), RouterLoss(model, z, config.router_z_loss)
    anchor: Anchor = jax.eval_shape(
        lambda key: init_anchor(model.replace(num_experts=1), key), jax.random.key(0)
    )
    if not isinstance(config, ExpertTraining):
        return anchor, None, AnchorLoss(model, z)
    if config.gating == "alone":
        frozen = (anchor, anchor.public.router)
        return anchor.public.feed_forward, frozen, ExpertAloneLoss(model, z)
    return anchor.public, anchor, ExpertPairLoss(model, z, config.router_z_loss)


def _weights(model: ModelConfig, mesh: Mesh) -> tuple[Any, Experts]:
    """Shapes of the merged model, with empty experts where the mesh needs them."""
    ways = mesh.shape[EXPERT]
    return abstract_model(model.replace(num_experts=-(-model.num_experts // ways) * ways))


def _placed(tree: Any, mesh: Mesh, over: tuple[str, ...] = AXES) -> Any:
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        tree, shardings(tree, mesh, over),
    )  # fmt: skip


def _decode(config: Training, model: ModelConfig, mesh: Mesh) -> tuple[Any, tuple, dict]:
    """One turn of the loop over new tokens; weights in the dtype of the activations."""
    batch, length = config.data.batch_size, config.data.length

    def abstract(shape, dtype, *spec):
        where = NamedSharding(mesh, P(*spec))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    weights = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, model.dtype), _weights(model, mesh)
    )
    weights = _placed(weights, mesh, SERVING)
    num_experts = weights[1].router.bias.shape[1]
    shape = (model.num_layers, batch, model.kv_heads, length, model.head_size)
    axes = AXES
    cache = KVCache(*(abstract(shape, model.dtype, None, axes) for _ in range(2)))
    state = decode.Generation(
        abstract((), jnp.int32),
        abstract((batch, model.vocab_size), jnp.float32, axes),
        abstract((batch,), jnp.bool_, axes),
        cache,
        model.memory
        and abstract((model.num_layers, num_experts, batch), jnp.float32, None, None, axes),
        abstract((batch, decode.BUCKET), jnp.int32, axes),
    )
    arguments = (
        (*weights, None), state, abstract((batch,), jnp.int32, axes),
        abstract((batch, num_experts), jnp.bool_, axes),
        jax.eval_shape(jax.random.key, 0), abstract((1,), jnp.int32), decode.BUCKET,
    )  # fmt: skip
    named = {"config": model, "sampling": Sampling(0.0, None, None), "mesh": mesh}
    return decode.decode_on_accelerator, arguments, named
