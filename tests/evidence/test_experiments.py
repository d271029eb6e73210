"""Every experiment runs to its end at its quick setting, by the command that users type."""

import importlib.util
import json
import math
from typing import Any

import jax
import numpy as np
import pytest

from chainrule import cli
from chainrule.evidence import command, experiments
from chainrule.evidence.store import key_of
from chainrule.evidence.training import programs

NAMES = list(experiments.names())
IN_JAX = [name for name in NAMES if experiments.load(name).trainer is None]
RUNS_HERE = NAMES if importlib.util.find_spec("torch") else IN_JAX


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS_HERE)
def test_quick(name, tmp_path, capsys):
    # One of them also by the torch bridge.
    more = ["--bridge"] if name == "E7" and len(RUNS_HERE) > len(IN_JAX) else []
    assert cli.main(["evidence", name, "--quick", "--out", str(tmp_path), *more]) == 0
    (file,) = tmp_path.glob("*.json")
    document = json.loads(file.read_text())
    experiment = experiments.load(name)
    assert document["finished"] is not None
    wanted = experiment.settings["quick"].arms or [arm.name for arm in experiment.arms]
    kept = document["halving"][-1]["kept"] if "halving" in document else []
    dropped = {a.name for a in experiment.arms if a.role == "candidate" and a.base not in kept}
    assert set(document["arms"]) == set(wanted) - dropped
    for run in document["runs"]:
        assert None not in run["final"].values(), run
    written = (tmp_path / "REPORT.md").read_text()
    assert f"## {name}" in written
    assert ("2 of 2 verdicts are the same" in written) == bool(more)
    assert (tmp_path / f"{name}.png").stat().st_size < 80_000


@pytest.mark.parametrize("name", experiments.names())
def test_definition(name):
    """Every setting is there, and an experiment is called what its file is called."""
    experiment = experiments.load(name)
    assert experiment.id == name
    assert set(experiment.settings) == {"quick", "normal", "full"}
    assert experiment.settings["normal"].seeds >= 5
    grids = {math.prod(map(len, arm.grid.values())) for arm in experiment.arms if arm.grid}
    assert len(grids) == 1, f"arms start from different numbers of trials: {grids}"


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_JAX)
def test_every_arm_makes_a_step(name):
    """Also those that the quick setting leaves out: their programs are traced, not run."""
    experiment = experiments.load(name)
    setting = experiment.settings["quick"]
    tasks = {name: experiment.task(setting, name) for name in experiment.conditions}
    drawn_for = {name: task.draw(0) for name, task in tasks.items()}
    made: dict[str, dict] = {}
    measures: dict[str, Any] = {}
    for arm in experiment.arms:
        task, (params, drawn) = tasks[arm.condition], drawn_for[arm.condition]
        if arm.matches is None:
            made[arm.name] = {axis: values[0] for axis, values in arm.grid.items()}
        else:
            assert arm.match is not None
            half = {m: np.full(setting.evaluations, 0.5) for m in measures[arm.matches]}
            made[arm.name] = dict(arm.match(made[arm.matches], half))
        hyper = {axis: np.asarray(value, np.float32) for axis, value in made[arm.name].items()}
        hyper["seed"] = np.int32(0)
        init, chunk = programs(task, arm, setting)
        state = jax.eval_shape(init, hyper, params)
        new, _, curves, measures[arm.name] = jax.eval_shape(
            chunk, hyper, params, state, drawn, task.data, 0
        )
        shapes = [[np.shape(x) for x in jax.tree.leaves(tree)] for tree in (new, params)]
        assert shapes[0] == shapes[1] and jax.tree.structure(new) == jax.tree.structure(params)
        wanted = {experiment.tune_on.name, *(m.name for m in experiment.metrics)}
        assert wanted <= {*curves, *experiment.summaries}, arm.name


def test_the_key_is_of_settings_and_code():
    experiment = experiments.load("E7")
    keys = {key_of(experiment, setting) for setting in experiment.settings}
    assert len(keys) == 3
    assert key_of(experiment, "quick") in keys


def test_the_list(capsys):
    assert cli.main(["evidence"]) == 0
    assert "E7   Keras Muon on digits" in capsys.readouterr().out


def test_an_unknown_experiment_is_named(capsys):
    assert cli.main(["evidence", "E0"]) == 2
    assert "no experiment 'E0'" in capsys.readouterr().err


@pytest.mark.parametrize("quick", [True, False])
def test_only_a_smoke_test_is_built_quickly(quick):
    """XLA's optimizations are as they were again, whatever happens in between."""
    before = jax.config.read("jax_disable_most_optimizations")
    with pytest.raises(KeyboardInterrupt), command.built_quickly(quick):
        assert jax.config.read("jax_disable_most_optimizations") == (quick or before)
        raise KeyboardInterrupt
    assert jax.config.read("jax_disable_most_optimizations") == before
