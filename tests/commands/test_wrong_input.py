"""The command line: wrong input ends in one clear line and exit code 2."""

import os
import shutil
from pathlib import Path

import pytest

import flexolmo_jax as fo
from flexolmo_jax.federation.package import read_manifest

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


def test_inspecting_a_merged_model_looks_at_its_parts_too(copied, refused):
    damage(copied.experts["math"])
    assert "changed after the package was written" in refused("inspect", copied.merged)


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
