"""What each rank does in the matrix of chains and meshes: `python matrix.py SCENARIOS RANK RANKS FILE PART PARTS`.

A cell is a chain on a kind of mesh, eager or compiled, in float32 or in bfloat16 with stochastic rounding, against one
process. The first rank prints a line for each. Nothing stops at one that is wrong; at the end all are named.
"""

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[3]))
from tests.bridges.distributed.ranks import (
    COLLECTIVES,
    TOLERANCE,
    TRAINED,
    allowed_collectives,
    collectives,
    errors,
    is_same_on_ranks,
    layouts,
    model,
    run_scenarios,
    trained,
    whole,
)

from chainrule import TorchBridge
from optax_cases import NAMED

CELLS: dict[str, Callable[[], Any]] = TRAINED | {
    case.name: case.make for case in NAMED if not case.loss and not case.batch
}
LIMITS = {
    **dict.fromkeys((name for name in CELLS if name not in TRAINED), 0),
    **dict.fromkeys(("optax.novograd", "optax.polyak_sgd", "optax.contrib.dog"), 1),
    "optax.contrib.dowg": 1,
    **dict.fromkeys(("optax.fromage", "optax.lamb", "optax.lars", "optax.contrib.momo"), 2),
    **dict.fromkeys(
        ("optax.contrib.momo_adam", "optax.contrib.dadapt_adamw", "optax.contrib.prodigy"), 2
    ),
    **dict.fromkeys(("optax.adafactor", "optax.sm3"), 3),
    **dict.fromkeys(("optax.contrib.galore", "optax.contrib.muon"), 3),
    **COLLECTIVES,
}
"""How many collectives a step may have on a mesh of one dimension; of those of `TRAINED` that are not here one."""
DIAGONAL = {"TP+FSDP2": "stam", "HSDP": "clip_by_global_norm", "TP": "lion"}
"""What is compiled where there is no time for the matrix: a chain for every kind of mesh of four ranks."""
STEPS = 6
NOT_IN_BFLOAT16 = {"optax.novograd"}
"""Chains that fail in optax: novograd's state begins in bfloat16 and goes on in float32."""


def part() -> list[str]:
    """The chains of this run: every so-many-th."""
    number, of = map(int, sys.argv[5:7])
    return list(CELLS)[number::of]


def training(name: str, how: str, only: str = "", **options: Any) -> list[str]:
    """In float32, by real gradients; returns the cells that are wrong."""
    reference, wrong = model(), []
    trained(CELLS[name], reference)
    for kind, net in layouts(dist.get_world_size()):
        if only in ("", kind):
            optimizer = trained(CELLS[name], net, **options)
            error = torch.tensor(list(errors(net, reference).values())).max().item()
            same = all(is_same_on_ranks(whole(p)) for p in net.parameters())
            count = collectives(optimizer)
            right = error <= TOLERANCE and same and count <= allowed_collectives(name, kind, LIMITS)
            wrong += tell(right, f"{how} | {name} | {kind} | {error:.1e} | {same} | {count}")
    return wrong


def rounding(name: str, how: str, only: str = "", **options: Any) -> list[str]:
    """In bfloat16, by gradients that are made by hand; returns the cells that are wrong.

    Sums in another order move an update by some 1e-6 of itself, which is less than 1e-4 of the distance of two
    bfloat16 numbers: so rarely an entry lies on the other side of its random bits, where it is rounded to the next.
    Compiled code rounds to bfloat16 between its pieces, and these are others where a sum is over several ranks: an
    update moves by up to 2**-8 of itself, so an entry does so more often, by 2**-8 of how many such numbers it moves.
    """
    alone, lying = _lying(dist.get_world_size())
    expected, wrong = rounded(CELLS[name], alone, **options), []
    for kind, nets in lying.items():
        if only in ("", kind):
            found = rounded(CELLS[name], nets, **options)
            pairs = list(zip(found, expected, strict=True))
            other = sum(int((x != y).sum()) for x, y in pairs) / sum(x.numel() for x in found)
            near = all(torch.allclose(x, y, rtol=2 * 2**-7, atol=0) for x, y in pairs)
            same = all(map(is_same_on_ranks, found))
            exact = not options and LIMITS.get(name) == 0
            right = near and same and other <= (0 if exact else 0.1 if options else 0.01)
            cell = f"{how}, rounded | {name} | {kind} | {other:.1e} | {same} | {near}"
            wrong += tell(right, cell)
    return wrong


@functools.cache
def _lying(ranks: int) -> tuple[list[torch.nn.Module], dict[str, list[torch.nn.Module]]]:
    """Models in bfloat16, on one process and on every kind of mesh: of the first the parameters are trained, those of
    the others are its gradients."""
    seeds, lying = range(STEPS + 1), dict[str, list[torch.nn.Module]]()
    for seed in seeds:
        for kind, net in layouts(ranks, seed, torch.bfloat16):
            lying.setdefault(kind, []).append(net)
    return [model(seed).to(torch.bfloat16) for seed in seeds], lying


def rounded(
    make: Callable[[], Any], nets: list[torch.nn.Module], **options: Any
) -> list[torch.Tensor]:
    """The parameters of the first model, whole, after steps with the others' for gradients."""
    first, *others = ([p.detach() for p in net.parameters()] for net in nets)
    params = [torch.nn.Parameter(p.clone()) for p in first]
    torch.manual_seed(3)
    optimizer = TorchBridge(make(), params, rounding="stochastic", **options)
    for number, grads in enumerate(others):
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad.clone()
        # A closure, because some chains read the loss.
        optimizer.step(lambda number=number: 2.0 * 0.8**number + 0.1)
    return [whole(p) for p in params]


def tell(right: bool, cell: str) -> list[str]:
    """Prints a cell, on one rank; returns it if it is wrong."""
    if dist.get_rank() == 0:
        sys.stdout.write(f"{'right' if right else 'WRONG'} | {cell}\n")
        sys.stdout.flush()
    return [] if right else [cell]


def _all(cells: Callable[..., list[str]], how: str, **options: Any) -> None:
    left_out = set[str]() if cells is training else NOT_IN_BFLOAT16
    names = [name for name in part() if name not in left_out]
    wrong = [cell for name in names for cell in cells(name, how, **options)]
    assert not wrong, "\n".join(wrong)


eager = functools.partial(_all, training, "eager")
compiled = functools.partial(_all, training, "compiled", compile=True)
eager_rounded = functools.partial(_all, rounding, "eager")
compiled_rounded = functools.partial(_all, rounding, "compiled", compile=True)


def diagonal() -> None:
    wrong = [
        cell
        for kind, name in DIAGONAL.items()
        for cell in training(name, "compiled", kind, compile=True)
    ]
    wrong += [cell for name in ("optax.sgd", "stam", "muon") for cell in rounding(name, "eager")]
    assert not wrong, "\n".join(wrong)


if __name__ == "__main__":
    run_scenarios(globals())
