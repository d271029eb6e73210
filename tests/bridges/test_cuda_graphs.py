"""`compile="reduce-overhead"`: when a step is captured, replayed, or launched, with a capture that works on the CPU.

The capture below replays a step at the addresses that it was recorded with, as a CUDA graph does, and holds none of the
tensors. `benchmarks/gpu.py` checks the same on a device.
"""

import contextlib
import copy
import ctypes
import gc
import re
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import optax
import pytest
import torch
from tests.bridges.test_torch_tiers import cosmic, gradients, parameters
from tests.bridges.test_torch_tiers import run as run_tiers
from torch import Tensor, nn

from chainrule import TorchBridge, TorchWrap, chains
from chainrule.bridges import engines
from chainrule.bridges.lowering.backends import cuda_graph
from chainrule.bridges.lowering.backends.cuda_graph import (
    MOST,
    PATIENCE,
    WARM,
    CapturedStep,
    branches,
)
from chainrule.bridges.lowering.executor import BRANCHES, Together
from chainrule.bridges.lowering.pipeline import make_step
from chainrule.bridges.lowering.step_program import StepProgram

RATE = 0.5


def tensor_at(address: int, like: tuple[torch.dtype, torch.Size, tuple[int, ...]]) -> Tensor:
    """What is in memory at an address."""
    dtype, shape, strides = like
    if 0 in shape:
        return torch.empty(shape, dtype=dtype)
    spans = sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    memory = (ctypes.c_uint8 * ((1 + spans) * dtype.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=dtype).as_strided(shape, strides)


class OnCpu:
    """Records which addresses a step is to run at. Its memory, as CUDA's, is gone with the last of what it made."""

    def __init__(self, device: Any = None):
        self.device = device
        self.underway = False
        self.failure: Exception | None = None
        self.made: list[weakref.ref[Any]] = []

    def is_underway(self) -> bool:
        return self.underway

    def __call__(self, run: Any, inputs: Sequence[Tensor], *, afresh: bool) -> Callable[[], None]:
        assert afresh == all(made() is None for made in self.made)
        if self.failure:
            raise self.failure
        spots = [(x.data_ptr(), (x.dtype, x.shape, x.stride())) for x in inputs]

        def replay() -> None:
            run([tensor_at(*spot) for spot in spots])

        self.made.append(weakref.ref(replay))
        return replay


# ---- one step ------------------------------------------------------------------------------


def descend(inputs: Sequence[Tensor]) -> None:
    """p -= rate * g."""
    p, g, rate = inputs
    p.sub_(rate * g)


class Descent:
    """A parameter that descends by a `CapturedStep`, beside what it must become."""

    def __init__(self, start: Tensor, grad: Tensor):
        self.capture = OnCpu()
        self.step = CapturedStep(descend, 3, [0], self.capture)
        self.p, self.want = start, start.clone()
        self.grad, self.rate = grad, torch.tensor(RATE)

    def __call__(self, times: int = 1) -> None:
        for _ in range(times):
            self.step([self.p, self.grad, self.rate])
            self.want = self.want - self.rate * self.grad
            assert self.p.equal(self.want)

    def counts(self) -> tuple[int, int, int]:
        return self.step.captured, self.step.replayed, self.step.launched


def descent(*shape: int) -> Descent:
    return Descent(torch.ones(shape), torch.full(shape, 0.25))


def test_the_first_steps_are_launched_and_the_next_replayed_with_other_values() -> None:
    run = descent(3)
    run(WARM)
    assert run.counts() == (0, 0, WARM)
    run()
    run.grad.fill_(-2.0)
    run.rate.fill_(0.125)
    run(4)
    assert run.counts() == (1, 5, WARM)
    assert "1 kept of 1 captured; steps: 5 replayed, 2 launched" in run.step.explained()[0]


def test_gradients_at_a_few_places_have_a_graph_for_each() -> None:
    run = descent(3)
    places = [torch.full((3,), float(i)) for i in range(MOST)]
    for step in range(5 * MOST):
        run.grad = places[step % MOST].fill_(float(step))
        run()
    assert run.counts() == (MOST, 4 * MOST, MOST)
    assert "copies" not in run.step.explained()[0]


def test_gradients_that_are_always_elsewhere_are_copied() -> None:
    run = descent(3)
    held = []  # so that no address comes again
    for step in range(3 * PATIENCE):
        run.grad = torch.full((3,), float(step))
        held.append(run.grad)
        run()
    assert run.counts() == (1, 2 * PATIENCE, PATIENCE)
    assert "one reads copies of the gradients" in run.step.explained()[0]
    run(3)  # and where they stay, they get a graph of their own again
    assert run.counts() == (2, 2 * PATIENCE + 3, PATIENCE)


def test_now_and_then_another_place_costs_no_memory() -> None:
    """Such as the last batch of an epoch."""
    run = descent(3)
    usual, held = run.grad, []
    for step in range(40 * PATIENCE):
        run.grad = torch.ones(3) if step % 10 == 9 else usual
        held.append(run.grad)
        run()
    assert run.step.captured == 1 and "copies" not in run.step.explained()[0]


def test_copies_keep_each_dtype_and_layout() -> None:
    def run(inputs: Sequence[Tensor]) -> None:
        p, q, g, h = inputs
        p.add_(g)
        q.add_(h)

    step = CapturedStep(run, 4, [0, 1], OnCpu())
    p, q = torch.zeros(2, 3, dtype=torch.bfloat16), torch.zeros(3, 2)
    held = []
    for i in range(2 * PATIENCE):
        g, h = torch.full((2, 3), 1.0, dtype=torch.bfloat16), torch.arange(6.0).reshape(2, 3).t()
        h = h.contiguous() if i % 2 else h
        held.append((g, h))
        step([p, q, g, h])
    assert step.captured == 1 and step.replayed == PATIENCE
    assert p.equal(torch.full((2, 3), 2.0 * PATIENCE, dtype=torch.bfloat16))
    assert q.equal(2 * PATIENCE * torch.arange(6.0).reshape(2, 3).t())


def test_another_layout_at_the_same_place_is_another_graph() -> None:
    run = descent(2, 2)
    run.grad = memory = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    run(WARM + 1)
    run.grad = memory.t()
    run(3)
    assert run.step.captured == 2


def test_a_parameter_that_moved_has_other_graphs() -> None:
    run = descent(3)
    run(WARM + 2)
    old, run.p = run.p, run.p.clone()
    before = old.clone()
    run(WARM + 2)
    assert old.equal(before)
    assert run.counts() == (2, 4, 2 * WARM)
    assert "1 kept of 2 captured" in run.step.explained()[0]


def test_what_lies_elsewhere_in_the_same_tensor_is_noticed() -> None:
    """A parameter, of whatever shape, and an entry of the state that is no scalar."""

    def run(inputs: Sequence[Tensor]) -> None:
        p, q, m, g = inputs
        for x in (p, q, m):
            x.add_(g)

    start = torch.zeros(3, 3)
    p, q, m = nn.Parameter(torch.zeros(3, 3)), nn.Parameter(torch.zeros(())), start.clone()
    step, grad, expected = CapturedStep(run, 4, [0, 1, 2], OnCpu()), torch.ones(()), 0.0

    def changes() -> Iterator[None]:
        yield
        p.data = p.data.clone()
        yield
        q.data = q.data.clone()
        yield
        m.data = m.data.clone()
        yield
        p.data = p.data.t()  # at the same address
        yield

    with torch.no_grad():
        for times, _ in enumerate(changes(), 1):
            for _ in range(WARM + 2):
                step([p, q, m, grad])
                expected += 1
            assert all(bool((x == expected).all()) for x in (p, q, m))
            assert (step.captured, step.replayed) == (times, 2 * times)


def test_a_graph_holds_no_gradient() -> None:
    run = descent(3)
    run(WARM + 2)
    gone = weakref.ref(run.grad.untyped_storage())
    run.grad = torch.ones(3)
    gc.collect()
    assert run.step.captured == 1 and gone() is None


def test_a_step_inside_another_graph_becomes_a_part_of_it() -> None:
    run = descent(3)
    run(WARM + 1)
    run.capture.underway = True
    run(2)
    assert run.counts() == (1, 1, WARM)


def test_a_step_that_cannot_be_captured_says_what_to_do() -> None:
    run = descent(3)
    run(WARM)
    run.capture.failure = RuntimeError("operation not permitted when stream is capturing")
    with pytest.raises(RuntimeError, match=r"compile=True.*not permitted when stream is capturing"):
        run()
    assert run.p.equal(run.want)


# ---- branches ------------------------------------------------------------------------------


class Device:
    """One stream is the current one."""

    def __init__(self) -> None:
        self.current = self.main = Stream()

    @contextlib.contextmanager
    def on(self, stream: Any) -> Generator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before


class Stream:
    """How far it is; an event is a time."""

    def __init__(self) -> None:
        self.time = 0

    def record_event(self) -> int:
        return self.time

    def wait_event(self, event: int) -> None:
        self.time = max(self.time, event)


def test_calls_of_a_stage_are_beside_each_other_and_stages_after_each_other() -> None:
    device, others = Device(), [Stream() for _ in range(3)]
    spans: dict[str, tuple[Any, int, int]] = {}

    def call(name: str, length: int) -> Callable[[list[Any]], None]:
        def run(memory: list[Any]) -> None:
            assert memory == ["memory"]
            start, device.current.time = device.current.time, device.current.time + length
            spans[name] = device.current, start, device.current.time

        return run

    stages = [
        Together([call(f"{stage}{i}", 8 - i) for i in range(count)])
        for stage, count in (("a", 7), ("b", 1), ("c", 2))
    ]
    with branches(device.main, others, device.on):
        for stage in stages:
            stage(["memory"])
    assert device.current is device.main and BRANCHES.get() is None
    for i in range(7):  # one stream for every third
        assert spans[f"a{i}"][0] is others[i % 3]
    assert [spans[f"a{i}"][1] for i in range(7)] == [0, 0, 0, 8, 7, 6, 13]
    assert spans["b0"] == (device.main, 15, 23)  # after the last of before
    assert {spans[f"c{i}"][:2] for i in range(2)} == {(others[0], 23), (others[1], 23)}
    assert device.main.time == 31
    spans.clear()
    stages[0](["memory"])  # outside, one after the other
    assert {span[0] for span in spans.values()} == {device.main}


def test_a_stage_of_compiled_calls_can_run_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls of a stage, as for a GPU, backwards: none reads or overwrites what another makes or reads."""

    def make() -> Any:
        return chains.stam(0.1)

    want = train(make, True)[1]
    from chainrule.bridges.lowering.backends import inductor

    compiled_piece = inductor.compile_piece
    monkeypatch.setattr(inductor, "compile_piece", lambda *given: (compiled_piece(*given)[0], None))
    monkeypatch.setattr(StepProgram, "on_cpu", False)
    counts: list[int] = []

    def backwards(calls: Sequence[Callable[[], None]]) -> None:
        counts.append(len(calls))
        for call in reversed(calls):
            call()

    token = BRANCHES.set(backwards)
    try:
        got = train(make, True)[1]
    finally:
        BRANCHES.reset(token)
    assert max(counts) == 4  # a call for each parameter
    torch.testing.assert_close(got, want, rtol=0, atol=0)


# ---- bridges -------------------------------------------------------------------------------


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[OnCpu]]:
    """The captures of bridges on the CPU. Their steps run op by op, since it is not about what Inductor makes."""

    def op_by_op(lowered: Any, targets: Any, *, compile: bool, sharding: Any = None) -> Any:
        assert compile
        return make_step(lowered, targets, sharding=sharding)

    made: list[OnCpu] = []

    def capture(device: torch.device) -> OnCpu:
        made.append(OnCpu(device))
        return made[-1]

    monkeypatch.setattr(engines, "make_step", op_by_op)
    monkeypatch.setitem(cuda_graph.CAPTURES, "cpu", capture)
    yield made


def steps_of(bridge: TorchBridge) -> tuple[int, int, int]:
    """How many graphs were captured, steps replayed, steps launched."""
    found = re.findall(
        r"kept of (\d+) captured.*steps: (\d+) replayed, (\d+) launched", bridge.explain()
    )
    return tuple(map(sum, zip(*(map(int, row) for row in found), strict=True)))  # pyright: ignore[reportReturnType]


def net_of() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))


def train(
    make: Any, mode: Any, change: Callable[[Any, Any, int], None] | None = None, steps: int = 14
) -> tuple[TorchBridge, list[Tensor]]:
    """A bridge and its parameters after some steps; `change` is called before each."""
    net = net_of()
    torch.manual_seed(1)
    bridge = TorchBridge(make(), net.parameters(), compile=mode)
    generator = torch.Generator().manual_seed(2)
    for step in range(steps):
        bridge.zero_grad(set_to_none=change is None)
        x = torch.randn(8, 4, generator=generator)
        net(x).square().mean().backward()
        if change:
            change(bridge, net, step)
        bridge.step()
    return bridge, [p.detach() for p in net.parameters()]


def rates(bridge: TorchBridge, net: nn.Module, step: int) -> None:
    rate = 0.1 / (1 + step)
    bridge.param_groups[0]["lr"] = torch.tensor(rate) if step % 2 else rate


def absences(bridge: TorchBridge, net: nn.Module, step: int) -> None:
    list(net.parameters())[step % 4].grad = None


def one_absence(bridge: TorchBridge, net: nn.Module, step: int) -> None:
    list(net.parameters())[1].grad = None


def replacements(bridge: TorchBridge, net: nn.Module, step: int) -> None:
    if step == 6:
        p = next(net.parameters())
        p.data = p.data.clone()
    if step == 10:
        bridge.load_state_dict(copy.deepcopy(bridge.state_dict()))


def a_cleared_state(bridge: TorchBridge, net: nn.Module, step: int) -> None:
    if step == 8:
        bridge.state.clear()


CHANGES = [None, rates, absences, one_absence, replacements, a_cleared_state]


@pytest.mark.parametrize("change", CHANGES, ids=lambda c: c.__name__ if c else "nothing")
def test_replayed_steps_are_the_steps(graphs: list[OnCpu], change: Any) -> None:
    def make() -> Any:
        return chains.magma(chains.adam(0.1))  # draws random numbers, counts steps

    bridge, got = train(make, "reduce-overhead", change)
    assert graphs
    torch.testing.assert_close(got, train(make, True, change)[1], rtol=0, atol=0)
    captured, replayed, launched = steps_of(bridge)
    assert captured and replayed and replayed + launched == 14
    if change is replacements:  # what is loaded is copied into the memory that is there
        assert (captured, launched) == (2, 2 * WARM)


def test_rates_need_no_other_graph(graphs: list[OnCpu]) -> None:
    params = [nn.Parameter(torch.ones(3))]
    bridge = TorchBridge(chains.adam(0.1), params, compile="reduce-overhead")
    params[0].grad = torch.ones(3)
    for step in range(10):
        rates(bridge, nn.Module(), step)
        bridge.step()
    assert steps_of(bridge) == (1, 10 - WARM, WARM)


def test_the_loss_is_read_at_each_replay(graphs: list[OnCpu]) -> None:
    ends = []
    for mode in ("reduce-overhead", True):
        p = nn.Parameter(torch.tensor([1.0, -2.0]))
        p.grad = torch.zeros(2)
        bridge = TorchBridge(optax.polyak_sgd(1.0), [p], compile=mode)

        def closure(bridge: Any = bridge, p: Any = p) -> Tensor:
            bridge.zero_grad(set_to_none=False)
            loss = p.square().sum()
            loss.backward()
            return loss

        for _ in range(8):
            bridge.step(closure)
        assert mode is True or steps_of(bridge) == (1, 8 - WARM, WARM)
        ends.append(p.detach())
    assert ends[0].equal(ends[1])


def test_groups_and_newcomers_have_graphs_of_their_own(graphs: list[OnCpu]) -> None:
    ends = []
    for mode in ("reduce-overhead", True):
        p, q, frozen = (nn.Parameter(torch.full((3,), 1.0 + i)) for i in range(3))
        frozen.requires_grad_(False)
        bridge = TorchBridge(chains.adam(0.1), [p, frozen], compile=mode)
        for step in range(12):
            if step == 4:
                bridge.add_param_group({"params": [q], "lr": 0.2})
            if step == 8:
                frozen.requires_grad_(True)
            for x in (p, q, frozen):
                if x.requires_grad:
                    x.grad = torch.cos(x.detach() + step)
            bridge.step()
        ends.append([p.detach(), q.detach(), frozen.detach()])
    torch.testing.assert_close(*ends, rtol=0, atol=0)
    assert len(graphs) == 3  # a group, another, and the first with the newcomer


def test_tensors_that_change_tiers_have_other_graphs(graphs: list[OnCpu]) -> None:
    ends = []
    for mode in ("reduce-overhead", True):
        params = parameters()
        bridge = TorchBridge(cosmic(), params.items(), compile=mode)
        ends.append((run_tiers(bridge, params, gradients()), list(params.values())))
    assert len(set(ends[0][0])) > 2 and ends[0][0] == ends[1][0]
    torch.testing.assert_close(ends[0][1], ends[1][1], rtol=0, atol=0)


def test_a_copy_has_graphs_of_its_own(graphs: list[OnCpu]) -> None:
    bridge, params = train(lambda: chains.adam(0.1), "reduce-overhead", steps=6)
    before = [p.clone() for p in params]
    other = copy.deepcopy(bridge)
    theirs = other.param_groups[0]["params"]
    for _ in range(4):
        for p in theirs:
            p.grad = torch.ones_like(p)
        other.step()
    torch.testing.assert_close(params, before, rtol=0, atol=0)
    assert not any(p.equal(q) for p, q in zip(params, theirs, strict=True))


def test_a_failed_capture_leaves_a_bridge_that_goes_on(graphs: list[OnCpu]) -> None:
    p = nn.Parameter(torch.ones(3))
    bridge = TorchBridge(chains.adam(0.1), [p], compile="reduce-overhead")
    p.grad = torch.ones(3)
    for _ in range(WARM):
        bridge.step()
    before, state = p.detach().clone(), copy.deepcopy(bridge.state_dict())
    graphs[0].failure = RuntimeError("it waits")
    with pytest.raises(RuntimeError, match="cannot be captured as a CUDA graph"):
        bridge.step()
    assert p.equal(before)
    torch.testing.assert_close(bridge.state_dict(), state, rtol=0, atol=0)
    graphs[0].failure = None
    bridge.step()
    assert not p.equal(before)


def test_a_compiled_step_is_replayed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def make() -> Any:
        return optax.sgd(0.1, momentum=0.9)

    want = train(make, True)[1]
    monkeypatch.setitem(cuda_graph.CAPTURES, "cpu", OnCpu)
    bridge, got = train(make, "reduce-overhead")
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert steps_of(bridge)[1]


def test_on_a_cpu_it_means_to_compile() -> None:
    def make() -> Any:
        return optax.sgd(0.1, momentum=0.9)

    bridge, got = train(make, "reduce-overhead")
    torch.testing.assert_close(got, train(make, True)[1], rtol=0, atol=0)
    assert "CUDA graph" not in bridge.explain()


def test_what_has_no_graphs_is_refused() -> None:
    p = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="`compile` must be one of False, True, 'reduce-overhead'"):
        TorchBridge(optax.sgd(0.1), [p], compile="max-autotune")
    with pytest.raises(ValueError, match="XLA always compiles"):
        TorchBridge(optax.sgd(0.1), [p], compile="reduce-overhead", engine="xla")
    base = torch.optim.SGD([p], 0.1)
    with pytest.raises(ValueError, match="TorchWrap: `compile` must be one of False, True"):
        TorchWrap(base, before=optax.scale(2.0), compile="reduce-overhead")  # pyright: ignore[reportArgumentType]


def test_dtensors_are_refused_where_there_are_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cuda_graph.CAPTURES, "cpu", OnCpu)
    p = nn.Parameter(torch.ones(2))
    tree = TorchBridge(optax.sgd(0.1), [p])._groups[0].tree
    assert tree is not None
    trace, targets = tree.described.trace(False), tree.described.targets
    engine = engines.TorchEngine("reduce-overhead")
    sharding: Any = object()
    with pytest.raises(NotImplementedError, match=r"a parameter is a DTensor.*compile=True"):
        engine.program(trace, targets, torch.device("cpu"), sharding)
