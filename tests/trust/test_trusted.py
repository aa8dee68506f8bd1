"""What a registry and its log say is what loading goes by; nothing that was seen is unlearned."""

import datetime
import shutil

import pytest

import flexolmo_jax as fo
from flexolmo_jax.federation.merge import remove_expert
from flexolmo_jax.federation.package import Package
from flexolmo_jax.trust import keys, log, registry_changes, signers
from flexolmo_jax.trust.signatures import sign_package
from flexolmo_jax.trust.trusted import Trusted


@pytest.fixture
def own(signed_world):
    return signed_world


def key(world, name="cora"):
    return keys.read_private(world.key(name))


def test_a_signed_model_is_loaded_and_says_who_signed_it(own):
    model = fo.load(own.merged, keys=own.registry)
    registry = Trusted.open(own.registry).registry
    found = {(x.kind, x.name): registry.signer_of(x.key).name for x in model.signed}
    assert found == {
        ("merged", None): "cora", ("anchor", None): "pat", ("expert", "math"): "mia",
        ("expert", "code"): "carl",
    }  # fmt: skip
    assert {x.digest for x in model.signed} == {
        Package.open(x).digest for x in (own.merged, own.anchor, *own.experts.values())
    }
    assert fo.load(own.merged).signed == ()
    for path in (own.anchor, own.experts["math"]):
        assert len(fo.load(path, keys=own.registry).signed) in (1, 2)


@pytest.mark.parametrize("part", ["anchor", "merged", "math"])
def test_what_is_not_signed_is_not_loaded(own, part):
    folder = own.experts.get(part) or own.root / part
    file = folder.with_name(f"{folder.name}.sig")
    text = file.read_text()
    file.unlink()
    with pytest.raises(ValueError, match=rf"{part}.sig: no signature there"):
        fo.load(own.merged, keys=own.registry)
    file.write_text(text.replace("a", "b", 1))
    with pytest.raises(ValueError, match=rf"{part}.sig"):
        fo.load(own.merged, keys=own.registry)
    sign_package(folder, own.key("carl"))
    with pytest.raises(ValueError, match=rf"{part}.sig: .*carl's key"):
        fo.load(own.merged, keys=own.registry)


def test_what_was_revoked_is_not_loaded_and_the_reason_is_said(own):
    """By name, by digest, by key; and again after it was taken back."""
    registry, cora = own.registry, key(own)
    digest = Package.open(own.experts["math"]).digest
    for given, said in (
        ({"expert": "math"}, "the expert 'math' was revoked on .*: of a poisoner"),
        ({"package": digest}, f"the package {digest[:12]}... was revoked on .*: of a poisoner"),
        ({"package": Package.open(own.anchor).digest}, "anchor: the package .* was revoked on"),
        ({"package": Package.open(own.merged).digest}, "merged: the package .* was revoked on"),
    ):
        log.append(registry, cora, log.REVOKED, **given, reason="of a poisoner")
        with pytest.raises(ValueError, match=said):
            fo.load(own.merged, keys=registry)
        log.append(registry, cora, log.REINSTATED, **given, reason="a mistake")
        assert fo.load(own.merged, keys=registry).signed
    log.append(registry, cora, log.REVOKED, expert="math", reason="of a poisoner")
    assert fo.load(own.experts["code"], keys=registry).signed
    remove_expert(own.merged, "math")
    sign_package(own.merged, own.key("cora"))
    assert fo.load(own.merged, keys=registry).expert_names == ("public", "code")
    registry_changes.revoke_signer(registry, "carl", "his laptop was stolen", key(own, "root"))
    with pytest.raises(ValueError, match="carl's key .* was revoked on .*: his laptop was stolen"):
        fo.load(own.merged, keys=registry)


def test_a_rejected_package_is_refused_until_it_is_admitted(own):
    about = {"expert": "math", "package": Package.open(own.experts["math"]).digest}
    log.append(own.registry, key(own), log.REJECTED, **about, reason="takes 99% of public text")
    with pytest.raises(ValueError, match="expert 'math' was rejected: takes 99% of public text"):
        fo.load(own.merged, keys=own.registry)
    log.append(own.registry, key(own), log.ADMITTED, **about)
    assert fo.load(own.merged, keys=own.registry).signed


def test_an_expired_registry_permits_nothing(own, monkeypatch):
    trusted = Trusted.open(own.registry)
    signed = trusted.check(Package.open(own.anchor))
    late = trusted.registry.expires
    assert trusted.refusal(signed) is None
    assert "expired on" in trusted.refusal(signed, late)
    monkeypatch.setattr("flexolmo_jax.trust.registry.utc_now", lambda: late)
    with pytest.raises(ValueError, match="expired on"):
        fo.load(own.merged, keys=own.registry)


def test_a_key_is_trusted_while_it_is_valid(own):
    trusted = Trusted.open(own.registry)
    signed = trusted.check(Package.open(own.anchor))
    late = signers.utc_now() + datetime.timedelta(days=2)
    assert "pat's key" in trusted.refusal(signed, late)


def test_what_changes_is_followed(own):
    trusted = Trusted.open(own.registry)
    signed = trusted.check(Package.open(own.experts["math"]))
    assert trusted.follow() is False
    log.append(own.registry, key(own), log.REVOKED, expert="math", reason="of a poisoner")
    assert trusted.refusal(signed) is None
    assert trusted.follow() is True and trusted.follow() is False
    assert "of a poisoner" in trusted.refusal(signed)
    carls = trusted.check(Package.open(own.experts["code"]))
    registry_changes.revoke_signer(own.registry, "carl", "stolen", key(own, "root"))
    assert trusted.follow() and "stolen" in trusted.refusal(carls)


def test_it_never_goes_back(own, tmp_path):
    """A shorter log, a lower version, another registry: what was seen stays in force."""
    before = shutil.copytree(own.registry, tmp_path / "before")
    registry = own.registry
    log.append(registry, key(own), log.REVOKED, expert="math", reason="of a poisoner")
    trusted = Trusted.open(registry)
    signed = trusted.registry, trusted.entries
    whole = (registry / "log.jsonl").read_bytes()
    (registry / "log.jsonl").unlink()
    for _ in range(2):  # not just once
        with pytest.raises(ValueError, match="its log had 1 lines before"):
            trusted.follow()
    log.append(registry, key(own), log.REVOKED, expert="code", reason="another history")
    with pytest.raises(ValueError, match="its log had 1 lines before"):
        trusted.follow()
    (registry / "log.jsonl").write_bytes(whole)
    assert trusted.follow() and (trusted.registry, trusted.entries) == signed
    registry_changes.renew(registry, key(own, "root"), days=30)
    assert trusted.follow()
    version = trusted.registry.version
    (registry / f"{version}.json").unlink()
    with pytest.raises(ValueError, match=f"version {version} of the registry was here before"):
        trusted.follow()
    registry_changes.renew(registry, key(own, "root"), days=60)  # another one of that number
    with pytest.raises(ValueError, match=f"version {version} of the registry was here before"):
        trusted.follow()
    shutil.rmtree(registry)
    with pytest.raises(ValueError):
        trusted.follow()
    shutil.copytree(before, registry)
    with pytest.raises(ValueError):
        trusted.follow()
    assert trusted.entries == signed[1]


def test_hugging_face_folders_have_no_signature(own, flexolmo):
    out = own.root / "hf"
    assert flexolmo("export", own.merged, "--out", out)[0] == 0
    with pytest.raises(ValueError, match="a Hugging Face folder"):
        fo.load(out, keys=own.registry)
