"""Which documents were held out, by the record of those who trained: a share, and a group field.

Which side of the split a document is on follows from its group alone (`is_heldout`), so the record
in a package's manifest names the same documents to everyone who has the text, and tells nothing of
it to those who do not.
"""

import warnings
from pathlib import Path
from typing import Any, NamedTuple

from flexolmo_jax.config import DataConfig
from flexolmo_jax.data.sources import Document, is_heldout
from flexolmo_jax.federation.package import MANIFEST, read_manifest

GROUP_FIELD = str(DataConfig.group_field)  # where nothing else is said, as in training


class Split(NamedTuple):
    """A held-out share, and the field of a row that names its group."""

    share: float
    group_field: str = GROUP_FIELD

    def holds_out(self, document: Document) -> bool:
        return is_heldout(document, self.share)

    def __str__(self) -> str:
        return f"a share of {self.share:g}, grouped by {self.group_field!r}"


def check_share(share: float, option: str = "--heldout") -> float:
    """The share, if it is one. Raises ValueError otherwise."""
    if not 0 < share < 1:
        raise ValueError(
            f"{option} must be a share between 0 and 1 (0.1 for a tenth of the documents), found "
            f"{share:g}"
        )
    return share


def chosen_split(
    model: str | Path,
    name: str | None,
    share: float | bool | None,
    group_field: str | None,
    *,
    anchor: str | Path | None = None,
    trained: bool = False,
) -> Split | None:
    """The split to use with a text: as was said, and for the rest as the model's record says.

    Warns where what was said contradicts the record, since trained documents would then be taken
    for held-out ones, or the other way round.

    Args:
      model: a package, a merged model, or a Hugging Face directory (which has no record).
      name: of the expert whose text it is, or "public"; any other name stands for all experts, if
        their records agree.
      share: as was said; True for that of the record; None for no split, or with `trained` for
        that of the record, if there is one.
      group_field: as was said, or None.
      anchor: of an expert package, if it was named.
      trained: the trained documents are asked for, and not the held-out ones.

    Returns:
      the split, or None if all documents are asked for.

    Raises:
      ValueError: the share is out of range; the record that was asked for is not there, or a
        manifest has no sensible one.
    """
    if share is not None and share is not True:
        check_share(share)
    if share is None and not trained:
        return None
    records = _records(Path(model), None if anchor is None else Path(anchor))
    record = _record_for(records, name)
    if share is True or share is None:
        if record is None or not record.share:
            if share is None:
                if any(records.values()) and record is None:
                    warnings.warn(
                        f"{model}: {_why_none(records, record)}; without --heldout, all documents "
                        "are taken for trained ones, held-out ones too",
                        stacklevel=2,
                    )
                return None
            raise ValueError(
                f"{model}: {_why_none(records, record)}; say --heldout SHARE and, where documents "
                "were grouped, --group-field FIELD"
            )
        wanted = Split(record.share, group_field or record.group_field)
    else:
        field = group_field or (record.group_field if record else GROUP_FIELD)
        wanted = Split(float(share), field)
    if record is not None:
        mixed = wanted.share < record.share if trained else wanted.share > record.share
        if mixed or wanted.group_field != record.group_field:
            said = "held out" if trained else "trained on"
            warnings.warn(
                f"{model}: trained with {record} held out, asked for is {wanted}: if this is the "
                f"text of that training, some of these documents were {said}; leave the value out "
                "to go by the record",
                stacklevel=2,
            )
    return wanted


def _record_for(records: dict[str, Split | None], name: str | None) -> Split | None:
    if name in records:
        return records[name]
    experts = {record for one, record in records.items() if one != "public"}
    distinct = experts or set(records.values())
    return distinct.pop() if len(distinct) == 1 else None


def _why_none(records: dict[str, Split | None], record: Split | None) -> str:
    if record is not None:
        return "trained on all documents, and none were held out"
    if len({one for name, one in records.items() if name != "public"}) > 1:
        told = "; ".join(f"{name}: {one or 'no record'}" for name, one in records.items())
        return f"its experts were trained with other splits ({told}): use an expert's name as NAME"
    return "there is no record of which documents its training held out"


def _records(model: Path, anchor: Path | None) -> dict[str, Split | None]:
    """By expert; the anchor's under "public"."""
    if not (model / MANIFEST).exists():
        return {}
    manifest = read_manifest(model)
    if manifest["kind"] == "anchor":
        return {"public": _record(manifest)}
    records: dict[str, Split | None] = {}
    if manifest["kind"] == "merged":
        anchor = model / manifest["anchor"]["path"]
        for entry in manifest["experts"]:
            package = model / entry["path"]
            records[entry["name"]] = _record(read_manifest(package, kind="expert"))
    else:
        records[manifest["name"]] = _record(manifest)
    if anchor is not None and (anchor / MANIFEST).exists():
        records["public"] = _record(read_manifest(anchor, kind="anchor"))
    return records


def _record(manifest: dict[str, Any]) -> Split | None:
    found = manifest.get("heldout")
    if found is None:  # of an older version
        return None
    return Split(float(found["share"]), found["group_field"])
