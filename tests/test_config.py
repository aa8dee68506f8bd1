"""Configs check themselves; the presets have the sizes and values of the reference."""

import runpy

import pytest

import flexolmo_jax as fo
from flexolmo_jax.config import CONFIGS, Training, load_config
from flexolmo_jax.modeling.transformer import num_parameters

SIZES = {"vocab_size": 50, "width": 16, "num_layers": 2, "num_heads": 4, "ffn_width": 24}
PRESETS = sorted(file.stem for file in CONFIGS.glob("*.py") if file.stem != "__init__")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_heads": 3}, "num_heads must divide width, found width=16 and num_heads=3"),
        ({"num_kv_heads": 3}, "num_kv_heads must divide num_heads"),
        ({"head_width": 5}, "head_width must be even"),
        ({"num_heads": 16}, "head_width must be even"),
        ({"vocab_size": 0}, "vocab_size must be positive, found 0"),
        ({"num_layers": -1}, "num_layers must be positive, found -1"),
        ({"num_experts": 0}, "num_experts must be at least 1"),
        ({"active_experts": 0}, "active_experts must be at least 1"),
        ({"memory": (1.0, 0.3)}, r"memory must be a decay in \(0, 1\)"),
        ({"dtype": "float16"}, "dtype must be one of float32, bfloat16, found 'float16'"),
    ],
)
def test_a_model_that_cannot_be_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        fo.ModelConfig(**{**SIZES, **wrong})


def test_sizes_that_follow_from_others_follow():
    config = fo.ModelConfig(**SIZES)
    assert (config.head_size, config.kv_heads) == (4, 4)
    wider = config.replace(width=32, num_heads=2)
    assert (wider.head_size, wider.kv_heads) == (16, 2)


DATA = {"batch_size": 2, "length": 8}


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (fo.DataConfig, {**DATA, "batch_size": 0}, "batch_size must be positive"),
        (fo.DataConfig, {**DATA, "length": 1}, "length must be at least 2 tokens"),
        (fo.DataConfig, {**DATA, "heldout": 1.0}, r"heldout must be in \[0, 1\), found 1.0"),
        (fo.OptimizerConfig, {"learning_rate": 0}, "learning_rate must be positive"),
        (fo.DataConfig, {**DATA, "heldout": float("nan")}, r"heldout must be in \[0, 1\)"),
        (fo.DataConfig, {**DATA, "group_field": ""}, "group_field must not be empty"),
        (fo.OptimizerConfig, {"learning_rate": float("nan")}, "learning_rate must be positive"),
        (fo.OptimizerConfig, {"learning_rate": 3}, "learning_rate must be at most 1"),
        (fo.OptimizerConfig, {"learning_rate": 1, "clip_norm": 0}, "clip_norm must be positive"),
        (fo.OptimizerConfig, {"learning_rate": 1, "b1": 1.0}, r"b1 must be in \[0, 1\), found 1.0"),
        (fo.OptimizerConfig, {"learning_rate": 1, "b2": -0.1}, r"b2 must be in \[0, 1\)"),
        (fo.OptimizerConfig, {"learning_rate": 1, "eps": 0}, "eps must be positive and finite"),
        (fo.OptimizerConfig, {"learning_rate": 1, "warmup_steps": -1}, "warmup_steps must be 0 or"),
        (fo.OptimizerConfig, {"learning_rate": 1, "weight_decay": -1}, "weight_decay must be 0 or"),
        (fo.OptimizerConfig, {"learning_rate": 1, "name": "sgd"}, "name must be 'adamw' or 'muon'"),
        (
            fo.OptimizerConfig,
            {"learning_rate": 1, "adamw_learning_rate": 0.1},
            "adamw_learning_rate=0.1 with name='adamw': .* leave adamw_learning_rate out",
        ),
        (
            fo.OptimizerConfig,
            {"learning_rate": 1, "name": "muon", "adamw_learning_rate": 2},
            "adamw_learning_rate must be positive, and at most 1, found 2",
        ),
        (
            fo.OptimizerConfig,
            {"learning_rate": 0.1, "name": "muon", "adamw_learning_rate": 1, "weight_decay": 2},
            "below 1 / learning_rate",
        ),
        (
            fo.RouterTraining,
            {"optimizer": fo.OptimizerConfig(learning_rate=1, name="muon")},
            "optimizer.name='muon' is for matrices, and this stage trains router rows",
        ),
        (fo.ExpertTraining, {"seed": -1}, "seed must be 0 or more, found -1"),
        (fo.ExpertTraining, {"output_z_loss": -1}, "output_z_loss must be 0 or more"),
        (fo.ExpertTraining, {"steps": 0}, "steps must be positive, found 0"),
        (fo.ExpertTraining, {"log_every": 0}, "log_every must be positive"),
        (fo.ExpertTraining, {"checkpoint_every": 0}, "checkpoint_every must be positive"),
        (fo.ExpertTraining, {"gating": "both"}, "gating must be 'fixed' or 'softmax'"),
        (fo.ExpertTraining, {"router": "svm"}, "router must be 'logistic' or 'lda', found 'svm'"),
        (
            fo.ExpertTraining,
            {"gating": "softmax", "router": "lda"},
            "trains its rows; leave router",
        ),
        (
            fo.AnchorTraining,
            {"model": fo.ModelConfig(**SIZES, max_length=4)},
            "data.length=8 is longer than model.max_length=4",
        ),
    ],
)
def test_a_training_that_cannot_be_is_refused(kind, values, message):
    if issubclass(kind, Training):
        values = {
            "data": fo.DataConfig(**DATA),
            "optimizer": fo.OptimizerConfig(learning_rate=1),
            "steps": 1,
            **values,
        }
    with pytest.raises(ValueError, match=message):
        kind(**values)


def test_the_architecture_is_what_experts_must_share():
    base = fo.ModelConfig(**SIZES)
    for same in (
        {"dtype": "bfloat16"},
        {"remat": "layer"},
        {"num_experts": 4},
        {"max_length": 9},
        {"memory": (0.8, 0.3)},
    ):
        assert base.replace(**same).architecture() == base.architecture()
    for other in ({"width": 32}, {"rope_theta": 1e4}, {"renormalize": True}, {"vocab_size": 51}):
        assert base.replace(**other).architecture() != base.architecture()


# Presets.


def preset(name):
    return runpy.run_path(str(CONFIGS / f"{name}.py"))


def kind_of(name):
    for word, kind in (
        ("anchor", fo.AnchorTraining), ("expert", fo.ExpertTraining), ("router", fo.RouterTraining),
        ("evidence", fo.EvidenceTraining),
    ):  # fmt: skip
        if word in name:
            return kind


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_loads_by_name_and_as_a_file(name):
    config = load_config(name, kind_of(name))
    assert config == load_config(CONFIGS / f"{name}.py", kind_of(name))
    assert preset(name)["__doc__"]


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("olmo2_7b_anchor", 7_298_617_344 + 32 * 4096),  # and its public router rows
        ("flexolmo_7x7b_router", 33_270_665_216),
    ],
)
def test_a_full_size_model_has_exactly_so_many_parameters(name, parameters):
    assert num_parameters(preset(name)["model"]) == parameters


@pytest.mark.parametrize(
    ("name", "billions"), [("flexolmo_2x7b_expert", 11.63), ("flexolmo_8x7b_router", 37.60)]
)
def test_a_full_size_model_has_about_so_many_parameters(name, billions):
    assert round(num_parameters(preset(name)["model"]) / 1e9, 2) == billions


def test_full_size_models_are_of_one_architecture():
    names = [name for name in PRESETS if "7b" in name]
    models = [preset(name)["model"] for name in names]
    assert len(models) == 4
    assert all(model.architecture() == models[0].architecture() for model in models)
    assert [model.active_experts for model in models].count(4) == 1
    sizes = {"width": 4096, "num_layers": 32, "num_heads": 32, "head_width": 128}
    sizes |= {"ffn_width": 11_008, "vocab_size": 100_352, "rope_theta": 500_000.0, "norm_eps": 1e-6}
    found = models[0].architecture()
    assert {key: found[key] for key in sizes} == sizes


def test_expert_training_has_the_references_values():
    config = preset("flexolmo_2x7b_expert")["config"]
    assert (config.gating, config.output_z_loss, config.router_z_loss) == ("softmax", 1e-5, 1e-3)
    optimizer = config.optimizer
    assert (optimizer.learning_rate, optimizer.warmup_steps) == (9e-4, 2000)
    assert (optimizer.b1, optimizer.b2, optimizer.eps, optimizer.clip_norm) == (0.9, 0.95, 1e-8, 1)
    assert config.data.length == 4096
    tokens = config.steps * config.data.batch_size * config.data.length
    assert tokens == pytest.approx(50e9, rel=1e-3)


@pytest.mark.parametrize("name", ["flexolmo_7x7b_router", "flexolmo_8x7b_router"])
def test_router_tuning_has_the_references_values(name):
    config = preset(name)["config"]
    assert (config.output_z_loss, config.router_z_loss, config.active_experts) == (0, 1e-3, None)
    optimizer = config.optimizer
    found = (optimizer.learning_rate, optimizer.warmup_steps, optimizer.weight_decay)
    assert found == (2e-3, 100, 0.1)
    tokens = config.steps * config.data.batch_size * config.data.length
    assert tokens == pytest.approx(5e9, rel=1e-3)


def test_anchor_training_has_the_papers_values():
    config = preset("olmo2_7b_anchor")["config"]
    assert config.optimizer.learning_rate == 9e-4
    tokens = config.steps * config.data.batch_size * config.data.length
    assert tokens == pytest.approx(1e12, rel=1e-3)


# Config files.


def test_a_config_file_may_stand_anywhere(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import dataclasses\nfrom flexolmo_jax import *\n"
        "config = dataclasses.replace(load_config('demo_expert', ExpertTraining), steps=7)\n"
    )
    assert load_config(tmp_path / "mine.py", fo.ExpertTraining).steps == 7


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("config = 3", "expected `config` to be ExpertTraining, found int"),
        ("x = 3", "expected `config` to be ExpertTraining, found none"),
        ("raise ValueError('bad')", "mine.py: bad"),
    ],
)
def test_a_config_file_without_a_config_is_an_error(tmp_path, text, message):
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_config(tmp_path / "mine.py", fo.ExpertTraining)


def test_a_config_of_another_stage_is_an_error():
    with pytest.raises(ValueError, match="to be AnchorTraining, found ExpertTraining"):
        load_config("demo_expert", fo.AnchorTraining)


def test_a_config_that_does_not_exist_is_an_error_that_lists_ours(tmp_path):
    with pytest.raises(
        ValueError, match="no config at nothing; .*demo_anchor, demo_evidence, demo_expert"
    ):
        load_config("nothing", fo.AnchorTraining)
    with pytest.raises(ValueError, match="no config at"):  # not ours of that name
        load_config(tmp_path / "demo_anchor.py", fo.AnchorTraining)


def test_a_file_in_the_working_folder_does_not_take_a_presets_place(tmp_path, monkeypatch):
    """It is somebody else's code, perhaps; it runs only when it is named as a file."""
    monkeypatch.chdir(tmp_path)
    for name in ("demo_expert.py", "demo_expert", "mine"):
        (tmp_path / name).write_text("raise ValueError('ran')")
    with pytest.warns(UserWarning, match="comes with flexolmo_jax.*write ./demo_expert.py"):
        assert load_config("demo_expert", fo.ExpertTraining) == preset("demo_expert")["config"]
    for path in ("demo_expert.py", "./demo_expert.py", "./demo_expert", tmp_path / "mine"):
        with pytest.raises(ValueError, match="ran"):
            load_config(path, fo.ExpertTraining)
    with pytest.raises(ValueError, match="no config named mine; .* write ./mine"):
        load_config("mine", fo.ExpertTraining)


def test_a_folder_of_a_presets_name_is_not_in_its_way(tmp_path, monkeypatch):
    (tmp_path / "demo_anchor").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_config("demo_anchor", fo.AnchorTraining).steps > 0
