"""The other studies on a small world."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flexolmo_jax as fo
from flexolmo_jax.config import ModelConfig
from flexolmo_jax.data.sources import Document
from flexolmo_jax.federation.anchor import read_anchor, write_anchor
from flexolmo_jax.federation.expert import write_expert
from flexolmo_jax.federation.merge import merge
from flexolmo_jax.modeling.experts import Ranks, with_parts
from flexolmo_jax.studies import (
    demo,
    demo_trace,
    evidence,
    expert_size,
    loading,
    privacy_accounting,
    rounding,
    shares,
    tasks_compared,
)
from flexolmo_jax.studies.demo_seeds import promises
from flexolmo_jax.studies.expert_training import Recipe, make_page


def report(merged):
    """Of a demo of two owners, whose experts bring a domain to `merged` from 4."""
    anchor = {"public": 3.0, "math": 4.0, "code": 4.0}
    return {
        "domains": list(anchor), "seconds": 60.0,
        "bits_per_byte": {
            "anchor": anchor,
            "merged": {"public": 3.0, "math": merged, "code": merged},
            "merged_without:math": {"public": 3.0, "math": 4.0, "code": merged},
            "merged_without:code": {"public": 3.0, "math": merged, "code": 4.0},
        },
    }  # fmt: skip


def test_the_demo_measures_every_model_on_every_domain(world, tmp_path, monkeypatch):
    def run_command(words, **_):
        options = dict(zip(words, words[1:], strict=False))
        package = world.experts[options["--name"]] if words[1] == "expert" else world.anchor
        shutil.copytree(package, options["--out"])
        Path(options["--run"]).mkdir(parents=True)
        (Path(options["--run"]) / "config.json").write_text('{"steps": 3}')

    monkeypatch.setattr(demo, "run_command", run_command)
    monkeypatch.setattr(demo, "OWNERS", ("math", "code"))
    monkeypatch.setattr(demo, "TRACED", "math")
    monkeypatch.setattr(demo, "heldout_documents", lambda *_: [Document("One, two.", "")])
    own = [Document(f"{word} so", "", f"x.jsonl:{word}") for word in ("in", "reads")]
    monkeypatch.setattr(demo_trace, "read_documents", lambda *_, **__: own)
    made = demo.run_demo(tmp_path / "out", seed=4)
    assert list(made["bits_per_byte"]) == [
        "anchor", "expert:math", "expert:code", "merged", "merged_without:math",
        "merged_without:code",
    ]  # fmt: skip
    assert all(list(row) == ["public", "math", "code"] for row in made["bits_per_byte"].values())
    assert made["seeds"] == {"anchor": 4, "math": 4, "code": 4}
    assert made == json.loads((tmp_path / "out" / "report.json").read_text())
    assert made["trace"]["on"]["asked"] == ["public", "math", "code"]
    assert made["trace"]["off"]["asked"] == ["public", "code"]
    assert "where these words stand" in (tmp_path / "out" / "trace.html").read_text().lower()
    assert (tmp_path / "out" / "report.png").stat().st_size > 3000


def test_demos_that_are_there_are_not_run_again_and_the_worst_seed_counts(study, tmp_path):
    for seed, merged in enumerate((3.0, 3.9)):
        (tmp_path / f"seed{seed}").mkdir()
        (tmp_path / f"seed{seed}" / "report.json").write_text(json.dumps(report(merged)))
    page = tmp_path / "page.md"
    study("demo-seeds", tmp_path, "--seeds", 0, 1, "--page", page)
    text = page.read_text()
    assert "| merged | 3.000 (+0.0%; +0.0% +0.0%) | 3.450 (-13.8%; -25.0% -2.5%)" in text
    assert "their mean: -15% or better | -2.5% | **no** |" in text
    assert all(holds for _, _, holds in promises([report(3.0)]))


def test_every_dtype_is_scored(world, study, tmp_path, monkeypatch):
    monkeypatch.setattr(rounding, "OWNERS", ("math",))
    monkeypatch.setattr(rounding, "heldout_documents", lambda *_: [Document("One, two.", "")])
    (tmp_path / "merged").symlink_to(world.merged)
    page = tmp_path / "page.md"
    study("rounding", tmp_path, "--page", page)
    rows = [line for line in page.read_text().splitlines() if line.startswith("|")]
    assert rows[0] == "| dtype | public | math |" and len(rows) == 2 + len(rounding.DTYPES)
    assert "(+0.00%)" in rows[2]


def test_longer_rows_take_a_larger_share(world, study, make_expert, tmp_path, monkeypatch):
    monkeypatch.setattr(shares, "OWNERS", ("code", "creative"))
    monkeypatch.setattr(shares, "FACTORS", (100,))
    (tmp_path / "anchor").symlink_to(world.anchor)
    (tmp_path / "experts").mkdir()
    for seed, name in enumerate(shares.OWNERS):
        make_expert(tmp_path / "experts" / name, name, seed=seed)
    printed = study("shares", tmp_path)
    rows = [line.split(" | ") for line in printed.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows[2:6]] == ["| 1", "| 2", "| 1", "| 2"]
    without = {row[0]: float(row[2].rstrip("% |")) for row in rows[-3:]}
    assert without["| row along the mean input"] > without["| honest"]


def test_evidence_heads_are_attacked_split_and_read_by_position(
    world, study, tmp_path, monkeypatch
):
    ranks, demo_folder = Ranks(head=2, evidence=4), tmp_path / "demo"
    anchor = read_anchor(world.anchor)

    def with_heads(seed):
        random = np.random.default_rng(seed)
        expert = jax.tree.map(jnp.asarray, anchor.weights.public)
        expert.set_heads(anchor.config, ranks, jax.random.key(0))
        return jax.tree.map(lambda x: x + 0.1 * random.standard_normal(x.shape, np.float32), expert)

    def write(path, seed):
        public = with_parts(anchor.weights.public, evidence=with_heads(seed).evidence)
        weights = anchor.weights._replace(public=public)
        write_anchor(path, weights, anchor.config, anchor.tokenizer, ["One, two."], {})

    write(demo_folder / "anchor", 0)
    for seed, name in enumerate(("code", "math"), 1):
        write_expert(demo_folder / "experts" / name, with_heads(seed), name, anchor, {})
    merge(
        demo_folder / "anchor", sorted((demo_folder / "experts").iterdir()), demo_folder / "merged"
    )
    monkeypatch.setattr(
        evidence, "run_command", lambda words, **_: write(Path(words[words.index("--out") + 1]), 7)
    )
    for name, value in {"OWNERS": ("code", "math"), "CHANGED": "code", "SHIFTS": (0.0, 50.0),
                        "PARTS": 2, "LENGTH": 24, "WINDOWS": 4}.items():  # fmt: skip
        monkeypatch.setattr(evidence, name, value)
    printed = study("evidence", demo_folder, tmp_path / "out")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    shares = {(row["evidence head"], row["shift"]): row for row in report["attacks"]}
    assert len(shares) == 8 and len(report["growth"]) == 4
    for (_, shift), row in shares.items():  # the public expert's is all that is left
        assert (row["share of math"] < 1e-6) == (shift == "50")
    assert [row["tokens"] for row in report["starts"]] == ["1 to 8", "9 to 16", "17 to 24"]
    assert [row["tokens"] for row in report["changes"]] == ["1 to 8", "9 to 12"]
    assert "growth:" in printed and "4: each in 2 parts" in printed


def test_a_model_is_loaded_over_two_devices(tmp_path):
    config = ModelConfig(vocab_size=512, width=32, num_layers=1, num_heads=2, ffn_width=48)
    loading.write_model(tmp_path / "large", 2, config)
    loading.evict(tmp_path / "large")
    (loaded,) = loading.run_processes(loading.load_model, tmp_path / "large", 1)
    assert 0 < loaded.largest_leaf <= loaded.part and loaded.seconds > 0
    halves = [loading.read_files(tmp_path / "large", 0, 2, index).part for index in (0, 1)]
    files = [file for file in (tmp_path / "large").rglob("*") if file.is_file()]
    assert sum(halves) == sum(file.stat().st_size for file in files)


def test_a_setting_of_the_accounting_is_drawn_the_same_everywhere_and_resumed(
    study, tmp_path, monkeypatch
):
    assert privacy_accounting.draw_setting(3, 0) == privacy_accounting.draw_setting(3, 0)
    setting = {"units": 2000, "mean_batch": 50, "steps": 20, "epsilon": 4.0, "rows": False}
    monkeypatch.setattr(privacy_accounting, "draw_setting", lambda number, seed: setting)
    out = tmp_path / "out.jsonl"
    assert "1 settings: 0 failed, 0 were refused" in study(
        "privacy-accounting", out, "--settings", 1
    )
    row = json.loads(out.read_text())
    assert row["stated"] <= 4.0 and not row["faults"]
    out.write_text(json.dumps({**row, "faults": ["2% less noise is enough"]}) + "\n")
    with pytest.raises(ValueError, match="1 of 1 settings failed"):
        study("privacy-accounting", out, "--settings", 1)


def test_scores_that_differ_are_named(tmp_path):
    expected = {"boolq": {"acc": 0.5, "acc_stderr": 0.1}, "piqa": {"acc": 0.4}}
    assert tasks_compared.differences(expected, expected) == []
    other = {**expected, "piqa": {"acc": 0.41}}
    assert tasks_compared.differences(expected, other) == ["piqa acc"]
    with pytest.raises(ValueError, match="one package of the tasks below .*, found 0"):
        tasks_compared.write_random_flexolmo(tmp_path, tmp_path)


def test_the_best_recipe_of_each_kind_is_bold():
    scores = {
        Recipe("expert", "AdamW", 1e-3): {"math": 3.5},
        Recipe("expert", "Muon", 1e-2): {"math": 3.2},
        Recipe("dense", "AdamW", 1e-3): {"math": 3.0},
    }
    page = "\n".join(make_page({"math": 4.0}, scores, 1000))
    assert "| expert | Muon | 0.01 | **3.200 (-0.800)** |" in page
    assert "| expert | AdamW | 0.001 | 3.500 (-0.500) |" in page
    assert "what the best dense model gains: math 80%." in page


def test_the_page_of_expert_sizes_says_what_each_form_keeps_and_costs(world, tmp_path, monkeypatch):
    monkeypatch.setattr(expert_size, "OWNERS", ("math", "code"))
    monkeypatch.setattr(expert_size, "RANKS", (2,))
    monkeypatch.setattr(expert_size, "ENERGIES", ())
    monkeypatch.setattr(expert_size, "BITS", (4,))
    monkeypatch.setattr(expert_size, "WIDTHS", ())
    monkeypatch.setattr(expert_size, "ROUNDS", 1)
    monkeypatch.setattr(expert_size, "NEW", 8)
    texts = {name: [Document("One, two, three.", "")] for name in ("math", "code", "public")}
    forms = expert_size.forms(world.root, tmp_path, [])
    rows = {}
    for title, make in forms.items():
        packages = {name: tmp_path / title / name for name in ("math", "code")}
        for name, package in packages.items():
            package.parent.mkdir(exist_ok=True)
            make(name, package)
        rows[title] = expert_size.measure(world.anchor, packages, texts)
    assert list(rows) == ["full", "rank 2", "int4", "rank 2, int4"]
    assert rows["int4"].megabytes < 0.25 * rows["full"].megabytes
    assert rows["rank 2, int4"].megabytes < 0.5 * rows["rank 2"].megabytes
    assert rows["rank 2"].megabytes < 0.2 * rows["full"].megabytes
    assert rows["rank 2"].megaflops < rows["full"].megaflops
    anchor = {name: 1 + bits for name, bits in rows["full"].alone.items()}
    models = {("rank 2", None): fo.load(tmp_path / "rank 2" / "merged")}
    speeds = expert_size.tokens_per_second(models)
    assert speeds.keys() == models.keys() and min(speeds.values()) > 0
    speeds = {(title, dtype): 1234.0 for title in rows for dtype in expert_size.DECODED}
    page = "\n".join(expert_size.make_page(anchor, rows, speeds))
    assert "(100%)" in page and "| 1,234 | 1,234 |" in page and "rank 2, int4" in page
