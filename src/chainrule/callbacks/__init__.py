"""Loggers of what a chain knows of the run: `chainrule.metrics` every n steps, to TensorBoard, W&B or a trainer's own.

Between two of those steps nothing is read from the device, and at one of them all values come in one transfer.
"""

import importlib
import importlib.util
import math
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import jax

from chainrule.transforms import metrics
from chainrule.transforms._trees import path_name

if TYPE_CHECKING:
    from chainrule.callbacks.lightning import LightningMetrics
    from chainrule.callbacks.transformers import TransformersMetrics

__all__ = [
    "LightningMetrics",
    "MetricsLogger",
    "TensorBoardLogger",
    "TransformersMetrics",
    "WandbLogger",
    "scalars",
]


_HOMES = {"LightningMetrics": "lightning", "TransformersMetrics": "transformers"}
"""What is imported when it is asked for -> the library that it needs, and its file here."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'chainrule.callbacks' has no attribute {name!r}")
    try:
        home = importlib.import_module(f"chainrule.callbacks.{_HOMES[name]}")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != _HOMES[name]:
            raise
        raise ModuleNotFoundError(
            f'chainrule.callbacks.{name} needs {_HOMES[name]}; install it with: pip install "chainrule[clients]"',
            name=error.name,
        ) from error
    return getattr(home, name)


def scalars(source: Any, *, per_parameter: bool = False) -> dict[str, float]:
    """The metrics of an optimizer or a state as numbers by name, in one transfer from the device.

    Args:
      source: an optimizer with a method `metrics` (`TorchBridge`), one that wraps such a one as `optimizer`
        (Accelerate's, Lightning's), or the state of a gradient transformation.
      per_parameter: what there is of each parameter is given for each, `"b1/dense/kernel"`; else its mean, least and
        largest, `"b1/mean"`, `"b1/min"`, `"b1/max"`.

    Returns:
      Numbers by name. Of several parameter groups the names begin with `group0/`, `group1/`, ...

    >>> import chainrule, jax.numpy as jnp
    >>> params = {"w": jnp.ones(4), "b": jnp.ones(2)}
    >>> state = chainrule.chains.stam_lite().init(params)
    >>> found = scalars(state)
    >>> sorted(found), round(found["b1/mean"], 6)
    (['b1/max', 'b1/mean', 'b1/min', 'nonfinite/max', 'nonfinite/mean', 'nonfinite/min', 'state_bytes'], 0.9)
    """
    while not hasattr(source, "metrics") and hasattr(source, "optimizer"):
        source = source.optimizer
    found = source.metrics() if hasattr(source, "metrics") else metrics(source)
    if isinstance(found, list):
        found = {f"group{i}/{k}": v for i, group in enumerate(found) for k, v in group.items()}
    named = {name: dict(_leaves(value)) for name, value in found.items()}
    values = iter(_on_host([x for leaves in named.values() for x in leaves.values()]))
    result: dict[str, float] = {}
    for name, leaves in named.items():
        own = {key: next(values) for key in leaves}
        shown = own if per_parameter or _is_plain(found[name]) else _summary(list(own.values()))
        result |= {f"{name}/{key}" if key else name: value for key, value in shown.items()}
    return result


def _leaves(value: Any) -> Iterator[tuple[str, Any]]:
    for path, leaf in jax.tree_util.tree_leaves_with_path(value):
        name = path_name(path)
        if not getattr(leaf, "ndim", 0):
            yield name, leaf
            continue
        for i, number in enumerate(leaf.reshape(-1)):  # CASMO's percentiles are a vector
            yield f"{name}/{i}" if name else str(i), number


def _is_plain(value: Any) -> bool:
    """Whether it is a scalar, or numbers of the host by name (`tier_occupancy`), not a number for each parameter."""
    leaves = jax.tree.leaves(value)
    return leaves == [value] or all(isinstance(x, (int, float)) for x in leaves)


def _summary(values: list[float]) -> dict[str, float]:
    if not values:
        return {}
    return {"mean": math.fsum(values) / len(values), "min": min(values), "max": max(values)}


def _on_host(leaves: list[Any]) -> list[float]:
    """Arrays of JAX, tensors of torch and numbers as numbers."""
    tensors = [x for x in leaves if hasattr(x, "detach")]
    if not tensors:
        return [float(x) for x in jax.device_get(leaves)]
    import torch

    values = iter(torch.stack([x.detach().float() for x in tensors]).tolist())
    return [next(values) if hasattr(x, "detach") else float(x) for x in leaves]


class MetricsLogger:
    """Writes the metrics of an optimizer every n steps.

    Args:
      write: takes numbers by name and the step.
      every: steps from one time to the next, at least 1.
      per_parameter: as in `scalars`.
      prefix: that the names get.

    Raises:
      ValueError: `every` is less than 1.

    >>> import chainrule, jax.numpy as jnp
    >>> logger = MetricsLogger(lambda values, step: print(step, values), every=2)
    >>> state = chainrule.transforms.scale_by_adam().init(jnp.ones(2))
    >>> [logger(state, step) for step in range(1, 4)]
    2 {'chainrule/state_bytes': 20.0}
    [False, True, False]
    """

    def __init__(
        self,
        write: Callable[[dict[str, float], int], Any],
        *,
        every: int = 100,
        per_parameter: bool = False,
        prefix: str = "chainrule/",
    ):
        if every < 1:
            raise ValueError(f"{type(self).__name__}: `every` must be at least 1, got {every}")
        self._write, self._every = write, every
        self._per_parameter, self._prefix = per_parameter, prefix
        self._last: int | None = None

    def __call__(self, source: Any, step: int) -> bool:
        """Writes if the step is a multiple of `every` and was not written before.

        Args:
          source: an optimizer or a state; see `scalars`.
          step: how many steps were made.

        Returns:
          Whether it wrote.
        """
        if step % self._every or step == self._last:
            return False
        found = scalars(source, per_parameter=self._per_parameter)
        self._write({self._prefix + name: value for name, value in found.items()}, step)
        self._last = step
        return True


class TensorBoardLogger(MetricsLogger):
    """Writes metrics to TensorBoard.

    Args:
      target: a folder, or a writer with `add_scalar` (`torch.utils.tensorboard.SummaryWriter`, tensorboardX's).
      **options: of `MetricsLogger`.

    Attributes:
      writer: the writer; `close` it at the end.

    Raises:
      ImportError: a folder, and neither tensorboard (with torch) nor tensorboardX is installed.
    """

    def __init__(self, target: Any, **options: Any):
        self.writer = _writer(target) if isinstance(target, (str, os.PathLike)) else target
        super().__init__(self._scalars, **options)

    def _scalars(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Closes the writer."""
        self.writer.close()


def _writer(folder: str | os.PathLike[str]) -> Any:
    def has(name: str) -> bool:
        return importlib.util.find_spec(name) is not None

    if has("torch") and has("tensorboard"):
        from torch.utils.tensorboard import SummaryWriter
    elif has("tensorboardX"):
        from tensorboardX import SummaryWriter  # pyright: ignore
    else:
        raise ImportError(
            "TensorBoardLogger: needs torch and tensorboard, or tensorboardX; install one of them, or give a writer "
            "with `add_scalar`"
        )
    return SummaryWriter(os.fspath(folder))


class WandbLogger(MetricsLogger):
    """Writes metrics to Weights & Biases.

    Args:
      run: what `wandb.init` returned.
      **options: of `MetricsLogger`.
    """

    def __init__(self, run: Any, **options: Any):
        super().__init__(lambda values, step: run.log(values, step=step), **options)
