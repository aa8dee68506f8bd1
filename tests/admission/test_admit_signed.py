"""`flexolmo admit --keys`: the owner's signature is required, and the log has the decision."""

import datetime
import hashlib
import json
import shutil

import pytest

from flexolmo_jax.federation.package import Package
from flexolmo_jax.trust import log
from flexolmo_jax.trust import registry_changes as changes
from flexolmo_jax.trust.keys import make_keys, read_private, read_public
from flexolmo_jax.trust.registry import Registry
from flexolmo_jax.trust.signatures import sign_package
from flexolmo_jax.trust.signers import make_signer, utc_now
from flexolmo_jax.trust.trusted import Trusted


@pytest.fixture(scope="module")
def hub(honest, write, admitted, world, tmp_path_factory):
    """A folder of keys, a registry of an owner of `mine` and a coordinator, and signed packages."""
    root = tmp_path_factory.mktemp("hub")
    for name in ("root", "owner", "hub", "stranger"):
        make_keys(root / name)
    key = read_private(root / "root")
    changes.create(root / "registry", [read_public(root / "root.pub")], 1, key)
    start = utc_now() - datetime.timedelta(days=1)
    for name, role, experts in (("owner", "owner", ("mine",)), ("hub", "coordinator", ())):
        public = read_public(root / f"{name}.pub")
        until = start + datetime.timedelta(days=100)
        signer = make_signer(name, public, role, experts, start, until, where=name)
        changes.add_signer(root / "registry", signer, key)
    sign_package(write(root / "mine", honest(80)), root / "owner")
    sign_package(write(root / "copy", honest(2), "mine"), root / "owner")
    (root / "policy.toml").write_text(
        f"cohort = {json.dumps([str(path) for path in admitted[:5]])}\n[loss]\nbytes = 2000\n"
    )
    return root


@pytest.fixture
def own(hub, tmp_path):
    return shutil.copytree(hub, tmp_path / "hub")


def admit_words(own, world, package, out="report"):
    return (
        "admit", own / package, "--anchor", world.anchor, "--public", world.texts["public"],
        "--policy", own / "policy.toml", "--keys", own / "registry", "--key", own / "hub",
        "--out", own / out,
    )  # fmt: skip


def test_an_admission_and_a_rejection_are_lines_of_the_log(flexolmo, own, world):
    code, printed, error = flexolmo(*admit_words(own, world, "mine"))
    assert code == 0 and "line 1 of the log" in printed, error
    code, printed, error = flexolmo(
        *admit_words(own, world, "copy", "second"), "--quarantine", own / "aside"
    )
    assert code == 4, error
    admitted, rejected = log.read(Registry.open(own / "registry"))
    assert (admitted.event, admitted.expert, admitted.signer) == ("admitted", "mine", "hub")
    assert admitted.package == Package.open(own / "mine").digest
    assert rejected.event == "rejected" and "old2" in rejected.reason
    for entry, folder in ((admitted, "report"), (rejected, "second")):
        data = (own / folder / "report.json").read_bytes()
        assert entry.report == hashlib.sha256(data).hexdigest()
    [place] = (own / "aside").iterdir()
    assert {x.name for x in place.iterdir()} == {"package", "package.sig", "report"}
    trusted = Trusted.open(own / "registry")
    trusted.check(Package.open(own / "mine"))
    with pytest.raises(ValueError, match="was rejected: .*old2"):
        trusted.check(Package.open(place / "package"))


def test_a_review_ends_with_a_reason_that_the_log_keeps(flexolmo, refused, own, world):
    policy = own / "policy.toml"
    policy.write_text(f"{policy.read_text()}[spectral]\nz = 0.0\n")  # all is out of the cohort
    code, printed, _ = flexolmo(*admit_words(own, world, "mine"))
    assert code == 3 and "--accept REASON" in " ".join(printed.split())
    reason = "Ann read the report: another optimizer"
    code, printed, error = flexolmo(*admit_words(own, world, "mine", "second"), "--accept", reason)
    assert code == 0, printed + error
    [entry] = log.read(Registry.open(own / "registry"))
    assert (entry.event, entry.reason) == ("admitted", reason)
    report = json.loads((own / "second" / "report.json").read_text())
    assert (report["verdict"], report["accepted"]) == ("admitted", reason)
    assert reason in (own / "second" / "report.html").read_text()
    code, *_ = flexolmo(*admit_words(own, world, "copy", "third"), "--accept", reason)
    assert code == 4  # a rejection stays one
    assert "on one line" in refused(*admit_words(own, world, "mine", "fourth"), "--accept", " ")


def test_what_is_not_signed_or_was_revoked_is_rejected_and_gets_no_line(flexolmo, own, world):
    """A line would be about the honest package of that digest."""
    signature = own / "mine.sig"
    kept = signature.read_bytes()
    signature.unlink()
    code, printed, _ = flexolmo(*admit_words(own, world, "mine"))
    assert code == 4 and "nothing is in the log" in printed
    signature.write_bytes(kept)
    shutil.copytree(own / "mine", own / "other")
    shutil.copy(own / "copy.sig", own / "other.sig")
    assert flexolmo(*admit_words(own, world, "other", "second"))[0] == 4
    assert log.read(Registry.open(own / "registry")) == ()
    key = read_private(own / "hub")
    log.append(own / "registry", key, log.REVOKED, expert="mine", reason="the owner asked")
    code, printed, _ = flexolmo(*admit_words(own, world, "mine", "third"))
    assert code == 4 and "the owner asked" in " ".join(printed.split())
    assert len(log.read(Registry.open(own / "registry"))) == 1


def test_the_key_must_be_a_coordinators_and_the_report_kept(refused, own, world):
    words = list(admit_words(own, world, "mine"))
    words[words.index("--key") + 1] = own / "owner"
    assert "coordinator" in refused(*words)
    assert "--keys needs --key" in refused(*words[: words.index("--key")])
    assert "--key is for --keys" in refused(*words[: words.index("--keys")], "--key", own / "hub")
    assert not (own / "report").exists()
