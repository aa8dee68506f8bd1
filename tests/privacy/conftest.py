"""Every test of private training is a user of its own, whose texts have no ledger yet."""

import pytest


@pytest.fixture(autouse=True)
def another_user(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
