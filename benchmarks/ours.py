"""Our side of each case."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.sizes import Size
from flexolmo_jax.cli import keep_freed_memory
from flexolmo_jax.config import ModelConfig, OptimizerConfig
from flexolmo_jax.data.loader import Batch
from flexolmo_jax.model import FlexOlmo
from flexolmo_jax.modeling.experts import Experts, mix
from flexolmo_jax.modeling.transformer import Anchor, Backbone, forward, init_anchor
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
      case: as in `benchmarks/__main__.py`.
      size: of the model and the work.
      option: of "moe_E_A" and "merged_forward" the expert compute, of "decode_B" the dtype; else
        unused.

    Raises:
      ValueError: there is no such case.
    """
    keep_freed_memory()  # as `flexolmo train` does
    if case == "gemm":
        a, b = (jnp.asarray(_normal(size.gemm, size.gemm)) for _ in range(2))
        multiply = jax.jit(jnp.matmul)
        return lambda: jax.block_until_ready(multiply(a, b))
    if case == "anchor_step":
        config = _unrolled(size.config)
        return _step(AnchorLoss(config, 1e-5), _anchor(config), None, size)
    if case == "expert_step":  # the paper's form: a softmax over two experts
        config = _unrolled(size.pair())
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
            return backbone.logits(forward(backbone, (experts,), tokens, config).hidden)

        return lambda: jax.block_until_ready(logits(backbone, experts, tokens, config))
    if case.startswith("decode_"):
        config = size.merged().replace(dtype=option)
        model = FlexOlmo(*_merged(config), config, tuple(map(str, range(config.num_experts))), None)
        prompts = np.asarray(_tokens(size, int(case.split("_")[1]), size.prompt)).tolist()
        return lambda: model.generate(prompts, size.new_tokens)
    if case.startswith("moe_"):
        return _layer(*map(int, case.split("_")[1:]), size, option)
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
        return jax.grad(lambda *a: jnp.sum(mix((a[0],), a[1], allowed, config)[0]), (0, 1))(
            stack, x
        )

    return lambda: jax.block_until_ready(gradients(stack, x))


def _unrolled(config: ModelConfig) -> ModelConfig:
    """What one would set on the machine at hand: small models run faster unrolled on CPU."""
    return config.replace(unroll=config.num_layers) if jax.default_backend() == "cpu" else config


def _normal(*shape: int) -> np.ndarray:
    return 0.02 * np.random.default_rng(0).standard_normal(shape, np.float32)


def _tokens(size: Size, batch: int, length: int) -> jax.Array:
    return jax.random.randint(jax.random.key(1), (batch, length), 0, size.config.vocab_size)


def _anchor(config: ModelConfig) -> Anchor:
    return jax.jit(init_anchor, static_argnums=0)(config, jax.random.key(0))


def _merged(config: ModelConfig) -> tuple[Backbone, Experts]:
    def build(key):
        return Backbone(config, key), Experts(config, config.num_experts, key)

    backbone, experts = jax.jit(build)(jax.random.key(0))
    experts.router.row[...] = jnp.asarray(_normal(*experts.router.row.shape))
    dtype = jnp.dtype(config.dtype)
    return jax.tree.map(lambda leaf: leaf.astype(dtype), (backbone, experts))


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
