"""`flexolmo registry`, `sign`, `verify` and `--require-signed`, as people use them."""

import json

import pytest

from flexolmo_jax.commands.main import main
from flexolmo_jax.trust.signatures import signature_file


@pytest.fixture
def said(flexolmo):
    """said(*arguments): what a command that succeeds prints, in one line."""

    def run(*arguments):
        code, out, error = flexolmo(*arguments)
        assert code == 0, error
        return " ".join((out + error).split())

    return run


def test_owners_sign_and_a_coordinator_merges(copied, tmp_path, said, refused, flexolmo):
    registry, keys = tmp_path / "registry", tmp_path / "keys"
    keys.mkdir()
    for name in ("ann", "ben", "publisher", "math", "code", "hub"):
        assert f"{name}.pub" in said("registry", "keygen", keys / name)
    roots = ("--root", keys / "ann.pub", keys / "ben.pub", "--threshold", 2)
    assert "waits for 1 more" in said("registry", "init", registry, *roots, "--key", keys / "ann")
    assert "version 1, not in force" in said("registry", "show", registry)
    assert "version 1 is in force" in said("registry", "sign", registry, "--key", keys / "ben")
    for name, role in (
        ("publisher", ("publisher",)), ("math", ("owner", "--experts", "math")),
        ("code", ("owner", "--experts", "code")), ("hub", ("coordinator",)),
    ):  # fmt: skip
        public = ("--public", keys / f"{name}.pub")
        words = ("--name", name, *public, "--role", *role, "--key", keys / "ann")
        said("registry", "add", registry, *words)
        said("registry", "sign", registry, "--key", keys / "ben")
    assert "version 5, verified" in said("registry", "show", registry)

    experts = (copied.experts["math"], copied.experts["code"])
    out = tmp_path / "ours"
    merge = ("merge", "--anchor", copied.anchor, "--expert", *experts, "--out", out)
    signed = ("--require-signed", registry)
    for package, name in ((experts[0], "math"), (experts[1], "code")):
        assert "send it with the package" in said("sign", package, "--key", keys / name)
        assert signature_file(package).exists()
    assert "anchor.sig: no signature there" in refused(*merge, *signed)
    assert not out.exists()
    said("sign", copied.anchor, "--key", keys / "publisher")
    said(*merge, *signed)
    said("sign", out, "--key", keys / "hub")
    verified = said("verify", out, "--keys", registry)
    assert "every byte is as it was signed" in verified and "hub" in verified
    _, printed, _ = flexolmo("verify", out, "--keys", registry, "--json")
    rows = json.loads(printed)["verified"]
    assert [row["signed_by"] for row in rows] == ["hub", "publisher", "math", "code"]

    assert "run `flexolmo sign` again" in said("experts", "remove", out, "code")
    assert "not the file that was signed" in refused("verify", out, "--keys", registry)
    signature_file(experts[1]).rename(tmp_path / "kept")
    assert "code.sig: no signature" in refused("experts", "add", out, experts[1], *signed)
    (tmp_path / "kept").rename(signature_file(experts[1]))
    said("experts", "add", out, experts[1], *signed)

    words = ("--name", "math", "--reason", "laptop stolen", "--key", keys / "ben")
    said("registry", "revoke-key", registry, *words)
    assert verified_by(said, experts[0], registry)
    said("registry", "sign", registry, "--key", keys / "ann")
    assert "revoked on" in refused("verify", experts[0], "--keys", registry)
    assert "laptop stolen" in refused(*merge[:-1], tmp_path / "other", *signed)
    assert "laptop stolen" in said("registry", "show", registry)


def verified_by(said, package, registry) -> bool:
    return "every byte is as it was signed" in said("verify", package, "--keys", registry)


def test_a_copy_of_a_registry_cannot_be_rolled_back(signed, tmp_path, said, refused):
    mine, key = tmp_path / "mine", ("--key", signed.key("root"))
    update = ("registry", "update", mine, "--source", signed.registry_folder)
    assert "version 5 (before: 0)" in said(*update)
    said("registry", "renew", signed.registry_folder, *key, "--days", 10)
    assert "version 6 (before: 5)" in said(*update)
    (signed.registry_folder / "6.json").unlink()
    assert "has 6 already" in refused(*update)
    said("registry", "renew", signed.registry_folder, *key, "--days", 20)
    assert "not the version that" in refused(*update)


def test_wrong_use_is_one_line(signed, tmp_path, refused):
    registry, key = signed.registry_folder, ("--key", signed.key("root"))
    public = ("--public", signed.key("stranger.pub"))
    add = ("registry", "add", registry, "--name", "new", *public, *key, "--role")
    assert "expected a role, publisher" in refused(*add, "boss")
    assert "names of experts" in refused(*add, "owner")
    assert "names of experts" in refused(*add, "publisher", "--experts", "math")
    assert "cannot be an expert's name" in refused(*add, "owner", "--experts", "public")
    assert "--until: expected a time" in refused(*add, "publisher", "--until", "soon")
    assert "expected a time of beginning" in refused(*add, "publisher", "--until", "2020-01-01")
    assert "1 to 3650 days" in refused("registry", "renew", registry, *key, "--days", 0)
    assert "no signer named 'nobody'" in refused(
        "registry", "revoke-key", registry, "--name", "nobody", "--reason", "x", *key
    )
    assert "no version waits" in refused("registry", "sign", registry, *key)
    assert "not empty" in refused(
        "registry", "init", registry, "--root", signed.key("root.pub"), *key
    )
    assert "none of its root keys" in refused(
        "registry", "renew", registry, "--key", signed.key("math")
    )
    assert "no such folder" in refused("verify", signed.math, "--keys", tmp_path / "none")
    assert "not a registry" in refused("verify", signed.math, "--keys", signed.math)
    assert "private key" in refused("sign", signed.math, "--key", signed.key("math.pub"))
    assert "no such folder" in refused("sign", signed.key("math"), "--key", signed.key("math"))


def test_a_hugging_face_anchor_cannot_be_signed(signed, tmp_path, refused):
    assert main(["export", str(signed.anchor), "--out", str(tmp_path / "hf")]) == 0
    assert "cannot be signed" in refused(
        "merge", "--anchor", tmp_path / "hf", "--expert", signed.math, "--out", tmp_path / "out",
        "--require-signed", signed.registry_folder,
    )  # fmt: skip
