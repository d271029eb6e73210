"""A step as a CUDA graph: captured once, then replayed by one launch of the host.

A graph reads and writes the addresses that it was captured with. What a step writes, parameters and state, stays where
it is; if not, the graphs are forgotten. Gradients lie wherever autograd puts them, mostly at the same few places: a
graph is kept for each of these. Where they move all the time, one graph reads them from memory of its own, into which
they are copied. Whatever else changes from step to step (rates, the loss) is in tensors that are filled before it.
"""

import contextlib
import operator
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from chainrule.bridges.lowering.executor import BRANCHES, InPlace, write
from chainrule.bridges.lowering.program import collector_paused

WARM = 2
"""So many steps are launched first: they compile, load code and allocate, which no graph may."""
STREAMS = int(os.environ.get("CHAINRULE_CUDA_STREAMS", "8"))
"""On so many streams are calls that do not depend on each other."""
MOST = 4
"""So many graphs are kept for places of the gradients, and so many of the last places are remembered."""
PATIENCE, LAST = 8, 32
"""When more than so many of the last steps had no graph of theirs, one that copies the gradients is made."""


class Capture(Protocol):
    """Records what is launched on a device."""

    def is_underway(self) -> bool:
        """Whether something is being recorded already, by whoever it is."""
        ...

    def __call__(
        self, run: InPlace, inputs: Sequence[Tensor], *, afresh: bool
    ) -> Callable[[], None]:
        """What runs `run(inputs)` again, at the same addresses; nothing has run, and no input is held.

        `afresh`: none of what it made before is there any more.
        """
        ...


@contextlib.contextmanager
def branches(main: Any, others: Sequence[Any], on: Callable[[Any], Any]) -> Generator[None]:
    """A context in which calls that do not depend on each other are on streams beside `main`, and join it after.

    Most kernels of a step are for small tensors: to start one takes longer than to run it, and a graph starts those of
    its branches at the same time.

    Args:
      main: the current stream.
      others: those beside it.
      on: makes a context in which a stream is the current one.
    """

    def run(calls: Sequence[Callable[[], None]]) -> None:
        if len(calls) < 2:
            for call in calls:
                call()
            return
        fork = main.record_event()
        used = [*zip(others, range(len(calls)), strict=False)]
        for stream, first in used:
            stream.wait_event(fork)
            with on(stream):
                for call in calls[first :: len(others)]:
                    call()
        for stream, _ in used:
            main.wait_event(stream.record_event())

    token = BRANCHES.set(run)
    try:
        yield
    finally:
        BRANCHES.reset(token)


class CudaCapture:
    """Captures on one device. The graphs share memory, since they run one after the other; it goes with the last."""

    def __init__(self, device: torch.device):
        self._device = device
        self._pool: Any = None
        self._streams: list[Any] = []

    def is_underway(self) -> bool:
        with torch.cuda.device(self._device):
            return torch.cuda.is_current_stream_capturing()

    def __call__(
        self, run: InPlace, inputs: Sequence[Tensor], *, afresh: bool
    ) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        # `torch.cuda.graph` would empty the allocator's cache too, and so move the next gradients elsewhere.
        with torch.cuda.device(self._device), collector_paused():
            if afresh:
                self._pool = torch.cuda.graph_pool_handle()
            # The same streams for all graphs, because each that multiplies matrices keeps memory for that.
            self._streams = self._streams or [torch.cuda.Stream() for _ in range(1 + STREAMS)]
            main, *others = self._streams
            with torch.cuda.stream(main), branches(main, others, torch.cuda.stream):
                # Other threads, such as a data loader's, may allocate meanwhile.
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    run(inputs)
                except BaseException:
                    with contextlib.suppress(RuntimeError):  # says no more than that it failed
                        graph.capture_end()
                    raise
                graph.capture_end()

        def replay() -> None:
            with torch.cuda.device(self._device):
                graph.replay()

        return replay


CAPTURES: dict[str, Callable[[torch.device], Capture]] = {"cuda": CudaCapture}
"""By the type of a device."""

_Places = tuple[Any, ...]
"""Addresses of tensors, with their strides where some are not contiguous."""


def _places(tensors: Sequence[Tensor]) -> _Places:
    addresses = tuple(map(Tensor.data_ptr, tensors))
    if all(map(Tensor.is_contiguous, tensors)):
        return addresses
    return addresses, tuple(map(Tensor.stride, tensors))


def picker(keys: Sequence[Any]) -> Callable[[Any], Sequence[Any]]:
    """`itemgetter`, but for the tuple that it does not return for a single key."""
    return operator.itemgetter(*keys) if len(keys) > 1 else lambda xs: tuple(xs[k] for k in keys)


class CapturedStep:
    """A step that is replayed where it can be, and launched else; the same is computed either way.

    Attributes:
      captured, replayed, launched: how many graphs were made, and how many steps ran either way.
    """

    def __init__(self, run: InPlace, inputs: int, written: Iterable[int], capture: Capture):
        """
        Args:
          run: the step.
          inputs: how many it has.
          written: the positions of those that it writes into.
          capture: for the device of the inputs.
        """
        self._run, self._capture = run, capture
        own = sorted(set(written))
        self._read = sorted({*range(inputs)} - {*own})
        self._pick_written, self._pick_read = picker(own), picker(self._read)
        self.captured = self.replayed = self.launched = 0
        self._forget(())

    def _forget(self, written: Sequence[Tensor]) -> None:
        """Drops all graphs; the next are for these tensors where they lie."""
        self._held = written
        # A chain has up to ten scalars for each parameter. Who moves the state by hand does not move these alone.
        self._pick_moving = picker([i for i, x in enumerate(written) if x.ndim or x.requires_grad])
        self._homes = _places(self._pick_moving(written))
        self._graphs: dict[_Places, InPlace] = {}
        self._copying: InPlace | None = None
        self._recent: deque[_Places] = deque(maxlen=MOST)
        self._missed: deque[bool] = deque(maxlen=LAST)

    def __call__(self, inputs: Sequence[Tensor]) -> None:
        self.at(inputs)(inputs)

    def at(self, inputs: Sequence[Tensor]) -> InPlace:
        """What runs the step on these inputs. A graph that it needs is captured; nothing is written yet.

        Raises:
          RuntimeError: the step cannot be captured.
        """
        if self._capture.is_underway():  # it becomes a part of the user's graph
            return self._run
        written = self._pick_written(inputs)
        stays = len(written) == len(self._held) and all(map(operator.is_, written, self._held))
        if not stays or _places(self._pick_moving(written)) != self._homes:
            self._forget(written)
        found = self._graph(_places(self._pick_read(inputs)), inputs)
        self.replayed += found is not None
        self.launched += found is None
        return found or self._run

    def _graph(self, places: _Places, inputs: Sequence[Tensor]) -> InPlace | None:
        """The graph for the places of what is only read; None where there is none yet."""
        found = self._graphs.get(places)
        self._missed.append(found is None)
        if found is not None:
            return found
        is_warm, is_known = len(self._missed) > WARM, places in self._recent
        if is_warm and is_known and len(self._graphs) < MOST:
            replay = self._made(inputs)
            self._graphs[places] = lambda _: replay()
            return self._graphs[places]
        self._recent.append(places)
        if self._copying is None and sum(self._missed) > PATIENCE:
            self._copying = self._with_copies(inputs)
        return self._copying

    def _with_copies(self, inputs: Sequence[Tensor]) -> InPlace:
        """A graph that reads copies of what is only read, wherever that lies."""
        own = {i: torch.empty_like(inputs[i]) for i in self._read}
        replay = self._made([own.get(i, x) for i, x in enumerate(inputs)])
        # One call for each dtype, because one for several would be a launch for each tensor.
        dtypes = {x.dtype for x in own.values()}
        lists = [[i for i, x in own.items() if x.dtype == dtype] for dtype in dtypes]

        def run(inputs: Sequence[Tensor]) -> None:
            for positions in lists:
                write([own[i] for i in positions], [inputs[i] for i in positions])
            replay()

        return run

    def _made(self, inputs: Sequence[Tensor]) -> Callable[[], None]:
        try:
            afresh = not self._graphs and self._copying is None
            replay = self._capture(self._run, inputs, afresh=afresh)
        except RuntimeError as error:
            raise RuntimeError(
                'TorchBridge: this step cannot be captured as a CUDA graph, as compile="reduce-overhead" asks; make '
                "the bridge with compile=True. What waits for the device, to read a value or in a factorisation, has "
                f"no graph: {error}"
            ) from error
        self.captured += 1
        return replay

    def explained(self) -> list[str]:
        """What became of the steps, as lines of text."""
        kept = len(self._graphs) + (self._copying is not None)
        copies = ", one reads copies of the gradients" if self._copying else ""
        return [
            f"  CUDA graphs: {kept} kept of {self.captured} captured{copies}; steps: {self.replayed} replayed, "
            f"{self.launched} launched"
        ]
