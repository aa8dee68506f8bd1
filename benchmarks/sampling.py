"""How long it takes to choose the next tokens from their logits, beside transformers: a table.

    python -m benchmarks.sampling

Of the vocabulary of the 50M model here and of that of OLMo 2, for one sequence and 16. Ours draws with
a seed for each sequence, as the engine does; transformers with its processors of logits and
`torch.multinomial`, as its `generate` does. Logits are random, with a standard deviation of 3.
"""  # noqa: E501

import argparse
import time
from collections.abc import Callable

import jax
import numpy as np

from benchmarks.machine import machine, versions
from flexolmo_jax.inference.sampling import Sampling, num_candidates, sample

VOCABULARIES = (8192, 100352)
BATCHES = (1, 16)
WAYS = {
    "greedy": Sampling(),
    "temperature 0.8": Sampling(0.8),
    "temperature 0.8, top_k 50": Sampling(0.8, 50),
    "temperature 0.8, top_p 0.9": Sampling(0.8, None, 0.9),
}
ROUNDS, CALLS = 5, 20  # the sides are interleaved


def ours(logits: np.ndarray, sampling: Sampling) -> Callable[[], np.ndarray]:
    batch, vocabulary = logits.shape
    placed, seeds = jax.device_put(logits), np.arange(batch, dtype=np.uint32)
    if not sampling.temperature:
        greedy = jax.jit(lambda logits: sample(logits, seeds, sampling))
        return lambda: np.asarray(greedy(placed))
    size = num_candidates(sampling.top_k, vocabulary)

    @jax.jit
    def choose(logits, seeds, *given):
        return sample(logits, jax.vmap(jax.random.key)(seeds), Sampling(*given), size)

    dtypes = (np.float32, np.int32, np.float32)
    given = [
        None if value is None else np.full((batch, 1), value, dtype)
        for value, dtype in zip(sampling, dtypes, strict=True)
    ]
    return lambda: np.asarray(choose(placed, seeds, *given))


def transformers(logits: np.ndarray, sampling: Sampling) -> Callable[[], np.ndarray]:
    import torch
    from transformers import (
        LogitsProcessorList,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    placed, ids = torch.from_numpy(logits), torch.zeros((len(logits), 1), dtype=torch.long)
    if not sampling.temperature:
        return lambda: torch.argmax(placed, dim=-1).numpy()
    warpers = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p:
        warpers.append(TopPLogitsWarper(sampling.top_p))

    def draw():
        probabilities = torch.softmax(warpers(ids, placed), dim=-1)
        return torch.multinomial(probabilities, num_samples=1).numpy()

    return draw


def milliseconds(sides: list[Callable[[], np.ndarray]]) -> list[float]:
    """Of one call of each: the median of the rounds."""
    rounds: list[list[float]] = [[] for _ in sides]
    for run in sides:
        run()
    for _ in range(ROUNDS):
        for run, taken in zip(sides, rounds, strict=True):
            begun = time.perf_counter()
            for _ in range(CALLS):
                run()
            taken.append((time.perf_counter() - begun) / CALLS)
    return [1e3 * float(np.median(taken)) for taken in rounds]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sampling", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    named = versions("jax", "torch", "transformers")
    print(f"{machine()}, {named}, {time.strftime('%Y-%m-%d')}\n")
    print("| vocabulary | sequences | | ours, ms | transformers, ms | |")
    print("| ---: | ---: | --- | ---: | ---: | ---: |")
    rng = np.random.default_rng(0)
    for vocabulary in VOCABULARIES:
        for batch in BATCHES:
            logits = 3 * rng.standard_normal((batch, vocabulary), np.float32)
            for name, sampling in WAYS.items():
                own, peer = milliseconds([ours(logits, sampling), transformers(logits, sampling)])
                line = f"| {vocabulary:,} | {batch} | {name} | {own:.2f} | {peer:.2f} |"
                print(f"{line} {peer / own:.1f}x |", flush=True)


if __name__ == "__main__":
    main()
