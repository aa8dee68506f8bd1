"""The registry of keys: its versions, thresholds, expiry, and what each key may sign."""

import datetime
import json
import shutil

import pytest

from flexolmo_jax.trust import registry_changes as changes
from flexolmo_jax.trust.keys import make_keys, public_of, read_private, read_public
from flexolmo_jax.trust.registry import PENDING, Registry
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
    assert changes.renew(registry, keys["second"], root_keys=new) == (4, 1)
    assert list(Registry.open(registry).root_keys.values()) == [public_of(keys["root"])]
    assert changes.cosign(registry, keys["root"]) == (4, 0)
    assert list(Registry.open(registry).root_keys.values()) == new
    with pytest.raises(ValueError, match="none of its root keys"):
        changes.renew(registry, keys["root"])


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
