"""The training loops of others drive `TorchBridge`, its classes and `TorchWrap`: they run and resume.

transformers, Lightning and its command line, Accelerate, paths in configurations; timm where it is installed.
"""

import functools
import importlib
import importlib.util
import json
import os
import socket
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optax
import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from chainrule import TorchBridge, TorchWrap, chains, torch_optimizers, transforms


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


def _gpt2(dropout: float = 0.1) -> Any:
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
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout),
    )
    return GPT2LMHeadModel(config)


def _trainer(
    folder: Path,
    net: Any,
    steps: int,
    stop: int | None = None,
    named: tuple[Any, dict[str, Any]] | None = None,
    **arguments_: Any,
) -> Any:
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
        **{"per_device_train_batch_size": 8, **arguments_},
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
    how: dict[str, Any] = {"optimizer_cls_and_kwargs": named}
    if named is None:
        optimizer = TorchBridge(chains.stam(3e-3), net.named_parameters())
        how = {"optimizers": (optimizer, get_cosine_schedule_with_warmup(optimizer, 2, steps))}
    return Trainer(
        model=net,
        args=arguments,
        train_dataset=data,  # pyright: ignore[reportArgumentType]
        **how,
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


def _plateau() -> Any:
    # Lightning passes a closure to every step, so chains that read the loss work too.
    return optax.chain(
        optax.inject_hyperparams(optax.adamw)(0.01), optax.contrib.reduce_on_plateau()
    )


def _lightning_module(make: Callable[[], Any] = _plateau) -> Any:
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
            optimizer = TorchBridge(make(), self.named_parameters())
            return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]

    return Classifier()


def _lightning_trainer(folder: Path, epochs: int, **arguments: Any) -> Any:
    import lightning

    return lightning.Trainer(
        default_root_dir=folder,
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **arguments,
    )


def _lightning_data(batch: int, rank: int | None = None) -> Any:
    """Batches of the samples in order; of every second one for each of two ranks."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(32, 6, generator=generator), torch.randint(3, (32,), generator=generator)
    if rank is not None:
        x, y = x[rank::2], y[rank::2]
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=batch)


@_needs("lightning")
def test_lightning_runs_and_resumes(tmp_path: Path) -> None:
    data = _lightning_data(8)
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


def _adam(net: nn.Module) -> Any:
    return TorchBridge(chains.adam(0.01), net.named_parameters())


def _accelerated(
    folder: Path, steps: range, load: bool, save: bool, make: Callable[[nn.Module], Any] = _adam
) -> torch.Tensor:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(
        reset_partial_state=True
    )  # what another test's Trainer left behind
    GradientState._reset_state()
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = make(net)
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


# ---- two ranks -----------------------------------------------------------------------------


def _rank(rank: int, port: int, body: Callable[[Path], torch.Tensor], folder: Path) -> None:
    warnings.simplefilter("ignore")
    found = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    os.environ.update({name: str(value) for name, value in found.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ["TORCHELASTIC_RUN_ID"] = "chainrule"  # or Lightning starts the ranks itself
    torch.set_num_threads(1)
    torch.save(body(folder / str(rank)), folder / f"{rank}.pt")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def on_two_ranks(body: Callable[[Path], torch.Tensor], folder: Path) -> torch.Tensor:
    """The weights that a body trains in each of two processes, which must be the same."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_rank, (port, body, folder), nprocs=2)  # pyright: ignore[reportPrivateImportUsage]
    one, other = (torch.load(folder / f"{rank}.pt") for rank in range(2))
    assert torch.equal(one, other)
    return one


def _stam() -> Any:
    return chains.stam(0.01)


def _lightning_rank(folder: Path) -> torch.Tensor:
    net = _lightning_module(_stam)
    # Its own sampler would shuffle.
    trainer = _lightning_trainer(
        folder, 2, devices=2, strategy="ddp", use_distributed_sampler=False
    )
    trainer.fit(net, _lightning_data(8, int(os.environ["RANK"])))
    return weights(net)


@_needs("lightning")
def test_lightning_on_two_ranks_is_as_on_one_of_twice_the_batch(tmp_path: Path) -> None:
    two = on_two_ranks(_lightning_rank, tmp_path)
    net = _lightning_module(_stam)
    _lightning_trainer(tmp_path, 2).fit(net, _lightning_data(16))
    torch.testing.assert_close(two, weights(net), rtol=0, atol=5e-5)


def _transformers_rank(folder: Path) -> torch.Tensor:
    net = _gpt2(dropout=0.0)
    _trainer(folder, net, steps=4, ddp_backend="gloo").train()
    return weights(net)


@_needs("transformers")
@_needs("accelerate")
def test_transformers_on_two_ranks_is_as_on_one_of_twice_the_batch(tmp_path: Path) -> None:
    two = on_two_ranks(_transformers_rank, tmp_path)
    net = _gpt2(dropout=0.0)
    _trainer(tmp_path, net, steps=4, per_device_train_batch_size=16).train()
    torch.testing.assert_close(two, weights(net), rtol=0, atol=5e-5)


def _trained(shard: bool) -> torch.Tensor:
    """A net that is sharded after two steps, as `Accelerator.prepare` shards with its FSDP2 plugin, not on CPUs."""
    from accelerate.utils.fsdp_utils import fsdp2_switch_optimizer_parameters

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer: Any = TorchBridge(_stam(), net.named_parameters())
    for step in range(6):
        if step == 2 and shard:
            old = {name: p.data_ptr() for name, p in net.named_parameters()}
            for group in optimizer.param_groups:
                for i, p in enumerate(group["params"]):
                    group["params"][i] = torch.empty(1)
                    group["params"][i].data_ptr = p.data_ptr()
            fully_shard(net)
            mapping = {old[name]: p for name, p in net.named_parameters()}
            fsdp2_switch_optimizer_parameters(optimizer, mapping)
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(8, 6, generator=generator), torch.randint(3, (8,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in net.parameters()]
    return torch.cat([p.detach().flatten() for p in whole])


def _accelerate_rank(folder: Path) -> torch.Tensor:
    del folder
    torch.distributed.init_process_group("gloo")
    return _trained(shard=True)


@_needs("accelerate")
def test_parameters_that_accelerate_exchanges_go_on(tmp_path: Path) -> None:
    two = on_two_ranks(_accelerate_rank, tmp_path)
    torch.testing.assert_close(two, _trained(shard=False), rtol=0, atol=5e-5)


# ---- classes by name -----------------------------------------------------------------------

NAMED = {
    "Stam": {"betas": (0.95, 0.99)},
    "Muon": {"exclude": []},
    "Grokfast": {"base": "Casmo", "lamb": 1.0},
}
"""A chain, a chain that routes, and one around another: what a JSON file would hold of each."""


def _by_name(folder: Path, net: Any, name: str, steps: int, stop: int | None = None) -> Any:
    arguments: dict[str, Any] = {"lr": 3e-3, **NAMED[name]}
    if name == "Muon":
        arguments["model"] = net  # transformers hands it on in place of the parameters
        del arguments["exclude"]
    cls = getattr(torch_optimizers, name)
    return _trainer(folder, net, steps, stop, (cls, arguments))


@_needs("transformers")
@_needs("accelerate")
@pytest.mark.parametrize("name", NAMED)
def test_transformers_trainer_takes_a_class_and_resumes(tmp_path: Path, name: str) -> None:
    whole = _gpt2()
    trainer = _by_name(tmp_path / "whole", whole, name, steps=6)
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    assert type(optimizer) is getattr(torch_optimizers, name)
    if name == "Muon":
        labels = {route.path: route.label for route in optimizer.plan().routes}
        assert (
            labels["transformer.wte.weight"] == "adam"
            and labels["transformer.h.0.mlp.c_fc.weight"] == "muon"
        )
        assert labels.keys() == dict(whole.named_parameters()).keys()
    _by_name(tmp_path / "parts", _gpt2(), name, steps=6, stop=3).train()
    net = _gpt2()
    _by_name(tmp_path / "parts", net, name, steps=6).train(resume_from_checkpoint=True)
    torch.testing.assert_close(weights(net), weights(whole), rtol=0, atol=0)


def _configured(optimizer: Any) -> Any:
    import lightning

    class Configured(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            x, y = batch
            return nn.functional.cross_entropy(self.net(x), y)

        def configure_optimizers(self) -> Any:
            return optimizer(self.parameters())

    return Configured


@_needs("lightning")
@pytest.mark.parametrize("name", NAMED)
def test_lightning_configures_a_class_and_resumes(tmp_path: Path, name: str) -> None:
    def optimizer(params: Any) -> Any:
        return getattr(torch_optimizers, name)(params, lr=0.01, **NAMED[name])

    module = _configured(optimizer)
    whole, net = module(), module()
    _lightning_trainer(tmp_path, 4).fit(whole, _lightning_data(8))
    part = _lightning_trainer(tmp_path, 2)
    part.fit(module(), _lightning_data(8))
    part.save_checkpoint(tmp_path / "half.ckpt")
    _lightning_trainer(tmp_path, 4).fit(
        net, _lightning_data(8), ckpt_path=str(tmp_path / "half.ckpt")
    )
    torch.testing.assert_close(weights(net), weights(whole), rtol=0, atol=0)


@_needs("lightning")
@_needs("jsonargparse")
@pytest.mark.parametrize("name", NAMED)
def test_the_lightning_command_line_reads_a_class_from_yaml(tmp_path: Path, name: str) -> None:
    import yaml
    from lightning.pytorch.cli import LightningCLI, OptimizerCallable
    from lightning.pytorch.demos.boring_classes import BoringModel

    class FromFile(BoringModel):
        def __init__(self, optimizer: OptimizerCallable):
            super().__init__()
            self.optimizer = optimizer

        def configure_optimizers(self) -> Any:
            return self.optimizer(self.parameters())

    path = f"chainrule.torch_optimizers.{name}"
    own = {"class_path": path, "init_args": {"lr": 0.02, **NAMED[name]}}
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({"model": {"optimizer": json.loads(json.dumps(own))}}))
    trainer = {"accelerator": "cpu", "max_steps": 2, "logger": False, "enable_checkpointing": False}
    trainer |= {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": str(tmp_path),
    }
    cli = LightningCLI(
        FromFile,
        args=["fit", f"--config={file}"],
        trainer_defaults=trainer,
        save_config_callback=None,
    )
    (optimizer,) = cli.trainer.optimizers
    assert type(optimizer) is getattr(torch_optimizers, name)
    assert optimizer.param_groups[0]["lr"] == 0.02 and cli.trainer.global_step == 2


@_needs("accelerate")
@pytest.mark.parametrize("name", NAMED)
def test_accelerate_prepares_a_class_and_resumes(tmp_path: Path, name: str) -> None:
    make = functools.partial(_named_optimizer, name)
    whole = _accelerated(tmp_path, range(8), load=False, save=False, make=make)
    _accelerated(tmp_path, range(4), load=False, save=True, make=make)
    resumed = _accelerated(tmp_path, range(4, 8), load=True, save=False, make=make)
    torch.testing.assert_close(resumed, whole, rtol=0, atol=0)


def _named_optimizer(name: str, net: nn.Module) -> Any:
    return getattr(torch_optimizers, name)(net.named_parameters(), lr=0.01, **NAMED[name])


@_needs("accelerate")
def test_accelerate_prepares_links_around_an_optimizer(tmp_path: Path) -> None:
    def make(net: nn.Module) -> Any:
        base = torch.optim.AdamW(net.parameters(), lr=0.01)
        return TorchWrap(
            base, before=transforms.grokfast_ema(), after=transforms.momentum_alignment_mask()
        )

    whole = _accelerated(tmp_path, range(8), load=False, save=False, make=make)
    _accelerated(tmp_path, range(4), load=False, save=True, make=make)
    resumed = _accelerated(tmp_path, range(4, 8), load=True, save=False, make=make)
    torch.testing.assert_close(resumed, whole, rtol=0, atol=0)


def _stepped(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        inputs = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(inputs), torch.arange(8) % 3).backward()
        optimizer.step()


def _runs_and_resumes(make: Callable[[nn.Module], torch.optim.Optimizer], path: Path) -> None:
    """Eight steps are four steps, a file, and four more."""

    def started() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
        return net, make(net)

    whole, optimizer = started()
    _stepped(whole, optimizer, range(8))
    net, optimizer = started()
    _stepped(net, optimizer, range(4))
    torch.save((net.state_dict(), optimizer.state_dict()), path)
    net, optimizer = started()
    for each, saved in zip((net, optimizer), torch.load(path), strict=True):
        each.load_state_dict(saved)
    _stepped(net, optimizer, range(4, 8))
    torch.testing.assert_close(weights(net), weights(whole), rtol=0, atol=0)


@_needs("timm")
@_needs("torchvision")
@pytest.mark.parametrize("name", NAMED)
def test_timm_creates_a_class_by_name_and_resumes(tmp_path: Path, name: str) -> None:
    torch_optimizers.register_timm()
    create = importlib.import_module("timm.optim").create_optimizer_v2

    def make(net: nn.Module) -> torch.optim.Optimizer:
        opt = f"chainrule-{name.lower()}"
        optimizer = create(net, opt, lr=0.01, weight_decay=0.1, **NAMED[name])
        assert type(optimizer) is getattr(torch_optimizers, name)
        assert sorted(g["weight_decay"] for g in optimizer.param_groups) == [0.0, 0.1]
        return optimizer

    _runs_and_resumes(make, tmp_path / "checkpoint.pt")


@pytest.mark.parametrize("name", NAMED)
def test_a_component_of_a_configuration_is_found_by_its_path_and_resumes(
    tmp_path: Path, name: str
) -> None:
    """As torchtune does: it looks `_component_` up part by part, and calls it with the other keys."""
    yaml = pytest.importorskip("yaml")
    path = tmp_path / "config.yaml"
    node = {"_component_": f"chainrule.torch_optimizers.{name}", "lr": 0.01, **NAMED[name]}
    path.write_text(json.dumps({"optimizer": node}))

    def make(net: nn.Module) -> torch.optim.Optimizer:
        arguments = yaml.safe_load(path.read_text())["optimizer"]
        package, *rest = arguments.pop("_component_").split(".")
        found = importlib.import_module(package)
        for part in rest:
            found = getattr(found, part)
        return found(net.parameters(), **arguments)

    _runs_and_resumes(make, tmp_path / "checkpoint.pt")
