"""Which documents were held out, from the record of the training: a share, and a group field.

A document's side of the split depends on its group only (`is_heldout`). So the record in a
package's manifest identifies the same documents to everyone who has the text, and reveals nothing
of the text to others.
"""

import warnings
from pathlib import Path
from typing import Any, NamedTuple

from flexolmo_jax.config import DataConfig
from flexolmo_jax.data.sources import Document, is_heldout
from flexolmo_jax.federation.package import MANIFEST, read_manifest

GROUP_FIELD = str(DataConfig.group_field)  # the default, as in training


class Split(NamedTuple):
    """A held-out share, and the field of a row that names its group."""

    share: float
    group_field: str = GROUP_FIELD

    def holds_out(self, document: Document) -> bool:
        return is_heldout(document, self.share)

    def __str__(self) -> str:
        return f"a share of {self.share:g}, grouped by {self.group_field!r}"


def check_share(share: float, option: str = "--heldout") -> float:
    """Returns the share, or raises ValueError if it is not between 0 and 1."""
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
    """The split to use with a text: from the options, and otherwise from the model's record.

    Warns if the options contradict the record, since trained documents would then count as held
    out, or held-out ones as trained.

    Args:
      model: a package, a merged model, or a Hugging Face directory (which has no record).
      name: of the expert whose text it is, or "public"; any other name stands for all experts, if
        their records agree.
      share: the option; True for the record's share; None for no split, or with `trained` for the
        record's split, if it has one.
      group_field: the option, or None.
      anchor: of an expert package, if it was given.
      trained: whether the trained documents are needed, and not the held-out ones.

    Returns:
      the split, or None if all documents are used.

    Raises:
      ValueError: the share is out of range; the record is needed and missing, or invalid.
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
                        "count as trained, held-out ones too",
                        stacklevel=2,
                    )
                return None
            raise ValueError(
                f"{model}: {_why_none(records, record)}; pass --heldout SHARE and, if documents "
                "were grouped, --group-field FIELD"
            )
        wanted = Split(record.share, group_field or record.group_field)
    else:
        field = group_field or (record.group_field if record else GROUP_FIELD)
        wanted = Split(float(share), field)
    if record is not None:
        _warn_of_contradiction(model, wanted, record, trained)
    return wanted


def _warn_of_contradiction(model: str | Path, wanted: Split, record: Split, trained: bool) -> None:
    """Warns if trained documents would count as held out, or held-out ones as trained."""
    mixed = wanted.share < record.share if trained else wanted.share > record.share
    if mixed or wanted.group_field != record.group_field:
        side = "held out" if trained else "trained on"
        warnings.warn(
            f"{model}: trained with {record} held out, but the options say {wanted}: if this is "
            f"the text of that training, some of these documents were {side}; omit the option to "
            "use the record",
            stacklevel=3,
        )


def _record_for(records: dict[str, Split | None], name: str | None) -> Split | None:
    if name in records:
        return records[name]
    experts = {record for expert, record in records.items() if expert != "public"}
    distinct = experts or set(records.values())
    return distinct.pop() if len(distinct) == 1 else None


def _why_none(records: dict[str, Split | None], record: Split | None) -> str:
    if record is not None:
        return "trained on all documents, and none were held out"
    if len({split for name, split in records.items() if name != "public"}) > 1:
        splits = "; ".join(f"{name}: {split or 'no record'}" for name, split in records.items())
        return (
            f"its experts were trained with different splits ({splits}): use an expert's name as "
            "NAME"
        )
    return "there is no record of which documents its training held out"


def _records(model: Path, anchor: Path | None) -> dict[str, Split | None]:
    """The recorded splits by expert; the anchor's is under "public"."""
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
    heldout = manifest.get("heldout")
    if heldout is None:  # a package of an older version
        return None
    return Split(float(heldout["share"]), heldout["group_field"])
