"""The study of routing mass and counterfactual."""

import json

from flexolmo_jax.data.sources import Document
from flexolmo_jax.studies import usage_agreement
from flexolmo_jax.usage import agreement


def test_every_kind_of_answer_is_compared(world, study, tmp_path, monkeypatch):
    text = "One, two, three, four, five, six. " * 4
    names = {"OWNERS": ("math", "code"), "PROMPT": 8, "ANSWER": 4, "SLOTS": 2}
    for name, value in names.items():
        monkeypatch.setattr(usage_agreement, name, value)
    monkeypatch.setattr(agreement, "FEWEST", 2)
    monkeypatch.setattr(
        usage_agreement, "heldout_documents",
        lambda source, *_, **__: [Document(source + text, ""), Document("short", "")],
    )  # fmt: skip
    (tmp_path / "merged").symlink_to(world.merged)
    page = tmp_path / "page.md"
    page.write_text("Before\n<!-- usage agreement -->\n<!-- end of usage agreement -->\nAfter\n")
    study("usage-agreement", tmp_path, "--results", tmp_path, "--page", page, "--passages", 2)
    made = json.loads((tmp_path / "usage_agreement.json").read_text())
    assert made["passages"] == {"public": 2, "math": 2, "code": 2}
    assert [(x["answers"], x["experts"], x["count"]) for x in made["rows"]] == [
        (kind, experts, 6) for kind in usage_agreement.KINDS for experts in ("all", "owners")
    ]
    for shares in made["totals"].values():
        assert all(abs(sum(own.values()) - 1) < 1e-9 for own in shares.values())
    text = page.read_text()
    assert "2 public, 2 math, 2 code" in text and text.endswith("After\n")
    assert (tmp_path / "usage_agreement.png").stat().st_size > 3000


def test_passages_begin_with_the_beginnings_of_all_texts(monkeypatch):
    monkeypatch.setattr(usage_agreement, "PROMPT", 2)
    monkeypatch.setattr(usage_agreement, "ANSWER", 1)
    texts = [[1, 2, 3, 4, 5, 6], [7, 8], [9, 10, 11]]
    assert usage_agreement.passages(texts, 9) == [[1, 2, 3], [9, 10, 11], [4, 5, 6]]
    assert usage_agreement.passages(texts, 1) == [[1, 2, 3]]
