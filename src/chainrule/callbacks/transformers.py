"""Metrics of a chain in Hugging Face's Trainer."""

from typing import Any

import transformers

from chainrule.callbacks import MetricsLogger


class TransformersMetrics(transformers.TrainerCallback):
    """Writes the metrics of the trainer's optimizer.

    Args:
      logger: where to, and how often: `TensorBoardLogger`, `WandbLogger` or a `MetricsLogger`.

    >>> logger = MetricsLogger(print, every=50)
    >>> callback = TransformersMetrics(logger)  # transformers.Trainer(callbacks=[callback])
    """

    def __init__(self, logger: MetricsLogger):
        self.logger = logger

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Called by the trainer."""
        del args, control
        self.logger(given["optimizer"], state.global_step)
