"""How the tests run a study, by its name and words; and a study of baselines that takes seconds."""

import argparse
import importlib
import itertools
import json
import shutil
from pathlib import Path

import pytest

from flexolmo_jax.config import load_config
from flexolmo_jax.data.sources import read_documents
from flexolmo_jax.studies.baselines.config import StudyConfig
from flexolmo_jax.studies.engine import commands
from flexolmo_jax.studies.registry import STUDIES

TINY = """from flexolmo_jax.config import *
from flexolmo_jax.studies.baselines.config import StudyConfig

data = DataConfig(batch_size=4, length=32, heldout=0.0)
optimizer = OptimizerConfig(learning_rate=3e-3, warmup_steps=2)
sizes = dict(vocab_size=512, width=32, num_layers=1, num_heads=2, ffn_width=48, max_length=32)
model = ModelConfig(**sizes)
config = StudyConfig(
    texts={texts!r},
    owners=("math", "code"),
    anchor=AnchorTraining(model=model, data=data, optimizer=optimizer, steps=8, public_tokens=2048),
    expert=ExpertTraining(data=data, optimizer=optimizer, steps=4, fit_tokens=1024),
    router=RouterTraining(data=data, optimizer=optimizer, steps=2),
    dense_rates=((1e-3, 1e-3), (3e-3, 3e-3)),
    unrestricted_rates=((1e-3, 1e-3),),
    rate_owners=("code",),
    head_rank=4,
    evidence_rank=4,
    unrestricted_flops=(1.0,),
    tune_sequences=4,
    test_sequences=16,
    mixed_sequences=6,
    prefix=8,
    proxies=0.5,
    routers=("logistic",),
    memories=((0.8, 0.3),),
    active=(1,),
    decays=(0.9,),
    evidence_decays=(0.9,),
    evidence_strengths=(0.5, 1.0),
    evidence_shifts=(0.75, 1.5),
    soup_temperatures=(0.1,),
)
"""


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """A folder as `flexolmo data flexmix` writes it."""
    folder = tmp_path_factory.mktemp("texts")
    for domain, count in (("public", 60), ("math", 120), ("code", 30)):
        documents = [
            d.text[:3000] for d in itertools.islice(read_documents(f"corpus:{domain}"), count)
        ]
        (folder / domain).mkdir()
        parts = {"tune": documents[:10], "heldout": documents[10:20], "train": documents[20:]}
        for split, part in parts.items():
            lines = (json.dumps({"text": text}) + "\n" for text in part)
            (folder / domain / f"{split}.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture(scope="session")
def config_file(texts, tmp_path_factory):
    file = tmp_path_factory.mktemp("config") / "tiny.py"
    file.write_text(TINY.format(texts=str(texts)))
    return file


@pytest.fixture(scope="session")
def config(config_file) -> StudyConfig:
    return load_config(config_file, StudyConfig)


@pytest.fixture(scope="session")
def chosen(config) -> StudyConfig:
    """With one rate of each kind, as a seed is planned."""
    return config.with_rates("dense", config.dense_rates[:1])


@pytest.fixture
def study(capsys):
    """study(name, *words): runs a study and returns what it printed."""

    def run(name: str, *words: object) -> str:
        module = importlib.import_module(STUDIES[name])
        parser = argparse.ArgumentParser()
        module.add_arguments(parser)
        module.run(parser.parse_args([str(word) for word in words]))
        return capsys.readouterr().out

    return run


@pytest.fixture
def no_training(world, monkeypatch):
    """Commands that would train copy the world's packages; the list of what they were asked."""
    asked: list[list[str]] = []

    def run_command(words, **_):
        asked.append(words)
        options = dict(zip(words, words[1:], strict=False))
        packages = {"anchor": world.anchor, "router": world.merged}
        package = packages.get(words[1]) or world.experts[options["--name"]]
        shutil.copytree(package, Path(options["--out"]))

    monkeypatch.setattr(commands, "run_command", run_command)
    return asked
