"""A run is resumable, paired and vectorised without a trace; the report is what the files say. On a toy task."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from chainrule.evidence import report, store
from chainrule.evidence.conclusions import conclude, values
from chainrule.evidence.experiment import (
    HALVING_SEEDS,
    Arm,
    Claim,
    Experiment,
    Metric,
    Setting,
    Task,
    across,
    area,
)
from chainrule.evidence.runner import Run, with_sources

LOSS = Metric("loss", "held-out loss", margin=1e-3, better=-1)
GRID = {"learning_rate": (0.01, 0.1, 1.0)}
SETTING = Setting(steps=8, evaluations=4, seeds=3, tuning_seeds=2, block=4)


def build(sizes):
    """Least squares with noise, each seed its own."""
    del sizes

    def draw(seed):
        random = np.random.default_rng(seed)
        x, w = random.normal(size=(32, 3)), random.normal(size=3)
        y = x @ w + 0.1 * random.normal(size=32)
        batches = random.integers(32, size=(8, 4))
        numbers = {"x": x, "y": y, "w": w}
        drawn = {name: value.astype(np.float32) for name, value in numbers.items()}
        return {"w": np.zeros(3, np.float32)}, drawn | {"batches": batches.astype(np.int32)}

    def loss(params, data, drawn, step):
        rows = drawn["batches"][step]
        return jnp.mean((drawn["x"][rows] @ params["w"] - drawn["y"][rows]) ** 2)

    def evaluate(params, data, drawn):
        return {"loss": data["scale"] * jnp.sum((params["w"] - drawn["w"]) ** 2)}

    return Task({"scale": jnp.float32(1)}, draw, loss, evaluate)


def adam(h):
    return optax.chain(optax.adam(h["learning_rate"]), counted())


def counted():
    """Measures something that changes: the count of steps."""
    return optax.GradientTransformation(
        lambda params: jnp.zeros(()), lambda updates, state, params=None: (updates, state + 1)
    )


EXPERIMENT = Experiment(
    id="E99",
    title="Least squares",
    source="nobody",
    data="noise",
    model="linear",
    build=build,
    arms=[
        Arm("sgd", "baseline", lambda h: optax.sgd(h["learning_rate"]), GRID),
        Arm("adam", "claim", adam, GRID, measure=lambda state: {"count": state[1]}),
        Arm(
            "matched",
            "mechanism-off",
            lambda h: optax.sgd(h["learning_rate"] * h["factor"]),
            matches="adam",
            match=lambda point, measured: {**point, "factor": measured["count"].mean() / 4.5},
        ),
    ],
    claims=[Claim("Adam is better", "adam", "sgd", "loss", "matched")],
    metrics=[LOSS, Metric("area", "mean loss", margin=1e-3, better=-1)],
    tune_on=LOSS,
    settings={"quick": SETTING},
    summaries={"area": area("loss")},
)


@pytest.fixture(autouse=True)
def _in_a_file(monkeypatch):
    # The key reads the experiment's own file by its module; importlib mode gives this one a name of its own.
    monkeypatch.setattr(store, "key_of", lambda experiment, setting: "0" * 8)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "key_of", lambda experiment, setting: "0" * 8)
        return folder, Run(EXPERIMENT, "quick", folder)()


def test_a_run_is_what_a_plain_loop_does(whole):
    """Neither `vmap`, blocks nor the scan change what is trained."""
    _, document = whole
    run = next(r for r in document["runs"] if r["arm"] == "sgd" and r["seed"] == 1)
    task = build({})
    params, drawn = task.draw(1)
    tx = optax.sgd(run["point"]["learning_rate"])
    state, curve = tx.init(params), []
    for step in range(8):
        updates, state = tx.update(jax.grad(task.loss)(params, {}, drawn, step), state)
        params = optax.apply_updates(params, updates)
        curve.append(float(task.evaluate(params, {"scale": 1.0}, drawn)["loss"]))
    # Eight steps of float32 arithmetic, stored with six digits.
    np.testing.assert_allclose(run["curves"]["loss"], curve[1::2], rtol=2e-5)
    assert run["final"]["loss"] == run["curves"]["loss"][-1]
    assert run["final"]["area"] == pytest.approx(np.mean(run["curves"]["loss"]), rel=1e-5)


def test_a_matched_arm_is_made_of_what_its_source_measured(whole):
    _, document = whole
    adam, matched = document["arms"]["adam"], document["arms"]["matched"]
    assert matched["point"]["factor"] == 1.0  # the mean of 1, 2, ..., 8
    assert matched["point"]["learning_rate"] == adam["point"]["learning_rate"]
    assert matched["trials"] == 0


def test_each_condition_has_its_own_task(tmp_path):
    """An arm is tuned and trained on the task of its condition; claims stay inside one."""
    built = []

    def build_with(sizes):
        built.append(sizes)
        return build(sizes)

    conditions = {"small": {"batch": 4}, "large": {"batch": 32}}
    arms, claims = across(conditions, EXPERIMENT.arms, EXPERIMENT.claims)
    experiment = dataclasses.replace(
        EXPERIMENT,
        arms=arms,
        claims=claims,
        conditions=conditions,
        build=build_with,
        settings={"quick": dataclasses.replace(SETTING, sizes={"batch": 1, "width": 2})},
    )
    document = Run(experiment, "quick", tmp_path)()
    assert built == [{"steps": 8, "batch": batch, "width": 2} for batch in (4, 32)]
    assert document["arms"]["matched (large)"]["matches"] == "adam (large)"
    assert [c.claim.baseline for c in conclude(document)] == ["sgd (small)", "sgd (large)"]
    report.write(tmp_path)
    with pytest.raises(ValueError, match="two conditions"):
        dataclasses.replace(
            experiment,
            claims=[Claim("mixed", "adam (small)", "sgd (large)", "loss")],
        )
    with pytest.raises(ValueError, match="no condition"):
        dataclasses.replace(experiment, conditions={"small": {}})


def test_halving_runs_the_first_part_of_a_run_and_keeps_the_best(whole, tmp_path):
    """Candidates train on seeds of their own; who is left is tuned and reported as any arm."""

    def at(factor):
        return lambda h: optax.sgd(factor * h["learning_rate"])

    makes = {"zero": at(0.0), "sgd": at(1.0), "ascent": at(-1.0)}
    candidates = [Arm(name, "candidate", make, GRID) for name, make in makes.items()]
    experiment = dataclasses.replace(
        EXPERIMENT,
        arms=[Arm("baseline", "baseline", at(1.0), GRID), *candidates],
        claims=[Claim(f"{name} is better", name, "baseline", "loss") for name in makes],
        settings={"quick": dataclasses.replace(SETTING, halving=((1, 2), (2, 1)))},
    )
    document = Run(experiment, "quick", tmp_path)()
    first, second = document["halving"]
    assert first["kept"] == ["sgd", "zero"]
    assert second["kept"] == ["sgd"]
    assert set(document["arms"]) == {"baseline", "sgd"}
    assert [c.claim.arm for c in conclude(document)] == ["sgd"]
    early = [r for r in document["runs"] if r["seed"] >= HALVING_SEEDS]
    assert {r["seed"] for r in early if r["arm"] == "ascent"} == {2000, 2001}
    assert {r["seed"] for r in early if r["arm"] == "zero"} == {2000, 2001, 2100, 2101}
    # One evaluation of four: two steps, from the same start on the same batches as the whole run.
    task = build({})
    params, drawn = task.draw(2000)
    for step in range(2):
        grads = jax.grad(task.loss)(params, {}, drawn, step)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
    (run,) = [
        r
        for r in early
        if (r["arm"], r["seed"], r["point"]) == ("sgd", 2000, {"learning_rate": 0.1})
    ]
    wanted = task.evaluate(params, {"scale": 1.0}, drawn)["loss"]
    np.testing.assert_allclose(run["final"]["loss"], wanted, rtol=2e-5)
    text = report.write(tmp_path).read_text()
    assert "3 for 2 steps, 2 for 4 steps; 1 were tuned" in text
    assert "the end, as number 1" in text
    again: list[int] = []
    Run(experiment, "quick", tmp_path, progress=lambda what, done, planned: again.append(done))()
    assert sum(again) == 0


def test_costs_are_in_the_file_and_the_report(tmp_path):
    """Arms are timed once, at their tuned hyperparameters, on the parameters that the experiment names."""
    experiment = dataclasses.replace(EXPERIMENT, timed=lambda: {"w": np.zeros(1000, np.float32)})
    run = Run(experiment, "quick", tmp_path)
    costs = json.loads(json.dumps(run()["costs"]))
    stored = json.loads(run.store.path.read_text())
    assert stored["costs"] == costs
    assert stored["runs"] == run.store.runs
    assert costs["adam"]["state_bytes"] == 2 * 4000 + 4 + 4  # two moments, two counts
    assert f"{costs['sgd']['step_microseconds']:.0f} µs" in report.write(tmp_path).read_text()
    assert Run(experiment, "quick", tmp_path)()["costs"] == costs


def test_an_interrupted_run_goes_on_and_ends_alike(whole, tmp_path):
    """Stopped after each block: nothing is trained twice, and the results are those of a run in one piece."""
    trained, interruptions = [], 0

    def stop_after_a_block(what, done, planned):
        # The first evaluation of a second block.
        trained.append(done)
        if sum(trained) % 4 == 1 and sum(trained) > 4:
            raise KeyboardInterrupt

    while True:
        trained.clear()
        try:
            document = Run(EXPERIMENT, "quick", tmp_path, progress=stop_after_a_block)()
        except KeyboardInterrupt:
            interruptions += 1
            continue
        break
    assert interruptions >= 3
    identities = [(r["arm"], str(r["point"]), r["seed"]) for r in document["runs"]]
    assert len(set(identities)) == len(identities)
    for arm in document["arms"]:
        np.testing.assert_allclose(
            values(document, arm, "loss"), values(whole[1], arm, "loss"), rtol=1e-5
        )
    again: list[int] = []
    Run(EXPERIMENT, "quick", tmp_path, progress=lambda what, done, planned: again.append(done))()
    assert sum(again) == 0


def test_more_seeds_train_only_these(whole, tmp_path):
    folder, _ = whole
    (file,) = folder.glob("*.json")
    (tmp_path / file.name).write_bytes(file.read_bytes())
    run = Run(EXPERIMENT, "quick", tmp_path, seeds=4, arms=["sgd"])
    before = len(run.store.runs)
    run()
    assert [(r["arm"], r["seed"]) for r in run.store.runs[before:]] == [("sgd", 3)]


def test_tuning_seeds_and_reported_seeds_are_disjoint(whole):
    _, document = whole
    seeds = {run["seed"] for run in document["runs"]}
    assert seeds == {0, 1, 2, 1000, 1001}
    assert all(("curves" in run) == (run["seed"] < 1000) for run in document["runs"])


def test_the_file_is_whole_at_every_moment(tmp_path, monkeypatch):
    run = Run(EXPERIMENT, "quick", tmp_path, arms=["sgd"])
    run()
    before = run.store.path.read_text()

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(store.os, "replace", fail)
    run.store.document["seconds"] = 1e9
    with pytest.raises(OSError, match="no space"):
        run.store.write()
    assert run.store.path.read_text() == before
    assert json.loads(before)["finished"] is not None


def test_the_report_is_what_the_files_say(whole, tmp_path):
    folder, document = whole
    (file,) = folder.glob("*.json")
    (tmp_path / file.name).write_bytes(file.read_bytes())
    text = report.write(tmp_path).read_text()
    (conclusion,) = conclude(json.loads(file.read_text()))
    assert f"**{conclusion.verdict}**" in text
    assert report.shown(conclusion.over_baseline, LOSS) in text
    for arm in document["arms"]:
        assert f"| {arm} |" in text
    picture = (tmp_path / "E99.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) < 80_000


def test_less_is_better_where_the_metric_says_so(whole):
    _, document = whole
    (conclusion,) = conclude(document)
    sgd, adam = (values(document, arm, "loss") for arm in ("sgd", "adam"))
    assert conclusion.over_baseline.interval.effect == pytest.approx(np.mean(sgd - adam))


def test_numbers_that_are_not_finite_are_null():
    assert store.plain({"a": [np.float32("nan"), float("inf"), np.float32(0.1)]}) == {
        "a": [None, None, 0.1]
    }
    assert np.isnan(store.number(None))


def test_an_unknown_arm_is_named():
    with pytest.raises(ValueError, match=r"no arm 'adm'; its arms are sgd, adam, matched"):
        with_sources(EXPERIMENT, ["adm"])


def test_an_arm_brings_what_it_is_made_from():
    assert [arm.name for arm in with_sources(EXPERIMENT, ["matched"])] == ["adam", "matched"]


def test_a_claim_names_arms_that_exist():
    with pytest.raises(ValueError, match="names what there is not"):
        dataclasses.replace(EXPERIMENT, claims=[Claim("x", "lion", "sgd", "loss")])
