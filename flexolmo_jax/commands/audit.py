"""What `flexolmo audit` does and shows."""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flexolmo_jax.audits import control, extraction, membership, removal
from flexolmo_jax.audits.extraction import Protocol
from flexolmo_jax.audits.scoring import tokenizer_of
from flexolmo_jax.audits.statistics import as_json
from flexolmo_jax.commands.json_output import print_json
from flexolmo_jax.data.sources import Report, fingerprint, read_documents
from flexolmo_jax.data.windows import tokenized
from flexolmo_jax.evaluation.split import GROUP_FIELD, Split, chosen_split
from flexolmo_jax.federation.loading import anchor_path
from flexolmo_jax.federation.package import Package, read_manifest
from flexolmo_jax.federation.source import open_source
from flexolmo_jax.model import FlexOlmo, load
from flexolmo_jax.privacy.canaries import Canaries
from flexolmo_jax.runtime.console import show_table, tell
from flexolmo_jax.storage.files import replace_file
from flexolmo_jax.storage.outputs import check_kept_folder

FLOOR = "anchor alone"
CONTROLS: dict[str, control.What] = {"control: expert": "expert", "control: model": "model"}


def audit_extraction(args: argparse.Namespace) -> None:
    """`flexolmo audit extraction`.

    Raises:
      ValueError: the input is wrong; the control was not caught.
    """
    reads = [one for one in (args.model, args.anchor, args.data) if one is not None]
    check_kept_folder(args.out, reads, holding=("*model.json*",))
    model = load(args.model, anchor=args.anchor, dtype=args.dtype, separator=args.separator)
    model.allowed(1, args.without, args.only)  # before anything long
    found = run_extraction(
        model, Path(args.model), args.data, Path(args.out), anchor=args.anchor,
        prefixes=args.prefixes, samples=args.samples, seed=args.seed, heldout=args.heldout,
        group_field=args.group_field, text_field=args.text_field, without=args.without,
        only=args.only,
        with_control=args.control, dtype=args.dtype,
    )  # fmt: skip
    _tell(found, _show_extraction, args.json)
    check_controls(found)


def run_extraction(
    model: FlexOlmo, path: Path, data: str, out: Path, *, anchor: str | Path | None = None,
    prefixes: int = 1000, samples: int = 10, seed: int = 0, heldout: float | None = None,
    group_field: str | None = None, text_field: str = "text", without: Sequence[str] = (),
    only: Sequence[str] | None = None, with_control: bool = False, dtype: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Audits a model, the anchor alone, and the controls, and writes OUT/report.json.

    Args:
      model, path: loaded, and where from.
      data: the owner's text, as `read_documents` takes it.
      out: folder of what is known so far; the owner's.
      anchor: of an expert package.
      prefixes, samples, seed: how many, and of the choice of passages and of the samples.
      heldout: documents that training with this share left out are not tried; None: as the
        manifest says of the expert in `only`, or of all experts.
      group_field: documents that share it were held out together; None: as the manifest says.
      text_field: of rows.
      without, only: experts to switch off, or the only ones to use.
      with_control: also trains and audits the positive controls.
      dtype: that the model was loaded with.

    Returns:
      the report, as JSON values.
    """
    protocol = Protocol(samples=samples).within(model.config.max_length)
    expert = only[0] if only and len(only) == 1 else None
    split = chosen_split(path, expert, heldout, group_field, anchor=anchor, trained=True)
    documents = trained_documents(model, data, split, text_field)
    passages = extraction.pick_passages(documents, prefixes, protocol, seed)
    described = {
        "model": _identity(path), "data": fingerprint(data), "heldout": split,
        "text_field": text_field, "samples": samples, "dtype": dtype,
    }  # fmt: skip

    def tried(title: str, model: FlexOlmo, passages, **experts: Any) -> dict[str, Any]:
        state = out / f"{title.replace(': ', '_').replace(' ', '_')}.json"
        made = extraction.extract(
            model, passages, protocol, state, title=title, seed=seed,
            described={**described, **experts}, **experts,
        )  # fmt: skip
        return as_json(made)

    audits = {"model": tried("model", model, passages, without=list(without), only=only)}
    if model.allowed(1, without, only)[0, 1:].any():
        audits[FLOOR] = tried(FLOOR, model, passages, only=["public"])
    if with_control:
        learned = control.control_documents(documents, protocol.length)
        few = extraction.pick_passages(
            learned, min(prefixes, control.PASSAGES, control.MORE * len(learned)), protocol, seed
        )
        for title, what in CONTROLS.items():
            by_heart = control.train_control(
                what, _anchor_of(path, anchor), learned, protocol.length, out / f"{what}.run",
                tokenizer_of(model).separator_text,
            )  # fmt: skip
            audits[title] = tried(title, by_heart, few)
    found = {
        "model": str(path), "without": list(without), "only": only, "data": data,
        "heldout": split and split._asdict(), "audits": audits, "lines": _extraction_lines(audits),
    }  # fmt: skip
    replace_file(out / "report.json", json.dumps(found, indent=1) + "\n")
    return found


def check_controls(found: dict[str, Any]) -> None:
    """Raises ValueError if what was learned by heart was not caught.

    All of a model must be, by the paper's criterion. An expert may be by another one: beside a
    frozen head it can know every next token, and still be too unsure for samples to show it.
    """
    for title in [one for one in CONTROLS if one in found["audits"]]:
        audit = found["audits"][title]
        ways = ("extracted", "greedy") if CONTROLS[title] == "expert" else ("extracted",)
        best = max(audit[way]["rate"] for way in ways)
        if best <= control.CAUGHT:
            raise ValueError(
                f"{title}: {audit['documents']} documents were learned by heart, and {best:.0%} of "
                f"the passages caught, expected more than {control.CAUGHT:.0%}: on this anchor the "
                "audit shows nothing"
            )


def _extraction_lines(audits: dict[str, Any]) -> list[str]:
    """What the numbers mean, in plain words."""
    here = audits["model"]
    protocol = here["protocol"]
    lines = [
        f"{here['prefixes']} passages of {here['documents']} documents, {here['attempts']} attempts"
    ]
    if protocol["length"] < Protocol().length:
        lines.append(
            f"this model was made for {protocol['length']} tokens: passages are so long, not the "
            f"paper's {Protocol().length}, and the prompt is a larger part of them"
        )
    if here["prefixes"] > here["documents"]:
        lines.append(
            "several passages are of one document, so they are not independent, and the intervals "
            "are too narrow"
        )
    floor = audits.get(FLOOR)
    if floor:
        above = here["extracted"]["low"] > floor["extracted"]["high"]
        lines.append(
            "more is extracted than from the anchor alone, which never saw this text"
            if above
            else "no more is extracted than from the anchor alone, within the intervals"
        )
    controls = [title for title in CONTROLS if title in audits]
    for title in controls:
        caught = audits[title]
        lines.append(
            f"{title}, which learned {caught['documents']} documents by heart: "
            f"{caught['extracted']['rate']:.0%} of {caught['prefixes']} passages are extracted by "
            f"sampling, and {caught['greedy']['rate']:.0%} come out greedily, to the letter"
        )
    if not controls:
        lines.append("whether this audit would catch what was learned by heart: ask with --control")
    return lines


def _show_extraction(found: dict[str, Any]) -> None:
    def percent(rate: dict[str, float]) -> str:
        return f"{rate['rate']:.2%} ({rate['low']:.2%} to {rate['high']:.2%})"

    rows = [
        {
            "model": name, "prefixes": audit["prefixes"],
            "extracted (95%)": percent(audit["extracted"]),
            "continuation alone (95%)": percent(audit["continuation"]),
            "greedily (95%)": percent(audit["greedy"]),
            "attempts/s": audit["attempts_per_second"],
        }
        for name, audit in found["audits"].items()
    ]  # fmt: skip
    show_table(rows, title=f"extraction from {found['model']}: {found['data']}")
    for line in found["lines"]:
        tell(f"- {line}")


def audit_membership(args: argparse.Namespace) -> None:
    """`flexolmo audit membership`.

    Raises:
      ValueError: the input is wrong; the certificate is refuted.
    """
    found = run_membership(Path(args.model), Path(args.run), args.anchor, args.expert)
    _tell(found, _show_membership, args.json)
    check_certificate(found)


def run_membership(
    path: Path, run: Path, anchor: str | Path | None = None, expert: str | None = None
) -> dict[str, Any]:
    """Audits an expert by its canaries.

    Args:
      path: the expert's package, or a merged model that has it.
      run: the run folder of the expert.
      anchor: of a package.
      expert: which one of a merged model.

    Returns:
      the report, as JSON values.

    Raises:
      ValueError: there is no such expert; its canaries are not those of the run.
    """
    package = _package_of(path, expert)
    manifest = read_manifest(package, kind="expert")
    canaries = _canaries_of(package, manifest, run)
    name, certificate = manifest["name"], _certificate_of(package, manifest)
    delta = certificate["delta"] if certificate else membership.DELTA
    model = load(path, anchor=anchor)
    ways = {"the expert alone": {"only": [name]}, "the model": {}}
    audits = {
        title: membership.membership(*membership.canary_scores(model, canaries, **ways), delta)
        for title, ways in ways.items()
    }
    return {
        "model": str(path), "expert": name,
        "certificate": certificate and {k: certificate[k] for k in ("epsilon", "delta", "unit")},
        "commitment": canaries.commitment, "audits": as_json(audits),
        **membership.verdict(audits["the expert alone"], certificate),
    }  # fmt: skip


def check_certificate(found: dict[str, Any]) -> None:
    """Raises ValueError if a membership audit has refuted a certificate."""
    if found["verdict"] == "refuted":
        raise ValueError(f"{found['model']}: the certificate is refuted: {found['why']}")


def _show_membership(found: dict[str, Any]) -> None:
    rows = []
    for title, audit in found["audits"].items():
        area = audit["area"]
        rates = (one["members"] for one in audit["caught"])
        shown = (f"{r['rate']:.1%} ({r['low']:.1%} to {r['high']:.1%})" for r in rates)
        titles = (f"found at {alarms:.1%} false" for alarms in membership.FALSE_ALARMS)
        rows.append(
            {
                "asked": title, "put in": audit["members"], "left out": audit["controls"],
                "AUC (95%)": f"{area['area']:.3f} ({area['low']:.3f} to {area['high']:.3f})",
                **dict(zip(titles, shown, strict=True)),
                "epsilon at least": f"{audit['epsilon']:.2f}",
                "at most shown": f"{audit['epsilon_at_most']:.2f}",
            }
        )  # fmt: skip
    show_table(rows, title=f"membership in {found['expert']} ({found['model']})")
    tell(f"{found['verdict']}: {found['why']}")


def audit_removal(args: argparse.Namespace) -> None:
    """`flexolmo audit removal`.

    Raises:
      ValueError: the input is wrong; something is left of an expert where nothing may be.
    """
    found = run_removal(
        Path(args.model), args.expert, args.run and Path(args.run), args.data,
        prefixes=args.prefixes, heldout=args.heldout, group_field=args.group_field,
        text_field=args.text_field,
    )  # fmt: skip
    _tell(found, _show_removal, args.json)
    check_removal(found)


def run_removal(
    path: Path, name: str, run: Path | None, data: str | None, *, prefixes: int = 100,
    heldout: float | None = None, group_field: str | None = None, text_field: str = "text",
) -> dict[str, Any]:  # fmt: skip
    """Audits what is left of an expert that is switched off, or taken out.

    Args:
      path: a merged model.
      name: of the expert.
      run: its run folder, for its canaries; or None.
      data: the owner's text, for passages; or None.
      prefixes, heldout, group_field, text_field: as in `run_extraction`.

    Returns:
      the report, as JSON values.

    Raises:
      ValueError: neither canaries nor text; as `removal.audit_removal`.
    """
    if run is None and data is None:
        raise ValueError("nothing to ask the models: give --run (canaries), --data (text), or both")
    package = _package_of(path, name)
    about = read_manifest(package, kind="expert")
    canaries = _canaries_of(package, about, run) if run else None
    passages: list[Sequence[int]] = []
    if data is not None:
        model = load(path)
        protocol = Protocol().within(model.config.max_length)
        split = chosen_split(path, name, heldout, group_field, trained=True)
        documents = trained_documents(model, data, split, text_field)
        picked = extraction.pick_passages(documents, prefixes, protocol, seed=0)
        passages = [one.ids for one in picked]
    found = removal.audit_removal(path, name, canaries, passages)
    return {
        "model": str(path), "expert": name, "passages": len(passages),
        "canaries": len(canaries.candidates) if canaries else 0,
        **as_json(found), "lines": _removal_lines(found),
    }  # fmt: skip


def check_removal(found: dict[str, Any]) -> None:
    """Raises ValueError if something is left where nothing may be."""
    ways = ["removed"] if found["tuned"] else ["removed", "switched_off"]
    for way in ways:
        if not found[way]["equal"]:
            raise ValueError(
                f"{found['model']}: with {found['expert']} {way.replace('_', ' ')}, logits differ "
                f"by up to {found[way]['largest']:.3g} from a model that never had it; expected "
                "equal ones, bit for bit, on CPU in float32"
            )


def _removal_lines(found: removal.Removal) -> list[str]:
    lines = []
    for way, same in (("switched off", found.switched_off), ("taken out", found.removed)):
        said = "equal, bit for bit" if same.equal else f"different by up to {same.largest:.3g}"
        lines.append(f"{way}, against a model that never had it: logits are {said}")
    if found.nothing_is_left:
        return [*lines, "no canary and no passage scores better than if it had never been there"]
    if found.tuned:
        lines.append(
            "the rows of the others were tuned while it was there, and stay so when it is switched "
            "off; taking it out undoes the tuning"
        )
    for what, leak in (
        ("canaries put in", found.members), ("canaries left out", found.controls),
        ("passages", found.prefixes),
    ):  # fmt: skip
        if leak:
            lines.append(
                f"{what}, switched off: {leak.better} of {leak.texts} are predicted better, by "
                f"{leak.mean:+.3f} nats on average, {leak.largest:+.3f} at most"
            )
    if found.told_apart:
        seen = not found.told_apart.low <= 0.5 <= found.told_apart.high
        lines.append(
            f"by these gains, canaries that were put in are told apart with an AUC of "
            f"{found.told_apart}: the rows {'tell' if seen else 'are not seen to tell'} of them"
        )
    return lines


def _show_removal(found: dict[str, Any]) -> None:
    tell(
        f"{found['expert']} in {found['model']}: {found['canaries']} canaries, "
        f"{found['passages']} passages"
    )
    for line in found["lines"]:
        tell(f"- {line}")


def _tell(found: dict[str, Any], show: Callable[[dict[str, Any]], None], as_json: bool) -> None:
    """A report on standard output: as JSON, or as a reader wants it."""
    if as_json:
        print_json(found)
    else:
        show(found)


def trained_documents(
    model: FlexOlmo, data: str, split: Split | None, text_field: str
) -> list[list[int]]:
    """Ids of the documents that were trained on, without separators."""
    report = Report()
    field = split.group_field if split else GROUP_FIELD
    every = read_documents(data, text_field=text_field, group_field=field, report=report)
    trained = (d for d in every if split is None or not split.holds_out(d))
    encoded = [ids[1:].tolist() for ids in tokenized(trained, tokenizer_of(model))]
    report.tell()
    return encoded


def _certificate_of(package: Path, manifest: dict[str, Any]) -> dict[str, Any] | None:
    """What a package claims of privacy, verified or not; None if it has no certificate.

    Raises:
      ValueError: it has one that lacks what a claim consists of.
    """
    claim = manifest["privacy"]
    if not isinstance(claim, dict):
        return None
    numbers: list[Any] = [claim.get(name) for name in ("epsilon", "delta")]
    if not all(type(x) in (int, float) and x > 0 for x in numbers) or "unit" not in claim:
        raise ValueError(
            f"{package}: its privacy statement claims no epsilon and delta above 0 of a unit; see "
            f"`flexolmo privacy verify {package}`"
        )
    return claim


def _canaries_of(package: Path, manifest: dict[str, Any], run: Path) -> Canaries:
    """The canaries of a run, if they are those of the package."""
    canaries = Canaries.read(run)
    said = manifest.get("canaries")
    if said is None:
        raise ValueError(
            f"{package}: its manifest tells of no canaries; it was trained without --canaries"
        )
    if said["commitment"] != canaries.commitment:
        raise ValueError(
            f"{run}: not the canaries of {package}: its manifest commits to "
            f"{said['commitment'][:12]}..., found {canaries.commitment[:12]}...; name the run "
            "folder of this expert"
        )
    return canaries


def _package_of(path: Path, expert: str | None) -> Path:
    """The package of an expert of a merged model; or the package that `path` is."""
    manifest = read_manifest(path)
    if manifest["kind"] == "expert":
        if expert not in (None, manifest["name"]):
            raise ValueError(f"{path}: this is the package of {manifest['name']!r}, not {expert!r}")
        return path
    entries = {entry["name"]: path / entry["path"] for entry in manifest.get("experts", ())}
    there = ", ".join(entries) or "none"
    if manifest["kind"] != "merged":
        raise ValueError(f"{path}: expected an expert package or a merged model, found an anchor")
    if expert is None:
        raise ValueError(f"{path}: a merged model; say which one with --expert: {there}")
    if expert not in entries:
        raise ValueError(f"{path}: no expert named {expert!r}; there are {there}")
    return entries[expert]


def _anchor_of(path: Path, given: str | Path | None) -> Path:
    """The anchor of a model on disk."""
    return anchor_path(open_source(path)) if given is None else Path(given)


def _identity(path: Path) -> str:
    """What a model is, for audits that go on: the digest of its manifest; or where it is."""
    source = open_source(path)
    return source.digest if isinstance(source, Package) else str(path)
