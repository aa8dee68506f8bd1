"""What an attacker does to the weights of a package: pure functions of tensors by name.

Each takes the tensors of an expert package ("feed_forward.gate" [L, 1, D, F], "router.row"
[L, 1, D], "evidence.b" [1, 1, R, V], ...) as NumPy arrays, and returns them changed.
"""

from collections.abc import Callable

import numpy as np

Weights = dict[str, np.ndarray]

NETWORK = ("feed_forward.gate", "feed_forward.up", "feed_forward.down")
HEADS = ("head", "evidence")
ROUNDS = 8  # of bisection


def times(weights: Weights, factor: float, *names: str) -> Weights:
    """Some tensors, `factor` times."""
    return {**weights, **{name: np.float32(factor) * weights[name] for name in names}}


def away_from(weights: Weights, public: Weights, factor: float) -> Weights:
    """W_public + factor * (W_expert - W_public) of the three matrices: -1 flips the update."""
    moved = {name: public[name] + factor * (weights[name] - public[name]) for name in NETWORK}
    return {**weights, **{name: x.astype(np.float32) for name, x in moved.items()}}


def with_parts_of(weights: Weights, other: Weights, *parts: str) -> Weights:
    """The tensors of some parts, such as "router", from another expert."""
    kept = {name: x for name, x in weights.items() if name.partition(".")[0] not in parts}
    return {**kept, **{n: x for n, x in other.items() if n.partition(".")[0] in parts}}


def between(one: Weights, other: Weights, share: float, *names: str) -> Weights:
    """Some tensors of `one`, moved by `share` of the way to those of `other`."""
    mixed = {name: (1 - share) * one[name] + share * other[name] for name in names}
    return {**one, **{name: x.astype(np.float32) for name, x in mixed.items()}}


def heads_between(one: Weights, other: Weights, share: float, part: str) -> Weights:
    """A head whose logits are (1 - share) times those of `one`'s, and share times `other`'s.

    Its rank is the sum of both.
    """
    a = np.concatenate([one[f"{part}.a"], other[f"{part}.a"]], axis=-1)
    b = np.concatenate([(1 - share) * one[f"{part}.b"], share * other[f"{part}.b"]], axis=-2)
    bias = (1 - share) * one[f"{part}.bias"] + share * other[f"{part}.bias"]
    made = {f"{part}.a": a, f"{part}.b": b, f"{part}.bias": bias}
    return {**one, **{name: x.astype(np.float32) for name, x in made.items()}}


def with_noise(weights: Weights, share: float, seed: int, *names: str) -> Weights:
    """Tensors with Gaussian noise, `share` of each one's standard deviation; default: all."""
    random = np.random.default_rng(seed)

    def noisy(x: np.ndarray) -> np.ndarray:
        return (x + share * x.std() * random.standard_normal(x.shape)).astype(np.float32)

    return {**weights, **{name: noisy(weights[name]) for name in sorted(names or weights)}}


def permuted(weights: Weights, seed: int) -> Weights:
    """The same function by other numbers: hidden units in another order, heads in another basis.

    Equal up to rounding. The router's tensors are as they were: they act on the residual stream,
    whose basis is the anchor's.
    """
    random = np.random.default_rng(seed)
    made = dict(weights)
    gate, up, down = (weights[name].copy() for name in NETWORK)
    for layer in range(len(gate)):
        order = random.permutation(gate.shape[-1])
        gate[layer], up[layer] = gate[layer][..., order], up[layer][..., order]
        down[layer] = down[layer][..., order, :]
    made.update(zip(NETWORK, (gate, up, down), strict=True))
    for part in HEADS:
        if f"{part}.a" in weights:
            a, b = weights[f"{part}.a"], weights[f"{part}.b"]
            turn, _ = np.linalg.qr(random.standard_normal((a.shape[-1],) * 2))
            made[f"{part}.a"] = (a @ turn).astype(np.float32)
            made[f"{part}.b"] = (turn.T @ b).astype(np.float32)
    return made


def with_row(weights: Weights, row: np.ndarray, factor: float) -> Weights:
    """Router rows with `factor` times `row` [L, D] added."""
    rows = weights["router.row"] + factor * row[:, None]
    return {**weights, "router.row": rows.astype(np.float32)}


def strongest(make: Callable[[float], Weights], share: Callable[[Weights], float],
              bound: float, most: float) -> Weights:  # fmt: skip
    """The weights of the largest strength in [0, most] whose share stays below a bound.

    Args:
      make: weights of a strength; the share must grow with it.
      share: what the attacker can measure of weights.
      bound: on the share.
      most: the largest strength.
    """
    low, high = 0.0, most
    if share(make(high)) < bound:
        return make(high)
    for _ in range(ROUNDS):
        middle = (low + high) / 2
        low, high = (middle, high) if share(make(middle)) < bound else (low, middle)
    return make(low)
