"""Our side of each case."""

import functools
import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.sizes import Size
from flexolmo_jax.config import ModelConfig, OptimizerConfig
from flexolmo_jax.data.batches import Batch
from flexolmo_jax.data.tokenizer import Tokenizer
from flexolmo_jax.federation.anchor import read_anchor, write_anchor
from flexolmo_jax.federation.expert import write_expert
from flexolmo_jax.federation.merge import merge
from flexolmo_jax.inference.cpu_weights import round_to_int8
from flexolmo_jax.model import FlexOlmo, load
from flexolmo_jax.modeling.experts import Experts, moe
from flexolmo_jax.modeling.kernels.cross_entropy import cross_entropy
from flexolmo_jax.modeling.transformer import (
    Anchor,
    Backbone,
    abstract_model,
    forward,
    init_anchor,
)
from flexolmo_jax.training.optimizer import make_optimizer
from flexolmo_jax.training.step import (
    AnchorLoss,
    ExpertAloneLoss,
    ExpertPairLoss,
    Loss,
    train_step,
)


def build(case: str, size: Size, option: str) -> Callable[[], None]:
    """One run of a case, ready to be timed.

    Args:
      case: as in `benchmarks/cases.py`.
      size: of the model and the work.
      option: of "merged_forward" the expert compute, of "moe_E_A" that or "products" (as of
        "expert_step"), of "decode_B" the dtype, of "masks_B" whether experts are off, of "remat"
        the policy, of the last three what is done; else unused.

    Raises:
      ValueError: there is no such case.
    """
    if case == "gemm":
        a, b = (jnp.asarray(_normal(size.gemm, size.gemm)) for _ in range(2))
        multiply = jax.jit(jnp.matmul)
        return lambda: jax.block_until_ready(multiply(a, b))
    if case == "stream":
        matrix, vector = (jnp.asarray(_normal(n, size.stream)) for n in (size.stream, 1))
        read = jax.jit(lambda matrix, vector: jnp.einsum("bd,fd->bf", vector, matrix))
        return lambda: jax.block_until_ready(read(matrix, vector))
    if case == "anchor_step":
        config = _unrolled(size.config)
        return _step(AnchorLoss(config, 1e-5), _anchor(config), None, size)
    if option == "products" and case == "expert_step":
        return _step_products(size)
    if case in ("expert_step", "remat"):  # the paper's form: a softmax over two experts
        config = _unrolled(size.pair()).replace(remat=option or size.config.remat)
        anchor = _anchor(config)
        expert = jax.tree.map(jnp.copy, anchor.public)
        return _step(ExpertPairLoss(config, 1e-5, 0.0), expert, anchor, size)
    if case == "expert_alone_step":  # our default recipe
        config = _unrolled(size.config)
        anchor = _anchor(config)
        expert = jax.tree.map(jnp.copy, anchor.public.feed_forward)
        frozen = (anchor, anchor.public.router)
        return _step(ExpertAloneLoss(config, 1e-5), expert, frozen, size)
    if case == "merged_forward":
        config = _unrolled(size.merged()).replace(expert_compute=option)
        backbone, experts = _merged(config)
        tokens = _tokens(size, size.batch, size.length)

        @functools.partial(jax.jit, static_argnames="config")
        def logits(backbone, experts, tokens, config: ModelConfig):
            return backbone.logits(forward(backbone, (experts,), tokens, config).hidden, config)

        return lambda: jax.block_until_ready(logits(backbone, experts, tokens, config))
    if case.startswith(("decode_", "masks_")):
        return _decode(int(case.split("_")[1]), size, option)
    if case.startswith("moe_"):
        experts, active = map(int, case.split("_")[1:])
        if option == "products":
            return _products(experts, active, size)
        return _layer(experts, active, size, option)
    if case == "loss_100352":
        return _loss(size, option)
    if case in ("load", "merge"):
        return _files(size, option)
    raise ValueError(f"no case {case!r} on our side")


def _layer(experts: int, active: int, size: Size, compute: str) -> Callable[[], None]:
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


def _products(experts: int, active: int, size: Size) -> Callable[[], None]:
    """The layer's nine products, with as many rows for every expert."""
    rows, c = -(-size.tokens * active // experts), size.config
    x, hidden = (jnp.asarray(_normal(experts, rows, n)) for n in (c.width, c.ffn_width))
    up, down = (
        jnp.asarray(_normal(experts, *n))
        for n in ((c.width, c.ffn_width), (c.ffn_width, c.width))
    )  # fmt: skip
    forward = [("emd,edf->emf", x, up)] * 2 + [("emf,efd->emd", hidden, down)]
    to_inputs = [("emd,efd->emf", x, down)] + [("emf,edf->emd", hidden, up)] * 2
    to_weights = [("emd,emf->edf", x, hidden)] * 2 + [("emf,emd->efd", hidden, x)]
    return _in_turn([(*one, 1) for one in forward + to_inputs + to_weights])


def _step_products(size: Size) -> Callable[[], None]:
    """The matrix products with weights of an expert's training step, and nothing else."""
    c, rows = size.config, size.batch * size.length
    heads, layers = (2 * c.num_heads + 2 * c.kv_heads) * c.head_size, c.num_layers
    forward = [  # [T, a] times [a, b], so often
        (c.width, heads, layers), (c.width, c.ffn_width, 4 * layers),
        (c.ffn_width, c.width, 2 * layers), (c.width, c.vocab_size, 1),
    ]  # fmt: skip
    to_inputs = [  # of the first layer, only the input of the owner's `down`
        (heads, c.width, layers - 1), (c.ffn_width, c.width, 4 * (layers - 1)),
        (c.width, c.ffn_width, 2 * (layers - 1) + 1), (c.vocab_size, c.width, 1),
    ]  # fmt: skip
    to_weights = [(c.width, c.ffn_width, 2 * layers), (c.ffn_width, c.width, layers)]

    def arrays(left: tuple[int, int], right: tuple[int, int]):
        return jnp.asarray(_normal(*left)), jnp.asarray(_normal(*right))

    work = [("ta,ab->tb", *arrays((rows, a), (a, b)), n) for a, b, n in forward]
    work += [("ta,ba->tb", *arrays((rows, a), (b, a)), n) for a, b, n in to_inputs]
    work += [("ta,tb->ab", *arrays((rows, a), (rows, b)), n) for a, b, n in to_weights]
    return _in_turn(work)


def _in_turn(work: list[tuple[str, jax.Array, jax.Array, int]]) -> Callable[[], None]:
    """Products (einsum, factors, how often), one after the other."""
    product = jax.jit(jnp.einsum, static_argnums=0)

    def run():
        for *one, times in work:
            for _ in range(times):
                jax.block_until_ready(product(*one))

    return run


def _decode(batch: int, size: Size, option: str) -> Callable[[], None]:
    int8 = option == "int8"
    dtype = option if option in ("float32", "bfloat16") else "float32"
    config = size.merged().replace(dtype=dtype)
    weights = _merged(config)
    weights = round_to_int8(*weights) if int8 else weights
    model = FlexOlmo(*weights, config, tuple(map(str, range(size.experts))), None, int8)
    prompts = np.asarray(_tokens(size, batch, size.prompt)).tolist()
    allowed = np.ones((batch, size.experts), bool)
    if option == "off":  # in each sequence, in turn, one or two
        rows = np.arange(batch)
        allowed[rows, 1 + rows % (size.experts - 1)] = False
        allowed[rows, 1 + rows * 2 % (size.experts - 1)] = False
    return lambda: model.generate(prompts, size.new_tokens, allowed=allowed)


def _loss(size: Size, option: str) -> Callable[[], None]:
    """Loss and its gradient to the hidden states, at the full size's vocabulary."""
    vocabulary, shape = 100_352, (size.batch, size.length)
    hidden = jnp.asarray(_normal(*shape, size.config.width))
    head = jnp.asarray(_normal(size.config.width, vocabulary))
    targets = jax.random.randint(jax.random.key(2), shape, 0, vocabulary)

    def loss(hidden, head):
        if option == "chunks":
            return cross_entropy(hidden, head, targets, jnp.ones(shape))[0]
        logits = hidden @ head
        return jnp.sum(optax.softmax_cross_entropy_with_integer_labels(logits, targets))

    gradient = jax.jit(jax.value_and_grad(loss))
    return lambda: jax.block_until_ready(gradient(hidden, head))


def _files(size: Size, what: str) -> Callable[[], None]:
    """Loads or merges real packages, or reads their bytes."""
    folder = Path(tempfile.mkdtemp())
    tokenizer = Tokenizer.train(["Some words, that do for a tokenizer."], 260)
    anchor = _anchor(size.config)
    write_anchor(folder / "anchor", anchor, size.config, tokenizer, ["Some words."], {})
    read = read_anchor(folder / "anchor")
    experts = [folder / f"expert{i}" for i in range(1, size.experts)]
    for path in experts:
        write_expert(path, anchor.public, path.name, read, {})
    merge(folder / "anchor", experts, folder / "model", active_experts=size.active)
    if what == "load":
        return lambda: jax.block_until_ready((load(folder / "model").experts,))
    if what == "merge":
        numbers = itertools.count()
        return lambda: merge(folder / "anchor", experts, folder / f"merged{next(numbers)}")

    def plain():
        for file in folder.rglob("*"):
            if file.is_file():
                file.read_bytes()

    return plain


def _unrolled(config: ModelConfig) -> ModelConfig:
    """What one would set on the machine at hand: small models run faster unrolled on CPU."""
    return config.replace(unroll=config.num_layers) if jax.default_backend() == "cpu" else config


def _normal(*shape: int) -> np.ndarray:
    values = np.random.default_rng(0).standard_normal(shape, np.float32)
    values *= 0.02
    return values


def _tokens(size: Size, batch: int, length: int) -> jax.Array:
    return jax.random.randint(jax.random.key(1), (batch, length), 0, size.config.vocab_size)


def _anchor(config: ModelConfig) -> Anchor:
    return jax.jit(init_anchor, static_argnums=0)(config, jax.random.key(0))


def _merged(config: ModelConfig) -> tuple[Backbone, Experts]:
    """Filled by NumPy: jitted initialisation would leave as much again in the process."""

    def fill(path, leaf):
        is_norm = "norm" in jax.tree_util.keystr(path)
        values = np.ones(leaf.shape, np.float32) if is_norm else _normal(*leaf.shape)
        return jnp.asarray(values, config.dtype)

    return jax.tree_util.tree_map_with_path(fill, abstract_model(config))


def _step(loss: Loss, trainable, frozen, size: Size) -> Callable[[], None]:
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-3), 1000)
    state = jax.jit(optimizer.init)(trainable)
    tokens = _tokens(size, size.batch, size.length)
    ones = jnp.ones(tokens.shape, jnp.int32)
    batch = Batch(tokens, jnp.roll(tokens, -1, 1), ones, ones.astype(jnp.float32))

    def run():
        nonlocal trainable, state
        trainable, state, _ = train_step(loss, optimizer, trainable, state, frozen, batch)
        jax.block_until_ready(trainable)

    return run
