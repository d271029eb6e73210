"""`TorchBridge` beside `torch.compile`: steps inside a compiled function, and compiled steps in several threads."""

import logging
import threading
from collections.abc import Callable
from typing import Any

import optax
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from chainrule import TorchBridge, chains

# Dynamo's own: it looks at `.grad` of a loss that a function still holds when a graph ends.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")


class Stepped(TorchBridge):
    """A subclass with a step of its own."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        return super().step(closure)


def trained(make: type[TorchBridge], compile: bool, with_closure: bool) -> list[torch.Tensor]:
    torch.manual_seed(0)
    net = nn.Linear(3, 2)
    bridge = make(chains.adam(0.1), net.parameters())
    scheduler = lr_scheduler.ExponentialLR(bridge, 0.9)

    def closure() -> torch.Tensor:
        bridge.zero_grad()
        loss = net(torch.ones(4, 3)).square().sum()
        loss.backward()
        return loss

    def train() -> None:
        if with_closure:
            bridge.step(closure)
        else:
            closure()
            bridge.step()

    run: Callable[[], None] = torch.compile(train, backend="eager") if compile else train
    for _ in range(10):  # more than Dynamo compiles a function again before it gives up
        run()
        scheduler.step()
    return [p.detach() for p in net.parameters()]


@pytest.mark.parametrize("make", [TorchBridge, Stepped])
@pytest.mark.parametrize("with_closure", [False, True])
def test_a_compiled_training_step_may_hold_the_bridges(
    make: type[TorchBridge], with_closure: bool, caplog: pytest.LogCaptureFixture
) -> None:
    torch.compiler.reset()
    with caplog.at_level(logging.WARNING, "torch"):
        got = trained(make, True, with_closure)
    assert not caplog.records
    torch.testing.assert_close(got, trained(make, False, with_closure), rtol=0, atol=0)


def test_a_full_graph_is_refused_with_the_reason() -> None:
    p = nn.Parameter(torch.ones(2))
    bridge = TorchBridge(optax.sgd(0.1), [p])
    p.grad = torch.ones(2)
    compiled = torch.compile(lambda: bridge.step(), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="the step of a TorchBridge is a traced program already"):
        compiled()


def test_threads_may_compile_their_first_steps_at_once() -> None:
    momenta = (None, 0.9)
    start = threading.Barrier(len(momenta))
    failures: list[BaseException] = []

    def bridge_of(momentum: float | None, compile: bool) -> TorchBridge:
        p = nn.Parameter(torch.ones(3, 2))
        p.grad = torch.ones_like(p)
        return TorchBridge(optax.sgd(0.1, momentum), [p], compile=compile)

    bridges = [bridge_of(momentum, True) for momentum in momenta]

    def run(bridge: TorchBridge) -> None:
        start.wait()
        try:
            bridge.step()
        except BaseException as error:  # shown below: a thread's errors are nobody's
            failures.append(error)

    threads = [threading.Thread(target=run, args=(bridge,)) for bridge in bridges]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures
    for bridge, momentum in zip(bridges, momenta, strict=True):
        want = bridge_of(momentum, False)
        want.step()
        got, expected = (b.param_groups[0]["params"] for b in (bridge, want))
        torch.testing.assert_close(got, expected)
