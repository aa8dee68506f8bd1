"""Evidence routing: experts are weighed by how well each predicted the tokens that were read.

Every owner trains, alone, a bigram model of its text: a low-rank head on the anchor's embedding of
the token before. The anchor's owner trains one of public text. The logit of expert e at token t is

    strength * sum over s <= t of decay^(t - s) * (log p_e(x_s | x_s-1) - log p_public(x_s | x_s-1))

minus `shift` for every expert but the public one; a softmax over these gives the weights, the same
in all layers and in the head. It is the posterior of a mixture of bigram models with forgetting,
and not in the paper; Branch-Train-Merge (Li et al. 2022) weighs whole models so, and runs them all.

It is causal, it is known before the first layer, and it depends on the anchor and on expert e
alone: which other experts exist or are allowed changes nothing in it.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from flexolmo_jax.modeling.heads import LowRankHead, delta
from flexolmo_jax.modeling.kernels.quantized import Quantized, dot
from flexolmo_jax.modeling.router import add_decayed_logits


@jax.named_scope("evidence")
def evidence_logits(
    ratios: Float[Array, "E B S"],
    segments: Int[Array, "B S"],
    evidence: tuple[float, float, float],
    sums: Float[Array, "E B"],
    lengths: Int[Array, " B"] | None = None,
) -> tuple[Float[Array, "E B S"], Float[Array, "E B"]]:
    """The logits to route by, from the log-likelihood ratios of the tokens.

    Args:
      ratios: log p_e - log p_public of each token, 0 for the first of a document.
      segments: the document of each token; every document begins with an empty sum.
      evidence: (decay, strength, shift).
      sums: the decayed sums up to the token before the first one, if that token is of the same
        document; else 0.
      lengths: as in `add_decayed_logits`.

    Returns:
      the logits, and the sums up to the last token; float32.
    """
    decay, strength, shift = evidence
    totals, sums = add_decayed_logits(ratios, segments, (decay, 1.0), sums, lengths)
    shifts = jnp.where(jnp.arange(len(ratios)) == 0, 0.0, shift)
    return strength * totals - shifts[:, None, None], sums


def follows(segments: Int[Array, "B S"], previous: Int[Array, "B S"]) -> Bool[Array, "B S"]:
    """Whether a token has a token before it in its document.

    Args:
      segments: of the tokens; 0 is padding.
      previous: the tokens before them; -1 is none.
    """
    before = jnp.concatenate([segments[:, :1], segments[:, :-1]], axis=1)
    return (previous >= 0) & (before == segments) & (segments > 0)


def log_probabilities(
    heads: LowRankHead,
    hidden: Float[Array, "B S D"],
    matrix: jax.Array | Quantized,
    targets: Int[Array, "B S"],
    chunk: int,
) -> Float[Array, "E B S"]:
    """log p_e(targets) of the bigram models, expert by expert, in float32.

    The logits of `chunk` positions and one expert are in memory at a time, never [B, S, E, V].

    Args:
      heads: of all experts.
      hidden: the normed embeddings of the tokens before the targets.
      matrix: the backbone's output head, [D, V].
      targets: the tokens to score.
      chunk: positions of each sequence.
    """
    batch, length = targets.shape
    chunk = min(chunk, length)

    def split(x):  # [B, S, ...] -> [S / chunk, B, chunk, ...]
        x = jnp.pad(x, ((0, 0), (0, -length % chunk), *((0, 0),) * (x.ndim - 2)))
        return x.reshape(batch, -1, chunk, *x.shape[2:]).swapaxes(0, 1)

    def of_chunk(inputs):
        hidden, targets = inputs
        public = dot(hidden, matrix, jnp.float32)

        def of_expert(blocks):
            add = lambda logits, block: (logits + delta(hidden, *block), None)  # noqa: E731
            logits, _ = jax.lax.scan(add, public, blocks)
            chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
            return chosen - jax.nn.logsumexp(logits, axis=-1)

        return jax.lax.map(of_expert, heads.blocks())  # [E, B, chunk]

    scores = jax.lax.map(of_chunk, (split(hidden), split(targets)))  # [n, E, B, chunk]
    return jnp.moveaxis(scores, 0, 2).reshape(scores.shape[1], batch, -1)[..., :length]
