"""What trains in torch: runs by `TorchBridge` are JAX's, and processes of their own give what a plain loop gives."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest

from chainrule.evidence import experiments
from chainrule.evidence.bridged import BridgeTrainer
from chainrule.evidence.experiment import Task
from chainrule.evidence.processes import Process, Running
from chainrule.evidence.training import Trainer

E6, E7 = experiments.load("E6"), experiments.load("E7")
POINT = {"learning_rate": 3e-3}


def arm_of(experiment, name):
    return next(arm for arm in experiment.arms if arm.name == name)


def nudged(task: Task, seed: int) -> Task:
    """The task with initial parameters that are off by a rounding: by one part in 2^23, at random."""

    def draw(run):
        params, drawn = task.draw(run)
        random = np.random.default_rng(seed)
        return jax.tree.map(
            lambda p: (p * (1 + 2.0**-23 * random.choice([-1, 1], p.shape))).astype(p.dtype), params
        ), drawn

    return task._replace(draw=draw)


@pytest.mark.parametrize("name", ["nadam", "muon"])
def test_the_bridge_trains_as_jax_does(name):
    """Apart by no more than roundings: each step makes one. What one does to the whole curve is measured, by runs from
    initial parameters that are off by one, and is a unit of the loss in float32 at least.
    """
    setting = dataclasses.replace(E7.settings["quick"], block=1)
    task, arm = E7.task(setting, ""), arm_of(E7, name)

    def curve(trainer):
        ((outcome,),) = trainer.train(arm, [(POINT, 0)])
        return outcome.curves["train_loss"]

    jax_curve = curve(Trainer(task, setting))
    one = np.abs(curve(Trainer(nudged(task, 0), setting)) - jax_curve).max()
    one = max(one, np.spacing(np.float32(jax_curve.max())))
    difference = np.abs(curve(BridgeTrainer(task, setting)) - jax_curve).max()
    assert difference <= setting.steps * one
    assert (
        np.ptp(jax_curve) > 1000 * setting.steps * one
    )  # it trained, and the bound says something


def plain_loop(arm, start, steps):
    """The losses of E6's task by a loop in this process."""
    setting = E6.settings["quick"]
    task = E6.task(setting, "")
    model, batches = task.start(0, start)
    optimizer = arm.make({**POINT, "seed": 0, "steps": setting.steps})(model)
    losses = []
    for batch in batches[:steps]:
        optimizer.zero_grad()
        loss = task.loss(model, batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, task.evaluate(model), optimizer


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("start") / "start.pt"
    E6.task(E6.settings["quick"], "").prepare(path)
    return path


@pytest.mark.parametrize("name", [arm.name for arm in E6.arms])
def test_a_run_in_a_process_is_a_plain_loop(name, start):
    """What a process answers, asked without one; and its bytes of state."""
    setting, arm = E6.settings["quick"], arm_of(E6, name)
    running = Running(E6.task(setting, ""), arm, setting, start)
    running.answer({"begin": POINT, "seed": 0})
    seen = [running.answer({"go": 3}), running.answer({"go": 3})]
    losses, held_out, optimizer = plain_loop(arm, start, 6)
    np.testing.assert_allclose(
        [each["train_loss"] for each in seen], np.reshape(losses, (2, 3)).mean(1)
    )
    assert seen[1]["loss"] == held_out["loss"]
    told = running.answer({"memory": True})
    sizes = {
        "fused adamw": 2 * sum(4 * p.numel() for p in optimizer.param_groups[0]["params"]),
        "lion": sum(4 * p.numel() for p in optimizer.param_groups[0]["params"]),
        "signsgd": 0,
    }
    if name in sizes:  # and counts of steps, a number a tensor at most
        assert (
            0 <= told["state_bytes"] - sizes[name] <= 8 * len(optimizer.param_groups[0]["params"])
        )
    assert told["peak_bytes"] > told["state_bytes"]


@pytest.mark.slow
def test_a_process_that_ends_is_named(start):
    setting = dataclasses.replace(E6.settings["quick"], sizes={})
    message = "the process of cosmic ended with status 1"
    with (
        Process("E6", "cosmic", setting, start) as process,
        pytest.raises(RuntimeError, match=message),
    ):
        process(begin=POINT, seed=0)


@pytest.mark.slow
def test_the_peak_of_a_process_is_its_own(start):
    """Not what the process that started it had at most, which Linux hands on in `ru_maxrss`."""
    ours = np.ones(10**8)  # 0.8 GB, written
    with Process("E6", "signsgd", E6.settings["quick"], start) as process:
        process(begin=POINT, seed=0)
        assert process(memory=True)["peak_bytes"] < ours.nbytes
