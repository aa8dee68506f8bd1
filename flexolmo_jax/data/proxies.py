"""Proxies: public documents that look most like an owner's, picked by the owner (paper, A.2).

A small classifier of the owner's text against public text (TF-IDF of words and word pairs,
logistic regression) ranks the public documents. Only public text leaves the owner; that the
choice itself says something about the owner's text is inherent in the paper's method.
"""

import itertools
import json
from pathlib import Path
from typing import NamedTuple

from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline

from flexolmo_jax.data.sources import Document, Report, read_documents
from flexolmo_jax.storage.files import new_file
from flexolmo_jax.storage.outputs import check_new_file


class Proxies(NamedTuple):
    documents: int
    of_public: int
    accuracy: float  # of the classifier, cross-validated


def pick_proxies(
    own: str, public: str, out: Path, *, share: float = 0.05, most: int = 20_000
) -> Proxies:
    """Writes the public documents that look most like the owner's, as JSONL.

    Args:
      own: the owner's text, as `read_documents` takes it; at most `most` documents are used.
      public: public text; every document is ranked, `most` train the classifier.
      out: the JSONL file to write (fields text and probability); must not exist.
      share: of the public documents, how many to pick.
      most: cap on the documents of each side that the classifier learns from.

    Raises:
      ValueError: a source is empty, or has too few documents to tell them apart; `out` is there
        already, or cannot be written.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must be in (0, 1], found {share}")
    check_new_file(out, [own, public])
    reports = (Report(), Report())
    own_texts = [d.text for d in itertools.islice(read_documents(own, report=reports[0]), most)]
    public_documents: list[Document] = list(read_documents(public, report=reports[1]))
    for report in reports:
        report.tell()
    public_texts = [d.text for d in public_documents[:most]]
    if min(len(own_texts), len(public_texts)) < 10:
        raise ValueError(
            f"expected at least 10 documents on each side to tell them apart, found "
            f"{len(own_texts)} own and {len(public_texts)} public"
        )
    classifier = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), max_features=100_000, sublinear_tf=True),
        LogisticRegression(class_weight="balanced", max_iter=1000),
    )
    texts = own_texts + public_texts
    labels = [1] * len(own_texts) + [0] * len(public_texts)
    accuracy = cross_val_score(classifier, texts, labels, cv=3, scoring="balanced_accuracy")
    classifier.fit(texts, labels)
    scores = classifier.predict_proba([d.text for d in public_documents])[:, 1]
    count = max(1, round(share * len(public_documents)))
    best = sorted(range(len(scores)), key=lambda i: -scores[i])[:count]
    out.parent.mkdir(parents=True, exist_ok=True)
    with new_file(out) as file:
        for index in best:
            document = public_documents[index]
            row = {"text": document.text, "probability": float(scores[index])}
            if document.group != document.text:  # so that it stays held out under its group
                row["group"] = document.group.removeprefix("group:")
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return Proxies(count, len(public_documents), float(accuracy.mean()))
