"""`flexolmo revoke`, `flexolmo log`, and removals that leave a record."""

import json

import pytest

import flexolmo_jax as fo
from flexolmo_jax.federation.package import Package


@pytest.fixture
def options(signed_world):
    return ("--keys", signed_world.registry, "--key", signed_world.key("cora"), "--reason", "bad")


def lines(flexolmo, world):
    code, shown, error = flexolmo("log", "--keys", world.registry, "--json")
    assert code == 0, error
    return json.loads(shown)


def test_a_revoked_package_is_refused_by_every_command(signed_world, flexolmo, refused, options):
    """By its folder, by its digest, by its name; and accepted again once that is taken back."""
    world = signed_world
    math, digest = world.experts["math"], Package.open(world.experts["math"]).digest
    need = ("--require-signed", world.registry)
    for what in ((math,), ("--digest", digest), ("--expert", "math")):
        code, said, error = flexolmo("revoke", *what, *options)
        assert code == 0, error
        assert "is revoked" in said
        assert "was revoked on" in refused("verify", math, "--keys", world.registry)
        assert "was revoked on" in refused("verify", world.merged, "--keys", world.registry)
        out = world.root / "out"
        merge = ("merge", "--anchor", world.anchor, "--expert", math, "--out", out)
        assert ": bad" in refused(*merge, *need) and not out.exists()
        assert ": bad" in refused("experts", "add", world.merged, math, *need)
        assert ": bad" in refused("generate", "--model", world.merged, "--prompt", "1", *need)
        assert "is revoked since" in refused("revoke", *what, *options)
        assert flexolmo("revoke", *what, *options, "--undo")[0] == 0
        assert flexolmo("verify", world.merged, "--keys", world.registry)[0] == 0
    assert flexolmo("generate", "--model", world.merged, "--prompt", "1", *need)[0] == 0
    found = [(x["event"], x["expert"], x["package"]) for x in lines(flexolmo, world)]
    assert found[:4] == [
        ("revoked", "math", digest), ("reinstated", "math", digest),
        ("revoked", None, digest), ("reinstated", None, digest),
    ]  # fmt: skip
    shown = flexolmo("log", "--keys", world.registry)[1]
    assert "reinstated" in shown and "cora" in shown


def test_what_cannot_be_revoked_is_said(signed_world, refused, options):
    world = signed_world
    assert "one of the arguments" in refused("revoke", *options)
    assert "not allowed with" in refused("revoke", world.anchor, "--expert", "math", *options)
    said = refused("revoke", "--expert", "maths", *options)
    assert "maths" in said and "there are: code, math" in said
    assert "64 hexadecimal" in refused("revoke", "--digest", "abc", *options)
    assert "no such folder" in refused("revoke", world.root / "none", *options)
    assert "what is: nothing" in refused("revoke", "--expert", "math", *options, "--undo")
    of_an_owner = (*options[:3], world.key("mia"), *options[4:])
    assert "expected that of a coordinator" in refused("revoke", "--expert", "math", *of_an_owner)
    assert not (world.registry / "log.jsonl").exists()
    assert "none" in refused("log", "--keys", world.root / "none")


def test_a_removal_leaves_a_record_and_a_signed_model(signed_world, flexolmo, refused):
    world = signed_world
    digest = Package.open(world.experts["math"]).digest
    record = ("--log", world.registry, "--key", world.key("cora"))
    assert "there are math, code" in refused("experts", "remove", world.merged, "mat", *record)
    assert lines(flexolmo, world) == []
    remove = ("experts", "remove", world.merged, "math")
    assert "--log needs --key" in refused(*remove, *record[:2])
    assert "--key needs --log" in refused(*remove, *record[2:])
    assert "expected that of a coord" in refused(*remove, *record[:3], world.key("mia"))
    code, said, error = flexolmo(*remove, "math", *record, "--reason", "its owner left")
    assert code == 0 and "the model is signed again" in said, error
    [line] = lines(flexolmo, world)
    assert (line["event"], line["expert"], line["package"]) == ("removed", "math", digest)
    assert (line["reason"], line["signer"]) == ("its owner left", "cora")
    assert fo.load(world.merged, keys=world.registry).expert_names == ("public", "code")


def test_a_model_that_somebody_changed_is_not_signed_again(signed_world, flexolmo, refused):
    world = signed_world
    assert flexolmo("experts", "remove", world.merged, "math")[0] == 0
    record = ("--log", world.registry, "--key", world.key("cora"))
    assert "merged.sig" in refused("experts", "remove", world.merged, "code", *record)
    assert lines(flexolmo, world) == []
    (world.root / "merged.sig").unlink()
    assert flexolmo("experts", "remove", world.merged, "code", *record)[0] == 0
    assert not (world.root / "merged.sig").exists() and len(lines(flexolmo, world)) == 1
