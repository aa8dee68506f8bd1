"""The audits, from folders on disk to a report of JSON values."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flexolmo_jax.audits import control, extraction, findings, membership, removal
from flexolmo_jax.audits.evidence import Bigrams, revealed
from flexolmo_jax.audits.extraction import Passage, Protocol
from flexolmo_jax.audits.findings import CONTROLS, FLOOR
from flexolmo_jax.audits.scoring import tokenizer_of
from flexolmo_jax.audits.statistics import as_json
from flexolmo_jax.audits.subjects import (
    anchor_of,
    canaries_of,
    claim_of,
    identity_of,
    package_of,
    trained_documents,
)
from flexolmo_jax.data.sources import fingerprint
from flexolmo_jax.evaluation.split import chosen_split
from flexolmo_jax.federation.package import read_manifest
from flexolmo_jax.model import FlexOlmo, load
from flexolmo_jax.storage.files import replace_file


def run_extraction(
    model: FlexOlmo, path: Path, data: str, out: Path, *, anchor: str | Path | None = None,
    prefixes: int = 1000, samples: int = 10, seed: int = 0, heldout: float | None = None,
    group_field: str | None = None, text_field: str = "text", without: Sequence[str] = (),
    only: Sequence[str] | None = None, with_control: bool = False, dtype: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Audits a model, the anchor alone, and the controls, and writes OUT/report.json.

    Args:
      model, path: the model, and the folder it was loaded from.
      data: the owner's text, as `read_documents` takes it.
      out: a folder for the state of the audit; it belongs to the owner.
      anchor: the anchor of an expert package.
      prefixes, samples, seed: the number of passages, the samples of each, and their seed.
      heldout: skips documents that training with this share held out; None: as the manifest
        says of the expert in `only`, or of all experts.
      group_field: documents that share it were held out together; None: as the manifest says.
      text_field: the field of rows that holds the text.
      without, only: experts to switch off, or the only ones to use.
      with_control: also trains and audits the positive controls.
      dtype: the dtype that the model was loaded with.

    Returns:
      the report, as JSON values.
    """
    protocol = Protocol(samples=samples).within(model.config.max_length)
    expert = only[0] if only and len(only) == 1 else None
    split = chosen_split(path, expert, heldout, group_field, anchor=anchor, trained=True)
    documents = trained_documents(model, data, split, text_field)
    passages = extraction.pick_passages(documents, prefixes, protocol, seed)
    described = {
        "model": identity_of(path), "data": fingerprint(data), "heldout": split,
        "text_field": text_field, "samples": samples, "dtype": dtype,
    }  # fmt: skip

    def extract(title: str, model: FlexOlmo, passages, **experts: Any) -> dict[str, Any]:
        state = out / f"{title.replace(': ', '_').replace(' ', '_')}.json"
        report = extraction.extract(
            model, passages, protocol, state, title=title, seed=seed,
            described={**described, **experts}, **experts,
        )  # fmt: skip
        return as_json(report)

    audits = {"model": extract("model", model, passages, without=list(without), only=only)}
    if model.allowed(1, without, only)[0, 1:].any():
        audits[FLOOR] = extract(FLOOR, model, passages, only=["public"])
    if with_control:
        memorized = control.control_documents(documents, protocol.length)
        count = min(prefixes, control.PASSAGES, control.MORE * len(memorized))
        few = extraction.pick_passages(memorized, count, protocol, seed)
        start = anchor_of(path, anchor), tokenizer_of(model).separator_text
        rank = model.experts.ranks.head
        audits |= _extract_controls(extract, memorized, few, protocol.length, out, *start, rank)
    report = {
        "model": str(path), "without": list(without), "only": only, "data": data,
        "heldout": split and split._asdict(), "audits": audits,
        "lines": findings.extraction_lines(audits),
    }  # fmt: skip
    replace_file(out / "report.json", json.dumps(report, indent=1) + "\n")
    return report


def _extract_controls(
    extract: Callable[..., dict[str, Any]], memorized: list[Sequence[int]],
    passages: list[Passage], length: int, out: Path, anchor: Path, separator: str | None,
    head_rank: int,
) -> dict[str, Any]:  # fmt: skip
    """Trains the positive controls on some documents, and audits each on passages of them."""
    audits = {}
    for title, what in CONTROLS.items():
        trained = control.train_control(
            what, anchor, memorized, length, out / f"{what}.run", separator, head_rank
        )
        audits[title] = extract(title, trained, passages)
    return audits


def run_membership(
    path: Path, run: Path, anchor: str | Path | None = None, expert: str | None = None
) -> dict[str, Any]:
    """Audits an expert by its canaries.

    Args:
      path: the expert's package, or a merged model that has it.
      run: the expert's run folder.
      anchor: the anchor of a package.
      expert: the expert's name in a merged model.

    Returns:
      the report, as JSON values.

    Raises:
      ValueError: there is no such expert, or its canaries are not those of the run.
    """
    package = package_of(path, expert)
    manifest = read_manifest(package, kind="expert")
    canaries = canaries_of(package, manifest, run)
    name, claim = manifest["name"], claim_of(package, manifest)
    delta = claim["delta"] if claim else membership.DELTA
    model = load(path, anchor=anchor)
    scores = {"the expert alone": membership.canary_scores(model, canaries, only=[name])}
    bigrams = Bigrams.of(package, anchor_of(path, anchor), model)
    if bigrams is not None:
        scores["its evidence head alone"] = membership.evidence_scores(bigrams, canaries)
    attacks = {
        title: membership.membership(*groups, delta, attacks=len(scores))
        for title, groups in scores.items()
    }
    of_model = membership.membership(*membership.canary_scores(model, canaries), delta)
    return {
        "model": str(path), "expert": name,
        "certificate": claim and {key: claim[key] for key in ("epsilon", "delta", "unit")},
        "commitment": canaries.commitment, "audits": as_json({**attacks, "the model": of_model}),
        **membership.verdict(attacks, claim),
    }  # fmt: skip


def run_evidence(
    path: Path, anchor: str | Path | None = None, expert: str | None = None, count: int = 20
) -> dict[str, Any]:
    """Reads off an evidence head what its owner's text has more of than public text.

    Args:
      path, anchor, expert: as in `run_membership`.
      count: of tokens, and of bigrams.

    Returns:
      the report, as JSON values.

    Raises:
      ValueError: there is no such expert, or it has no evidence head.
    """
    package = package_of(path, expert)
    bigrams = Bigrams.of(package, anchor_of(path, anchor), load(path, anchor=anchor))
    if bigrams is None:
        raise ValueError(f"{package}: has no evidence head, so there is none to read")
    name = read_manifest(package)["name"]
    return {"model": str(path), "expert": name, **as_json(revealed(bigrams, count))}


def run_removal(
    path: Path, name: str, run: Path | None, data: str | None, *, prefixes: int = 100,
    heldout: float | None = None, group_field: str | None = None, text_field: str = "text",
) -> dict[str, Any]:  # fmt: skip
    """Audits what is left of an expert that is switched off, or removed.

    Args:
      path: a merged model.
      name: the expert's name.
      run: the expert's run folder, for its canaries; or None.
      data: the owner's text, for passages; or None.
      prefixes, heldout, group_field, text_field: as in `run_extraction`.

    Returns:
      the report, as JSON values.

    Raises:
      ValueError: neither canaries nor text were given, or as `removal.audit_removal`.
    """
    if run is None and data is None:
        raise ValueError(
            "the audit has no text to compare on: give --run (canaries), --data (text), or both"
        )
    package = package_of(path, name)
    canaries = canaries_of(package, read_manifest(package, kind="expert"), run) if run else None
    passages: list[Sequence[int]] = []
    if data is not None:
        model = load(path)
        protocol = Protocol().within(model.config.max_length)
        split = chosen_split(path, name, heldout, group_field, trained=True)
        documents = trained_documents(model, data, split, text_field)
        picked = extraction.pick_passages(documents, prefixes, protocol, seed=0)
        passages = [passage.ids for passage in picked]
    left = removal.audit_removal(path, name, canaries, passages)
    return {
        "model": str(path), "expert": name, "passages": len(passages),
        "canaries": len(canaries.candidates) if canaries else 0,
        **as_json(left), "lines": findings.removal_lines(left),
    }  # fmt: skip
