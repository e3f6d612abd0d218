"""The monitor as a callback of Lightning; needs ``pip install gradkernels[lightning]``."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback

from gradkernels.flow.log import EVERY, DictLog
from gradkernels.flow.monitor import Monitor
from gradkernels.flow.ranks import group_of
from gradkernels.flow.recorder import sinks


class FlowCallback(Callback):
    """Watches a LightningModule while it is fitted, and logs :func:`gradkernels.flow.log.scalars` to its loggers.

    ``Trainer(callbacks=[FlowCallback()])``; afterwards ``callback.monitor`` has what was found. Options are those of
    :func:`gradkernels.flow.watch`; `scaler` and `group` are the trainer's own.
    """

    monitor: Monitor | None = None

    def __init__(self, every_logged: int = EVERY, **options: Any) -> None:
        self.every_logged, self.options = every_logged, options

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        def log(values: dict[str, float], step: int) -> None:
            for logger in trainer.loggers:
                logger.log_metrics(values, step=step)

        options = {"scaler": getattr(trainer.precision_plugin, "scaler", None), **self.options}
        options.setdefault("group", group_of(trainer.strategy.model))
        options["log"] = [*sinks(options.get("log", ())), DictLog(log, self.every_logged)]
        self.monitor = Monitor(pl_module, **options)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if self.monitor is not None:
            self.monitor.sync()
            self.monitor.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        if self.monitor is not None:
            self.monitor.close()
