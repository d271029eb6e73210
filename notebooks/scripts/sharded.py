"""Data-parallel and fully sharded training on two processes, with any chain: DDP, then FSDP2.

    python notebooks/scripts/sharded.py [--quick]        # two processes over gloo, on this machine
    torchrun --nproc-per-node 8 notebooks/scripts/sharded.py

Both trainings see the same data in the same order, and end at the same weights as one process would.
"""

import argparse
import os
import socket

import torch
from torch import distributed, multiprocessing, nn
from torch.distributed.fsdp import fully_shard

import chainrule


def new_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 4))


def train(model: nn.Module, rank: int, world: int, steps: int) -> tuple[float, float]:
    """The first and the last loss over all ranks' rows."""
    optimizer = chainrule.TorchBridge(chainrule.chains.stam(1e-2), model.named_parameters())
    torch.manual_seed(1)
    inputs = torch.randn(64, 16)
    targets = inputs[:, :4].sin()
    own = slice(rank * 64 // world, (rank + 1) * 64 // world)
    losses = []
    for _ in range(steps):
        loss = ((model(inputs[own]) - targets[own]) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = loss.detach() / world
        distributed.all_reduce(mean)
        losses.append(mean.item())
    return losses[0], losses[-1]


def work(rank: int, world: int, steps: int) -> None:
    distributed.init_process_group("gloo", rank=rank, world_size=world)
    replicated = train(nn.parallel.DistributedDataParallel(new_model()), rank, world, steps)
    model = new_model()
    fully_shard(model, mesh=distributed.init_device_mesh("cpu", (world,)))
    sharded = train(model, rank, world, steps)
    if rank == 0:
        print(f"DDP   {replicated[0]:.4f} -> {replicated[1]:.4f}")
        print(f"FSDP2 {sharded[0]:.4f} -> {sharded[1]:.4f}")
        assert sharded[1] < sharded[0], "the loss did not fall"
        assert abs(sharded[1] - replicated[1]) < 1e-3 * replicated[0], "the two differ"
    distributed.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a smoke test: seconds")
    steps = 20 if parser.parse_args().quick else 500
    if "RANK" in os.environ:  # started by torchrun
        work(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), steps)
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    multiprocessing.spawn(work, (2, steps), nprocs=2)


if __name__ == "__main__":
    main()
