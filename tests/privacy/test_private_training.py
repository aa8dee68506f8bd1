"""Private training as an owner does it: what it costs, what it hands out, and how it is killed."""

import json
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexolmo_jax.data.sources import is_heldout, read_documents
from flexolmo_jax.data.units import prepare_units
from flexolmo_jax.federation.anchor import read_anchor
from flexolmo_jax.federation.expert import read_expert
from flexolmo_jax.federation.package import read_manifest, write_manifest
from flexolmo_jax.model import load
from flexolmo_jax.storage import tensors
from flexolmo_jax.training.private import release
from flexolmo_jax.training.public_data import public_units

SMALL = ("--dp-windows", 2, "--dp-microbatch-size", 4, "--dp-clip", 0.2)


def training(world, folder, *more, config="alone", name="math"):
    """The words of a command that trains with privacy, on a copy of the text in that folder."""
    text = folder / f"{name}.jsonl"
    if not text.exists():
        shutil.copy(world.texts[name], text)
    return [
        "train", "expert", world.config_file(config), "--anchor", world.anchor, "--name", name,
        "--data", text, "--out", folder / "out", "--run", folder / "run", *SMALL,
        *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def private(world, tmp_path_factory):
    """An owner's folder, with a private expert and what was printed."""
    folder = tmp_path_factory.mktemp("private")
    words = training(world, folder, "--dp-epsilon", 4)
    done = subprocess.run(
        [sys.executable, "-m", "flexolmo_jax", *map(str, words)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (folder / "printed").write_text(done.stdout)
    return folder


def test_the_package_carries_its_certificate(private, world):
    manifest = read_manifest(private / "out")
    said = manifest["privacy"]
    documents = json.loads((private / "budget.json").read_text())["runs"][0]["planned"]["units"]
    assert 30 < documents < 50
    expected = {
        "delta": 1e-5, "unit": "document", "units": documents, "steps": 8, "mean_batch": 4,
        "clip_norm": 0.2, "windows_of_a_unit": 2, "window_tokens": 32, "other_runs": [],
        "accountant": "privacy loss distributions, dp_accounting 0.6.0",
        "library": "jax_privacy 2.0.0",
    }  # fmt: skip
    assert {key: said[key] for key in expected} == expected
    assert 3.8 < said["epsilon"] == said["epsilon_of_all_runs"] <= 4
    assert said["noise_multiplier"] > 0.2 and said["rows_noise_multiplier"] > 1
    assert manifest["tokens_seen"] == 8 * 4 * 2 * 32  # of the mean batch, not what was seen
    assert "epsilon" in (private / "printed").read_text()
    assert (private / ".math.jsonl.ledger").exists()  # the text's mark, which holds no text
    assert "is not" in (private / "printed").read_text()  # what the statement does not cover


def test_nothing_but_weights_and_the_certificate_leaves(private):
    names = {p.name for p in (private / "out").iterdir()}
    assert names == {"manifest.json", "params"}
    text = (private / "out" / "manifest.json").read_text()
    assert not [word for word in ("seed", '"loss"', "noise_key", str(private)) if word in text]
    config = json.loads((private / "run" / "config.json").read_text())
    assert config["dp_epsilon"] == 4 and not [key for key in config if "key" in key]


def test_the_ledger_knows_what_was_spent(private, flexolmo):
    (run,) = json.loads((private / "budget.json").read_text())["runs"]
    assert run["finished"] and run["steps"] == 8 and run["rows"]
    assert run["spent_epsilon"] == run["planned_epsilon"] <= 4
    code, printed, _ = flexolmo("privacy", "budget", private / "budget.json")
    assert code == 0 and "8/8" in printed and "limit: epsilon 4" in printed


def test_metrics_of_the_run_say_what_is_clipped(private):
    rows = [json.loads(line) for line in (private / "run" / "metrics.jsonl").open()]
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert all({"loss", "clipped", "grad_norm"} <= row.keys() for row in rows)


def test_verify_computes_epsilon_again(private, flexolmo):
    code, printed, _ = flexolmo("privacy", "verify", private / "out", "--json")
    assert code == 0
    found = json.loads(printed)["epsilon"]
    assert found["pld"] <= found["stated"] <= 4 < found["renyi"]
    code, printed, _ = flexolmo("privacy", "verify", private / "out")
    assert code == 0 and "Renyi" in printed


def test_verify_refuses_a_manipulated_statement(private, tmp_path, refused):
    package = tmp_path / "package"
    shutil.copytree(private / "out", package)
    manifest = read_manifest(package)
    changed = {**manifest, "privacy": {**manifest["privacy"], "epsilon": 0.5}}
    write_manifest(package, changed)  # with a digest that fits
    assert "claims epsilon 0.5, and its own numbers cost" in refused("privacy", "verify", package)
    text = (private / "out" / "manifest.json").read_text()
    (package / "manifest.json").write_text(text.replace('"steps": 8', '"steps": 7'))
    assert "its digest does not match" in refused("privacy", "verify", package)
    (package / "manifest.json").write_text(text)
    (package / "more").write_text("?")
    assert "unexpected file; delete it" in refused("privacy", "verify", package)


def test_verify_says_of_an_ordinary_expert_that_there_is_nothing(world, refused):
    said = refused("privacy", "verify", world.experts["math"])
    assert "nothing to verify" in said and "without differential privacy" in said


def test_the_expert_is_one_like_others(private, world, flexolmo, tmp_path):
    merged = tmp_path / "merged"
    parts = ("--anchor", world.anchor, "--out", merged)
    code, _, error = flexolmo("merge", *parts, "--expert", private / "out")
    assert code == 0, error
    model = load(merged)
    assert np.isfinite(np.asarray(model.logits(np.arange(12).reshape(1, 12)))).all()
    code, printed, _ = flexolmo("experts", "list", merged, "--json")
    assert json.loads(printed)[0]["privacy"]["unit"] == "document"
    anchor = read_anchor(world.anchor)
    trained = tensors.named(read_expert(private / "out", anchor))
    for name, start in tensors.named(anchor.weights.public).items():
        if "feed_forward" in name:  # noise is on every weight
            assert not np.any(np.asarray(trained[name]) == np.asarray(start)), name
    assert (np.asarray(trained["router.bias"]) <= 0).all()


def test_a_second_run_does_not_start_above_the_limit(private, world, tmp_path, refused):
    before = (private / "budget.json").read_text()
    again = training(world, tmp_path, "--dp-epsilon", 1, "--dp-ledger", private / "budget.json")
    said = refused(*again)
    assert "above the owner's limit of 4; 1 earlier runs have spent" in said
    assert (private / "budget.json").read_text() == before
    assert not (tmp_path / "out").exists()


def test_a_second_run_within_the_limit_is_counted_with_the_first(
    private, world, tmp_path, flexolmo
):
    ledger = json.loads((private / "budget.json").read_text())
    del ledger["file"]  # or it would be a copy, which is refused
    (tmp_path / "budget.json").write_text(json.dumps(ledger))
    again = training(
        world, tmp_path, "--dp-epsilon", 1, "--dp-limit", 6, "--gating", "softmax", "--steps", 3
    )
    code, _, error = flexolmo(*again)
    assert code == 0, error
    said = read_manifest(tmp_path / "out")["privacy"]
    assert said["epsilon"] <= 1 and 4 < said["epsilon_of_all_runs"] < 5
    assert len(said["other_runs"]) == 1
    assert said["rows_noise_multiplier"] is None and said["rows_clip_norm"] is None
    assert flexolmo("privacy", "verify", tmp_path / "out")[0] == 0


def test_a_group_is_protected_as_one(world, tmp_path, flexolmo):
    short = ("--dp-epsilon", 4, "--dp-unit", "group:group", "--steps", 2, "--data.batch-size", 2)
    code, _, error = flexolmo(*training(world, tmp_path, *short))
    assert code == 0, error
    groups = {d.group for d in read_documents(str(world.texts["math"])) if not is_heldout(d, 0.1)}
    said = read_manifest(tmp_path / "out")["privacy"]
    assert said["unit"] == "group:group" and said["units"] == len(groups) < 45


def test_muon_pays_what_adamw_pays(private, world, tmp_path, flexolmo):
    """An optimizer is a function of the noised sums."""
    muon = ("--optimizer.name", "muon", "--optimizer.learning-rate", 0.01)
    code, _, error = flexolmo(*training(world, tmp_path, "--dp-epsilon", 4, *muon))
    assert code == 0, error
    said, like = (read_manifest(folder / "out")["privacy"] for folder in (tmp_path, private))
    assert "then Muon and AdamW. Router rows: one sum" in said["mechanism"]
    assert {**said, "mechanism": like["mechanism"]} == like
    assert flexolmo("privacy", "verify", tmp_path / "out")[0] == 0


# Killing a real process.


def begun(ledger):
    try:
        return json.loads(ledger.read_text())["runs"][0]["steps"]
    except (OSError, ValueError, IndexError):
        return 0


def test_a_killed_run_loses_no_budget_and_its_copy_is_refused(world, tmp_path, flexolmo, refused):
    first = tmp_path / "first"
    first.mkdir()
    long = ("--dp-epsilon", 4, "--steps", 60)
    words = [
        sys.executable,
        "-m",
        "flexolmo_jax",
        *map(str, training(world, first, *long)),
    ]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while begun(first / "budget.json") < 20 and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    spent = begun(first / "budget.json")
    rows = [json.loads(line) for line in (first / "run" / "metrics.jsonl").open()]
    saved = max(int(p.name) for p in (first / "run" / "checkpoints").iterdir() if p.name.isdigit())
    assert 20 <= spent < 60 and saved <= spent and max(row["step"] for row in rows) <= spent

    second = tmp_path / "second"
    shutil.copytree(first, second)
    data = ("--data", first / "math.jsonl", "--resume")
    code, _, error = flexolmo(*training(world, first, *long), *data)
    assert code == 0, error
    assert f"resuming after step {spent}" in error
    (run,) = json.loads((first / "budget.json").read_text())["runs"]
    assert run["steps"] == run["planned"]["steps"] == 60 and run["finished"]
    assert run["spent_epsilon"] <= 4
    steps = [json.loads(line)["step"] for line in (first / "run" / "metrics.jsonl").open()]
    assert [step for step in steps if step > spent] == list(range(spent + 1, 61))
    assert flexolmo("privacy", "verify", first / "out")[0] == 0
    # A copy of run and ledger cannot be spent from as well.
    before = (second / "budget.json").read_text()
    assert "a copy of another ledger" in refused(*training(world, second, *long), *data)
    assert (second / "budget.json").read_text() == before and not (second / "out").exists()


def test_a_run_whose_steps_are_all_begun_and_none_saved_says_so(world, tmp_path, refused):
    words = training(world, tmp_path, "--dp-epsilon", 4, "--steps", 4)
    process = subprocess.Popen(
        [sys.executable, "-m", "flexolmo_jax", *map(str, words)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while begun(tmp_path / "budget.json") < 1 and process.poll() is None:
        time.sleep(0.005)
    process.kill()
    process.wait()
    shutil.rmtree(tmp_path / "run" / "checkpoints", ignore_errors=True)
    ledger = json.loads((tmp_path / "budget.json").read_text())
    ledger["runs"][0]["steps"] = 4
    (tmp_path / "budget.json").write_text(json.dumps(ledger))
    said = refused(*words, "--resume")
    assert "all 4 steps of this run were begun, and none was saved" in said


# What is refused before anything is spent.

REFUSED = {
    "an epsilon that only noise reaches": (
        ["--dp-epsilon", 0.0001], "epsilon 0.0001 (at delta 1e-05) cannot be met for this text"
    ),
    "an option without a budget": (["--dp-unit", "sequence"], "--dp-clip without --dp-epsilon"),
    "no budget at all": (["--dp-epsilon", 0], "epsilon must be positive and finite, found 0.0"),
    "a delta that allows anything": (
        ["--dp-epsilon", 1, "--dp-delta", 0.1], "--dp-delta must be below 1 / "
    ),
    "more units in a batch than there are": (
        ["--dp-epsilon", 1, "--data.batch-size", 100], "data.batch_size=100 is the mean number of"
    ),
    "layers shared among devices": (
        ["--dp-epsilon", 1, "--tensor-parallel", 2], "tensor_parallel with --dp-epsilon"
    ),
    "a field that rows do not have": (
        ["--dp-epsilon", 1, "--dp-unit", "group:patient"], "no field 'patient'"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_done_is_refused(world, tmp_path, refused, name):
    more, message = REFUSED[name]
    assert message in refused(*training(world, tmp_path, *more))
    assert not (tmp_path / "budget.json").exists() and not (tmp_path / "out").exists()


def test_a_second_ledger_for_the_same_text_is_refused(private, world, tmp_path, refused):
    """Beside the text, whose mark is found; a copy of the text is another test's."""
    text = private / "math.jsonl"
    before = {p: p.read_bytes() for p in private.iterdir() if p.is_file()}
    asked = training(world, tmp_path, "--dp-epsilon", 1, "--data", text)
    said = refused(*asked)
    assert f"another ledger, {private / 'budget.json'}" in said and "--dp-ledger" in said
    assert {p: p.read_bytes() for p in private.iterdir() if p.is_file()} == before
    assert not (tmp_path / "budget.json").exists() and not (tmp_path / "out").exists()


def test_windows_beside_documents_are_not_added_up(private, world, tmp_path, refused):
    said = refused(
        *training(world, tmp_path, "--dp-epsilon", 1, "--dp-unit", "sequence"),
        "--dp-limit", 20, "--dp-ledger", private / "budget.json",
    )  # fmt: skip
    assert "protect the unit document" in said and "cannot be added" in said


def test_an_embedding_of_private_text_is_refused(world, tmp_path, refused):
    words = training(world, tmp_path, "--dp-epsilon", 1, config="pair", name="code")
    assert "domain_embedding with --dp-epsilon" in refused(*words)


def test_another_way_to_fit_rows_is_refused(world, tmp_path, refused):
    words = training(world, tmp_path, "--dp-epsilon", 1, "--router", "lda")
    assert (
        "router='lda' with --dp-epsilon: private rows are always fitted to one noisy release"
        in refused(*words)
    )


# The release that router rows are fitted to.


class Rows:
    """The anchor, two owners' units, and what public text says."""

    def __init__(self, world, folder):
        self.anchor = read_anchor(world.anchor)
        data = world.config("alone").data
        self.units = {
            name: prepare_units(
                str(world.texts[name]), data, self.anchor.tokenizer, folder / name, "document"
            )
            for name in ("math", "code")
        }
        self.public = self.look_at(self.anchor.public_text)

    def look_at(self, texts):
        read = public_units(texts, self.anchor.tokenizer, length=32, max_windows=2, tokens=4096)
        return release.public_statistics(read, self.anchor.weights, self.anchor.config)

    def total(self, units):
        return release.clipped_total(
            self.anchor.weights, units, self.public, self.anchor.config,
            np.random.default_rng(0), max_windows=2, microbatch_size=4,
        )  # fmt: skip


@pytest.fixture(scope="module")
def rows(world, tmp_path_factory):
    return Rows(world, tmp_path_factory.mktemp("rows"))


class WithoutOne:
    """Units, of which one is nothing."""

    def __init__(self, units, gone):
        self.units, self.gone = units, gone

    def __len__(self):
        return len(self.units)

    def batch(self, numbers, shape, generator):
        batch = self.units.batch(numbers, shape, generator)
        rows = np.array([number == self.gone for number in numbers])
        rows = np.pad(rows, (0, shape[0] - len(rows)))[:, None, None]
        return jax.tree.map(lambda x: jnp.where(rows, 0, x), batch)


def test_the_release_changes_by_one_at_most_between_neighbours(rows):
    total = rows.total(rows.units["math"])
    lengths = []
    for gone in range(6):
        other = rows.total(WithoutOne(rows.units["math"], gone))
        lengths.append(float(jnp.linalg.norm(total - other)))
    assert max(lengths) <= 1 + 1e-5
    assert max(lengths) > 0.9  # some are clipped
    assert float(jnp.linalg.norm(total)) <= len(rows.units["math"])


def test_the_release_has_the_noise_it_says(rows):
    total, n = jnp.zeros((50, 2000)), 40
    made = release.release(total, 2.0, n, 5.0, jax.random.key(1))
    assert made.noise == 5.0 * 2.0 / n
    assert made.mean.std() == pytest.approx(made.noise, rel=0.02)


def test_rows_of_a_release_tell_the_owners_text_from_public_text(rows, world):
    """With little noise, in every layer."""

    def means(texts):
        return np.stack([w.mean for w in rows.look_at(texts).whitenings])

    units = rows.units["math"]
    little = release.release(
        rows.total(units), rows.public.clip, len(units), 1e-3, jax.random.key(0)
    )
    fitted, biases = release.rows_of(little, rows.public.whitenings, 0.3)
    own = [d.text for d in read_documents(str(world.texts["math"]))]
    for texts, is_own in ((own, True), (rows.anchor.public_text, False)):
        scores = np.einsum("LD,LD->L", fitted, means(texts)) + biases
        assert all((scores > np.log(0.3 / 0.7)) == is_own), (is_own, scores)
    assert (biases <= 0).all()


def test_where_all_may_be_noise_the_rows_say_nothing(rows):
    shape = (rows.anchor.config.num_layers, rows.anchor.config.width)
    noise = release.Release(np.full(shape, 0.9, np.float32), noise=1.0, clip=2.0)
    fitted, biases = release.rows_of(noise, rows.public.whitenings, 0.3)
    assert not fitted.any() and np.allclose(biases, np.log(0.3 / 0.7))
    longer = noise._replace(mean=np.full(shape, 2.0, np.float32))
    fitted, _ = release.rows_of(longer, rows.public.whitenings, 0.3)
    assert np.all(np.linalg.norm(fitted, axis=1) > 0)
