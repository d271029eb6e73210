"""Chains in the torch bridge through the compiled kernel equal the same chains lowered to torch."""

import subprocess
import sys
import textwrap
from typing import Any

import jax
import numpy as np
import optax
import pytest
import torch
from torch import nn

import bounds
import chainrule
import harness
from chainrule import TierPolicy, TorchBridge, chains
from chainrule.bridges.engines import TorchProgram
from chainrule.bridges.lowering import lower
from chainrule.bridges.lowering.backends.scalar_program import only_scalars
from chainrule.bridges.lowering.pipeline import FRONT
from chainrule.bridges.lowering.pipeline import run as run_passes
from chainrule.bridges.lowering.step_program import StepProgram
from chainrule.native import xla
from chainrule.transforms import scale_by_dual_ema

ALL_TIERS = TierPolicy({2: 0.4, 1: 0.3}, reassignment_interval=3, min_tier_steps=0)
STEPS = 7
SHAPES = {"a": (6, 4), "b": (5,), "c": (3, 2, 2), "d": (), "e": (0,), "f": (300,)}


def contiguous(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape)


def transposed(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape[::-1]).permute(tuple(range(len(shape)))[::-1])


def strided(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(*shape, 2)[..., 0]


def run(chain: Any, make: Any = contiguous, dtype: torch.dtype = torch.float32, **options: Any):
    """Parameters and state after some steps."""
    torch.manual_seed(0)
    params = {n: nn.Parameter(make(shape).to(dtype)) for n, shape in SHAPES.items()}
    bridge = TorchBridge(chain, params.items(), **options)
    for t in range(STEPS):
        for i, (name, p) in enumerate(params.items()):
            p.grad = (make(SHAPES[name]) * 10.0 ** ((i + t) % 3)).to(dtype)
            if t == 4 and name == "b":
                p.grad = None
        bridge.step(lambda: 1.0)
    return params, bridge


def apart(dtype: str) -> float:
    """Relative difference of state after the steps: the kernel takes its decays in float32; a half may fall on either
    side of a tie at every step."""
    if dtype in ("bfloat16", "float16"):
        return bounds.gamma(3 * STEPS, dtype)
    return bounds.stepped(STEPS) + bounds.live(0.9) + bounds.live(0.999)


def assert_close(first: Any, second: Any, rate: float = 0.01) -> None:
    (params, bridge), (others, other) = first, second
    for name, p in params.items():
        dtype = str(p.dtype).removeprefix("torch.")
        moved = 2 * STEPS * rate * apart(dtype)  # updates are hardly larger than twice the rate
        torch.testing.assert_close(p, others[name], rtol=bounds.gamma(2 * STEPS, dtype), atol=moved)
    mine, theirs = bridge.jax_state(), other.jax_state()
    assert mine.inner_state[0].assignment.tiers == theirs.inner_state[0].assignment.tiers
    for x, y in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
        if x.dtype != np.uint8:
            harness.assert_close(x, y, apart(str(x.dtype)))


CHAINS = {
    "default": {},
    "decay": {"weight_decay": 0.1},
    "gated decay": {"weight_decay": 0.1, "decay": "gated"},
    "no rate": {"learning_rate": 0.0, "weight_decay": 0.1},
    "only decay": {"weight_decay": 0.1, "tier_scale": (0.0, 0.0, 0.0), "min_lr_scale": 0.0},
    "untiered": {"tiered": False},
    "long kept": {"keep_long": True, "debias": "second", "clock": "chain"},
    "no second moment": {"b2": None},
    "in codes": {"bits": 4, "block": 16},
    "schedule": {"learning_rate": optax.linear_schedule(0.1, 0.0, 5)},
}


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", CHAINS)
def test_kernel_is_torch(name: str, compile: bool) -> None:
    settings: dict[str, Any] = {"policy": ALL_TIERS, "learning_rate": 0.01, **CHAINS[name]}
    fast = run(chains.cosmic(**settings), compile=compile)
    assert_close(
        fast, run(chains.cosmic(**settings, kernel="xla")), 0.1 if name == "schedule" else 0.01
    )


@pytest.mark.parametrize("make", [transposed, strided])
def test_any_layout(make: Any) -> None:
    settings = {"policy": ALL_TIERS, "weight_decay": 0.1}
    fast, plain = (run(chains.cosmic(0.01, **settings, kernel=k), make) for k in ("auto", "xla"))  # pyright: ignore
    assert_close(fast, plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_dtype(dtype: torch.dtype) -> None:
    fast, plain = (
        run(chains.cosmic(0.01, policy=ALL_TIERS, kernel=k), dtype=dtype) for k in ("auto", "xla")
    )
    assert_close(fast, plain)


def test_stochastic_rounding_is_left_to_torch() -> None:
    chain = chains.cosmic(0.01, policy=ALL_TIERS)
    fast, plain = (
        run(c, dtype=torch.bfloat16, rounding="stochastic")
        for c in (chain, chains.cosmic(0.01, policy=ALL_TIERS, kernel="xla"))
    )
    assert_close(fast, plain)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_spreads_as_in_torch(bad: float) -> None:
    found = []
    for kernel in ("auto", "xla"):
        p = nn.Parameter(torch.ones(8))
        bridge = TorchBridge(chains.cosmic(0.01, policy=TierPolicy({2: 1.0}), kernel=kernel), [p])
        for value in (1.0, bad, 1.0):
            p.grad = torch.ones(8)
            p.grad[3] = value
            bridge.step()
        found.append(p.detach())
    torch.testing.assert_close(*found, equal_nan=True)


@pytest.mark.parametrize(
    "then", [optax.identity(), optax.clip_by_global_norm(0.5), optax.trace(0.9)]
)
def test_what_follows_the_kernel_may_be_anything(then: Any) -> None:
    found = []
    for kernel in ("native", "xla"):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(7)), nn.Parameter(torch.randn(2, 3))]
        chain = optax.chain(scale_by_dual_ema(kernel=kernel), then, optax.scale(-0.1))
        bridge = TorchBridge(chain, params)
        for _ in range(3):
            for p in params:
                p.grad = torch.randn_like(p)
            bridge.step()
        found.append(params)
    for p, q in zip(*found, strict=True):
        moved = 3 * 0.1 * 2 * apart("float32")
        torch.testing.assert_close(p, q, rtol=bounds.gamma(6), atol=moved)


@pytest.mark.parametrize("tensors", [6, 300])
def test_steps_of_cosmic_leave_no_work_on_tensors_to_torch(tensors: int) -> None:
    """With 300 tensors a table of the gate's statistics would be work, if it were not made in a branch."""
    chain = chains.cosmic(policy=ALL_TIERS, weight_decay=0.1)
    if tensors == 6:
        _, bridge = run(chain)
    else:
        bridge = TorchBridge(chain, [nn.Parameter(torch.ones(3)) for _ in range(tensors)])
    tree = bridge._groups[0].tree
    assert tree is not None and isinstance(tree.program, TorchProgram)
    program = StepProgram.of(tree.program.lowered, tree.described.targets)
    program = run_passes(FRONT, program)
    assert program.moves and only_scalars(program)


def test_a_primitive_that_a_bridge_does_not_leave_to_the_kernel_is_its_form() -> None:
    def quantize(x: Any) -> Any:
        return xla.quantize([x], block=2)

    lowered = lower(quantize, jax.ShapeDtypeStruct((4,), "float32"))
    codes, scales = lowered(torch.tensor([7.0, -3.0, 0.0, 0.0]))
    # 7 and -3 in steps of 1, 0 and 0: each code plus 8 in its nibble, the even index low.
    assert codes.tolist() == [15 | 5 << 4, 8 | 8 << 4]
    assert scales.tolist() == [1.0, 1.0]


def test_without_the_kernel_the_bridge_runs_in_torch_and_says_so_once() -> None:
    code = """
        import sys, warnings
        sys.modules["chainrule.native._kernel"] = None  # as where it was left out
        import torch, chainrule
        from chainrule import chains
        found = []
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for kernel in ("auto", "native", "xla"):
                p = torch.nn.Parameter(torch.ones(8))
                policy = chainrule.TierPolicy({2: 1.0})
                bridge = chainrule.TorchBridge(chains.cosmic(policy=policy, kernel=kernel), [p])
                for _ in range(3):
                    p.grad = torch.arange(8.0)
                    bridge.step()
                found.append(p.detach())
        told = [w for w in caught if "kernel is not installed" in str(w.message)]
        assert len(told) == 1, caught
        assert found[0].equal(found[1]) and found[0].equal(found[2])
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=120)


def test_in_jax_auto_is_xla() -> None:
    tx = chains.cosmic(policy=TierPolicy({2: 1.0}))
    params = {"a": np.ones(4, np.float32)}
    state = chainrule.retier(tx.init(params), params, params)
    args = params, state, params
    assert "chainrule_tier2" in str(jax.make_jaxpr(tx.update)(*args))
    assert "chainrule_" not in jax.jit(tx.update).lower(*args).as_text()
