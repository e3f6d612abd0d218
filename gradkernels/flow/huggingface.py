"""The monitor as a callback of Hugging Face's Trainer; needs ``pip install gradkernels[transformers]``."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from transformers import TrainerCallback

from gradkernels.flow.log import scalars
from gradkernels.flow.monitor import Monitor


class FlowCallback(TrainerCallback):
    """Watches the Trainer's model, and adds :func:`gradkernels.flow.log.scalars` to what the Trainer logs.

    ``Trainer(..., callbacks=[FlowCallback()])``; afterwards ``callback.monitor`` has what was found. Options are those of
    :func:`gradkernels.flow.watch`; with ``fp16=True`` give it the scaler, which the Trainer does not hand to callbacks.
    """

    monitor: Monitor | None = None

    def __init__(self, **options: Any) -> None:
        self.options = options

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        parallel = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        clip = args.max_grad_norm if args.max_grad_norm and args.max_grad_norm > 0 else None
        self.monitor = Monitor(model, **{"group": dist.group.WORLD if parallel else None, "clip": clip, **self.options})

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        records = self.monitor.kept() if self.monitor is not None else []
        if records and logs is not None:
            found = scalars(records[-1])
            logs.update(found)
            if state.log_history:
                state.log_history[-1].update(found)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.monitor is not None:
            self.monitor.sync()
            self.monitor.close()
