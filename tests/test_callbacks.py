"""`chainrule.callbacks`: what is written, when, and that nothing is read from the device in between."""

import csv
import importlib.util
import sys

import jax
import jax.numpy as jnp
import optax
import pytest
import torch

from chainrule import TorchBridge, callbacks, chains, metrics
from chainrule.callbacks import MetricsLogger, TensorBoardLogger, WandbLogger, scalars

PARAMS = {"w": jnp.ones((4, 3)), "b": jnp.ones(3)}


class Counting:
    """An optimizer that counts how often it is asked."""

    def __init__(self):
        self.asked = 0

    def metrics(self):
        self.asked += 1
        return {"gate": torch.tensor(0.5)}


def model_and_bridge(tx):
    model = torch.nn.Linear(3, 2)
    optimizer = TorchBridge(tx, model.named_parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return optimizer


def test_scalars_are_the_metrics():
    tx = chains.stam()
    _, state = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    known, found = metrics(state), scalars(state, per_parameter=True)
    assert found == {
        "b1/w": float(known["b1"]["w"]),
        "b1/b": float(known["b1"]["b"]),
        "nonfinite/w": 0.0,
        "nonfinite/b": 0.0,
        "state_bytes": known["state_bytes"],
    }
    short, values = scalars(state), [float(x) for x in known["b1"].values()]
    assert short["b1/min"] == min(values) and short["b1/max"] == max(values)
    assert short["b1/mean"] == pytest.approx(sum(values) / 2, rel=1e-15)


def test_a_bridge_and_what_wraps_one():
    optimizer = model_and_bridge(chains.stam())
    wrapped = torch.nn.Module()
    wrapped.optimizer = optimizer
    assert scalars(wrapped) == scalars(optimizer)
    assert scalars(optimizer)["b1/max"] == max(map(float, optimizer.metrics()["b1"].values()))


@pytest.mark.parametrize("source", ["state", "bridge"])
def test_a_vector_has_a_number_for_each_entry(source):
    tx = chains.casmo()
    found = scalars(tx.init(PARAMS) if source == "state" else model_and_bridge(tx))
    assert {f"percentiles/{i}": found.get(f"percentiles/{i}") for i in range(3)} == dict.fromkeys(
        ("percentiles/0", "percentiles/1", "percentiles/2"), 0.0
    )
    assert "tau" in found and "percentiles" not in found


def test_groups_and_tiers():
    groups = [{"params": [torch.nn.Parameter(torch.ones(2))]} for _ in range(2)]
    found = scalars(TorchBridge(chains.cosmic(), groups))
    assert found["group0/tier_occupancy/0"] == found["group1/tier_occupancy/0"] == 1


def test_a_chain_without_metrics_has_its_bytes():
    state = optax.sgd(0.1).init(PARAMS)
    assert scalars(state) == {"state_bytes": 0}


def test_every_n_steps_and_never_twice():
    written, source = [], Counting()
    logger = MetricsLogger(lambda values, step: written.append((step, values)), every=3)
    for step in (1, 2, 3, 3, 4, 5, 6):  # with gradients accumulated a step comes twice
        logger(source, step)
    assert written == [(3, {"chainrule/gate": 0.5}), (6, {"chainrule/gate": 0.5})]
    assert source.asked == 2


def test_between_two_times_nothing_is_read(monkeypatch):
    """Neither in JAX nor in torch."""
    tx = chains.stam()
    state, optimizer = tx.init(PARAMS), model_and_bridge(chains.stam())
    loggers = [MetricsLogger(lambda *_: None, every=10) for _ in range(2)]

    def refuse(*_, **__):
        raise AssertionError("read from the device")

    with monkeypatch.context() as patched:
        patched.setattr(jax, "device_get", refuse)
        for name in ("tolist", "item", "cpu", "numpy"):
            patched.setattr(torch.Tensor, name, refuse)
        for step in range(1, 10):
            assert not loggers[0](state, step) and not loggers[1](optimizer, step)
        with pytest.raises(AssertionError, match="read from the device"):
            loggers[0](state, 10)
        with pytest.raises(AssertionError, match="read from the device"):
            loggers[1](optimizer, 10)


def test_at_one_of_them_all_values_come_together(monkeypatch):
    optimizer, calls = model_and_bridge(chains.casmo_snr()), []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda t: calls.append(t.shape) or tolist(t))
    assert len(scalars(optimizer, per_parameter=True)) >= 3
    assert len(calls) == 1


def test_wandb_gets_a_dictionary_and_the_step():
    class Run:
        def log(self, values, *, step):
            self.last = values, step

    run = Run()
    WandbLogger(run, every=2, prefix="optimizer/")(Counting(), 2)
    assert run.last == ({"optimizer/gate": 0.5}, 2)


@pytest.mark.skipif(
    not importlib.util.find_spec("tensorboard"), reason="tensorboard is not installed"
)
def test_tensorboard_reads_back_what_was_written(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import (  # pyright: ignore
        EventAccumulator,
    )

    tx, logger = chains.stam(), TensorBoardLogger(tmp_path, every=2)
    state, expected = tx.init(PARAMS), []
    for step in range(1, 7):
        _, state = tx.update(PARAMS, state, PARAMS)
        if logger(state, step):
            expected.append((step, scalars(state)["b1/mean"]))
    logger.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    got = [(event.step, event.value) for event in events.Scalars("chainrule/b1/mean")]
    assert [step for step, _ in got] == [2, 4, 6]
    assert [v for _, v in got] == pytest.approx([v for _, v in expected], rel=2**-23)


def test_errors(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match=r"WandbLogger: `every` must be at least 1, got 0"):
        WandbLogger(None, every=0)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="needs torch and tensorboard, or tensorboardX"):
        TensorBoardLogger(tmp_path)


# ---- trainers ----------------------------------------------------------------------------------


@pytest.mark.clients
@pytest.mark.filterwarnings("ignore")
def test_lightning(tmp_path):
    import lightning.pytorch as pl
    from lightning.pytorch.loggers import CSVLogger

    from chainrule.callbacks import LightningMetrics

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(3, 1)

        def training_step(self, batch):
            return self.layer(batch[0]).square().mean()

        def configure_optimizers(self):
            return TorchBridge(chains.stam(), self.named_parameters())

    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(8, 3)))
    logger = CSVLogger(tmp_path)
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=logger,
        callbacks=[LightningMetrics(every=4)],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(), data)
    with open(f"{logger.log_dir}/metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["chainrule/b1/mean"]]
    assert [row["step"] for row in rows] == ["4", "8"]


@pytest.mark.clients
@pytest.mark.filterwarnings("ignore")
def test_transformers():
    import transformers

    from chainrule.callbacks import TransformersMetrics

    written = []
    logger = MetricsLogger(lambda values, step: written.append((step, values)), every=2)
    optimizer = model_and_bridge(chains.stam())
    callback = TransformersMetrics(logger)
    for step in (1, 2, 3):
        state = transformers.TrainerState(global_step=step)
        callback.on_step_end(None, state, None, optimizer=optimizer)
    assert [step for step, _ in written] == [2] and "chainrule/b1/mean" in written[0][1]


@pytest.mark.parametrize(
    ("name", "library"),
    [("LightningMetrics", "lightning"), ("TransformersMetrics", "transformers")],
)
def test_a_trainer_that_is_not_there_is_named_with_what_installs_it(name, library, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)  # what Python takes for not there
    monkeypatch.delitem(sys.modules, f"chainrule.callbacks.{library}", raising=False)
    with pytest.raises(
        ModuleNotFoundError, match=r'install it with: pip install "chainrule\[clients\]"'
    ):
        getattr(callbacks, name)
