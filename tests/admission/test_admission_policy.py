"""A policy of admission is parsed strictly; what is printed to begin with is what holds anyway."""

import dataclasses
import tomllib

import pytest

from flexolmo_jax.admission.policy import EXAMPLE, SECTIONS, Policy, parse_policy, read_policy


def test_the_printed_policy_is_the_default_and_names_every_field(flexolmo):
    code, printed, _ = flexolmo("admit", "--print-policy")
    assert code == 0 and printed == EXAMPLE
    tables = tomllib.loads(printed)
    assert parse_policy(tables) == Policy()
    for name, section in SECTIONS.items():
        fields = {field.name for field in dataclasses.fields(section)}
        assert tables[name].keys() == fields - {"file"}


def test_paths_are_relative_to_the_file(tmp_path):
    (tmp_path / "deep").mkdir()
    file = tmp_path / "deep" / "policy.toml"
    file.write_text(
        'cohort = ["a", "/b"]\n[domains]\nx = "x.jsonl"\ny = "corpus:math"\n'
        '[probes]\nfile = "p.jsonl"\n[spectral]\nz = 3\nfails = "reject"\n'
    )
    policy = read_policy(file)
    assert policy.cohort == (str(file.parent / "a"), "/b")
    assert policy.domains == {"x": str(file.parent / "x.jsonl"), "y": "corpus:math"}
    assert policy.probes.file == str(file.parent / "p.jsonl")
    assert (policy.spectral.z, policy.spectral.fails) == (3, "reject")
    assert policy.digest() != Policy().digest()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cohorts = []", "unknown field cohorts: did you mean cohort?"),
        ("[routing]\npublik = 1", "unknown field routing.publik: did you mean routing.public?"),
        ("[rooting]\npublic = 1", "unknown field rooting: did you mean routing?"),
        ("zzz = 1", "unknown field zzz: expected cohort, always_on"),
        ("[routing]\npublic = 2", "routing.public: expected a number from 0.0 to 1.0, found 2"),
        ("[routing]\npublic = true", "routing.public: expected a number"),
        ("[routing]\npublic = nan", "routing.public: expected a number"),
        ("[loss]\nbytes = 1.5", "loss.bytes: expected a whole number"),
        ("[probes]\nfails = 'maybe'", "probes.fails: expected reject, review, note"),
        ("[probes]\nfile = 3", "probes.file: expected a path"),
        ("routing = 3", "routing: expected a table"),
        ("cohort = 'a'", "cohort: expected a list of texts"),
        ("cohort = [1]", "cohort: expected a list of texts"),
        ("always_on = ['public', 'a b']", "cannot be an expert's name"),
        ("[domains]\nmath = 3", "domains.math: expected a SOURCE"),
        ("[spectral]\nmembers = 1", "spectral.members: expected a whole number from 3"),
        ("= 3", "--print-policy"),
    ],
)
def test_what_is_wrong_in_it_is_named(tmp_path, text, message):
    file = tmp_path / "policy.toml"
    file.write_text(text)
    with pytest.raises(ValueError, match="policy.toml") as raised:
        read_policy(file)
    assert message in str(raised.value)


def test_a_missing_policy_is_named(tmp_path):
    with pytest.raises(ValueError, match="--print-policy"):
        read_policy(tmp_path / "none.toml")
