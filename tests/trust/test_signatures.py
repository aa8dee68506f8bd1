"""Signatures of packages: who signed, exactly which files, and what is refused."""

import base64
import json
import os
import re
import shutil

import model_signing
import pytest

from flexolmo_jax.federation.merge import add_expert, merge
from flexolmo_jax.federation.package import Package
from flexolmo_jax.trust import bundle, keys
from flexolmo_jax.trust import registry_changes as changes
from flexolmo_jax.trust.keys import read_private, read_public
from flexolmo_jax.trust.signatures import (
    read_signature,
    sign_package,
    signature_file,
    verify_package,
    verify_signature,
)


def verify(signed, package):
    registry = signed.registry
    return verify_package(package, lambda one: verify_signature(one, registry))


def resign(signed, package, key, change):
    """Signs a package's statement again, as anyone can with a program of their own."""
    file = signature_file(package)
    value = json.loads(file.read_text())
    statement = json.loads(base64.b64decode(value["dsseEnvelope"]["payload"]))
    change(statement["predicate"])
    digests = [entry["digest"] for entry in statement["predicate"]["resources"]]
    root = bundle.hashlib.sha256(b"".join(map(bytes.fromhex, digests))).hexdigest()
    statement["subject"][0]["digest"]["sha256"] = root
    payload = json.dumps(statement).encode()
    value["dsseEnvelope"]["payload"] = base64.b64encode(payload).decode()
    made = read_signature(file)._replace(payload=payload)
    signature = keys.sign(read_private(signed.key(key)), made.signed_bytes)
    value["dsseEnvelope"]["signatures"][0]["sig"] = base64.b64encode(signature).decode()
    file.write_text(json.dumps(value))


def test_every_kind_of_package_is_signed_by_whom_the_registry_says(signed):
    found = {one.package.folder.name: one.signer.name for one in verify(signed, signed.merged)}
    assert found == {"merged": "hub", "anchor": "publisher", "math": "math", "code": "code"}
    (only,) = verify(signed, signed.math)
    assert (only.package.manifest["name"], only.signer.role) == ("math", "owner")


def test_the_reference_implementation_verifies_our_signatures(signed):
    for package, key in ((signed.anchor, "publisher"), (signed.math, "math")):
        config = model_signing.verifying.Config()
        config.use_elliptic_key_verifier(public_key=signed.key(f"{key}.pub"))
        config.verify(package, signature_file(package))


def test_a_changed_byte_of_any_file_is_refused(signed):
    for name in ("manifest.json", *Package.open(signed.math).manifest["files"]):
        file = signed.math / name
        before = file.read_bytes()
        file.write_bytes(bytes([before[0] ^ 1]) + before[1:] if before else b"x")
        with pytest.raises(ValueError, match=re.escape(str(file))):
            verify(signed, signed.math)
        file.write_bytes(before)
    assert verify(signed, signed.math)


def test_a_package_sealed_again_by_somebody_else_is_refused(signed, make_expert):
    shutil.rmtree(signed.math)
    make_expert(signed.math, "math", seed=9)
    with pytest.raises(ValueError, match="not the file that was signed"):
        verify(signed, signed.math)
    sign_package(signed.math, signed.key("stranger"))
    with pytest.raises(ValueError, match="signed with a key that is not in the registry"):
        verify(signed, signed.math)
    sign_package(signed.math, signed.key("code"))
    with pytest.raises(ValueError, match="may sign the experts code, and this is 'math'"):
        verify(signed, signed.math)
    sign_package(signed.math, signed.key("hub"))
    with pytest.raises(ValueError, match="is that of a coordinator, expected that of an owner"):
        verify(signed, signed.math)
    sign_package(signed.math, signed.key("math"))
    assert verify(signed, signed.math)


def test_a_missing_signature_and_that_of_another_package_are_refused(signed):
    shutil.copy(signature_file(signed.code), signature_file(signed.math))
    with pytest.raises(ValueError, match="may sign the experts code"):
        verify(signed, signed.math)
    signature_file(signed.math).unlink()
    with pytest.raises(ValueError, match=r"math\.sig: no signature there"):
        verify(signed, signed.merged)


def test_a_revoked_key_is_refused_with_its_reason(signed):
    changes.revoke_signer(
        signed.registry_folder, "math", "left the consortium", read_private(signed.key("root"))
    )
    with pytest.raises(ValueError, match="was revoked on .*: left the consortium"):
        verify(signed, signed.merged)
    assert verify(signed, signed.code)


@pytest.mark.parametrize("name", [".git/config", ".github/x", ".gitignore", "params/.gitignore"])
def test_files_that_the_format_leaves_unsigned_are_refused(signed, name):
    (signed.math / name).parent.mkdir(exist_ok=True)
    (signed.math / name).write_text("x")
    with pytest.raises(ValueError, match="unexpected file"):
        verify(signed, signed.math)


def test_links_and_pipes_are_refused(signed):
    target = next(iter(Package.open(signed.math).manifest["files"]))
    outside = signed.root / "outside"
    shutil.move(signed.math / target, outside)
    (signed.math / target).symlink_to(outside)
    with pytest.raises(ValueError, match="a link, where only regular files"):
        verify(signed, signed.math)
    (signed.math / target).unlink()
    os.mkfifo(signed.math / target)
    with pytest.raises(ValueError, match="a named pipe"):
        verify(signed, signed.math)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda p: p["serialization"].update(ignore_paths=["params"]), "leaves params unsigned"),
        (lambda p: p["serialization"].update(allow_symlinks=True), "allow_symlinks to be False"),
        (lambda p: p["serialization"].update(method="shards", shard_size=9), "'files'"),
        (lambda p: p["resources"].pop(), "not signed in"),
        (lambda p: p["resources"].append({**p["resources"][0], "name": "more"}), "signs more"),
        (lambda p: p["resources"].append(p["resources"][0]), "twice"),
        (lambda p: p["resources"][0].update(digest="0" * 64), "not the file that was signed"),
        (lambda p: p["resources"][0].update(name="../x"), "plain relative paths"),
        (lambda p: p["resources"][0].update(algorithm="blake3"), "algorithm of"),
        (
            lambda p: (
                p["serialization"].update(hash_type="blake3"),
                [entry.update(algorithm="blake3") for entry in p["resources"]],
            ),
            "hash_type to be 'sha256'",
        ),
        (lambda p: p.update(more=1), "unknown field 'more'"),
    ],
)  # fmt: skip
def test_what_an_owner_may_sign_is_strict(signed, change, reason):
    """The owner's own key signs each of these, so only the content is at fault."""
    resign(signed, signed.math, "math", lambda predicate: None)
    assert verify(signed, signed.math)
    resign(signed, signed.math, "math", change)
    with pytest.raises(ValueError, match=reason):
        verify(signed, signed.math)


def test_the_root_digest_must_be_right(signed):
    file = signature_file(signed.math)
    value = json.loads(file.read_text())
    payload = json.loads(base64.b64decode(value["dsseEnvelope"]["payload"]))
    payload["subject"][0]["digest"]["sha256"] = "0" * 64
    value["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(payload).encode()).decode()
    file.write_text(json.dumps(value))
    with pytest.raises(ValueError, match="root digest is not"):
        verify(signed, signed.math)


def test_a_damaged_package_is_not_signed(signed):
    names = Package.open(signed.math).manifest["files"]
    target = max((signed.math / name for name in names), key=lambda file: file.stat().st_size)
    before = signature_file(signed.math).read_bytes()
    data = target.read_bytes()
    target.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    with pytest.raises(ValueError, match="damaged, so it is not signed"):
        sign_package(signed.math, signed.key("math"))
    assert signature_file(signed.math).read_bytes() == before


def test_merging_can_require_signatures(signed):
    registry = signed.registry
    signature_file(signed.code).rename(signed.root / "kept")

    def require(package):
        return verify_signature(package, registry)

    out = signed.root / "out"
    with pytest.raises(ValueError, match=r"code\.sig: no signature"):
        merge(signed.anchor, [signed.math, signed.code], out, require=require)
    assert not out.exists()
    merge(signed.anchor, [signed.math], out, require=require)
    before = (out / "manifest.json").read_bytes()
    with pytest.raises(ValueError, match=r"code\.sig: no signature"):
        add_expert(out, signed.code, require=require)
    assert (out / "manifest.json").read_bytes() == before
    (signed.root / "kept").rename(signature_file(signed.code))
    add_expert(out, signed.code, require=require)
    sign_package(out, signed.key("hub"))
    assert [one.signer.name for one in verify(signed, out)] == ["hub", "publisher", "math", "code"]


def test_a_key_of_another_curve_does_not_sign(signed, tmp_path):
    from cryptography.hazmat.primitives.asymmetric import ec

    from flexolmo_jax.storage.key_files import write_keys

    public = write_keys(tmp_path / "p384", ec.generate_private_key(ec.SECP384R1()))
    with pytest.raises(ValueError, match="P-256"):
        sign_package(signed.math, tmp_path / "p384")
    with pytest.raises(ValueError, match="P-256"):
        read_public(public)
