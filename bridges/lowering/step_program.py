"""`StepProgram`: what the passes of a step take and return."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, fx

from chainrule.bridges.lowering.nodes import inputs_of, results_of
from chainrule.bridges.lowering.program import Lowered

if TYPE_CHECKING:
    from chainrule.bridges.lowering.passes.partition import Piece
    from chainrule.bridges.lowering.passes.shard import Sharding


class KernelMove(NamedTuple):
    """Parameters that one call of the kernel updates in place, after the graph has run."""

    kind: tuple[str, Any]
    """Name and parameters of the tier-2 primitive, or `take_kernel_moves.SIGN`."""
    tensors: dict[str, list[int]]
    """Role -> position of the input, for every parameter."""
    values: np.ndarray
    """The factors of all moves; the graph writes the first of them, which are in its buffer."""
    columns: np.ndarray
    """Number x parameter x factor -> position in `values`."""


@dataclasses.dataclass
class StepProgram:
    """A program that updates some of its inputs in place, on its way from a graph to calls.

    Attributes:
      graph: flat tensors in, a tuple of flat tensors out; the program's own. Every node is pure. From `infer_values` on
        each has `meta["val"]`, a fake tensor, which every pass keeps true.
      attributes: what the graph's `get_attr` nodes name.
      targets: for every result the position of the input that it is written into; no input twice.
      device: where all inputs are.
      sharding: how the inputs lie on a mesh of devices; None: on one device. From `shard` on the graph is this rank's.
      agrees: whether its own last input says which parameters have a gradient here, and becomes on how many ranks.
      buffers: the memory of the last inputs, which the program brings itself.
      moves: what the kernel does after the graph, in place.
      stages: the graph in pieces, from `partition` on.
      log: a line for every pass.
    """

    graph: fx.Graph
    attributes: dict[str, Any]
    targets: tuple[int, ...]
    device: torch.device
    sharding: "Sharding | None" = None
    agrees: bool = False
    buffers: list[Tensor] = dataclasses.field(default_factory=list)
    moves: Sequence[KernelMove] = ()
    stages: "Sequence[Sequence[Piece]]" = ()
    log: list[str] = dataclasses.field(default_factory=list)

    @classmethod
    def of(
        cls, lowered: Lowered, targets: Sequence[int], sharding: "Sharding | None" = None
    ) -> "StepProgram":
        """A copy of a lowered program, whose results are written into the inputs at `targets`."""
        graph = fx.Graph()
        graph.output(graph.graph_copy(lowered.graph, {}))
        return cls(graph, lowered.attributes, tuple(targets), lowered.device, sharding)

    @property
    def inputs(self) -> list[fx.Node]:
        return inputs_of(self.graph)

    @property
    def results(self) -> list[fx.Node]:
        return results_of(self.graph)

    @property
    def updates(self) -> list[tuple[fx.Node, fx.Node]]:
        """Every result with the input that it is written into."""
        inputs = self.inputs
        return [(r, inputs[t]) for r, t in zip(self.results, self.targets, strict=True)]

    @property
    def on_cpu(self) -> bool:
        """Whether a scalar tensor can be read as a number without waiting for a device."""
        return self.device.type == "cpu"
