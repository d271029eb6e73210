"""What each rank does in the tests of sharded parameters: `python ranks.py SCENARIOS RANK RANKS FILE`.

Every scenario trains a model on one process, and the same model on several, and raises where they differ.
"""

import functools
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optax
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from chainrule import TorchBridge, chains

# Sums of a few hundred products in another order, through six steps of a rate of at most 0.1.
TOLERANCE = 5e-5

CASMO_BY_PARAMETER = 'casmo(granularity="parameter")'
CHAINS: dict[str, Callable[[], Any]] = {
    "adamw": lambda: optax.adamw(1e-2),
    "lion": lambda: optax.lion(1e-2),
    "clip_by_global_norm": lambda: optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.1)),
    "lamb": lambda: optax.lamb(1e-2),
    "adafactor": lambda: optax.adafactor(1e-2, min_dim_size_to_factor=4),
    "noisy_sgd": lambda: optax.noisy_sgd(1e-2, key=0),
    "stam": lambda: chains.stam(1e-2),
    "stam_lite": lambda: chains.stam_lite(1e-2),
    "casmo": lambda: chains.casmo(1e-2),
    CASMO_BY_PARAMETER: lambda: chains.casmo(1e-2, granularity="parameter"),
    "casmo_snr": lambda: chains.casmo_snr(1e-2),
    "magma": lambda: chains.magma(optax.adamw(1e-2)),
    "muon": lambda: chains.muon(1e-2),
    "nadam": lambda: chains.nadam(1e-2),
    "cosmic": lambda: chains.cosmic(1e-2),
    "orthograd": lambda: chains.orthograd(optax.sgd(0.1)),
    "quantized_state": lambda: optax.chain(_quantized_adam(), optax.scale_by_learning_rate(1e-2)),
}
"""Those of the table for `ZeroRedundancyOptimizer`."""

TRAINED = CHAINS | {
    "clip_by_global_norm, adamw": lambda: optax.chain(
        optax.clip_by_global_norm(0.1), optax.adamw(1e-2)
    ),
}

COLLECTIVES = {
    **dict.fromkeys(("adamw", "lion", "noisy_sgd", "nadam"), 0),
    **dict.fromkeys(("lamb", "orthograd", "quantized_state"), 2),
    "cosmic": 2,
    "muon": 3,
    "adafactor": 4,
}
"""How many a step of a chain has on a mesh of one dimension; of the others one."""


def _quantized_adam() -> Any:
    from chainrule.transforms import quantized_state, scale_by_adam

    return quantized_state(scale_by_adam(), 8, 32)


def model(seed: int = 0) -> torch.nn.Module:
    """With an axis of 5 rows, which gives four ranks 2, 2, 1 and none."""
    torch.manual_seed(seed)
    return torch.nn.Sequential(
        torch.nn.Linear(6, 12),
        torch.nn.Tanh(),
        torch.nn.Linear(12, 5),
        torch.nn.LayerNorm(5),
        torch.nn.Linear(5, 3, bias=False),
    )


@functools.cache
def mesh(*sizes: int, names: tuple[str, ...] | None = None) -> DeviceMesh:
    """A mesh, which is made once: each has threads of gloo's, which never rest."""
    return init_device_mesh("cpu", sizes, mesh_dim_names=names)


def layouts(
    ranks: int, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Iterator[tuple[str, torch.nn.Module]]:
    """The model on every kind of mesh that a number of ranks makes."""
    plan: Any = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    made = model(seed).to(dtype)
    fully_shard(made, mesh=mesh(ranks))
    yield "FSDP2", made
    yield "DDP", DistributedDataParallel(model(seed).to(dtype))
    if ranks == 4:
        made = model(seed).to(dtype)
        fully_shard(made, mesh=mesh(2, 2, names=("copy", "shard")))
        yield "HSDP", made
        both = mesh(2, 2, names=("data", "model"))
        made = model(seed).to(dtype)
        parallelize_module(made, both["model"], plan)
        fully_shard(made, mesh=both["data"])
        yield "TP+FSDP2", made
        made = model(seed).to(dtype)
        parallelize_module(made, mesh(4, names=("model",)), plan)
        yield "TP", made


def step(net: torch.nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    x, y = (torch.randn(8, n, generator=generator) for n in (6, 3))

    def closure() -> Any:
        optimizer.zero_grad()
        loss = ((net(x) - y) ** 2).mean()
        loss.backward()
        return loss

    optimizer.step(closure)


def whole(tensor: Any) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def errors(net: torch.nn.Module, reference: torch.nn.Module) -> dict[str, float]:
    """How far the parameters are from those of the reference."""
    pairs = zip(net.named_parameters(), reference.parameters(), strict=True)
    return {name: (whole(own) - p.detach()).abs().max().item() for (name, own), p in pairs}


def check_same(what: str, net: torch.nn.Module, reference: torch.nn.Module) -> None:
    """The parameters are those of the reference, and equal to the bit on all ranks."""
    for name, error in errors(net, reference).items():
        assert error <= TOLERANCE, f"{what}: {name} is off by {error}"
    check_same_on_ranks(what, {name: whole(own) for name, own in net.named_parameters()})


def check_same_on_ranks(what: str, found: dict[str, torch.Tensor]) -> None:
    """Every rank has the same numbers, to the bit."""
    for name, full in found.items():
        assert is_same_on_ranks(full), f"{what}: ranks differ in {name}"


def is_same_on_ranks(full: torch.Tensor) -> bool:
    everyone = [torch.empty_like(full) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, full)
    return all(torch.equal(full, other) for other in everyone)


def trained(make: Callable[[], Any], net: torch.nn.Module, steps: int = 6, **options: Any) -> Any:
    optimizer = TorchBridge(make(), net.named_parameters(), **options)
    for number in range(steps):
        step(net, optimizer, number)
    return optimizer


def collectives(optimizer: TorchBridge) -> int:
    """How many a step has."""
    found = re.findall(r"collectives a step: (.*)", optimizer.explain(passes=True))
    return sum(int(n) for line in found for n in re.findall(r": (\d+)", line))


def allowed_collectives(name: str, kind: str, limits: dict[str, int] = COLLECTIVES) -> int:
    """How many a step of a chain may have on a kind of mesh."""
    found = limits.get(name, 1)
    return found + (4 if found and kind in ("HSDP", "TP+FSDP2") else 0)


def eager() -> None:
    for name, make in TRAINED.items():
        reference = model()
        trained(make, reference)
        for kind, net in layouts(dist.get_world_size()):
            optimizer = trained(make, net)
            check_same(f"{name}, {kind}", net, reference)
            allowed = allowed_collectives(name, kind)
            assert collectives(optimizer) <= allowed, optimizer.explain(passes=True)
            for p in net.parameters():
                for entry, value in optimizer.state[p].items():
                    alike = isinstance(p, DTensor) and value.shape == p.shape
                    assert isinstance(value, DTensor) == alike, (name, kind, entry)


def exchanged() -> None:
    """A trainer that puts new tensors into `group["params"]`, as Accelerate does for FSDP2."""
    for name in ("adamw", "stam"):
        reference, net = model(), model()
        expected = trained(CHAINS[name], reference, 3)
        optimizer = trained(CHAINS[name], net, 3)
        fully_shard(net, mesh=mesh(dist.get_world_size()))
        optimizer.param_groups[0]["params"] = list(net.parameters())
        for number in range(3, 6):
            step(reference, expected, number)
            step(net, optimizer, number)
        check_same(name, net, reference)


def frozen() -> None:
    """A layer that is frozen at first, and a parameter that never has a gradient."""
    reference = model()
    nets = [("one", reference), *layouts(dist.get_world_size())]
    for kind, net in nets:
        if kind not in ("one", "FSDP2", "TP+FSDP2"):
            continue
        layer: Any = net[2]
        layer.requires_grad_(False)
        optimizer = TorchBridge(chains.stam(1e-2), net.named_parameters())
        for number in range(2):
            step(net, optimizer, number)
        layer.requires_grad_(True)
        for number in range(2, 5):
            step(net, optimizer, number)
        check_same(kind, net, reference)


def refused() -> None:
    net = model()
    fully_shard(net, mesh=mesh(dist.get_world_size()))
    try:
        TorchBridge(optax.adam(1e-2), net.named_parameters(), engine="xla")
    except NotImplementedError as error:
        assert 'engine="xla"' in str(error) and "DTensor" in str(error)
    else:
        raise AssertionError("engine='xla' took a DTensor")
    for use_orig_params in (False, True):
        old = FullyShardedDataParallel(
            model(), use_orig_params=use_orig_params, device_id=torch.device("cpu")
        )
        try:
            TorchBridge(optax.adam(1e-2), old.named_parameters())
        except TypeError as error:
            assert "fully_shard" in str(error)
        else:
            raise AssertionError("FSDP1 was taken")


def in_jax() -> None:
    """`jax_state` sees whole tensors, and going on from it equals going on."""
    reference, net = model(), model()
    expected = trained(CHAINS["stam"], reference, 3)
    fully_shard(net, mesh=mesh(dist.get_world_size()))
    optimizer = trained(CHAINS["stam"], net, 3)
    optimizer.load_jax_state(optimizer.jax_state())
    for number in range(3, 6):
        step(reference, expected, number)
        step(net, optimizer, number)
    check_same("stam", net, reference)


def emptied() -> None:
    """Of an empty state torch makes one by a step with zero gradients, which changes no parameter."""
    for name in ("adamw", "stam", "muon"):
        net = model()
        fully_shard(net, mesh=mesh(dist.get_world_size()))
        optimizer = trained(CHAINS[name], net, 2)
        before = [whole(p).clone() for p in net.parameters()]
        rate = optimizer.param_groups[0]["lr"]
        optimizer.state.clear()
        found: Any = get_optimizer_state_dict(net, optimizer)["state"]
        assert set(found) == dict(net.named_parameters()).keys(), name
        after = [whole(p) for p in net.parameters()]
        assert all(map(torch.equal, before, after)), name
        assert optimizer.param_groups[0]["lr"] == rate, name


def save() -> None:
    folder = Path(sys.argv[4]).with_name("checkpoint")
    for name in ("adamw", "stam", "muon"):
        net = model()
        fully_shard(net, mesh=mesh(dist.get_world_size()))
        optimizer = trained(CHAINS[name], net, 3)
        state = {"model": net.state_dict(), "optimizer": get_optimizer_state_dict(net, optimizer)}
        state_dict_saver.save(state, checkpoint_id=f"{folder}/{name}")
        for number in range(3, 6):
            step(net, optimizer, number)
        reference = model()
        trained(CHAINS[name], reference)
        check_same(f"{name}, saved", net, reference)
        final = {k: whole(p) for k, p in net.named_parameters()}
        if dist.get_rank() == 0:
            torch.save(final, f"{folder}/{name}.pt")


def load() -> None:
    folder = Path(sys.argv[4]).with_name("checkpoint")
    for name in ("adamw", "stam", "muon"):
        net = model()
        if dist.get_world_size() > 1:
            fully_shard(net, mesh=mesh(dist.get_world_size()))
        optimizer = TorchBridge(CHAINS[name](), net.named_parameters())
        state = {"model": net.state_dict(), "optimizer": get_optimizer_state_dict(net, optimizer)}
        state_dict_loader.load(state, checkpoint_id=f"{folder}/{name}")
        net.load_state_dict(state["model"])
        set_optimizer_state_dict(net, optimizer, state["optimizer"])
        for number in range(3, 6):
            step(net, optimizer, number)
        for key, expected in torch.load(f"{folder}/{name}.pt").items():
            error = (whole(dict(net.named_parameters())[key]) - expected).abs().max().item()
            assert error <= TOLERANCE, f"{name}: {key} is off by {error}"


def run_scenarios(scenarios: dict[str, Any]) -> None:
    """Joins the other ranks, and calls the scenarios that the command line names, with commas between."""
    names, rank, ranks, file = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    # FSDP and DTensor warn of what they do themselves.
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=ranks)
    for name in names.split(","):
        scenarios[name]()
    dist.destroy_process_group()


if __name__ == "__main__":
    run_scenarios(globals())
