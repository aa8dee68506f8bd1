"""The network as many small programs, called layer by layer and expert by expert.

On a CPU, compiling the whole network as one program takes longer than most answers. Layers have the
same shapes, so one program of attention and one of an expert serve all of them. Python reads which
experts a layer uses, and calls only those: the others are not read from memory. For few tokens, a
layer is one program, which has a branch for each expert, and Python waits for none of them.

A program's rows do not depend on each other, and an expert that is not called would have added
exactly 0; so what is computed for a sequence depends on no other sequence of the batch.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from flexolmo_jax.config import ModelConfig
from flexolmo_jax.inference.cpu_weights import Unstacked
from flexolmo_jax.inference.paged_attention import attend_to_pages, write_tokens
from flexolmo_jax.inference.sequences import Sequences, Tokens
from flexolmo_jax.modeling.attention import attend_to_segments
from flexolmo_jax.modeling.decode_state import write_to_segments
from flexolmo_jax.modeling.experts import Experts, FeedForward, router_weights, with_parts
from flexolmo_jax.modeling.kernels.quantized import Quantized, dot
from flexolmo_jax.modeling.low_rank import LowRankGroups
from flexolmo_jax.modeling.transformer import Backbone, add_heads, evidence_weights

GATHER_MIN_TOKENS = 64  # of a prompt; with fewer, what would be compiled costs more than it saves
MAX_BEST = 20  # how many of the likeliest tokens are scored, as OpenAI's interface allows
GATHER_SIZES = 8  # gathered tokens are padded to one of this many sizes
# Of a layer that is one program: with more networks, compiling it takes longer than most answers
# gain by it; with more tokens, experts that read only those that use them gain as much.
MAX_BRANCHES = 8
MAX_TOKENS = 8
GATHER_MIN_ROWS = 4  # XLA's matmuls of 1 to 3 rows give other bits than those of more
# XLA for CPU uses half of AVX-512's width by default, which converts bfloat16 to floats more slowly
# than memory delivers them.
OPTIONS = {"xla_cpu_prefer_vector_width": 512}
# The product of a vector and a `Quantized` matrix is a loop over each sum, which LLVM vectorizes
# only if it may reorder the sum. JAX 0.10 let it; JAX 0.12 does with fast math only, and is 10x
# slower without. NaN and infinity stay what they are: XLA's `honor` flags are on by default.
REORDERED_SUMS = {"xla_cpu_enable_fast_math": True}


class Reading(NamedTuple):
    """What a model says of tokens that it has read.

    Attributes:
      logits: after the last token of each sequence.
      sequences: with the tokens; `compiled.Stacked` where the network is one program.
      shares: the experts' router weights at that token, mean over the layers; float32.
      scores: of the tokens that follow, where they were given.
    """

    logits: Float[Array, "B V"]
    sequences: Any
    shares: Float[Array | np.ndarray, "E B"]
    scores: "Scores | None"


class Scores(NamedTuple):
    """Natural log-probabilities of tokens, and of the likeliest in their place; float32."""

    own: Float[Array, "*T"]
    best: Float[Array, "*T k"]
    best_ids: Int[Array, "*T k"]

    @classmethod
    def of(cls, logits: Float[Array, "*T V"], ids: Int[Array, "*T"]) -> "Scores":
        """Of the tokens `ids`, under the model's own distribution."""
        scores = jax.nn.log_softmax(logits)
        own = jnp.take_along_axis(scores, ids[..., None], axis=-1)[..., 0]
        return cls(own, *jax.lax.top_k(scores, min(MAX_BEST, scores.shape[-1])))


class Network:
    """The weights of a model, and the programs that run over them."""

    def __init__(
        self, backbone: Backbone, experts: Experts, unstacked: Unstacked, config: ModelConfig
    ):
        self.config = config
        self.num_experts = experts.router.bias.shape[1]
        ends = (with_parts(backbone, layers=None), with_parts(experts, feed_forward=None))
        self._ends, ends_structure = jax.tree.flatten((*ends, unstacked.head))
        flat = [jax.tree.flatten((layer.shared, layer.router)) for layer in unstacked.layers]
        self._layers = [leaves for leaves, _ in flat]
        networks = [[jax.tree.flatten(x) for x in layer.networks] for layer in unstacked.layers]
        self._networks = [[leaves for leaves, _ in layer] for layer in networks]
        structures = tuple(structure for _, structure in networks[0])
        structures = (config, ends_structure, flat[0][1], structures)
        self._programs = _programs(*structures)
        of_vectors = isinstance(unstacked.head, Quantized)
        self._of_one_token = _programs(*structures, reordered_sums=True) if of_vectors else None
        counts = [x.experts_here for x in unstacked.layers[0].networks]
        self._gathers_few: dict[int, bool] = {}
        self._first = np.cumsum([0, *counts])
        self._numbers = [jnp.int32(i) for i in self._first]

    def reads_in_background(self, count: int) -> bool:
        """Whether a call with that many tokens returns before JAX has computed anything."""
        return count <= MAX_TOKENS and len(self._networks[0]) <= MAX_BRANCHES

    def empty(self, batch: int, length: int) -> Sequences:
        """Of no tokens, with room for `length`."""
        return Sequences.empty(self.config, self.num_experts, batch, length)

    def place(self, batch: Sequences, one: Sequences, row: int, length: int) -> Sequences:
        """The batch, which is donated, with its sequence `row` replaced by `one`, of `length`."""
        return batch.place(one, row, length)

    def __call__(
        self, tokens: Tokens, sequences: Sequences, following: np.ndarray | None = None
    ) -> Reading:
        """Reads the next tokens.

        Args:
          tokens, sequences: the tokens, and what was read before them.
          following: int32 [B, S], the token after each, to score it; a 0 where there is none.
        """
        sequences, pages = sequences.with_pages(tokens)
        batch, length = tokens.ids.shape
        last = np.arange(batch, dtype=np.int32) * length + tokens.last  # of all tokens [T]
        tokens = jax.device_put(tokens)  # once for all layers
        run = self._programs
        if batch * length == 1 and self._of_one_token is not None:
            run = self._of_one_token
        in_one = self.reads_in_background(batch * length)
        sizes = [] if in_one else self._sizes(batch, batch * length)
        x, added, weights, evidence = run.embed(self._ends, tokens, sequences.evidence)
        before: Any = self._layers[-1]  # of `added`, which is 0: nothing comes before the first
        caches, router_states, all_weights = [], [], []
        states = sequences.router_states
        for index, layer in enumerate(self._layers):
            state = None if states is None else states[index]
            read = before, layer, x, added, tokens, weights, sequences.caches[index], state, pages
            if in_one:
                x, own_weights, cache, state, added = run.layer(*read, self._networks[index])
            else:
                x, own_weights, cache, state, added = run.attend(*read)
                # Evidence gives the weights of all layers before the first: Python waits once.
                used = np.asarray(own_weights if weights is None else weights)
                added = self._add_experts(run.add, index, added, x, own_weights, used, sizes)
            before = layer
            caches.append(cache)
            router_states.append(state)
            all_weights.append(own_weights)
        end = (self._ends, before, x, added)
        scores = None if following is None else run.scores(*end, own_weights, following)
        logits, shares = run.logits(*end, all_weights, last)
        next_states = None if states is None else tuple(router_states)
        sequences = Sequences(tuple(caches), next_states, evidence, sequences.table)
        return Reading(logits, sequences, shares, scores)

    def _add_experts(self, programs, index, added, x, weights, used, sizes):
        for numbers, tokens in self._calls(programs, used > 0, sizes):
            networks = tuple(self._networks[index][number] for number in numbers)
            first = tuple(self._numbers[number] for number in numbers)
            added = programs[numbers[0]](networks, added, x, weights, first, tokens)
        return added

    def _calls(
        self, programs: Sequence[Any], is_used: Bool[np.ndarray, "E T"], sizes: Sequence[int]
    ) -> Iterator[tuple[Sequence[int], np.ndarray | None]]:
        """Networks that tokens use, and which tokens they read; None: all."""
        num_tokens = is_used.shape[1]
        of_one_token: dict[Any, list[int]] = {}  # by their program
        by_network = np.logical_or.reduceat(is_used, self._first[:-1])
        counts = by_network.sum(axis=1)
        for number in np.flatnonzero(counts).tolist():
            if num_tokens == 1:
                of_one_token.setdefault(programs[number], []).append(number)
                continue
            # How many experts several tokens use depends on all of them: each is called alone.
            size = next(size for size in sizes if size >= counts[number])
            order = None
            if size < num_tokens:
                order = np.argsort(~by_network[number], kind="stable")[:size].astype(np.int32)
            yield [number], order
        for numbers in of_one_token.values():
            yield numbers, None

    def _sizes(self, batch: int, count: int) -> list[int]:
        """How many of `count` tokens an expert may read; several if it reads those that use it."""
        if batch > 1:
            gathers = self.gathers_few(count)
        else:  # a short prompt compiles nothing for it
            gathers = count >= GATHER_MIN_TOKENS or self._gathers_few.get(count, False)
        return gathered_sizes(count) if gathers else [count]

    def gathers_few(self, count: int) -> bool:
        """Whether experts may read only the tokens that use them, of `count` in decoding.

        They may if that gives the same bits; else those of a sequence would depend on how many
        others use its experts. XLA's matmuls of 4 to 32 rows do, on the CPUs that we know; the
        first call compiles them, and compares them with this model's weights.
        """
        if count not in self._gathers_few:
            self._gathers_few[count] = self._same_bits_if_gathered(count)
        return self._gathers_few[count]

    def _same_bits_if_gathered(self, count: int) -> bool:
        rng = np.random.default_rng(0)
        width = self.config.width
        x = jnp.asarray(rng.standard_normal((count, width)), self.config.dtype)
        weights = jnp.ones((self.num_experts, count))

        def added(number, tokens):
            one = ((self._networks[0][number],), jnp.zeros_like(x), x, weights)
            return np.asarray(self._programs.add[number](*one, (self._numbers[number],), tokens))

        for number in {add: number for number, add in enumerate(self._programs.add)}.values():
            whole = added(number, None)
            for size in gathered_sizes(count)[:-1]:
                tokens = np.arange(size, dtype=np.int32)
                if not np.array_equal(added(number, tokens)[:size], whole[:size]):
                    return False
        return True


def gathered_sizes(count: int) -> list[int]:
    """To how many of `count` tokens those of an expert are padded: few programs are compiled."""
    step = max(GATHER_MIN_ROWS, -(-count // GATHER_SIZES))
    return [*range(step, count, step), count]


def add_gathered(
    network: FeedForward | LowRankGroups,
    added: Float[Array, "T D"],
    x: Float[Array, "T D"],
    weights: Float[Array, "E T"],
    tokens: Int[Array, " n"] | None,
) -> Float[Array, "T D"]:
    """`network.add_dense`, computed for some tokens.

    Args:
      network, added, x, weights: as in `FeedForward.add_dense`, of one sequence.
      tokens: indices of different tokens, with all that use one of its experts; None: all tokens.
    """
    if tokens is None:
        return network.add_dense(added[None], x[None], weights[:, None])[0]
    out = network.add_dense(None, x[None, tokens], weights[:, None, tokens])[0]
    return added.at[tokens].add(out, unique_indices=True)


class _Programs(NamedTuple):
    """Jitted functions; a model of the same structure shares them."""

    embed: Any
    attend: Any
    layer: Any  # `attend`, and all networks, each if a token uses one of its experts
    add: tuple[Any, ...]  # one for each network of a layer; equal structures share one
    logits: Any
    scores: Any


@functools.lru_cache(maxsize=16)
def _programs(
    config: ModelConfig, ends, layer_structure, structures, reordered_sums: bool = False
) -> _Programs:
    """The programs; modules are flattened once, because JAX takes plain arrays much faster.

    Between them, tokens of all sequences are one axis T, so that those that add experts serve
    prompts and decoding.
    """
    options = OPTIONS | (REORDERED_SUMS if reordered_sums else {})
    compiled = functools.partial(jax.jit, compiler_options=options)

    @compiled
    def embed(leaves, tokens: Tokens, state):
        backbone, experts, head = jax.tree.unflatten(ends, leaves)
        x = backbone.embed[...][tokens.ids].astype(config.dtype)
        flat = x.reshape(-1, config.width)
        if config.evidence is None:
            return flat, jnp.zeros_like(flat), None, None
        segments = jnp.ones(tokens.ids.shape, jnp.int32)
        weights, state = evidence_weights(
            backbone, (experts,), tokens.ids, segments, some_allowed(tokens.allowed), config, state,
            head, tokens.last + 1,
        )  # fmt: skip
        assert weights is not None
        weights = jnp.where(_is_text(tokens), weights, 0).reshape(len(weights), -1)
        return flat, jnp.zeros_like(flat), weights, state

    def attend(before, leaves, x, added, tokens: Tokens, weights, cache, router_state, pages):
        previous, _ = jax.tree.unflatten(layer_structure, before)
        layer, router = jax.tree.unflatten(layer_structure, leaves)
        x = x + previous.experts_norm(added, config.norm_eps)
        x = x.reshape(*tokens.ids.shape, -1)
        positions = tokens.start[:, None] + jnp.arange(x.shape[1])
        q, keys, values = layer.attention.project(x, positions, config)
        if pages is None:
            cache = write_to_segments(cache, keys, values, positions)
            last = tokens.start + tokens.last
            reached = jnp.minimum(positions, last[:, None])  # padding reaches no segment of its own
            out = attend_to_segments(q, cache, reached)
        else:
            cache = write_tokens(cache, keys, values, positions, pages)
            out = attend_to_pages(q, cache, positions, pages)
        x = x + layer.attention_norm(layer.attention.output(out), config.norm_eps)
        if weights is None:
            weights, router_state = router_weights(
                router(x), some_allowed(tokens.allowed), config, router_state=router_state,
                lengths=tokens.lengths,
            )  # fmt: skip
            weights = jnp.where(_is_text(tokens), weights, 0).reshape(len(weights), -1)
        x = x.reshape(-1, config.width)
        return x, weights, cache, router_state, jnp.zeros_like(x)

    def layer(*arguments):
        *of_attention, networks = arguments
        x, weights, cache, router_state, added = attend(*of_attention)
        first = 0
        for leaves, structure in zip(networks, structures, strict=True):
            network = jax.tree.unflatten(structure, leaves)
            own = weights[first : first + network.experts_here]
            first += network.experts_here
            add = functools.partial(add_gathered, network, x=x, weights=own, tokens=None)
            with jax.named_scope("experts"):
                added = jax.lax.cond(jnp.any(own > 0), add, lambda added: added, added)
        return x, weights, cache, router_state, added

    @functools.cache
    def adding(structure):
        @functools.partial(compiled, donate_argnums=1)
        def add(networks, added, x, weights, firsts, tokens=None):
            for leaves, first in zip(networks, firsts, strict=True):
                network = jax.tree.unflatten(structure, leaves)
                own = jax.lax.dynamic_slice_in_dim(weights, first, network.experts_here)
                added = add_gathered(network, added, x, own, tokens)
            return added

        return add

    def at(leaves, before, x, added, weights):
        """Logits of tokens [T]; their x and `added` are [T, D], and their weights [E, T]."""
        backbone, experts, head = jax.tree.unflatten(ends, leaves)
        previous, _ = jax.tree.unflatten(layer_structure, before)
        x = x + previous.experts_norm(added, config.norm_eps)
        hidden = backbone.norm(x, config.norm_eps)
        return add_heads(dot(hidden, head, jnp.float32), (experts,), hidden, weights)

    @compiled
    def logits(leaves, before, x, added, all_weights, last):
        weights = [own[:, last] for own in all_weights]
        shares = sum(weights) / len(weights)
        return at(leaves, before, x[last], added[last], weights[-1]), shares

    @compiled
    def scores(leaves, before, x, added, weights, following):
        all_logits = at(leaves, before, x, added, weights)
        return Scores.of(all_logits.reshape(*following.shape, -1), following)

    of_layer = functools.partial(compiled, donate_argnums=(2, 3, 6, 7))  # all but the weights
    add = tuple(map(adding, structures))
    return _Programs(embed, of_layer(attend), of_layer(layer), add, logits, scores)


def _is_text(tokens: Tokens) -> Bool[Array, "B S"]:
    """The tokens that are not padding."""
    return jnp.arange(tokens.ids.shape[1]) < tokens.lengths[:, None]


def some_allowed(allowed: Bool[Array, "B E"]) -> Bool[Array, "B E"]:
    """All experts where a row, which is not in use, allows none: a softmax needs one."""
    return allowed | ~jnp.any(allowed, axis=1, keepdims=True)
