"""Which documents count as held out: by the record in the packages, and not by guessing."""

import json
import shutil

import pytest

import flexolmo_jax as fo
from flexolmo_jax.data.sources import is_heldout, read_documents
from flexolmo_jax.evaluation.split import Split, chosen_split
from flexolmo_jax.federation.anchor import read_anchor
from flexolmo_jax.federation.expert import write_expert
from flexolmo_jax.federation.merge import merge

WORDS = "the river walks under a quiet stone house".split()


@pytest.fixture(scope="module")
def patients(tmp_path_factory):
    """Short letters of 40 patients, 6 of each."""
    rows = [
        {"patient": f"p{n // 6}", "text": f"{WORDS[n % 8]} {WORDS[n % 7]} of visit {n}"}
        for n in range(240)
    ]
    file = tmp_path_factory.mktemp("patients") / "letters.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def models(world, tmp_path_factory):
    """Packages with other records, a merge of all, and one of those that agree."""
    folder = tmp_path_factory.mktemp("split")
    anchor = read_anchor(world.anchor)
    facts = {"licence": "CC0-1.0", "contact": "a@b.example"}
    for name, heldout in (
        ("clinic", {"share": 0.1, "group_field": "patient"}),
        ("ward", {"share": 0.1, "group_field": "patient"}),
        ("everything", {"share": 0.0, "group_field": "group"}),
        ("old", None),
    ):
        more = {"heldout": heldout} if heldout else {}
        write_expert(folder / name, anchor.weights.public, name, anchor, {**facts, **more})
    two = [folder / name for name in ("clinic", "ward")]
    merge(world.anchor, two, folder / "agreeing")
    merge(world.anchor, [*two, folder / "everything"], folder / "merged")
    return folder


def test_evaluate_scores_the_documents_that_training_held_out(world, models, patients, flexolmo):
    held_out = [d for d in read_documents(patients, group_field="patient") if is_heldout(d, 0.1)]
    by_text = [d for d in read_documents(patients) if is_heldout(d, 0.1)]
    assert 0 < len(held_out) != len(by_text)
    data = ("--data", f"clinic={patients}", "--json")
    for model in ((models / "clinic", "--anchor", world.anchor), (models / "merged",)):
        for said in (("--heldout",), ("--heldout", "0.1")):
            code, out, error = flexolmo("evaluate", "--model", *model, *data, *said)
            assert code == 0, error
            assert json.loads(out)[0]["documents"] == len(held_out)


def test_the_record_is_of_the_expert_that_is_named_or_of_all(models, world):
    by_patient = Split(0.1, "patient")
    assert chosen_split(models / "merged", "ward", True, None) == by_patient
    assert chosen_split(models / "agreeing", "letters", True, None) == by_patient
    assert chosen_split(models / "merged", "public", True, None) == Split(0.1, "group")
    assert chosen_split(world.anchor, "anything", True, None) == Split(0.1, "group")
    assert chosen_split(models / "merged", "ward", None, None) is None
    assert chosen_split(models / "merged", "ward", None, None, trained=True) == by_patient
    assert chosen_split(models / "old", "old", 0.2, None) == Split(0.2, "group")
    for model, name, why in (
        ("merged", "letters", "its experts were trained with different splits"),
        ("old", "old", "there is no record"),
        ("everything", "everything", "none were held out"),
    ):
        with pytest.raises(ValueError, match=why):
            chosen_split(models / model, name, True, None)


@pytest.mark.parametrize(
    "odd",
    [
        {"share": True, "group_field": "patient"}, {"share": 1, "group_field": "patient"},
        {"share": 0.1, "group_field": ""}, {"share": 0.1}, "a tenth",
    ],
)  # fmt: skip
def test_no_package_holds_an_odd_record(world, odd, tmp_path):
    anchor = read_anchor(world.anchor)
    with pytest.raises(ValueError, match="field 'heldout': expected an object of a share"):
        write_expert(tmp_path / "odd", anchor.weights.public, "odd", anchor, {"heldout": odd})
    assert not list(tmp_path.iterdir())


def test_an_audit_of_experts_with_several_records_says_that_it_goes_by_none(models):
    with pytest.warns(UserWarning, match="different splits .*all documents count as trained"):
        assert chosen_split(models / "merged", None, None, None, trained=True) is None


@pytest.mark.parametrize(
    ("share", "field", "trained"),
    [(0.2, None, False), (0.1, "author", False), (0.05, None, True), (0.1, "author", True)],
)
def test_what_contradicts_the_record_is_warned_of(models, share, field, trained):
    with pytest.warns(UserWarning, match="trained with a share of 0.1, grouped by 'patient'"):
        chosen_split(models / "clinic", "clinic", share, field, trained=trained)


@pytest.mark.parametrize("share", ["10", "1", "0", "-0.1", "nan", "inf"])
def test_a_share_lies_between_0_and_1(world, models, patients, refused, share, tmp_path):
    model = ("--model", models / "clinic", "--anchor", world.anchor)
    wrong = ("--heldout", share)
    assert "between 0 and 1" in refused("evaluate", *model, "--data", f"x={patients}", *wrong)
    audit = ("audit", "extraction", *model, "--data", patients, "--out", tmp_path / "out")
    assert "between 0 and 1" in refused(*audit, *wrong)
    with pytest.raises(ValueError, match="between 0 and 1"):
        fo.bits_per_byte(fo.load(world.anchor), str(patients), heldout=float(share))


def test_a_hugging_face_directory_has_no_record(tmp_path, world):
    shutil.copytree(world.anchor, tmp_path / "hf", ignore=shutil.ignore_patterns("manifest*"))
    with pytest.raises(ValueError, match="there is no record"):
        chosen_split(tmp_path / "hf", "x", True, None)
