"""The command line: what each command does, and that wrong input ends in one clear line."""

import json
import os
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest

import flexolmo_jax as fo
from flexolmo_jax.data.sources import read_documents
from flexolmo_jax.federation.package import read_manifest, write_manifest
from flexolmo_jax.runtime.console import console
from flexolmo_jax.storage.files import canonical_digest

pytestmark = pytest.mark.usefixtures("quick")
BORDERS = dict.fromkeys(map(ord, "│┃┏┓┗┛┌┐└┘├┤┬┴┼─━┡┩╇┳╋┻"))


@pytest.fixture
def narrow():
    """narrow(width): commands print for a screen that is `width` columns wide."""

    def set_width(width: int) -> None:
        console.width = width

    before = console.width
    yield set_width
    console.width = before


# What the commands do. The world was made by them.


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


def test_inspecting_a_merged_model_looks_at_its_parts_too(copied, refused):
    damage(copied.experts["math"])
    assert "changed after the package was written" in refused("inspect", copied.merged)


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


# Wrong input: one line, exit code 2.


LATIN_1 = b"caf\xe9".decode(errors="surrogateescape")  # as Python reads such an argument


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--prompt", ("generate", "--model", "m", "--prompt", "good", LATIN_1)),
        ("--prompt", ("generate", "--model", "m", "--json", "--prompt", f"a <|b|> {LATIN_1}")),
        ("--without", ("generate", "--model", "m", "--prompt", "x", "--without", LATIN_1)),
        ("--data", ("evaluate", "--model", "m", "--data", f"{LATIN_1}=x.jsonl")),
        ("--text-field", ("evaluate", "--model", "m", "--data", "a=b", "--text-field", LATIN_1)),
        ("--name", ("train", "expert", "demo_expert", "--name", LATIN_1)),
        ("--licence", ("train", "expert", "demo_expert", "--name", "x", "--licence", LATIN_1)),
        ("--contact", ("train", "anchor", "demo_anchor", f"--contact={LATIN_1}")),
    ],
)
def test_a_text_that_is_not_utf_8_is_refused_before_any_work(option, words, refused, tmp_path):
    more = ("--out", tmp_path / "out", "--data", "corpus:math") if words[0] == "train" else ()
    more = (*more, "--anchor", "a") if words[1] == "expert" else more
    said = refused(*words, *more)
    assert f"error: {option}: expected text in UTF-8, found " in said and r"\udce9" in said
    assert not (tmp_path / "out").exists()


def test_a_file_whose_name_is_not_utf_8_is_read_and_named_in_plain_characters(
    world, flexolmo, tmp_path
):
    file = tmp_path / f"{LATIN_1}.jsonl"
    file.write_text('{"text": "a text"}\n')
    code, _, error = flexolmo("evaluate", "--model", world.anchor, "--data", f"own={file}")
    assert code == 0 and r"caf\udce9.jsonl: 1 document" in error


def damage(package: Path) -> Path:
    """Flips a bit in the middle of the largest file."""
    file = max(package.rglob("*"), key=lambda p: p.is_file() and p.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(bytes(content))
    return file


def test_a_package_made_for_another_anchor(world, refused, flexolmo, tmp_path):
    code, *_ = flexolmo(
        "train", "anchor", world.config_file("anchor"), "--data", world.texts["code"],
        "--out", tmp_path / "other", "--steps", "1",
    )  # fmt: skip
    assert code == 0
    said = refused(
        "merge", "--anchor", tmp_path / "other", "--expert", world.experts["math"],
        "--out", tmp_path / "merged",
    )  # fmt: skip
    assert f"{world.experts['math']}: made for another tokenizer" in said
    assert not (tmp_path / "merged").exists()


def test_a_flipped_byte_in_a_package(copied, refused, tmp_path):
    file = damage(copied.experts["math"])
    for command in (
        ("generate", "--model", copied.merged, "--prompt", "x"),
        ("evaluate", "--model", copied.merged, "--data", "x=corpus:math"),
        ("inspect", copied.experts["math"]),
        (
            "merge", "--anchor", copied.anchor, "--expert", copied.experts["math"],
            "--out", tmp_path / "new",
        ),
    ):  # fmt: skip
        said = refused(*command)
        assert str(file.name) in said and "changed after the package was written" in said


def test_a_missing_tensor(copied, refused):
    shutil.rmtree(next((copied.experts["math"] / "params").rglob("feed_forward.up")))
    said = refused("generate", "--model", copied.merged, "--prompt", "x")
    assert "(tensor feed_forward.up): missing from the package" in said


def test_of_a_truncated_checkpoint_the_one_before_is_used(world, flexolmo, tmp_path):
    out, run = tmp_path / "mine", tmp_path / "run"
    assert flexolmo(*world.expert_words(out, run=run))[0] == 0
    shutil.rmtree(out)
    step = run / "checkpoints" / "8"
    file = max(step.rglob("*"), key=lambda p: p.is_file() and p.stat().st_size)
    os.truncate(file, file.stat().st_size // 2)
    code, _, said = flexolmo(*world.expert_words(out, "--resume", run=run))
    assert code == 0
    assert "checkpoint 8 cannot be read" in said and "resuming from checkpoint 6" in said
    assert "resuming after step 6" in said
    assert (run / "damaged" / "8.0").is_dir()
    alone = read_manifest(world.experts["math"])
    assert read_manifest(out)["tensors"] == alone["tensors"]  # bit for bit


def test_two_packages_of_one_name(world, copied, refused, tmp_path):
    said = refused(
        "merge", "--anchor", world.anchor, "--out", tmp_path / "merged",
        "--expert", world.experts["math"], copied.experts["math"],
    )  # fmt: skip
    assert "two packages are named 'math'" in said
    said = refused("experts", "add", copied.merged, world.experts["math"])
    assert "two packages are named 'math'" in said
    said = refused("experts", "add", copied.merged, copied.experts["math"])
    assert "given twice" in said


def test_tokens_outside_the_vocabulary(world, tmp_path):
    with pytest.raises(ValueError, match=r"tokens must be in \[0, 512\)"):
        fo.load(world.merged).logits([[512]])


def test_a_tokenizer_larger_than_the_vocabulary(world, refused, tmp_path):
    said = refused(
        "train", "anchor", world.config_file("anchor"), "--data", world.texts["public"],
        "--out", tmp_path / "a", "--tokenizer", world.anchor / "tokenizer.json",
        "--model.vocab-size", "300",
    )  # fmt: skip
    assert "the tokenizer has 512 ids, more than model.vocab_size=300" in said


def test_an_unknown_expert(world, refused):
    for switch in ("--without", "--only"):
        said = refused("generate", "--model", world.merged, "--prompt", "x", switch, "maths")
        assert "no expert named 'maths'; there are public, math, code" in said


def test_all_experts_switched_off(world, refused):
    everyone = ("--without", "public", "math", "code")
    for command in (("generate", "--prompt", "x"), ("evaluate", "--data", "x=corpus:math")):
        said = refused(*command, "--model", world.merged, *everyone)
        assert "all experts are switched off; leave at least one of public, math, code" in said


def test_an_empty_corpus(world, refused, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "folder").mkdir()
    for source, message in (
        (tmp_path / "empty.jsonl", "no usable document found"),
        (tmp_path / "folder", "the folder holds no file that can be read"),
        (tmp_path / "missing.txt", "no such file or folder"),
    ):
        run = tmp_path / f"run of {source.name}"
        assert message in refused(*world.expert_words(tmp_path / "mine", data=source, run=run))
        said = refused("evaluate", "--model", world.anchor, "--data", f"x={source}")
        assert message in said
    assert not (tmp_path / "mine").exists()


def test_the_command_can_be_given_again_with_the_right_source(world, flexolmo, refused, tmp_path):
    """A wrong source leaves no run behind that has to be resumed or removed."""
    refused(*world.expert_words(tmp_path / "mine", data=tmp_path / "typo.jsonl"))
    code, _, error = flexolmo(*world.expert_words(tmp_path / "mine", "--steps", "2"))
    assert code == 0
    assert " documents, " in error and " characters\n" in error  # what was read is said


def test_a_run_is_resumed_with_the_same_text_and_anchor_only(world, refused, flexolmo, tmp_path):
    run = tmp_path / "run"
    assert flexolmo(*world.expert_words(tmp_path / "mine", "--steps", "2", run=run))[0] == 0
    again = ("--steps", "2", "--resume")
    said = refused(*world.expert_words(tmp_path / "other", *again, data="code", run=run))
    assert "cannot resume" in said and "code.jsonl" in said


def test_heads_that_do_not_divide_the_width(world, refused, tmp_path):
    text = Path(world.config_file("anchor")).read_text()
    (tmp_path / "bad.py").write_text(text.replace("num_heads=2", "num_heads=3"))
    for config, more in (
        (tmp_path / "bad.py", ()),
        (world.config_file("anchor"), ("--model.num-heads", "3")),
    ):
        said = refused(
            "train", "anchor", config, "--data", "corpus:public", "--out", tmp_path / "a", *more
        )
        assert "num_heads must divide width, found width=32 and num_heads=3" in said


@pytest.mark.parametrize(
    "override",
    [("--stepss", "5"), ("--steps", "many"), ("--steps",), ("--data.lenght", "5"), ("x",)],
)
def test_a_bad_override_is_exit_2(world, flexolmo, tmp_path, override):
    code, _, error = flexolmo(*world.expert_words(tmp_path / "mine", *override))
    assert code == 2 and error and "Traceback" not in error
    assert not list(tmp_path.iterdir())


def test_an_override_that_a_config_refuses_is_one_line(world, refused, tmp_path):
    assert "steps must be positive, found -5" in refused(
        *world.expert_words(tmp_path / "m", "--steps", "-5")
    )


def test_other_wrong_input(world, refused, tmp_path):
    out = tmp_path / "out"
    full = tmp_path / "full"
    full.mkdir()
    (full / "x").write_text("x")
    cases = [
        (world.expert_words(full), "already there"),
        (world.expert_words(out, name="a/b"), "cannot be an expert's name"),
        (world.expert_words(out, config="pair", data=tmp_path / "none.txt"), "no such file"),
        (("merge", "--anchor", out, "--expert", out, "--out", tmp_path / "m"), "no such folder"),
        (("merge", "--anchor", out, "--expert", out, "--out", full), "already there"),
        (("generate", "--model", out, "--prompt", "x"), "no such folder"),
        (("generate", "--model", full, "--prompt", "x"), "no manifest.json there"),
        (("inspect", full), "no manifest.json there"),
        (("evaluate", "--model", world.anchor, "--data", "corpus:math"), "expected NAME=SOURCE"),
        (("experts", "remove", world.merged, "maths"), "no expert named 'maths'"),
        (("experts", "list", world.anchor), "expected a package of kind merged, found anchor"),
        (("generate", "--model", world.anchor, "--prompt", "x", "--top-p", "2"), "top_p must be"),
        (("train", "anchor", "nothing", "--out", out), "no config at nothing"),
        (("train", "anchor", "demo_expert", "--out", out), "found ExpertTraining"),
        (("train", "anchor", "demo_anchor", "--out", out), "no text to train on"),
        (
            ("data", "proxies", "--data", "corpus:x", "--public", "corpus:public", "--out", out),
            "corpus:x",
        ),
    ]
    for command, message in cases:
        assert message in refused(*command), command
    assert not out.exists()


def test_too_few_tokens_to_fit_rows_on(world, refused, tmp_path):
    said = refused(*world.expert_words(tmp_path / "mine", "--fit-tokens", "1"))
    assert "fit_tokens" in said


def test_a_merged_model_says_how_many_experts_a_token_may_use(world, flexolmo, refused, tmp_path):
    merge = ("merge", "--anchor", world.anchor, "--expert", *world.experts.values())
    assert flexolmo(*merge, "--out", tmp_path / "one", "--active", "1")[0] == 0
    assert fo.load(tmp_path / "one").config.active_experts == 1
    said = refused(*merge, "--out", tmp_path / "none", "--active", "0")
    assert "active_experts must be at least 1" in said


def test_debug_shows_the_traceback(world, flexolmo):
    wrong = ("generate", "--model", world.root / "nothing", "--prompt", "x")
    for command in (("--debug", *wrong), (*wrong, "--debug")):
        code, _, error = flexolmo(*command)
        assert code == 2 and "Traceback" in error and "no such folder" in error


def test_an_unknown_argument_is_exit_2(world, flexolmo):
    code, _, error = flexolmo("inspect", world.anchor, "--jsn")
    assert code == 2 and "unrecognized" in error or "unknown argument --jsn" in error
