"""Traces a text: where its words stand in the indexed documents of one or several owners."""

from collections.abc import Sequence

import numpy as np

from flexolmo_jax.tracing.documents import find_passages, ranked
from flexolmo_jax.tracing.index import Index
from flexolmo_jax.tracing.results import Span, Trace
from flexolmo_jax.tracing.spans import Match, as_asked, log_probabilities, matches, rarest


def trace(text: str, indexes: Sequence[Index], *, prompt: str = "", similar: int = 0) -> Trace:
    """Finds the rarest spans of a text that stand verbatim in documents of the given indexes.

    The text is matched against all indexes together, as if they were one: a span is as long as the
    longest match in any of them.

    Args:
      text: what to trace, as an answer of a model.
      indexes: of one or several owners, all of one tokenizer.
      prompt: what the text answers; documents are ranked against both. It is not traced.
      similar: how many passages to add that are alike in meaning but not verbatim. This reads all
        documents, and needs the extra `embeddings`.

    Raises:
      ValueError: no index, the same one twice, or two tokenizers.
    """
    check_indexes(indexes)
    found, length = find_matches(text, indexes)
    counts = np.sum([index.counts for index in indexes], axis=0)
    spans, known = [], {}
    kept = rarest(found, counts, length)
    for match, probability in zip(kept, log_probabilities(kept, counts).tolist(), strict=True):
        words = text[match.start : match.stop]  # which a text may repeat
        if words not in known:
            known[words] = find_passages(match, indexes)
        by_owner, passages = known[words]
        tokens, places = len(match.forms[0]), tuple(passages)
        spans.append(Span(match.start, match.stop, tokens, probability, by_owner, places))
    query = f"{prompt}\n{text}"
    alike: tuple = ()
    if similar:
        from flexolmo_jax.tracing.similar import similar_passages

        named = [passage for span in spans for passage in span.passages]
        alike = tuple(similar_passages(text, indexes, query, similar, named))
    owners = tuple(dict.fromkeys(index.owner for index in indexes))
    return Trace(text, tuple(ranked(spans, query)), alike, owners)


def find_matches(text: str, indexes: Sequence[Index]) -> tuple[list[Match], int]:
    """All maximal spans of a text over all indexes together, and how many tokens the text has."""
    asked = as_asked(text, indexes[0].encode)
    longest = [np.max([index.longest_matches(a.ids) for index in indexes], axis=0) for a in asked]
    return matches(text, asked, longest), len(asked[0].ids)


def check_indexes(indexes: Sequence[Index]) -> None:
    """Raises ValueError unless there is an index, none twice, and all of one tokenizer."""
    if not indexes:
        raise ValueError("there is no index to trace the text in: give at least one")
    seen = set()
    for index in indexes:
        folder = index.folder.resolve()
        if folder in seen:
            raise ValueError(f"{index.folder}: this index is given twice; give each one once")
        seen.add(folder)
        if index.tokenizer_digest != indexes[0].tokenizer_digest:
            raise ValueError(
                f"{index.folder}: made with another tokenizer than {indexes[0].folder}; build all "
                "indexes with the tokenizer.json of one anchor (flexolmo trace index --tokenizer)"
            )


def of_owners(indexes: Sequence[Index], used: Sequence[str], known: Sequence[str]) -> list[Index]:
    """The indexes of the owners that are used.

    Args:
      used: names of owners.
      known: names of all owners that an index may be of. Another one's index is an error: whether
        its owner is switched off could not be told.

    Raises:
      ValueError: an index is of an owner that is not known, or none is left.
    """
    for index in indexes:
        if index.owner not in known:
            raise ValueError(
                f"{index.folder}: an index of {index.owner!r}; expected one of {', '.join(known)} "
                "(flexolmo trace index --owner)"
            )
    kept = [index for index in indexes if index.owner in used]
    if indexes and not kept:
        raise ValueError("the owners of all indexes are switched off; nothing is left to search")
    return kept
