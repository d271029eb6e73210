"""Metrics of a chain in Lightning."""

from typing import Any

import lightning.pytorch as pl

from chainrule.callbacks import MetricsLogger


class LightningMetrics(pl.Callback):
    """Writes the metrics of every optimizer that has any to the trainer's loggers.

    Args:
      every: optimizer steps from one time to the next, at least 1.
      **options: of `MetricsLogger`.

    >>> callback = LightningMetrics(every=50)  # pl.Trainer(callbacks=[callback])
    """

    def __init__(self, *, every: int = 100, **options: Any):
        super().__init__()
        self._options: dict[str, Any] = {"every": every, **options}
        self._loggers: dict[int, MetricsLogger] = {}
        MetricsLogger(print, **self._options)  # for its errors

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called by Lightning."""
        self._loggers = {}

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any, **__: Any
    ) -> None:
        """Called by Lightning."""
        for i, optimizer in enumerate(trainer.optimizers):
            if not hasattr(optimizer, "metrics"):
                continue
            several = f"optimizer{i}/" if len(trainer.optimizers) > 1 else ""

            def write(values: dict[str, float], step: int, several: str = several) -> None:
                named = {several + name: value for name, value in values.items()}
                for logger in trainer.loggers:
                    logger.log_metrics(named, step=step)

            logger = self._loggers.setdefault(i, MetricsLogger(write, **self._options))
            logger(optimizer, trainer.global_step)
