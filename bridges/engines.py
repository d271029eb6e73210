"""What computes the steps of a torch bridge: torch, or JAX on tensors exchanged over DLPack."""

from collections import Counter
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from chainrule.bridges.checks import autocast_off
from chainrule.bridges.engine_xla import XlaEngine
from chainrule.bridges.lowering import Lowered, lower_jaxpr
from chainrule.bridges.lowering.backends.cuda_graph import CAPTURES, CapturedStep
from chainrule.bridges.lowering.executor import InPlace
from chainrule.bridges.lowering.passes.shard import Sharding
from chainrule.bridges.lowering.pipeline import Step, make_step, sharded
from chainrule.bridges.lowering.release import dissolve_with
from chainrule.bridges.step.trace import Trace
from chainrule.native.dtypes import x64_if_wide


class Program(Protocol):
    """A step for tensors on one device."""

    def ready(self) -> InPlace:
        """The step as a function of its flat inputs, which writes each output into its target; built, if it was not."""
        ...

    def agrees(self) -> bool:
        """Whether it takes one more input: see `StepProgram.agrees`; built, if it was not."""
        ...

    def explained(self, parameters: int) -> list[str]:
        """How it runs, as lines of text; `parameters` is their number."""
        ...

    def passes(self) -> list[str]:
        """What each pass did to it, as lines of text; it is built, if it was not."""
        ...


class Engine(Protocol):
    """A way to compute a step."""

    def program(
        self,
        trace: Trace,
        targets: Sequence[int],
        device: torch.device,
        sharding: Sharding | None = None,
    ) -> Program:
        """The program of a step function.

        Args:
          trace: the step as a function of the leaves of (parameters, gradients, state, extras).
          targets: for every output, the position of the input in whose place it goes.
          device: of the inputs.
          sharding: how the inputs lie on a mesh; None: on one device.

        Raises:
          UnsupportedPrimitive: the chain needs another engine.
        """
        ...

    def initial(
        self,
        init: Trace,
        params: Sequence[Tensor],
        device: torch.device,
        sharding: Sharding | None = None,
    ) -> list[Tensor]:
        """The leaves of the state that `init` makes for parameters on a device, or for what this rank has of them."""
        ...


COMPILE = (False, True, "reduce-overhead")
"""Whether Inductor compiles torch's programs; and CUDA graphs replay them, where there are such graphs."""


def engine_named(name: str, compile: bool | str) -> Engine:
    """`"torch"` or `"xla"`; `compile` is one of `COMPILE`."""
    return XlaEngine() if name == "xla" else TorchEngine(compile)


class TorchProgram:
    """A step lowered to torch."""

    def __init__(self, lowered: Lowered, step: Step, captured: CapturedStep | None = None):
        self.lowered, self.step, self.captured = lowered, step, captured

    def ready(self) -> InPlace:
        return self.step.ready() if self.captured is None else self.captured

    def agrees(self) -> bool:
        self.step.ready()
        return self.step.agrees

    def explained(self, parameters: int) -> list[str]:
        nodes = [n for n in self.lowered.graph.nodes if n.op == "call_function"]
        lines = [f"  {'link':40}{'operations':>12}{'a parameter':>14}"]
        for link, count in Counter(n.meta.get("link") or "(apply updates)" for n in nodes).items():
            lines.append(f"  {link:40}{count:>12,}{count / parameters:>14.1f}")
        return lines + (self.captured.explained() if self.captured else [])

    def passes(self) -> list[str]:
        self.ready()
        return [f"  {'pass':40}{'nodes':>12}{'gone':>7}{'new':>7}", *self.step.log]


class TorchEngine:
    """Lowers to torch, and runs it op by op or through Inductor, also as CUDA graphs."""

    def __init__(self, compile: bool | str):
        self._compile = compile

    def program(
        self,
        trace: Trace,
        targets: Sequence[int],
        device: torch.device,
        sharding: Sharding | None = None,
    ) -> TorchProgram:
        compiled = bool(self._compile)
        lowered = _lowered(trace, device, compiled, sharding is not None)
        made = make_step(lowered, targets, compile=compiled, sharding=sharding)
        capture = CAPTURES.get(device.type) if self._compile == "reduce-overhead" else None
        if capture is None:
            return TorchProgram(lowered, made)
        if sharding is not None:
            raise NotImplementedError(
                'TorchBridge: compile="reduce-overhead" is for one device, and a parameter is a DTensor; ranks that '
                "wait for each other are not captured. Use compile=True"
            )
        inputs = len(trace.jaxpr.in_avals)
        return TorchProgram(lowered, made, CapturedStep(made, inputs, targets, capture(device)))

    def initial(
        self,
        init: Trace,
        params: Sequence[Tensor],
        device: torch.device,
        sharding: Sharding | None = None,
    ) -> list[Tensor]:
        lowered = _lowered(init, device, False, sharding is not None)
        run = lowered if sharding is None else sharded(lowered, sharding)
        with autocast_off(params):
            leaves = list(run(*params))
        for i in lowered.passthrough:  # a state that starts as the parameters themselves
            leaves[i] = leaves[i].detach().clone()
        return leaves


def _lowered(trace: Trace, device: torch.device, compiled: bool, sharded: bool) -> Lowered:
    with x64_if_wide(trace.inputs):
        lowered = lower_jaxpr(trace.jaxpr, device=device, compiled=compiled, sharded=sharded)
    dissolve_with(lowered, lowered.graphs)
    return lowered
