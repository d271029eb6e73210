"""Exported files with `compile=True`: the eager step within rounding, for every list of parameters."""

import copy
import ctypes
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import optax
import pytest
import torch
from torch._inductor.codecache import CppCodeCache

import bounds
from chainrule import chains
from chainrule.bridges.export import export
from exported import exported, parameters, set_gradients, state_of, step

RATE = 1e-2
SHAPES = ((5,), (8, 4), (4, 6), ())
CHAINS = {
    "adam": lambda: chains.adam(RATE, weight_decay=0.1),
    "stam": lambda: chains.stam(RATE),
    "casmo": lambda: chains.casmo(RATE),
    "magma": lambda: chains.magma(chains.adam(RATE)),
    "muon": lambda: chains.muon(RATE),
}
BLOCKED = """
import sys
for name in ("jax", "jaxlib", "optax", "chainrule"):
    sys.modules[name] = None
import importlib.util, torch
spec = importlib.util.spec_from_file_location("exported", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
start, grads = torch.load(sys.argv[2])
results = []
for compile in (True, False):
    params = [torch.nn.Parameter(x.clone()) for x in start]
    optimizer = module.Exported(params, compile=compile)
    for index, own in enumerate(grads):
        optimizer.param_groups[0]["lr"] = 0.01 * 0.5**index
        for p, g in zip(params, own):
            p.grad = g.clone()
        optimizer.step()
    results.append(([p.detach() for p in params], [dict(optimizer.state[p]) for p in params]))
    assert len(optimizer._programs) == compile  # new rates need no new program
torch.save(results, sys.argv[2])
"""
Run = tuple[list[torch.Tensor], dict[Any, torch.Tensor]]


def assert_close(one: Run, other: Run, start: list[torch.Tensor]) -> None:
    """Two ways to round at most ten steps apart: of the movement, of a state's size, and of the numbers themselves."""
    for p, q, before in zip(one[0], other[0], start, strict=True):
        moved, size = (x.abs().max().item() for x in (q - before, q))
        bound = bounds.MOVEMENT["float32"] * moved + bounds.gamma(4) * size
        assert moved > bound
        torch.testing.assert_close(p, q, rtol=0, atol=bound)
    assert one[1].keys() == other[1].keys()
    for key, x in other[1].items():
        if x.is_floating_point():
            bound = bounds.STATE["float32"] * x.abs().max().item()
            torch.testing.assert_close(one[1][key], x, rtol=0, atol=bound, msg=str(key))
        else:
            assert torch.equal(one[1][key], x), key


def run_of(optimizer: torch.optim.Optimizer) -> Run:
    return [p.detach() for g in optimizer.param_groups for p in g["params"]], state_of(optimizer)


@pytest.fixture
def adam(tmp_path: Path) -> Any:
    return exported(CHAINS["adam"](), tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:export. this chain tells parameters apart by name")
@pytest.mark.parametrize("name", [name for name in CHAINS if name != "adam"])
def test_a_compiled_step_needs_torch_alone_and_is_the_eager_one_within_rounding(
    name: str, tmp_path: Path
) -> None:
    path = export(CHAINS[name](), [torch.float32], tmp_path / "exported.py")
    params, grads = parameters(SHAPES), []
    for seed in range(4):
        set_gradients(params, seed)
        grads.append([p.grad for p in params])
    start = [p.detach() for p in params]
    torch.save((start, grads), tmp_path / "runs.pt")
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, str(path), str(tmp_path / "runs.pt")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    compiled, eager = (
        (values, {(i, key): x for i, own in enumerate(states) for key, x in own.items()})
        for values, states in torch.load(tmp_path / "runs.pt")
    )
    assert_close(compiled, eager, start)


def test_a_compiled_step_is_the_eager_one_within_rounding(adam: Any) -> None:
    compiled, eager = adam(parameters(SHAPES), compile=True), adam(parameters(SHAPES))
    for index in range(4):
        for optimizer in (compiled, eager):
            optimizer.param_groups[0]["lr"] = RATE * 0.5**index
            step(optimizer, index)
    assert len(compiled._programs) == 1  # new rates need no new program
    assert_close(run_of(compiled), run_of(eager), parameters(SHAPES))


def test_layouts_missing_gradients_copies_and_groups(adam: Any) -> None:
    pair = []
    shapes = ((8, 4), (8, 4), (2, 3))
    for compile in (True, False):
        params = parameters(shapes)
        params[0].data = params[0].data.t().contiguous().t()
        optimizer = adam(
            [{"params": params[:2]}, {"params": params[2:], "lr": 0.1}], compile=compile
        )
        step(optimizer, 0)
        step(optimizer, 1)
        params[1].grad = None
        params[2].grad = torch.ones(()).expand(2, 3)
        optimizer.step()
        saved = copy.deepcopy(optimizer)
        again = pickle.loads(pickle.dumps(optimizer))
        for other in (saved, again):
            assert other._compile is compile
            step(other, 2)
        step(optimizer, 2)
        for p, q, r in zip(
            *(o.param_groups[0]["params"] for o in (optimizer, saved, again)), strict=True
        ):
            assert torch.equal(p, q) and torch.equal(p, r)
        pair.append(optimizer)
    assert not pair[0].param_groups[0]["params"][0].is_contiguous()
    assert_close(*map(run_of, pair), parameters(shapes))


def test_a_known_step_follows_what_others_change(adam: Any) -> None:
    """Memory, layouts, states and gradients that are other tensors than those of the step before."""
    pair = []
    for compile in (True, False):
        optimizer = adam(parameters(SHAPES), compile=compile)
        params = optimizer.param_groups[0]["params"]
        step(optimizer, 0)
        step(optimizer, 1)
        params[1].data = params[1].data.clone()
        step(optimizer, 2)
        params[1].data = params[1].data.t().contiguous().t()
        step(optimizer, 3)
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        step(optimizer, 4)
        optimizer.state[params[0]]["mu"] = optimizer.state[params[0]]["mu"] * 2
        params[2].grad = None
        optimizer.step()
        params[2].grad = torch.ones(6, 4).t()
        optimizer.step()
        optimizer.param_groups[0]["params"][:2] = params[1::-1]
        step(optimizer, 5)
        pair.append(optimizer)
    start = parameters(SHAPES)
    assert_close(*map(run_of, pair), [start[1], start[0], *start[2:]])


def test_equal_groups_share_what_is_compiled(adam: Any) -> None:
    pair = []
    for compile in (True, False):
        params = parameters(((4, 6), (4, 6)))
        groups = [{"params": [p], "lr": lr} for p, lr in zip(params, (RATE, 0.1), strict=True)]
        optimizer = adam(groups, compile=compile)
        for seed in range(3):
            step(optimizer, seed)
        pair.append(optimizer)
    assert len(pair[0]._programs) == 1
    assert_close(*map(run_of, pair), parameters(((4, 6), (4, 6))))


def test_a_tensor_is_summed_while_it_is_updated(adam: Any) -> None:
    """The sum reads what was just written, which is one loop to Inductor, but for what reads the old value later."""
    copied, summed = torch.ops.aten.copy_.default, torch.ops.aten.sum.dim_IntList

    def body(m: torch.Tensor, g: torch.Tensor, total: torch.Tensor) -> list[torch.Tensor]:
        m.add_(g)
        total.copy_(torch.sum(m * m, 0))
        return []

    inputs = [torch.ones(97), torch.ones(97), torch.empty(2)[1]]
    graph = sys.modules[adam.__module__]._traced(body, inputs, True).graph
    order = [node.target for node in graph.nodes]
    assert order.index(copied) < order.index(summed) and order.count(copied) == 2
    (square,) = next(n for n in graph.nodes if n.target is summed).all_input_nodes[:1]
    assert {n.target for n in square.all_input_nodes} == {copied}


def test_functions_that_use_all_threads_are_in_no_parallel_loop(adam: Any) -> None:
    """Inside one OpenMP would start new threads at each call."""
    code = '#include <omp.h>\nextern "C" void level(int* x) { *x = omp_get_level(); }'
    level, words = CppCodeCache.load(code).level, torch.full((1,), -1, dtype=torch.int32)
    place, rows = ctypes.c_size_t(words.data_ptr()), ctypes.c_uint32(0)
    address = ctypes.cast(level, ctypes.c_void_p)
    run = sys.modules[adam.__module__]._loop().run
    for threads, wanted in ((1, 0), (2, 1)):
        run(address, ctypes.byref(place), ctypes.byref(rows), 1, 1, threads)
        assert words.item() == wanted


@pytest.mark.slow
def test_a_step_compiled_as_a_whole_is_the_eager_one(
    adam: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on other devices than CPUs."""
    monkeypatch.setattr(sys.modules[adam.__module__], "_by_function", lambda *step: None)
    compiled, eager = adam(parameters(SHAPES), compile=True), adam(parameters(SHAPES))
    for optimizer in (compiled, eager):
        for seed in range(2):
            step(optimizer, seed)
    assert_close(run_of(compiled), run_of(eager), parameters(SHAPES))


def test_a_step_that_cannot_be_compiled_says_why_and_writes_nothing(
    adam: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer = adam(parameters(SHAPES), compile=True)
    before = copy.deepcopy(optimizer.state_dict()["state"])

    def reads(*args: Any) -> None:
        if args[0][0].grad.tolist():
            raise AssertionError

    monkeypatch.setattr(sys.modules[adam.__module__], "_step", reads)
    with pytest.raises(
        RuntimeError, match=r"Exported: this step cannot be compiled: .*compile=False"
    ):
        step(optimizer, 0)
    for key, entry in optimizer.state_dict()["state"].items():
        assert all(torch.equal(x, before[key][name]) for name, x in entry.items())
    for p, q in zip(optimizer.param_groups[0]["params"], parameters(SHAPES), strict=True):
        assert torch.equal(p, q)


def test_a_chain_whose_only_key_is_the_rate_compiles(tmp_path: Path) -> None:
    sgd = exported(optax.sgd(0.5), tmp_path)([torch.nn.Parameter(torch.ones(2))], compile=True)
    sgd.param_groups[0]["params"][0].grad = torch.ones(2)
    sgd.step()
    assert sgd.param_groups[0]["params"][0].tolist() == [0.5, 0.5]
