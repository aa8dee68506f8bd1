"""Stages run once; a changed input re-runs what depends on it, and nothing else."""

import json

import pytest

from flexolmo_jax.studies.engine.stages import DONE, Stage, in_order, run_stages, value_stage


@pytest.fixture
def ran():
    return []


@pytest.fixture
def make(tmp_path, ran):
    """make(a, b): two branches from one root, and what joins them."""

    def stage(name, made_from, *needs):
        def work(folder):
            ran.append(name)
            (folder / "result").write_text(str(made_from))

        return Stage(name, tmp_path, {"value": made_from}, needs, work)

    def make(a=1, b=1):
        root = stage("root", 0)
        left, right = stage("left", a, root), stage("right", b, root)
        return [root, left, right, stage("both", 0, left, right)]

    return make


def test_a_change_runs_again_what_depends_on_it_and_nothing_else(make, ran):
    run_stages(make())
    assert ran == ["root", "left", "right", "both"]
    ran.clear()
    run_stages(make())
    assert ran == []
    run_stages(make(a=2))
    assert ran == ["left", "both"]
    ran.clear()
    run_stages(make())  # the old value: its results are still there
    assert ran == []


def test_what_a_stage_was_made_from_is_written_down(make):
    stages = make(b=5)
    run_stages(stages)
    facts = json.loads((stages[2].folder / DONE).read_text())
    assert facts["name"] == "right" and facts["made_from"] == {"value": 5}
    assert facts["needs"] == [stages[0].folder.name]
    assert stages[2].seconds >= 0


def test_a_killed_stage_goes_on_where_it_was(tmp_path, ran):
    def first(folder):
        ran.append("first")

    def second(folder):
        half = folder / "half"
        ran.append("second, again" if half.exists() else "second")
        if not half.exists():
            half.touch()
            raise KeyboardInterrupt

    one = Stage("one", tmp_path, None, (), first)
    stages = [one, Stage("two", tmp_path, None, (one,), second)]
    with pytest.raises(KeyboardInterrupt):
        run_stages(stages)
    assert stages[0].is_done and not stages[1].is_done
    run_stages(stages)
    assert ran == ["first", "second", "second, again"]


def test_a_stage_and_its_needs_run_once_whoever_asks_and_its_value_is_read(tmp_path, ran):
    def plan():
        def compute(folder):
            ran.append(folder.name)
            return {"value": [1.5, None]}

        root = value_stage("root", tmp_path, [], compute, size=1)
        return [value_stage(name, tmp_path, [root], compute) for name in ("left", "right")]

    stages = [*plan(), *plan()]  # equal stages, planned twice
    ordered = in_order(stages)
    assert [stage.name for stage in ordered] == ["root", "left", "right"]
    run_stages(ordered)
    assert len(ran) == 3 and stages[3].result == {"value": [1.5, None]}
