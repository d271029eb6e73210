"""The training loops of others drive `TorchBridge`: transformers, Lightning, Accelerate. All three run and resume."""

import importlib.util
import os
from pathlib import Path
from typing import Any

import optax
import pytest
import torch
from torch import nn

from chainrule import TorchBridge, chains


def _needs(package: str) -> Any:
    absent = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(absent, reason=f"{package} is not installed (extra `clients`)")


# Their own deprecations and notices are not ours to fail on.
pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("WANDB_DISABLED", "true")


def weights(net: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters()])


# ---- Hugging Face Trainer ------------------------------------------------------------------


def _gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=64,
        n_positions=16,
        n_embd=32,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


def _trainer(folder: Path, net: Any, steps: int, stop: int | None = None) -> Any:
    from transformers import (
        Trainer,
        TrainerCallback,
        TrainingArguments,
        get_cosine_schedule_with_warmup,
    )

    class StopAt(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
            if state.global_step == stop:
                control.should_training_stop = control.should_save = True
            return control

    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(64, (48, 16), generator=generator)
    data = [{"input_ids": row, "labels": row} for row in tokens]
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=8,
        max_steps=steps,
        save_steps=3,
        logging_steps=1,
        report_to=[],
        seed=0,
        use_cpu=True,
        dataloader_pin_memory=False,
        max_grad_norm=1.0,
        disable_tqdm=True,
    )
    optimizer = TorchBridge(chains.stam(3e-3), net.named_parameters())
    scheduler = get_cosine_schedule_with_warmup(optimizer, 2, steps)
    return Trainer(
        model=net,
        args=arguments,
        train_dataset=data,  # pyright: ignore[reportArgumentType]
        optimizers=(optimizer, scheduler),
        callbacks=[StopAt()],
    )


@_needs("transformers")
@_needs("accelerate")
def test_transformers_trainer_runs_and_resumes(tmp_path: Path) -> None:
    whole = _gpt2()
    trainer = _trainer(tmp_path / "whole", whole, steps=8)
    result = trainer.train()
    assert result.global_step == 8
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]

    half = _trainer(tmp_path / "parts", _gpt2(), steps=8, stop=3)
    half.train()
    assert half.state.global_step == 3
    net = _gpt2()
    resumed = _trainer(tmp_path / "parts", net, steps=8)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 8
    torch.testing.assert_close(weights(net), weights(whole), rtol=0, atol=0)


# ---- Lightning -----------------------------------------------------------------------------


def _lightning_module() -> Any:
    import lightning

    class Classifier(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            x, y = batch
            return nn.functional.cross_entropy(self.net(x), y)

        def configure_optimizers(self) -> Any:
            # Lightning passes a closure to every step, so chains that read the loss work too.
            chain = optax.chain(
                optax.inject_hyperparams(optax.adamw)(0.01), optax.contrib.reduce_on_plateau()
            )
            optimizer = TorchBridge(chain, self.named_parameters())
            return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]

    return Classifier()


def _lightning_trainer(folder: Path, epochs: int) -> Any:
    import lightning

    return lightning.Trainer(
        default_root_dir=folder,
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )


@_needs("lightning")
def test_lightning_runs_and_resumes(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(32, 6, generator=generator), torch.randint(3, (32,), generator=generator)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=8)
    whole = _lightning_module()
    _lightning_trainer(tmp_path, 4).fit(whole, data)

    part = _lightning_trainer(tmp_path, 2)
    part.fit(_lightning_module(), data)
    part.save_checkpoint(tmp_path / "half.ckpt")
    net = _lightning_module()
    resumed = _lightning_trainer(tmp_path, 4)
    resumed.fit(net, data, ckpt_path=str(tmp_path / "half.ckpt"))
    assert resumed.global_step == 16
    torch.testing.assert_close(weights(net), weights(whole), rtol=0, atol=0)


# ---- Accelerate ----------------------------------------------------------------------------


def _accelerated(folder: Path, steps: range, load: bool, save: bool) -> torch.Tensor:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(
        reset_partial_state=True
    )  # what another test's Trainer left behind
    GradientState._reset_state()
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = TorchBridge(chains.adam(0.01), net.named_parameters())
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=10)
    net, optimizer, scheduler = accelerator.prepare(net, optimizer, scheduler)
    if load:
        accelerator.load_state(str(folder))
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(8, 6, generator=generator), torch.randint(3, (8,), generator=generator)
        with accelerator.accumulate(net):
            accelerator.backward(nn.functional.cross_entropy(net(x), y))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    if save:
        accelerator.save_state(str(folder))
    accelerator.free_memory()
    return weights(net)


@_needs("accelerate")
def test_accelerate_runs_and_resumes(tmp_path: Path) -> None:
    whole = _accelerated(tmp_path, range(12), load=False, save=False)
    _accelerated(tmp_path, range(6), load=False, save=True)
    assert os.listdir(tmp_path)
    resumed = _accelerated(tmp_path, range(6, 12), load=True, save=False)
    torch.testing.assert_close(resumed, whole, rtol=0, atol=0)
