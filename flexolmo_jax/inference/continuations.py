"""Continuations of prompts: what a decoder yields of them, where they end, and what they need."""

import os
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flexolmo_jax.config import ModelConfig
from flexolmo_jax.data.tokenizer import Tokenizer
from flexolmo_jax.inference.sampling import Sampling


class Options(NamedTuple):
    """What all prompts of a call of `generate` have in common."""

    max_new_tokens: int
    stop: Sequence[int]  # ids that end a continuation; none of them is part of it
    sampling: Sampling
    seed: int  # of the random choices
    interval: int | None = None  # yield after that many new tokens; None: once, at the end


class Continuations(NamedTuple):
    """Of several prompts, so far."""

    generated: list[list[int]]  # the new ids of each
    ended: list[bool]  # no more will come of it
    mass: np.ndarray | None = None  # of the experts, float64 [B, E]; None: it was not counted


def check_memory(config: ModelConfig, batch: int, length: int, max_new_tokens: int) -> None:
    """Raises ValueError if the keys and values of all tokens take more than half of the memory."""
    memory = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    if memory is None:  # a CPU
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    numbers = 2 * config.num_layers * config.kv_heads * config.head_size  # per token
    needed = batch * length * numbers * jnp.dtype(config.dtype).itemsize
    if needed > memory / 2:
        raise ValueError(
            f"max_new_tokens={max_new_tokens} needs {needed / 1e9:,.0f} GB for keys and values, "
            f"more than half of the {memory / 1e9:,.0f} GB of memory; ask for fewer tokens (the "
            f"model was made for {config.max_length}), or for fewer prompts at a time"
        )


def check_length(config: ModelConfig, batch: int, longest: int, max_new_tokens: int) -> None:
    """Warns if a text may be longer than the model was made for.

    Args:
      config: of the model.
      batch: sequences at a time.
      longest: tokens of the longest prompt.
      max_new_tokens: of each prompt.

    Raises:
      ValueError: no token is asked for, or more than memory holds (`check_memory`).
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, found {max_new_tokens}")
    length = longest + max_new_tokens
    check_memory(config, batch, length, max_new_tokens)
    if length > config.max_length:
        warnings.warn(
            f"prompt and output may reach {length} tokens, more than the {config.max_length} that "
            "the model was made for",
            stacklevel=4,
        )


def checked_ends(until: Sequence[str]) -> list[str]:
    """The texts that end a continuation; a ValueError if one is empty."""
    ends = [until] if isinstance(until, str) else list(until)
    if not all(ends):
        raise ValueError("until must not contain an empty text, which would match everywhere")
    return ends


def all_ended(ended: list[bool], texts: list[str], ends: list[str]) -> bool:
    """Whether each continuation has ended or holds one of the ends."""
    return all(
        over or any(end in text for end in ends) for over, text in zip(ended, texts, strict=True)
    )


def before_first(text: str, ends: Sequence[str]) -> str:
    """The part of the text before the first of `ends`."""
    for end in ends:
        text = text.split(end)[0]
    return text


def checked_tokens(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """Tokens as int32 [B, S].

    Raises:
      ValueError: they are no integers of this shape, none, or not below `vocab_size`.
    """
    if tokens.ndim != 2 or not tokens.size or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(
            f"tokens must be integers of shape [B, S] with at least one token, found "
            f"{tokens.dtype} {list(tokens.shape)}"
        )
    low, high = tokens.min(), tokens.max()
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"tokens must be in [0, {vocab_size}), the vocabulary; found {low if low < 0 else high}"
        )
    return tokens.astype(np.int32)


def prompt_ids(
    prompts: Sequence[str] | Sequence[Sequence[int]], tokenizer: Tokenizer | None, vocab_size: int
) -> list[list[int]]:
    """The ids of prompts, texts or ids.

    Raises:
      ValueError: they are texts, and there is no tokenizer; or as `checked_tokens`.
    """
    if isinstance(prompts[0], str):
        encode = need_tokenizer(tokenizer).encode_prompt
        ids = [encode(text) for text in prompts]  # type: ignore[arg-type]
    else:
        ids = [list(map(int, prompt)) for prompt in prompts]
    for prompt in ids:
        checked_tokens(np.asarray([prompt]), vocab_size)
    return ids


def need_tokenizer(tokenizer: Tokenizer | None) -> Tokenizer:
    """The tokenizer; a ValueError if there is none."""
    if tokenizer is None:
        raise ValueError("this model came without a tokenizer.json; give token ids instead")
    return tokenizer
