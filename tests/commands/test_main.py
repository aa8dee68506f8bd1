"""The command line: what each command does."""

import json
import shutil
import subprocess
import sys
import unicodedata

import pytest

import flexolmo_jax as fo
from flexolmo_jax.data.sources import read_documents
from flexolmo_jax.federation.package import read_manifest, write_manifest
from flexolmo_jax.runtime.console import console
from flexolmo_jax.storage.files import canonical_digest

BORDERS = dict.fromkeys(map(ord, "│┃┏┓┗┛┌┐└┘├┤┬┴┼─━┡┩╇┳╋┻"))


@pytest.fixture
def narrow():
    """narrow(width): commands print for a screen that is `width` columns wide."""

    def set_width(width: int) -> None:
        console.width = width

    before = console.width
    yield set_width
    console.width = before


def test_training_shows_what_came_of_it(world):
    for name, out in (("public", world.anchor), ("math", world.experts["math"])):
        said = " ".join(world.printed[name].split())
        assert "held-out documents" in said and "bits per byte" in said
        assert "step 1/" in said and "tokens/s" in said
        assert "metrics and loss.png are in" in said and out.name in said
    assert "with math" in world.printed["math"]
    assert "public + 2 experts" in " ".join(world.printed["merge"].split())


def test_a_run_folder_beside_the_result_is_the_default(world, flexolmo, tmp_path):
    code, *_ = flexolmo(
        "train", "expert", world.config_file("alone"), "--data", world.texts["math"],
        "--anchor", world.anchor, "--name", "mine", "--out", tmp_path / "mine",
        "--steps", "2", "--optimizer.learning-rate", "1e-3", "--data.batch-size", "2",
        "--licence", "CC-BY-4.0",
    )  # fmt: skip
    assert code == 0
    saved = json.loads((tmp_path / "mine.run" / "config.json").read_text())
    assert (saved["steps"], saved["optimizer"]["learning_rate"]) == (2, 1e-3)
    assert saved["data"]["batch_size"] == 2 and saved["data"]["length"] == 32
    manifest = read_manifest(tmp_path / "mine")
    assert (manifest["licence"], manifest["tokens_seen"]) == ("CC-BY-4.0", 2 * 2 * 32)


def test_router_tuning(world, flexolmo, tmp_path):
    for name in ("math", "code"):
        code, out, _ = flexolmo(
            "data", "proxies", "--data", world.texts[name], "--public", world.texts["public"],
            "--out", tmp_path / "proxies" / f"{name}.jsonl", "--share", "0.3",
        )  # fmt: skip
        assert code == 0 and "30 of 100 public documents" in " ".join(out.split())
    code, out, _ = flexolmo(
        "train", "router", world.config_file("router"), "--model", world.merged,
        "--data", tmp_path / "proxies", "--out", tmp_path / "tuned",
    )  # fmt: skip
    assert code == 0 and "tuned" in out
    assert fo.load(tmp_path / "tuned").expert_names == ("public", "math", "code")
    code, out, _ = flexolmo("experts", "remove", tmp_path / "tuned", "code")
    assert code == 0 and "back to the owners' own rows" in " ".join(out.split())
    assert fo.load(tmp_path / "tuned").expert_names == ("public", "math")


def test_proxies_are_public_documents_the_likest_first(world, flexolmo, tmp_path):
    file = tmp_path / "proxies.jsonl"
    code, *_ = flexolmo(
        "data", "proxies", "--data", world.texts["math"], "--public", world.texts["public"],
        "--out", file,
    )  # fmt: skip
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert code == 0 and len(rows) == 5
    public = {(row["text"], row["group"]) for row in map(json.loads, open(world.texts["public"]))}
    assert all((row["text"], row["group"]) in public for row in rows)
    probabilities = [row["probability"] for row in rows]
    assert probabilities == sorted(probabilities, reverse=True)


def test_experts_are_listed_added_and_removed(copied, flexolmo, make_expert, tmp_path):
    third = make_expert(tmp_path / "third", "third")
    assert flexolmo("experts", "add", copied.merged, third)[0] == 0
    code, out, error = flexolmo("experts", "list", copied.merged, "--json")
    rows = json.loads(out)
    assert (code, error) == (0, "")
    assert [row["name"] for row in rows] == ["math", "code", "third"]
    assert (rows[2]["licence"], rows[2]["contact"]) == ("CC0-1.0", "a@b.example")
    assert flexolmo("experts", "remove", copied.merged, "math", "third")[0] == 0
    code, out, _ = flexolmo("experts", "list", copied.merged)
    assert code == 0 and "code" in out and "math" not in out
    assert flexolmo("experts", "remove", copied.merged, "code")[0] == 0
    assert json.loads(flexolmo("experts", "list", copied.merged, "--json")[1]) == []
    assert "no experts" in flexolmo("experts", "list", copied.merged)[1]


def test_several_experts_are_removed_all_or_none(copied, refused):
    assert "no expert named 'maths'" in refused("experts", "remove", copied.merged, "code", "maths")
    assert fo.load(copied.merged).expert_names == ("public", "math", "code")


def test_several_packages_are_added_all_or_none(copied, refused, make_expert, tmp_path):
    third = make_expert(tmp_path / "third", "third")
    refused("experts", "add", copied.merged, third, tmp_path / "missing")
    assert fo.load(copied.merged).expert_names == ("public", "math", "code")


@pytest.mark.parametrize("part", ["anchor", "experts/math", "merged"])
def test_inspect(world, flexolmo, part):
    code, out, error = flexolmo("inspect", world.root / part, "--json")
    assert (code, error) == (0, "")
    about = json.loads(out)
    assert about["kind"] == {"anchor": "anchor", "experts/math": "expert", "merged": "merged"}[part]
    code, out, _ = flexolmo("inspect", world.root / part)
    assert code == 0 and about["digest"][:8] in "".join(out.split())
    if part != "merged":
        assert about["tensors"] and "feed_forward.gate" in out


STRANGE = "Owner [/x] [red]\u202e[bold]\u200b"
ESCAPES = "\x1b[2J\x1b]0;title\x07\r\x9b31m"  # clear the screen, retitle the window


@pytest.mark.parametrize("width", [80, 60])
def test_text_fits_the_screen_and_nothing_is_cut(world, flexolmo, narrow, width, tmp_path):
    narrow(width)
    name, folder = "an-owner-with-a-rather-long-name-" + "x" * 30, tmp_path / "[red] data"
    shutil.copytree(world.experts["math"], folder)
    manifest = {**read_manifest(folder), "name": name, "contact": STRANGE}
    manifest["privacy"] = {"epsilon": 7.987654321, "delta": 1.23e-05, "unit": "group:patient"}
    write_manifest(folder, manifest)
    code, out, error = flexolmo(
        "merge", "--anchor", world.anchor, "--expert", folder, world.experts["code"],
        "--out", tmp_path / "model",
    )  # fmt: skip
    assert code == 0, error
    for command in (
        ("inspect", tmp_path / "model"), ("inspect", folder), ("inspect", world.anchor),
        ("experts", "list", tmp_path / "model"),
        ("evaluate", "--model", tmp_path / "model", "--data", f"{name}={world.texts['math']}"),
    ):  # fmt: skip
        code, out, error = flexolmo(*command)
        assert code == 0, error
        assert max(map(len, out.splitlines())) <= width and "\u2026" not in out
        assert not {c for c in out if unicodedata.category(c) in ("Cc", "Cf")} - {"\n"}
        whole = "".join(out.translate(BORDERS).split())
        if command[-1] != world.anchor:
            assert name in whole
        if command[0] != "evaluate" and command[-1] != world.anchor:
            assert r"Owner[/x][red]\u202e[bold]\u200b" in whole
            assert "epsilon7.987654321,delta1.23e-05" in whole and "[red]data" in whole


def test_a_message_about_a_stranger_s_package_does_not_reach_the_terminal_raw(copied, refused):
    file = copied.experts["math"] / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["model"]["width"] = STRANGE + ESCAPES
    del manifest["digest"]
    manifest["digest"] = canonical_digest(manifest)
    file.write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
    said = refused(
        "merge", "--anchor", copied.anchor, "--expert", copied.experts["math"], "--out", "nowhere"
    )
    assert not {c for c in said if unicodedata.category(c) in ("Cc", "Cf")} - {"\n"}
    assert "field 'model.width': a control character" in said


def test_evaluate(world, flexolmo):
    source = world.texts["math"]
    arguments = ("evaluate", "--model", world.merged, "--data", f"math={source}")
    code, out, error = flexolmo(*arguments, "--heldout", "0.1", "--json")
    documents = list(read_documents(source))
    size = sum(len(document.text) for document in documents)
    assert code == 0
    assert error == f"{source}: {len(documents):,} documents, {size:,} characters\n"
    (row,) = json.loads(out)
    expected = fo.bits_per_byte(fo.load(world.merged), str(source), heldout=0.1)
    assert row == {"data": "math", **expected._asdict(), "bad_rows": 0}
    code, out, _ = flexolmo(*arguments, f"code={world.texts['code']}", "--heldout", "0.1")
    assert code == 0 and f"{expected.bits_per_byte:.4f}" in out and "code" in out
    code, out, _ = flexolmo(*arguments, "--heldout", "0.1", "--json", "--without", "math", "code")
    alone = fo.bits_per_byte(fo.load(world.anchor), str(source), heldout=0.1)
    assert json.loads(out)[0]["bits_per_byte"] == alone.bits_per_byte


def test_evaluate_tells_of_bad_rows(world, flexolmo, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a good row"}\nnot json\n')
    code, out, error = flexolmo(
        "evaluate", "--model", world.anchor, "--data", f"x={tmp_path}/rows.jsonl", "--json"
    )
    assert code == 0 and json.loads(out)[0]["bad_rows"] == 1
    assert error.splitlines()[0].endswith(": 1 document, 10 characters; 1 bad row skipped")
    assert error.splitlines()[1].startswith(f"skipped {tmp_path}/rows.jsonl:2: not JSON")


def test_two_texts_of_one_name_are_refused(world, refused):
    texts = (f"x={world.texts['math']}", f"x={world.texts['code']}")
    for command in (("--data", *texts), ("--data", texts[0], "--data", texts[1])):
        said = refused("evaluate", "--model", world.anchor, *command)
        assert "the name 'x' is given twice" in said and "math" in said and "code" in said


def test_generate(world, flexolmo):
    arguments = ("generate", "--model", world.merged, "--max-new-tokens", "8")
    code, out, error = flexolmo(*arguments, "--prompt", "The theorem", "A river", "--json")
    assert (code, error) == (0, "")
    made = fo.load(world.merged).generate(["The theorem", "A river"], 8)
    assert json.loads(out) == [
        {"prompt": "The theorem", "continuation": made[0]},
        {"prompt": "A river", "continuation": made[1]},
    ]
    code, out, _ = flexolmo(*arguments, "--prompt", "The theorem")
    assert code == 0 and out == f"The theorem{made[0]}\n"
    code, out, _ = flexolmo(*arguments, "--prompt", "The theorem", "--only", "public")
    assert out == f"The theorem{fo.load(world.anchor).generate(['The theorem'], 8)[0]}\n"
    code, out, _ = flexolmo(*arguments, "--prompt", "The theorem", "--dtype", "int8")
    rounded = fo.load(world.merged, dtype="int8")
    assert code == 0 and out == f"The theorem{rounded.generate(['The theorem'], 8)[0]}\n"
    options = ("--temperature", "1", "--top-k", "50", "--top-p", "0.9", "--seed", "3")
    assert flexolmo(*arguments, "--prompt", "A", *options)[0] == 0


def test_a_profile_is_one_flag_away(world, tmp_path):
    """In a process of its own: where libtpu finds no TPU, a trace could end it."""
    ran = subprocess.run(
        [sys.executable, "-m", "flexolmo_jax", "generate", "--model", world.anchor,
         "--prompt", "The", "--max-new-tokens", "2", "--profile", tmp_path / "trace"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert list((tmp_path / "trace").rglob("*.xplane.pb"))


def test_an_expert_package_is_a_model_of_two(world, flexolmo):
    code, out, _ = flexolmo(
        "generate", "--model", world.experts["math"], "--anchor", world.anchor,
        "--prompt", "The", "--max-new-tokens", "4",
    )  # fmt: skip
    assert code == 0 and out.startswith("The")
