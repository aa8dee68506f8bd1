"""The registry of keys: its versions, thresholds, expiry, and what each key may sign."""

import datetime
import json
import shutil

import pytest
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata

from flexolmo_jax.trust import log
from flexolmo_jax.trust import registry_changes as changes
from flexolmo_jax.trust.keys import make_keys, public_of, read_private, read_public, tuf_key
from flexolmo_jax.trust.registry import PENDING, Registry, read_file, read_versions
from flexolmo_jax.trust.signers import make_signer, utc_now

YEAR = datetime.timedelta(days=365)


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """Private keys by name."""
    folder = tmp_path_factory.mktemp("keys")
    for name in ("root", "second", "third", "news", "law", "hub"):
        make_keys(folder / name)
    return {file.name: read_private(file) for file in folder.iterdir() if not file.suffix}


def signer(name, key, role="owner", experts=("news",), start=None, until=None):
    start = start or utc_now() - YEAR
    return make_signer(
        name, public_of(key), role, experts, start, until or start + 2 * YEAR, where="test"
    )


@pytest.fixture
def registry(tmp_path, keys):
    """A registry with an owner of `news` and a coordinator: three versions."""
    folder = tmp_path / "registry"
    changes.create(folder, [public_of(keys["root"])], 1, keys["root"])
    changes.add_signer(folder, signer("News Ltd", keys["news"]), keys["root"])
    changes.add_signer(folder, signer("hub", keys["hub"], "coordinator", ()), keys["root"])
    return folder


def test_keys_are_private_and_of_one_spelling(tmp_path):
    public = make_keys(tmp_path / "key")
    assert public == tmp_path / "key.pub"
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    assert read_public(public) == public_of(read_private(tmp_path / "key")) == public.read_text()
    with pytest.raises(ValueError, match="no key is replaced"):
        make_keys(tmp_path / "key")
    (tmp_path / "key").chmod(0o640)
    with pytest.raises(ValueError, match="chmod 600"):
        read_private(tmp_path / "key")


def test_a_registry_says_who_may_sign_what(registry, keys):
    opened = Registry.open(registry)
    assert (opened.version, opened.threshold, opened.log) == (3, 1, None)
    assert [one.name for one in opened.coordinators] == ["hub"]
    news = public_of(keys["news"])
    assert opened.check_signer(news, "owner", "news").name == "News Ltd"
    assert opened.signer_of(opened.signer_of(news).key_id).name == "News Ltd"
    with pytest.raises(ValueError, match="may sign the experts news, and this is 'law'"):
        opened.check_signer(news, "owner", "law")
    with pytest.raises(ValueError, match="is that of an owner, expected that of a coordinator"):
        opened.check_signer(news, "coordinator")
    with pytest.raises(ValueError, match="not in the registry"):
        opened.check_signer(public_of(keys["law"]), "owner", "law")
    with pytest.raises(ValueError, match="not valid before"):
        opened.check_signer(news, "owner", "news", utc_now() - 2 * YEAR)
    with pytest.raises(ValueError, match="not valid since"):
        opened.check_signer(news, "owner", "news", utc_now() + 2 * YEAR)


def test_a_revoked_key_signs_nothing(registry, keys):
    changes.revoke_signer(registry, "News Ltd", "laptop stolen", keys["root"])
    with pytest.raises(ValueError, match="was revoked on .*: laptop stolen"):
        Registry.open(registry).check_signer(public_of(keys["news"]), "owner", "news")
    with pytest.raises(ValueError, match="revoked already"):
        changes.revoke_signer(registry, "News Ltd", "again", keys["root"])


def test_a_version_counts_once_a_threshold_has_signed(registry, keys):
    both = [public_of(keys["root"]), public_of(keys["second"])]
    made = changes.renew(registry, keys["root"], root_keys=both, threshold=2)
    assert made == (4, 1)
    assert Registry.open(registry).version == 3
    with pytest.raises(ValueError, match="waits for signatures"):
        changes.renew(registry, keys["root"])
    with pytest.raises(ValueError, match="none of its root keys"):
        changes.cosign(registry, keys["third"])
    assert changes.cosign(registry, keys["root"]) == (4, 1), "the same key does not count twice"
    assert changes.cosign(registry, keys["second"]) == (4, 0)
    assert not (registry / PENDING).exists()
    opened = Registry.open(registry)
    assert (opened.version, opened.threshold, len(opened.root_keys)) == (4, 2, 2)


def test_root_keys_change_only_by_the_old_ones(registry, keys):
    new = [public_of(keys["second"])]
    with pytest.raises(ValueError, match="none of its root keys"):
        changes.renew(registry, keys["second"], root_keys=new)
    assert changes.renew(registry, keys["root"], root_keys=new) == (4, 1)
    assert list(Registry.open(registry).root_keys.values()) == [public_of(keys["root"])]
    assert changes.cosign(registry, keys["second"]) == (4, 0)
    assert list(Registry.open(registry).root_keys.values()) == new
    with pytest.raises(ValueError, match="none of its root keys"):
        changes.renew(registry, keys["root"])


def test_nobody_signs_what_no_root_key_proposed(registry, keys):
    """Whoever can write the folder puts a version there, signed with a root key of its own."""
    root = read_versions(registry)[1].signed
    mine = changes.create(registry.parent / "mine", [public_of(keys["third"])], 1, keys["third"])
    assert mine == (1, 0)
    third = read_versions(registry.parent / "mine")[1].signed
    root.version, root.keys, root.roles = 4, third.keys, third.roles
    planted = Metadata(root)
    for signature in ((), (CryptoSigner(keys["third"], tuf_key(public_of(keys["third"]))),)):
        for one in signature:
            planted.sign(one)
        (registry / PENDING).write_bytes(planted.to_bytes())
        with pytest.raises(ValueError, match="nobody who has a root key proposed this version"):
            changes.cosign(registry, keys["root"])
        with pytest.raises(ValueError, match="nobody who has a root key proposed this version"):
            changes.read_pending(registry)
    with pytest.raises(ValueError, match="look at it with `flexolmo registry show`"):
        changes.renew(registry, keys["root"])
    assert Registry.open(registry).version == 3


def test_no_version_makes_the_log_unreadable(registry, keys):
    """A coordinator writes a line after its key's revocation was proposed, and before it holds."""
    both = [public_of(keys["root"]), public_of(keys["second"])]
    changes.renew(registry, keys["root"], root_keys=both, threshold=2)
    changes.cosign(registry, keys["second"])
    given = (registry, "hub", "laptop stolen", keys["root"])
    assert changes.revoke_signer(*given) == (5, 1)
    log.append(registry, keys["hub"], log.REVOKED, package="ab" * 32, reason="meanwhile")
    pending = (registry / PENDING).read_bytes()
    with pytest.raises(ValueError, match="delete it, and propose it again"):
        changes.cosign(registry, keys["second"])
    assert (registry / PENDING).read_bytes() == pending
    assert len(log.read(Registry.open(registry))) == 1
    (registry / PENDING).unlink()
    assert changes.revoke_signer(*given) == (5, 1)
    assert changes.cosign(registry, keys["second"]) == (5, 0)
    assert [line.reason for line in log.read(Registry.open(registry))] == ["meanwhile"]


def test_an_update_takes_over_nothing_that_it_did_not_verify(registry, keys, monkeypatch):
    """The copy's folder is changed while it is read: after its first verification."""
    mine, source = registry.parent / "mine", registry.parent / "source"
    shutil.copytree(registry, source)
    changes.update(mine, registry)
    changes.renew(source, keys["root"])

    def change(file):
        data = read_file(file)
        return data.replace(b"News Ltd", b"Nobody!!") if file == source / "4.json" else data

    monkeypatch.setattr(changes, "read_file", change)
    with pytest.raises(ValueError, match="source/4.json"):
        changes.update(mine, source)
    monkeypatch.undo()
    assert Registry.open(mine).version == 3 and not (mine / "4.json").exists()
    assert changes.update(mine, source) == (3, 4)


def test_updates_at_the_same_time_do_not_go_back(registry, keys, monkeypatch):
    """One that began with an older copy ends after one with a newer copy."""
    mine, older = registry.parent / "mine", registry.parent / "older"
    changes.update(mine, registry)
    log.append(registry, keys["hub"], log.REVOKED, package="ab" * 32, reason="first")
    shutil.copytree(registry, older)
    log.append(registry, keys["hub"], log.REVOKED, package="cd" * 32, reason="second")
    locked = changes._locked

    def late(folder):
        monkeypatch.undo()
        changes.update(mine, registry)
        return locked(folder)

    monkeypatch.setattr(changes, "_locked", late)
    with pytest.raises(ValueError, match="not a continuation of"):
        changes.update(mine, older)
    assert len(log.read(Registry.open(mine))) == 2


def test_an_empty_folder_can_be_updated(registry, tmp_path):
    (tmp_path / "empty").mkdir()
    assert changes.update(tmp_path / "empty", registry) == (0, 3)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="not a folder"):
        changes.update(tmp_path / "file", registry)


def test_an_expired_registry_is_refused_until_renewed(registry, keys):
    later = utc_now() + datetime.timedelta(days=366)
    with pytest.raises(ValueError, match="version 3, the last, expired on"):
        Registry.open(registry, later)
    changes.renew(registry, keys["root"], days=400)
    assert Registry.open(registry, later).version == 4


def test_gaps_rollbacks_and_changed_versions_are_refused(registry, tmp_path):
    def refused(change, reason):
        copy = tmp_path / "copy"
        shutil.copytree(registry, copy)
        change(copy)
        with pytest.raises(ValueError, match=reason):
            Registry.open(copy)
        shutil.rmtree(copy)

    refused(lambda folder: (folder / "2.json").unlink(), "2.json: missing")
    refused(lambda folder: (folder / "1.json").unlink(), "1.json: missing")
    refused(lambda folder: shutil.copy(folder / "2.json", folder / "3.json"), "it is version 2")

    def as_owner_of_law(folder):
        text = (folder / "3.json").read_text()
        (folder / "3.json").write_text(text.replace('"news"', '"law"'))

    refused(as_owner_of_law, "was changed|signature of key .* is wrong")

    def spaced(folder):
        value = json.loads((folder / "3.json").read_text())
        (folder / "3.json").write_text(json.dumps(value))

    refused(spaced, "not spelled as")
    with pytest.raises(ValueError, match="no 1.json there"):
        Registry.open(tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("role", ["owner"], "expected a role"),
        ("experts", "news", "a list of names"),
        ("experts", [["news"]], "cannot be an expert's name"),
        ("from", "2026-1-1", "expected a time"),
        ("key", "x", "expected a public key"),
        ("name", "a\nb", "a line of text"),
        ("revoked", {"time": "2026-01-01T00:00:00Z"}, "a time and a reason"),
        ("more", 1, "expected a signer"),
    ],
)
def test_an_entry_of_another_form_is_refused_in_one_sentence(registry, field, value, reason):
    file = registry / "3.json"
    content = json.loads(file.read_text())
    content["signed"]["signers"][0][field] = value
    file.write_text(json.dumps(content, separators=(",", ":"), sort_keys=True))
    with pytest.raises(ValueError, match=reason):
        Registry.open(registry)
