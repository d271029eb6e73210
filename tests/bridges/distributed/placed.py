"""What each rank does in the tests of parameters that are laid out, and get gradients, by hand.

`python placed.py SCENARIOS RANK RANKS FILE`. A scenario compares with one process, which gets the same gradients whole.
"""

import functools
import itertools
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[3]))
from tests.bridges.distributed.ranks import (
    CHAINS,
    TOLERANCE,
    check_same_on_ranks,
    collectives,
    run_scenarios,
    whole,
)

from chainrule import TorchBridge, chains, transforms
from chainrule.bridges.lowering.ops.collectives import all_reduce_
from optax_cases import NAMED

SHAPES = {"wide": (5, 6), "tall": (7, 3), "vector": (5,)}
"""On two by two ranks: parts of 3 and 2, of 4 and 3, and an empty one where both dimensions cut an axis of 5."""
STEPS = 6


def given(number: int, shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Tensors that are the same on every rank."""
    generator = torch.Generator().manual_seed(number)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def placements(mesh: DeviceMesh) -> Iterator[list[Any]]:
    """Ways to lie on a mesh, over and over."""
    if mesh.ndim == 1:
        while True:
            yield from ([Shard(0)], [Shard(-1)], [Shard(0)])
    more = [Replicate()] * (mesh.ndim - 2)
    while True:
        yield from (
            [Shard(0), Shard(1), *more],
            [Replicate(), *more, Shard(0)],
            [Shard(0), *more, Shard(0)],
            [*more, Shard(1), Replicate()],
        )


class Placed:
    """Parameters with gradients that are made by hand: whole, or on a mesh."""

    def __init__(
        self,
        mesh: DeviceMesh | None,
        shapes: dict[str, tuple[int, ...]] | None = None,
        way: list[Any] | None = None,
    ) -> None:
        self.mesh, self.shapes, self.way = mesh, shapes or SHAPES, way
        self.params = {name: torch.nn.Parameter(x) for name, x in self.laid(-1).items()}

    def laid(self, number: int) -> dict[str, torch.Tensor]:
        found = given(number + 100, self.shapes)
        if self.mesh is None:
            return found
        every = itertools.repeat(self.way) if self.way else placements(self.mesh)
        ways = zip(found.items(), every, strict=False)
        return {
            name: distribute_tensor(
                x, self.mesh, [Shard(w.dim % x.ndim) if isinstance(w, Shard) else w for w in way]
            )
            for (name, x), way in ways
        }

    def step(self, optimizer: Any, number: int, lack: Mapping[str, set[int]] = {}) -> None:
        """A step in which some ranks lack the gradients of some parameters, which lie in rows."""
        ranks = dist.get_world_size()
        for name, grad in self.laid(number).items():
            without = lack.get(name, set())
            if self.mesh is None:
                for rank, rows in enumerate(grad.chunk(ranks)):
                    rows.mul_(rank not in without)
            here = range(ranks) if self.mesh is None else [dist.get_rank()]
            p = self.params[name]
            p.grad = None if without.issuperset(here) else grad.to(p.dtype)
        # A closure, because some chains read the loss.
        optimizer.step(lambda: 2.0 * 0.8**number + 0.1)

    def trained(self, make: Callable[[], Any], steps: Sequence[int] = range(STEPS)) -> Any:
        optimizer = TorchBridge(make(), self.params.items())
        for number in steps:
            self.step(optimizer, number)
        return optimizer

    def values(self) -> list[torch.Tensor]:
        return [whole(p) for p in self.params.values()]


def check_close(what: str, got: Sequence[torch.Tensor], want: Sequence[torch.Tensor]) -> None:
    """Equal up to the order of sums, in float32, and on all ranks to the bit."""
    check_same_on_ranks(what, dict(zip(map(str, range(len(got))), got, strict=True)))
    for x, y in zip(got, want, strict=True):
        assert torch.isfinite(y).all(), f"{what}: {y}"
        error = (x - y).abs().max().item() / max(1.0, y.abs().max().item())
        assert error <= TOLERANCE, f"{what} is off by {error}"


def optax_chains() -> None:
    """All named optimizers of optax that a bridge takes, on a mesh of two dimensions."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
    cases = [case for case in NAMED if not case.loss and not case.batch]
    ranks, me = dist.get_world_size(), dist.get_rank()
    expected: dict[int, list[torch.Tensor]] = {}
    for i in range(me, len(cases), ranks):  # each rank finds some of what all compare with
        alone = Placed(None)
        alone.trained(cases[i].make)
        expected[i] = alone.values()
    for i, case in enumerate(cases):
        many = Placed(mesh)
        many.trained(case.make)
        wanted = expected.get(i) or [torch.empty(shape) for shape in many.shapes.values()]
        for x in wanted:
            dist.broadcast(x, i % ranks)
        check_close(case.name, many.values(), wanted)


def owners() -> None:
    """Each product is made once, on one rank, and there are not more collectives for more matrices."""
    ranks = dist.get_world_size()
    meshes = [init_device_mesh("cpu", (ranks,), mesh_dim_names=("shard",))]
    if ranks == 4:
        meshes.append(init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner")))
    square = {f"m{i}": (6 + i, 6) for i in range(6)}
    for mesh in meshes:
        for shapes in ({"one": (5, 6)}, SHAPES, square):
            alone, many = Placed(None, shapes), Placed(mesh, shapes)
            counts = []
            for placed in (alone, many):
                optimizer = placed.trained(CHAINS["muon"])
                with FlopCounterMode(display=False) as counter:
                    placed.step(optimizer, STEPS)
                counts.append(counter.get_total_flops())
                if placed is many:
                    assert collectives(optimizer) <= 3, optimizer.explain(passes=True)
            check_close(f"{mesh}, {len(shapes)} matrices", many.values(), alone.values())
            sums: list[Any] = [None] * ranks
            dist.all_gather_object(sums, counts[1])
            assert sum(sums) == counts[0], f"{sums} operations of {counts[0]}"
            if shapes is square:
                assert max(sums) < counts[0] * 2 / ranks, f"{sums} operations of {counts[0]}"


def meshes() -> None:
    """Slices of a mesh of three dimensions, and meshes smaller than the world."""
    three = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("a", "b", "c"))
    for mesh in (three, three["a", "b"], three["a", "c"], three["c"]):
        for name in ("clip_by_global_norm", "stam", "muon"):
            alone, many = Placed(None), Placed(mesh)
            alone.trained(CHAINS[name])
            many.trained(CHAINS[name])
            check_close(f"{name} on {mesh}", many.values(), alone.values())


def missing() -> None:
    """Gradients that some ranks lack are zeros there; those that all lack leave parameter and state as they are."""
    ranks = dist.get_world_size()
    everyone = set(range(ranks))
    shapes = {"wide": (5, 6), "tall": (7, 3), "square": (4, 4)}
    lacking: list[dict[str, set[int]]] = [
        {},
        {"wide": {1}},
        {name: {0} for name in shapes},
        dict.fromkeys(shapes, everyone),
        {"tall": everyone, "square": {0, 1}},
        {},
    ]
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("shard",))
    cases = [(name, lacking) for name in ("clip_by_global_norm", "stam", "casmo", "muon", "cosmic")]
    # Nothing is told where nothing needs to be: who has no entries may have no gradient either.
    cases.append(
        ("adamw", [{}, {"wide": {3}}, {"tall": everyone}, dict.fromkeys(shapes, everyone)])
    )
    for name, steps in cases:
        alone, many = Placed(None, shapes), Placed(mesh, shapes, [Shard(0)])
        for placed in (alone, many):
            optimizer = placed.trained(CHAINS[name], range(2))
            for number, lack in enumerate(steps):
                placed.step(optimizer, number + 2, lack)
        check_close(name, many.values(), alone.values())


def gradients() -> None:
    """In another layout than their parameters': partial sums and means, whole, cut along another axis."""
    for sizes, names in (((4,), ("all",)), ((2, 2), ("outer", "inner"))):
        mesh = init_device_mesh("cpu", sizes, mesh_dim_names=names)
        ways = [
            [Partial()] * mesh.ndim,
            [Partial("avg"), Replicate()][: mesh.ndim],
            [Replicate()] * mesh.ndim,
            [Partial(), Shard(0)][-mesh.ndim :],
            [Shard(-1), Partial()][: mesh.ndim],
        ]
        for name in ("clip_by_global_norm", "muon"):
            alone, many = Placed(None), Placed(mesh)
            alone.trained(CHAINS[name])
            optimizer = TorchBridge(CHAINS[name](), many.params.items())
            for number in range(STEPS):
                for key, grad in given(number + 100, SHAPES).items():
                    many.params[key].grad = partial(grad, mesh, ways[number % len(ways)])
                optimizer.step()
            check_close(f"{name} on {mesh}", many.values(), alone.values())


def partial(whole: torch.Tensor, mesh: DeviceMesh, way: list[Any]) -> DTensor:
    """A tensor of which ranks hold different summands: n times itself, and -1 times, which is exact."""
    way = [Shard(w.dim % whole.ndim) if isinstance(w, Shard) else w for w in way]
    cut = [w if isinstance(w, Shard) else Replicate() for w in way]
    own = distribute_tensor(whole, mesh, cut).to_local()
    for dim, placement in enumerate(way):
        if isinstance(placement, Partial):
            size = mesh.size(dim)
            own = own * (-1 if mesh.get_local_rank(dim) else size)
            own = own * (size if placement.reduce_op == "avg" else 1)
    return DTensor.from_local(
        own, mesh, way, run_check=False, shape=whole.shape, stride=whole.stride()
    )


def kahan() -> None:
    """bfloat16 weights under `compensated`, with what that keeps, are those of one process.

    Sums in another order move what is kept by one unit in its last place in a step, 2^-17 of a weight, and rarely.
    """
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
    for name in ("adamw", "stam"):
        chain = optax.chain(CHAINS[name](), optax.scale(0.1), transforms.compensated())
        sums = []
        for placed in (Placed(None), Placed(mesh)):
            for key, p in placed.params.items():
                placed.params[key] = torch.nn.Parameter(p.detach().bfloat16())
            optimizer = placed.trained(lambda chain=chain: chain)
            lost = [optimizer.state[p]["lost"] for p in placed.params.values()]
            for p, rest in zip(placed.params.values(), lost, strict=True):
                assert rest.dtype is torch.bfloat16 and whole(rest).any(), f"{name} lost nothing"
                assert getattr(rest, "placements", None) == getattr(p, "placements", None), name
            pairs = zip(placed.values(), map(whole, lost), strict=True)
            sums.append([p.float() + rest.float() for p, rest in pairs])
        alone, many = sums
        check_close(f"{name}, compensated", many, alone)


def reductions() -> None:
    """Extremes and flags of tensors of which a rank may have nothing, and of NaN; what is gathered is told."""
    ranks = dist.get_world_size()
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("shard",))

    def by_leaf(u: Any) -> Any:
        x = u / jnp.max(jnp.abs(u)) + jnp.min(u) + jnp.max(u, axis=0)
        return jnp.where(jnp.any(u > 2) & jnp.all(u < 9), x, -x) + jnp.cumsum(u, axis=0)

    chain = optax.stateless(lambda updates, _: jax.tree.map(by_leaf, updates))
    alone, many = Placed(None), Placed(mesh, way=[Shard(0)])
    alone.trained(lambda: chain)
    optimizer = many.trained(lambda: chain)
    check_close("reductions", many.values(), alone.values())
    report = optimizer.explain(passes=True)
    assert "whole tensors for 3 cumsum" in report, report
    name = mesh.get_group().group_name
    for bad, kind, dtype in itertools.product(
        range(ranks), ("max", "min"), (torch.float32, torch.bfloat16, torch.float64)
    ):
        x = torch.tensor([1.5 * dist.get_rank() - 2, -torch.inf, 0.0], dtype=dtype)
        if dist.get_rank() == bad:
            x[2] = -torch.nan
        all_reduce_(x, kind, name)
        extreme = -2.0 if kind == "min" else 1.5 * (ranks - 1) - 2
        assert x[:2].tolist() == [extreme, -torch.inf] and x[2].isnan(), (bad, kind, x)


def tiers() -> None:
    """COSMIC's parameters move between tiers, also where a rank lacks gradients, and their state goes with them."""
    ranks = dist.get_world_size()
    eager = {"min_tier_steps": 0, "signal_ema_decay": None, "signal_margin": 0.0}
    policy = transforms.TierPolicy(
        {2: 0.4, 1: 0.3}, reassignment_interval=2, warmup_steps=0, confirmations=1, **eager
    )
    shapes = {"wide": (5, 6), "tall": (7, 3), "square": (4, 4)}
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("shard",))
    seen = []
    for placed in (Placed(None, shapes), Placed(mesh, shapes, [Shard(0)])):
        optimizer = TorchBridge(chains.cosmic(1e-2, policy=policy), placed.params.items())
        found = []
        for number in range(8):
            placed.step(optimizer, number, {"wide": {1}} if 2 < number < 6 else {})
            found.append(optimizer.state[placed.params["wide"]]["tiers"].tolist())
        seen.append((found, placed))
    (expected, alone), (found, many) = seen
    assert found == expected and len(set(map(tuple, found))) > 1, (found, expected)
    check_close("tiers", many.values(), alone.values())


def zero() -> None:
    """The table of docs/scaling.md: which chains `ZeroRedundancyOptimizer` suits, and which it does not."""
    # Its import warns, and tests are imported where warnings are errors.
    from torch.distributed.optim import ZeroRedundancyOptimizer

    text = (Path(__file__).parents[3] / "docs/scaling.md").read_text()
    suited, others = (
        re.findall(r"`([^`]+)`", line.split("|")[2])
        for line in text.splitlines()
        if line.startswith(("| parameter by parameter |", "| over several parameters |"))
    )
    assert sorted([*suited, *others]) == sorted(CHAINS), (suited, others)
    for name, make in CHAINS.items():
        alone, many = Placed(None), Placed(None)
        alone.trained(make)
        params = list(many.params.values())
        optimizer: Any = ZeroRedundancyOptimizer(params, functools.partial(TorchBridge, make()))
        for number in range(STEPS):
            many.step(optimizer, number)
        pairs = zip(many.values(), alone.values(), strict=True)
        error = max((x - y).abs().max().item() for x, y in pairs)
        assert (error <= TOLERANCE) == (name in suited), f"{name} is off by {error}"


def refused() -> None:
    one = init_device_mesh("cpu", (4,), mesh_dim_names=("all",))
    two = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
    x = torch.ones(4, 4)
    partial = DTensor.from_local(x, one, [Partial()], run_check=False)
    apart = [distribute_tensor(x, one, [Shard(0)]), distribute_tensor(x, two, [Shard(0), Shard(1)])]
    for params, says in (([partial], "Partial"), (apart, "slicing one mesh")):
        try:
            TorchBridge(optax.adam(1e-2), [torch.nn.Parameter(p) for p in params])
        except NotImplementedError as error:
            assert says in str(error), error
        else:
            raise AssertionError(f"{params} were taken")


if __name__ == "__main__":
    run_scenarios(globals())
