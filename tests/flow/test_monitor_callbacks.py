"""The monitor inside Lightning's and Hugging Face's trainers."""

import logging
import warnings

import pytest
import torch
from torch import nn

import gradkernels as gk


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = gk.nn.LSTM(3, 4), nn.Linear(4, 1)

    def forward(self, x, labels=None):
        y = self.head(self.rnn(x.transpose(0, 1))[0][-1]).squeeze(1)
        return {"loss": (y - labels).square().mean(), "logits": y}


ROWS = [
    {"x": torch.randn(6, 3, generator=torch.Generator().manual_seed(k)), "labels": torch.tensor(1.0)} for k in range(8)
]


@pytest.mark.slow
def test_lightning(tmp_path):
    import lightning.pytorch as pl
    from lightning.pytorch.loggers import Logger

    from gradkernels.flow.lightning import FlowCallback

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = Model()

        def training_step(self, batch, index):
            return self.model(**batch)["loss"]

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), 1e-2)

    class Kept(Logger):
        name, version = "kept", 0

        def __init__(self):
            super().__init__()
            self.metrics = []

        def log_metrics(self, metrics, step=None):
            self.metrics.append((step, metrics))

        def log_hyperparams(self, *args, **kwargs):
            pass

    callback, logger = FlowCallback(every_logged=3), Kept()
    trainer = pl.Trainer(
        max_epochs=2, accelerator="cpu", devices=1, callbacks=[callback], logger=[logger], default_root_dir=tmp_path,
        enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False, accumulate_grad_batches=2,
    )  # fmt: skip
    module = Module()
    trainer.fit(module, torch.utils.data.DataLoader(ROWS, batch_size=2))
    found = callback.monitor.history
    assert callback.monitor.step_count == trainer.global_step == 4 and [r.step for r in found] == [1, 2, 3, 4]
    assert found[0].parameters["model.rnn.l0"].update_ratio > 0
    ours = [(step, m) for step, m in logger.metrics if any(k.startswith("flow/") for k in m)]
    assert [step for step, _ in ours] == [1, 4] and ours[0][1]["flow/model.rnn.l0/horizon"] == found[0].layers[
        "model.rnn.l0"
    ].horizon
    assert module.model.rnn.probes is None


@pytest.mark.slow
def test_hugging_face(tmp_path):
    from transformers import Trainer, TrainingArguments

    from gradkernels.flow.huggingface import FlowCallback

    callback = FlowCallback()
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=2, logging_steps=2, use_cpu=True, report_to=[],
        save_strategy="no", disable_tqdm=True, gradient_accumulation_steps=2,
    )  # fmt: skip
    model = Model()
    trainer = Trainer(model=model, args=arguments, train_dataset=ROWS, callbacks=[callback])
    trainer.train()
    assert callback.monitor.step_count == 4 and len(callback.monitor.history) == 4
    assert callback.monitor.clip == 1.0 and callback.monitor.snapshot()["clip_rate"] is not None
    logged = [entry for entry in trainer.state.log_history if "flow/rnn.l0/horizon" in entry]
    assert [entry["step"] for entry in logged][:2] == [2, 4] and model.rnn.probes is None
