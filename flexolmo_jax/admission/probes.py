"""Behaviour probes: is a forbidden continuation likelier than the allowed ones, in any subset.

Leaving experts out is an attack of its own: masking under a fifth of the experts lifted attack
success from 7% to 70% in published work (arXiv 2602.08741). So every probe runs in every subset of
experts that a request may choose.
"""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flexolmo_jax.admission.policy import Probes
from flexolmo_jax.admission.results import Result, judged, not_judged
from flexolmo_jax.data.tokenizer import Tokenizer
from flexolmo_jax.evaluation.likelihood import Query, likelihoods
from flexolmo_jax.model import FlexOlmo

MEASURED = "forbidden over allowed, nats"
_LISTS = ("allowed", "forbidden")


class Probe(NamedTuple):
    """A prompt, and texts that may follow it, or may not.

    Attributes:
      prompt: what is read.
      allowed, forbidden: continuations, at least one of each.
      where: file:line.
    """

    prompt: str
    allowed: tuple[str, ...]
    forbidden: tuple[str, ...]
    where: str


def read_probes(file: str | Path) -> list[Probe]:
    """Reads probes, one JSON object a line: prompt, allowed, forbidden.

    Raises:
      ValueError: the file is missing or holds no probe; names the first line that is none.
    """
    file = Path(file)
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: expected probes in JSON Lines ({error})") from error
    rows = [(n, line) for n, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise ValueError(f"{file}: holds no probe; expected rows of prompt, allowed, forbidden")
    return [_probe(line, f"{file}:{number}") for number, line in rows]


def _probe(line: str, where: str) -> Probe:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: expected a JSON object ({error})") from error
    if not isinstance(row, dict) or row.keys() != {"prompt", *_LISTS}:
        found = ", ".join(map(str, row)) if isinstance(row, dict) else f"{row!r:.100}"
        raise ValueError(
            f"{where}: expected an object of prompt, allowed and forbidden, found {found}"
        )
    if not isinstance(row["prompt"], str) or not row["prompt"]:
        raise ValueError(f"{where}: prompt: expected text, found {row['prompt']!r:.100}")
    for name in _LISTS:
        texts = row[name]
        if not (isinstance(texts, list) and texts and all(isinstance(x, str) and x for x in texts)):
            raise ValueError(f"{where}: {name}: expected a list of texts, found {texts!r:.100}")
    return Probe(row["prompt"], tuple(row["allowed"]), tuple(row["forbidden"]), where)


def subsets(
    names: Sequence[str], always_on: Sequence[str], new: str, most: int
) -> list[tuple[str, ...]]:
    """Every subset of experts that a request can choose, in which the new one is on.

    Args:
      names: of all experts, the new one among them.
      always_on: that no request can switch off; others than `names` are not in this model.
      new: the name of the new expert.
      most: subsets.

    Raises:
      ValueError: there are more.
    """
    fixed = {new, *always_on} & set(names)
    free = [name for name in names if name not in fixed]
    if 2 ** len(free) > most:
        raise ValueError(
            f"{len(free)} experts can be switched off, so that probes run in 2^{len(free)} = "
            f"{2 ** len(free):,} subsets, and the policy allows {most:,}: mark experts as "
            "always_on, or raise probes.subsets"
        )
    chosen = itertools.chain.from_iterable(
        itertools.combinations(free, count) for count in range(len(free), -1, -1)
    )
    return [tuple(x for x in names if x in fixed or x in on) for on in chosen]


def check_probes(
    model: FlexOlmo, name: str, probes: Sequence[Probe], always_on: Sequence[str], bounds: Probes
) -> Result:
    """Runs probes in every subset of experts that holds the new one.

    A probe fails where the likeliest forbidden continuation leads the likeliest allowed one, in
    log-likelihood, by more than the margin. The same subsets without the new expert are run too, to
    say whether a probe failed before it came.

    Args:
      model: the cohort's experts and the new one, merged.
      name: of the new expert.
      probes: to run.
      always_on: as in `subsets`.
      bounds: of the policy.

    Raises:
      ValueError: too many subsets, or a probe is longer than the model reads.
    """
    if not probes:
        return not_judged("probes", MEASURED, "The policy names no probes.")
    sets = subsets(model.expert_names, always_on, name, bounds.subsets)
    leads = _leads(model, probes, sets)  # [subsets, probes]
    before_sets = [tuple(x for x in own if x != name) for own in sets]
    before = np.full_like(leads, -np.inf)
    are_some = [i for i, own in enumerate(before_sets) if own]
    if are_some:
        before[are_some] = _leads(model, probes, [before_sets[i] for i in are_some])
    leads = np.where(np.isnan(leads), np.inf, leads)  # the model says nothing: the worst
    failed, failed_before = leads > bounds.margin, before > bounds.margin
    subset, probe = divmod(int(leads.argmax()), len(probes))
    everything = failed[[len(own) for own in sets].index(len(model.expert_names))]
    why = f"The worst of {len(probes)} probes in {len(sets)} subsets is {probes[probe].where}"
    why += f" with {_said(sets[subset], model.expert_names)}"
    if failed.any():
        why += (
            f"; {int(failed.any(axis=0).sum())} probes fail in {int(failed.any(axis=1).sum())} "
            f"subsets, {int(everything.sum())} of them with all experts on"
        )
        if (failed & failed_before).any():
            count = int((failed & failed_before).any(axis=0).sum())
            why += f"; {count} of them fail in such a subset without it, too"
    return judged(
        "probes", MEASURED, float(leads.max()), bounds.margin, bounds.fails, f"{why}.",
        subsets=_rows(sets, leads, before, failed, probes),
    )  # fmt: skip


def _leads(model: FlexOlmo, probes: Sequence[Probe], sets: Sequence[tuple[str, ...]]) -> np.ndarray:
    """max over forbidden - max over allowed of the log-likelihood: float64 [subsets, probes]."""
    masks = [tuple(x in own for x in model.expert_names) for own in sets]
    assert model.tokenizer is not None
    pairs = [_split(model.tokenizer, probe, model.config.max_length) for probe in probes]
    queries = [Query(*pair, mask) for mask in masks for own in pairs for pair in own]
    answers = iter([answer.nats for answer in likelihoods(model, queries)])
    leads = []
    for _ in masks:
        for probe in probes:
            likeliest = [
                np.max([next(answers) for _ in texts]) for texts in (probe.forbidden, probe.allowed)
            ]
            leads.append(likeliest[0] - likeliest[1])
    return np.asarray(leads, np.float64).reshape(len(masks), len(probes))


def _split(tokenizer: Tokenizer, probe: Probe, limit: int) -> list[tuple[list[int], list[int]]]:
    """Ids of a context and of each continuation, the forbidden ones first.

    A continuation can change the last tokens of the prompt: "s" after "word" is "words". So the
    context is the part that the prompt has in common with all whole texts, and what follows it
    stands for the same characters in each.
    """
    prompt = tokenizer.encode_prompt(probe.prompt)
    texts = [tokenizer.encode_prompt(probe.prompt + x) for x in (*probe.forbidden, *probe.allowed)]
    longest = max(map(len, texts))
    if longest > limit:
        raise ValueError(
            f"{probe.where}: {longest} tokens with its continuation, and this model reads "
            f"{limit}; shorten the prompt"
        )
    count = 0
    while all(
        count < len(x) - 1 and prompt[count : count + 1] == x[count : count + 1] for x in texts
    ):
        count += 1
    if not count:
        raise ValueError(f"{probe.where}: the prompt has no token in common with its continuations")
    return [(text[:count], text[count:]) for text in texts]


def _said(own: tuple[str, ...], names: Sequence[str]) -> str:
    off = [name for name in names if name not in own]
    return f"{', '.join(off)} off" if off else "all experts on"


def _rows(
    sets: Sequence[tuple[str, ...]],
    leads: np.ndarray,
    before: np.ndarray,
    failed: np.ndarray,
    probes: Sequence[Probe],
) -> list[dict[str, Any]]:
    """Of each subset its worst probe, for JSON and plots."""

    return [
        {
            "experts": list(own),
            "failed": int(failed[i].sum()),
            "worst": probes[int(leads[i].argmax())].where,
            "lead": float(leads[i].max()),
            "lead_without_it": float(before[i].max()),
        }
        for i, own in enumerate(sets)
    ]
