"""Baselines that combine the answers of whole models: branch-train-merge, and prompt routing.

All is arithmetic on the models' log-likelihoods of each token, float [M, N, S]: M models, N
sequences, S tokens.
"""

from collections.abc import Sequence

import numpy as np
from scipy.special import logsumexp
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline

PIECE = 100  # characters of a training example of the prompt classifier: about as many as a prompt
MAX_PIECES = 3000  # of each domain


def running_evidence(nats: np.ndarray, decay: float = 1.0) -> np.ndarray:
    """Evidence for each model before each token: minus the cost of the earlier tokens.

    Args:
      nats: float [M, N, S], cost of each token.
      decay: factor of a token's evidence with every further token.

    Returns:
      float64 [M, N, S]: log-posteriors under a uniform prior, up to a constant.
    """
    evidence = np.zeros(nats.shape)
    for t in range(1, nats.shape[-1]):
        evidence[..., t] = decay * evidence[..., t - 1] - nats[..., t - 1]
    return evidence


def prefix_evidence(nats: np.ndarray, prefix: int) -> np.ndarray:
    """As `running_evidence`, from the first `prefix` tokens only; within them it is 0."""
    evidence = np.zeros(nats.shape)
    evidence[..., prefix:] = -nats[..., :prefix].sum(axis=-1, keepdims=True)
    return evidence


def btm(nats: np.ndarray, evidence: np.ndarray, active: int) -> np.ndarray:
    """Branch-train-merge: the mixture of the models, weighted by the posterior of each.

    Args:
      nats: float [M, N, S].
      evidence: float [M, N, S].
      active: the number of models with the most evidence that answer; models tied with the last
        of them answer too (at the start, all models).

    Returns:
      float [N, S], nats of each token.
    """
    least = np.sort(evidence, axis=0)[-active]
    log_weights = np.where(evidence >= least, evidence, -np.inf)
    log_weights = log_weights - logsumexp(log_weights, axis=0)
    return -logsumexp(log_weights - nats, axis=0)


def follow(nats: np.ndarray, choice: np.ndarray, prefix: int) -> np.ndarray:
    """Prompt routing: the chosen model answers after the prompt, the first one within it.

    Args:
      nats: float [M, N, S].
      choice: int [N], index of the model of each sequence.
      prefix: tokens of the prompt.

    Returns:
      float [N, S].
    """
    chosen = nats[choice, np.arange(nats.shape[1])]
    within = np.arange(nats.shape[-1]) < prefix
    return np.where(within, nats[0], chosen)


def domain_classifier(texts: Sequence[Sequence[str]]) -> Pipeline:
    """Trains a classifier that predicts the domain of a prompt, on all domains' texts together.

    Args:
      texts: of each domain.

    Returns:
      a scikit-learn pipeline that predicts indices of domains.
    """
    pieces, labels = [], []
    for number, documents in enumerate(texts):
        cut = [d[i : i + PIECE] for d in documents for i in range(0, len(d), PIECE)]
        random = np.random.default_rng(number)
        chosen = random.permutation(len(cut))[:MAX_PIECES]
        pieces += [cut[i] for i in chosen]
        labels += [number] * len(chosen)
    classifier = make_pipeline(
        TfidfVectorizer(analyzer="char_wb", ngram_range=(1, 4), min_df=2, sublinear_tf=True),
        LogisticRegression(class_weight="balanced", max_iter=300),
    )
    return classifier.fit(pieces, labels)
