"""Our side of each case: functions that return one run, ready to be timed."""

import dataclasses
import functools
import itertools
import tempfile
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.cases import Run
from benchmarks.sizes import Size
from flexolmo_jax.config import (
    AnchorTraining,
    DataConfig,
    ExpertTraining,
    ModelConfig,
    OptimizerConfig,
    Training,
)
from flexolmo_jax.data.batches import Batch
from flexolmo_jax.data.tokenizer import Tokenizer
from flexolmo_jax.federation.anchor import read_anchor, write_anchor
from flexolmo_jax.federation.expert import write_expert
from flexolmo_jax.federation.merge import merge
from flexolmo_jax.inference.request import Request
from flexolmo_jax.model import FlexOlmo, load
from flexolmo_jax.modeling.experts import Experts, moe
from flexolmo_jax.modeling.int8 import to_int8
from flexolmo_jax.modeling.kernels.cross_entropy import cross_entropy
from flexolmo_jax.modeling.transformer import (
    Anchor,
    abstract_model,
    forward,
    init_anchor,
)
from flexolmo_jax.storage.on_disk import page_aligned
from flexolmo_jax.training.objectives import StageParts, anchor_parts, expert_parts
from flexolmo_jax.training.optimizer import make_optimizer
from flexolmo_jax.training.step import train_step


def matrix_product(size: Size) -> Run:
    """A product of two large square matrices."""
    a, b = (jnp.asarray(_normal(size.gemm, size.gemm), size.config.dtype) for _ in range(2))
    multiply = jax.jit(jnp.matmul)
    return lambda: jax.block_until_ready(multiply(a, b))


def matrix_vector_product(size: Size) -> Run:
    """A product of a large matrix and a vector."""
    matrix, vector = (
        jnp.asarray(_normal(n, size.stream), size.config.dtype) for n in (size.stream, 1)
    )
    multiply = jax.jit(lambda matrix, vector: jnp.einsum("bd,fd->bf", vector, matrix))
    return lambda: jax.block_until_ready(multiply(matrix, vector))


def anchor_step(size: Size) -> Run:
    """A training step of stage 1."""
    model = _unrolled(size.config)
    config = AnchorTraining(**_training(size), model=model)
    return _step(config, anchor_parts(config, model, _anchor(model)), size)


def expert_step(size: Size, gating: str, remat: str | None, unrolled: bool = True) -> Run:
    """A training step of stage 2."""
    model = _unrolled(size.config) if unrolled else size.config
    config = ExpertTraining(**_training(size), gating=gating, remat=remat)  # type: ignore[arg-type]
    anchor = _anchor(model)
    expert = jax.tree.map(jnp.copy, anchor.public)
    return _step(config, expert_parts(config, model, anchor, expert), size)


def merged_forward(size: Size, compute: str, with_head: bool = True) -> Run:
    """Logits of the merged model; without the head, its final hidden states."""
    config = size.merged().replace(expert_compute=compute)  # unrolled, it is no faster
    backbone, experts = _merged(config)
    tokens = _tokens(size, size.batch, size.length)

    @functools.partial(jax.jit, static_argnames="config")
    def whole_forward(backbone, experts, tokens, config: ModelConfig):
        hidden = forward(backbone, (experts,), tokens, config).hidden
        return backbone.logits(hidden, config) if with_head else hidden

    return lambda: jax.block_until_ready(whole_forward(backbone, experts, tokens, config))


def moe_layer(size: Size, experts: int, active: int, compute: str) -> Run:
    """Forward and backward of one mixture of experts, all experts trained."""
    config = size.config.replace(
        num_layers=1, num_experts=experts, active_experts=active, expert_compute=compute
    )
    stack = jax.tree.map(lambda leaf: leaf[0], Experts(config, experts, jax.random.key(0)))
    stack.router.row[...] = jnp.asarray(_normal(experts, config.width))
    x = jnp.asarray(_normal(1, size.tokens, config.width))
    allowed = jnp.ones((1, experts), bool)

    @jax.jit
    def gradients(stack, x):
        return jax.grad(lambda *a: jnp.sum(moe(a[1], (a[0],), allowed, config)[0]), (0, 1))(
            stack, x
        )

    return lambda: jax.block_until_ready(gradients(stack, x))


def moe_layer_matmuls(size: Size, experts: int, active: int) -> Run:
    """The layer's nine matmuls, with equally many rows for every expert."""
    rows, c = -(-size.tokens * active // experts), size.config
    x, hidden = (jnp.asarray(_normal(experts, rows, n)) for n in (c.width, c.ffn_width))
    up, down = (
        jnp.asarray(_normal(experts, *n))
        for n in ((c.width, c.ffn_width), (c.ffn_width, c.width))
    )  # fmt: skip
    forward = [("emd,edf->emf", x, up)] * 2 + [("emf,efd->emd", hidden, down)]
    to_inputs = [("emd,efd->emf", x, down)] + [("emf,edf->emd", hidden, up)] * 2
    to_weights = [("emd,emf->edf", x, hidden)] * 2 + [("emf,emd->efd", hidden, x)]
    return _matmuls([(*matmul, 1) for matmul in forward + to_inputs + to_weights])


def expert_step_matmuls(size: Size) -> Run:
    """The matmuls with weights of an expert's training step, and nothing else."""
    c, rows = size.config, size.batch * size.length
    heads, layers = (2 * c.num_heads + 2 * c.kv_heads) * c.head_size, c.num_layers
    forward = [  # [T, a] times [a, b], and how often
        (c.width, heads, layers), (c.width, c.ffn_width, 4 * layers),
        (c.ffn_width, c.width, 2 * layers), (c.width, c.vocab_size, 1),
    ]  # fmt: skip
    to_inputs = [  # in the first layer, only to the input of the owner's `down`
        (heads, c.width, layers - 1), (c.ffn_width, c.width, 4 * (layers - 1)),
        (c.width, c.ffn_width, 2 * (layers - 1) + 1), (c.vocab_size, c.width, 1),
    ]  # fmt: skip
    to_weights = [(c.width, c.ffn_width, 2 * layers), (c.ffn_width, c.width, layers)]

    def arrays(left: tuple[int, int], right: tuple[int, int]):
        return jnp.asarray(_normal(*left)), jnp.asarray(_normal(*right))

    work = [("ta,ab->tb", *arrays((rows, a), (a, b)), n) for a, b, n in forward]
    work += [("ta,ba->tb", *arrays((rows, a), (b, a)), n) for a, b, n in to_inputs]
    work += [("ta,tb->ab", *arrays((rows, a), (rows, b)), n) for a, b, n in to_weights]
    return _matmuls(work)


def _matmuls(work: list[tuple[str, jax.Array, jax.Array, int]]) -> Run:
    """Matmuls (einsum, both factors, how often), one after the other."""
    matmul = jax.jit(jnp.einsum, static_argnums=0)

    def run():
        for *arguments, times in work:
            for _ in range(times):
                jax.block_until_ready(matmul(*arguments))

    return run


def generate(size: Size, batch: int, option: str) -> Run:
    """Greedy generation by the merged model.

    Args:
      size: of the model and the work.
      batch: sequences.
      option: the form of the weights, float32, bfloat16 or int8; or "all" or "off", with all
        experts, or with one or two masked in each sequence.
    """
    int8 = option == "int8"
    dtype = option if option in ("float32", "bfloat16") else "float32"
    config = size.merged().replace(dtype=dtype)
    weights = to_int8(*_merged(config, on_host=True)) if int8 else _merged(config)
    model = FlexOlmo(*weights, config, tuple(map(str, range(size.experts))), None, int8)
    prompts = np.asarray(_tokens(size, batch, size.prompt)).tolist()
    allowed = np.ones((batch, size.experts), bool)
    if option == "off":
        rows = np.arange(batch)
        allowed[rows, 1 + rows % (size.experts - 1)] = False
        allowed[rows, 1 + rows * 2 % (size.experts - 1)] = False
    return lambda: model.generate(prompts, size.new_tokens, allowed=allowed)


def requests(size: Size, lengths: list[tuple[int, int]], at_a_time: int, option: str) -> Run:
    """Greedy generation for requests of different lengths.

    Args:
      size: of the model.
      lengths: of the prompt and the continuation of each request.
      at_a_time: how many share a batch.
      option: "engine", or "batches": one batch after the other.
    """
    config = size.merged()
    model = FlexOlmo(*_merged(config), config, tuple(map(str, range(size.experts))), None)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, sum(n for n, _ in lengths))
    ends = itertools.accumulate(n for n, _ in lengths)
    prompts = [tokens[end - n : end].tolist() for end, (n, _) in zip(ends, lengths, strict=True)]
    allowed = np.ones(size.experts, bool)

    def with_engine():
        engine = model.engine(at_a_time, max(map(sum, lengths)))
        for prompt, (_, new) in zip(prompts, lengths, strict=True):
            engine.add(Request(prompt, new, allowed))
        while engine.step():
            pass

    def in_batches():
        for first in range(0, len(prompts), at_a_time):
            own = slice(first, first + at_a_time)
            with warnings.catch_warnings(action="ignore"):  # beyond the length it was made for
                model.generate(prompts[own], max(new for _, new in lengths[own]))

    return with_engine if option == "engine" else in_batches


def loss(size: Size, vocabulary: int, in_chunks: bool) -> Run:
    """The loss and its gradient to the hidden states."""
    shape = (size.batch, size.length)
    hidden = jnp.asarray(_normal(*shape, size.config.width))
    head = jnp.asarray(_normal(size.config.width, vocabulary))
    targets = jax.random.randint(jax.random.key(2), shape, 0, vocabulary)

    def summed_loss(hidden, head):
        if in_chunks:
            return cross_entropy(hidden, head, targets, jnp.ones(shape))[0]
        logits = hidden @ head
        return jnp.sum(optax.softmax_cross_entropy_with_integer_labels(logits, targets))

    gradient = jax.jit(jax.value_and_grad(summed_loss))
    return lambda: jax.block_until_ready(gradient(hidden, head))


def packages(size: Size, action: str) -> Run:
    """Loads or merges packages, or reads ("read") the bytes of their files."""
    folder = Path(tempfile.mkdtemp())
    tokenizer = Tokenizer.train(["Some words, enough for a tokenizer."], 260)
    anchor = _anchor(size.config)
    write_anchor(folder / "anchor", anchor, size.config, tokenizer, ["Some words."], {})
    read = read_anchor(folder / "anchor")
    experts = [folder / f"expert{i}" for i in range(1, size.experts)]
    for path in experts:
        write_expert(path, anchor.public, path.name, read, {})
    merge(folder / "anchor", experts, folder / "model", active_experts=size.active)
    if action == "load":
        return lambda: jax.block_until_ready((load(folder / "model").experts,))
    if action == "merge":
        numbers = itertools.count()
        return lambda: merge(folder / "anchor", experts, folder / f"merged{next(numbers)}")

    def plain():
        for file in folder.rglob("*"):
            if file.is_file():
                file.read_bytes()

    return plain


def _unrolled(config: ModelConfig) -> ModelConfig:
    """The best setting for this machine: on CPU, small models run faster unrolled."""
    return config.replace(unroll=config.num_layers) if jax.default_backend() == "cpu" else config


def _normal(*shape: int, dtype: str = "float32") -> np.ndarray | jax.Array:
    if jax.default_backend() != "cpu":  # drawing gigabytes on the host would take minutes
        return _drawn(shape, dtype)
    values = page_aligned(shape, np.dtype(np.float32))
    np.random.default_rng(0).standard_normal(out=values, dtype=np.float32)
    values *= 0.02
    return values


@functools.partial(jax.jit, static_argnums=(0, 1))
def _drawn(shape: tuple[int, ...], dtype: str) -> jax.Array:
    """Drawn part by part, so that the peak memory that JAX reports is that of the case itself."""
    keys = jax.random.split(jax.random.key(0), shape[0])
    return jax.lax.map(
        lambda key: (0.02 * jax.random.normal(key, shape[1:])).astype(dtype),
        keys,
        batch_size=-(-shape[0] // 16),
    )


def _tokens(size: Size, batch: int, length: int) -> jax.Array:
    return jax.random.randint(jax.random.key(1), (batch, length), 0, size.config.vocab_size)


def _anchor(config: ModelConfig) -> Anchor:
    return _filled(jax.eval_shape(lambda: init_anchor(config, jax.random.key(0))), "float32")


def _merged(config: ModelConfig, on_host: bool = False) -> Any:
    return _filled(abstract_model(config), config.dtype, on_host)


def _filled(abstract: Any, dtype: str, on_host: bool = False) -> Any:
    """Random weights from NumPy, in memory that JAX uses without a copy, as that of loaded weights.

    Jitted initialisation would compile, and leave twice the memory.

    With `on_host`, they are drawn when they are read.
    """

    def fill(path, leaf):
        if "norm" in jax.tree_util.keystr(path):
            return jnp.ones(leaf.shape, dtype)
        if on_host:
            return _Drawn(leaf.shape, dtype)
        values = jax.device_put(_normal(*leaf.shape, dtype=dtype), may_alias=True)
        return values.astype(dtype)

    return jax.tree_util.tree_map_with_path(fill, abstract)


@dataclasses.dataclass(frozen=True)
class _Drawn:
    """Random weights that are drawn when they are read, as those in a file are read."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __getitem__(self, part: tuple[slice, ...]) -> np.ndarray:
        own = (len(range(*x.indices(n))) for x, n in zip(part, self.shape, strict=True))
        return np.asarray(_normal(*own, dtype=self.dtype))


def _training(size: Size) -> dict[str, Any]:
    return {
        "data": DataConfig(batch_size=size.batch, length=size.length),
        "optimizer": OptimizerConfig(learning_rate=1e-3),
        "steps": 1000,
    }


def _step(config: Training, parts: StageParts, size: Size) -> Run:
    loss, trainable, frozen = parts
    optimizer = make_optimizer(config.optimizer, config.steps)
    state = jax.jit(optimizer.init)(trainable)
    tokens = _tokens(size, size.batch, size.length)
    ones = jnp.ones(tokens.shape, jnp.int32)
    batch = Batch(tokens, jnp.roll(tokens, -1, 1), ones, ones.astype(jnp.float32))

    def run():
        nonlocal trainable, state
        trainable, state, _ = train_step(loss, optimizer, trainable, state, frozen, batch)
        jax.block_until_ready(trainable)

    return run
