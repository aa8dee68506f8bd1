"""infini-gram 2.6.0 on the same tokens: its index, its attribution, and whether both agree.

Its own indexing of 32-bit ids allocates 34,359,738,368 bytes whatever the size of the text, and
fails. But its engine reads a suffix array of the same form from elsewhere: the places of all
tokens, in bytes, in the order of the suffixes' bytes.
"""

import time
from pathlib import Path
from typing import Any

import numpy as np

from flexolmo_jax.tracing.suffixes import SEPARATOR

FEW = 10  # documents of a span; OLMoTrace drops spans that are more frequent
ALL = 2**31 - 1


class Peer:
    """An engine of infini-gram.

    Args:
      folder: empty; for its index.
      ids: of each document.
      counts: int64 [V].
    """

    def __init__(self, folder: Path, ids: list[np.ndarray], counts: np.ndarray):
        import pydivsufsort
        from infini_gram.engine import InfiniGramEngine

        begun = time.perf_counter()
        tokens = np.concatenate([part for one in ids for part in ([SEPARATOR], one)]).astype("<u4")
        tokens.tofile(folder / "tokenized.0")
        order = pydivsufsort.divsufsort(tokens.view(np.uint8))
        order[order % 4 == 0].astype("<u4").tofile(folder / "table.0")
        starts = np.cumsum([0, *(len(one) + 1 for one in ids[:-1])])
        (4 * starts).astype("<u8").tofile(folder / "offset.0")
        some = np.flatnonzero(counts)
        lines = [f"{token} {counts[token]}\n" for token in some] + [f"{SEPARATOR} {len(ids)}\n"]
        (folder / "unigram.0").write_text("".join(lines))
        self.seconds = time.perf_counter() - begun
        self._engine = InfiniGramEngine(
            index_dir=str(folder), eos_token_id=0, vocab_size=len(counts), token_dtype="u32",
            precompute_unigram_logprobs=True,
        )  # fmt: skip

    def attribute(self, ids: np.ndarray, most: int = FEW) -> list[dict[str, Any]]:
        """The maximal spans of a text that occur at most `most` times."""
        return self._engine.attribute(ids.tolist(), [], 1, most, False)["spans"]
