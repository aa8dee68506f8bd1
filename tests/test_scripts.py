"""The scripts for pods and clusters: what they would run, and what they ask for."""

import os
import subprocess
from pathlib import Path

import pytest
import yaml

SCRIPTS = Path(__file__).parents[1] / "tpu_scripts"
EVERYWHERE = {"PROJECT": "p", "ZONE": "us-east5-a", "TPU": "pod"}
TRAINING = ["expert", "flexolmo_2x7b_expert", "--anchor", "/mnt/flexolmo/the anchor", "--name", "x"]
CASES = {
    "create.sh": (
        {**EVERYWHERE, "BUCKET": "b", "ACCELERATOR": "v5p-128", "VERSION": "v2-alpha-tpuv5"},
        [],
        ["buckets create gs://b", "--location us-east5 ", "--enable-hierarchical-namespace",
         "queued-resources create pod --node-id pod", "--accelerator-type v5p-128"],
    ),
    "setup.sh": (
        {**EVERYWHERE, "BUCKET": "b", "SOURCE": "https://example.org/it.git"},
        [],
        ["--worker=all", "gcsfuse --metadata-cache-ttl-secs 0 b", "git clone"],
    ),
    "train.sh": (
        {**EVERYWHERE, "OUT": "/mnt/flexolmo/mine"},
        TRAINING,
        ["--worker=all", "flexolmo train expert", "the anchor", "--distributed --resume"],
    ),
    "logs.sh": (EVERYWHERE, [], ["--worker=0", "tail -n 100 -F"]),
    "delete.sh": (EVERYWHERE, [], ["queued-resources delete pod"]),
    "slurm.sh": (
        {"OUT": "/shared/mine"},
        TRAINING,
        ["srun .venv/bin/flexolmo train expert", "the anchor", "--out /shared/mine",
         "--distributed --resume"],
    ),
    "heads.sh": (
        {"ANCHOR": "OLMo-2-0425-1B", "TEXTS": "flexmix", "OUT": "heads"},
        ["math", "news"],
        ["train evidence demo_evidence --anchor OLMo-2-0425-1B",
         "--name news --data flexmix/news/train.jsonl --resume --out heads/headed/news",
         "--resume --head-rank 0 --evidence-rank 0 --out heads/plain/math",
         "--expert heads/headed/math heads/headed/news --out heads/merged_headed",
         "evaluate --model heads/merged_plain --data public=flexmix/public/heldout.jsonl"],
    ),
    "jobset.sh": (
        {"NAME": "mine", "IMAGE": "registry/flexolmo", "BUCKET": "b"}, TRAINING, ["kind: JobSet"],
    ),
    "plan.sh": (
        {"TOPOLOGY": "v5p:4x4x4"},
        ["flexolmo_2x7b_expert", "--microbatches", "8"],
        ["flexolmo plan flexolmo_2x7b_expert --microbatches 8 --topology v5p:4x4x4"],
    ),
}  # fmt: skip


def dry_run(name, variables, arguments):
    """In an empty folder, with nothing set but what is given, and none of the tools at hand."""
    bare = {"PATH": os.environ["PATH"], "HOME": "/nowhere"}
    return subprocess.run(
        ["bash", SCRIPTS / name, "--dry-run", *arguments],
        env=bare | variables, capture_output=True, text=True,
    )  # fmt: skip


def test_every_script_is_here():
    assert {p.name for p in SCRIPTS.glob("*.sh")} == {*CASES, "common.sh"}


@pytest.mark.parametrize("name", CASES)
def test_a_dry_run_prints_every_command(name):
    variables, arguments, expected = CASES[name]
    ran = dry_run(name, variables, arguments)
    assert ran.returncode == 0, ran.stderr
    said = ran.stdout.replace("\\", "")  # of quoting
    for words in expected:
        assert words in said, (words, ran.stdout)


@pytest.mark.parametrize(
    ("name", "variable"), [(name, v) for name, (vs, *_) in CASES.items() for v in vs]
)
def test_a_variable_that_is_missing_is_named(name, variable):
    variables, arguments, _ = CASES[name]
    ran = dry_run(name, {k: v for k, v in variables.items() if k != variable}, arguments)
    assert ran.returncode == 2
    assert ran.stderr.startswith(f"{name}: set {variable}: ")
    assert not ran.stdout


@pytest.mark.parametrize("name", ["train.sh", "slurm.sh", "jobset.sh"])
def test_training_needs_to_be_named(name):
    ran = dry_run(name, CASES[name][0], [])
    assert ran.returncode == 2
    assert "say what to train" in ran.stderr


def test_the_jobset_is_one_pod_a_host_that_runs_the_command():
    variables, arguments, _ = CASES["jobset.sh"]
    made = yaml.safe_load(dry_run("jobset.sh", variables, [*arguments, 'a "word"']).stdout)
    job = made["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert (job["parallelism"], job["completions"]) == (16, 16)
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert container["args"] == ["train", *arguments, 'a "word"', "--distributed", "--resume"]
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x4x4"
    assert pod["volumes"][0]["csi"]["volumeAttributes"]["bucketName"] == "b"
