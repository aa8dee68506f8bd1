"""The mean embedding of an owner's documents: the paper's initial router row (appendix A.2).

The paper uses GritLM-7B; any embedding will do, as long as all owners and the anchor use the same.
"""

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tokenizers

DOCUMENTS = 1000  # how many are embedded, as in the paper


def domain_embedding(method: str, texts: Sequence[str], width: int) -> np.ndarray:
    """The mean embedding of up to 1,000 documents, of the model's width.

    Args:
      method: "wordllama" (static vectors in the package of that name), or the path of a .npy file
        that the owner made with an embedding model of choice: [D'] or [documents, D'].
      texts: the documents; unused with a .npy file.
      width: D. An embedding of another width is projected by a fixed random matrix, the same for
        everyone, which keeps angles on average.

    Returns:
      float32 [D].

    Raises:
      ValueError: the package or file is missing, or its array has no such shape.
    """
    if method == "wordllama":
        vectors = WordVectors().means(texts[:DOCUMENTS])
        vectors = vectors[vectors.any(axis=1)]
    else:
        vectors = _from_file(method)
    finite = vectors[np.isfinite(vectors).all(axis=1)]
    if not len(finite):
        raise ValueError(f"domain embedding {method}: no row of finite numbers")
    mean = finite.mean(axis=0).astype(np.float32)
    if len(mean) == width:
        return mean
    random = np.random.default_rng(20250709).standard_normal((len(mean), width))
    return (mean @ random / np.sqrt(len(mean))).astype(np.float32)


def source_name(method: str | None) -> str | None:
    """What may be told of where an embedding is from: not the name of an owner's file."""
    return method if method in (None, "wordllama") else "array"


def _from_file(path: str) -> np.ndarray:
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"domain embedding: expected 'wordllama' or a .npy file, found {path!r} ({error})"
        ) from error
    if array.ndim not in (1, 2) or not np.issubdtype(array.dtype, np.floating):
        raise ValueError(
            f"{path}: expected floats of shape [D] or [documents, D], found {array.dtype} "
            f"{list(array.shape)}"
        )
    return np.atleast_2d(array)


class WordVectors:
    """Static word vectors from the files of the package wordllama (the extra `embeddings`).

    Raises:
      ValueError: the package is not installed.
    """

    def __init__(self) -> None:
        from safetensors.numpy import load_file

        package = importlib.util.find_spec("wordllama")
        if package is None or package.origin is None:
            raise ValueError(
                "static word vectors need the package wordllama: "
                "in a clone of flexolmo_jax, run pip install -e '.[embeddings]'"
            )
        folder = Path(package.origin).parent
        table = load_file(folder / "weights/l2_supercat_256.safetensors")["embedding.weight"]
        self._table = table.astype(np.float32)
        json_text = (folder / "tokenizers/l2_supercat_tokenizer_config.json").read_text()
        self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(json.loads(json_text)))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.encode_special_tokens = True  # what spells a control token is text

    def sums(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """The sum of each text's word vectors, float32 [texts, 256], and how many they are."""
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        ids = [text.ids for text in encoded]
        counts = np.array([len(own) for own in ids], np.int64)
        sums = np.zeros((len(ids), self._table.shape[1]), np.float32)
        vectors = self._table[np.concatenate([*ids, []]).astype(np.int64)]
        full = np.flatnonzero(counts)
        if len(full):
            sums[full] = np.add.reduceat(vectors, (np.cumsum(counts) - counts)[full], axis=0)
        return sums, counts

    def means(self, texts: Sequence[str]) -> np.ndarray:
        """Unit-length mean word vectors, float32 [texts, 256]; zero where a text is empty."""
        return unit(self.sums(texts)[0])


def unit(vectors: np.ndarray) -> np.ndarray:
    """Rows [N, D] divided by their lengths; rows of zeros stay."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(lengths, lengths, 1)
