"""Two processes: what a monitor sums over ranks is what one process finds on the whole batch."""

import socket
import warnings

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import gradkernels as gk

T, B = 12, 8


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.rnn, self.head = gk.nn.LSTM(5, 6, num_layers=2), nn.Linear(6, 3)
        self.block = gk.nn.ResidualBlock(nn.Linear(6, 6), 6, dropout=0.0)

    def forward(self, x):
        return self.head(self.block(self.rnn(x)[0][-1]))


def train(model, parts, wrapped=None, scaler=None):
    """Two steps over these parts of a batch; a part's loss is a mean over its rows."""
    run = wrapped or model
    optimizer = torch.optim.SGD(run.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        for k, part in enumerate(parts):
            if wrapped is not None and hasattr(wrapped, "no_sync"):
                wrapped.require_backward_grad_sync = k == len(parts) - 1
            loss = run(part).square().mean() / len(parts)
            (scaler.scale(loss) if scaler else loss).backward()
        if scaler:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()


def alone(x):
    model = Net()
    with gk.flow.watch(model, clip=1e-9) as monitor:
        train(model, [x])
    return monitor


def ddp(x):
    model = DistributedDataParallel(Net())
    with gk.flow.watch(model, clip=1e-9) as monitor:
        train(model.module, [x], model)
    return monitor


def accumulated(x):
    model = DistributedDataParallel(Net())
    with gk.flow.watch(model) as monitor:
        train(model.module, list(x.split(2, 1)), model)
    return monitor


def scaled(x):
    model, scaler = DistributedDataParallel(Net()), torch.amp.GradScaler("cpu", init_scale=256.0)
    with gk.flow.watch(model, scaler=scaler) as monitor:
        train(model.module, [x], model, scaler)
    return monitor


def watched_first(x):
    model = Net()
    with gk.flow.watch(model, group=dist.group.WORLD) as monitor:
        train(model, [x], DistributedDataParallel(model))
    return monitor


def fsdp(x):
    model = Net()
    for part in (model.rnn, model):
        fully_shard(part, mesh=init_device_mesh("cpu", (2,)))
    with gk.flow.watch(model, clip=1e-9) as monitor:
        train(model, [x])
    return monitor


CASES = {f.__name__: f for f in (ddp, accumulated, scaled, watched_first, fsdp)}


def compared(got, want):
    """Every number of two histories."""
    assert [r.step for r in got.history] == [r.step for r in want.history] == [1, 2]
    for ours, theirs in zip(got.history, want.history):
        assert ours.layers.keys() == theirs.layers.keys() == got.layers.keys()
        for name, flow in theirs.layers.items():
            assert ours.layers[name].signals.keys() == flow.signals.keys()
            for signal, log10 in flow.signals.items():
                np.testing.assert_allclose(
                    ours.layers[name].signals[signal], log10, atol=2e-5, err_msg=f"{name} {signal}"
                )
            assert ours.layers[name].saturation.keys() == flow.saturation.keys()
            assert ours.layers[name].horizon == flow.horizon
        np.testing.assert_allclose(
            ours.blocks["block"].residual_share, theirs.blocks["block"].residual_share, rtol=1e-4
        )
        np.testing.assert_allclose(ours.blocks["block"].entrance, theirs.blocks["block"].entrance, atol=2e-5)
        if got.clip is not None:
            np.testing.assert_allclose(ours.grad_norm, theirs.grad_norm, rtol=1e-4)
        for name, group in theirs.parameters.items():
            np.testing.assert_allclose(ours.parameters[name].norm, group.norm, rtol=1e-5)
            np.testing.assert_allclose(ours.parameters[name].grad, group.grad, rtol=1e-4)
            np.testing.assert_allclose(ours.parameters[name].update_ratio, group.update_ratio, rtol=1e-4)


def lengths_apart(x, rank):
    """Ranks that have sequences of other lengths, and one that has none in the second step."""
    model = DistributedDataParallel(Net(), find_unused_parameters=True)
    monitor = gk.flow.watch(model)
    model(x[: 5 + 4 * rank]).sum().backward()
    monitor.step()
    if rank:
        model.module(x).sum().backward()
    monitor.step()
    monitor.sync()
    first, second = monitor.history
    assert len(first.layers["rnn.l0"].signals["h"]) == 9 and len(second.layers["rnn.l0"].signals["h"]) == 12
    before = monitor.snapshot()["steps"]
    for _ in range(15):  # nobody asks for it: with the 16th step all ranks do it
        monitor.step()
    assert monitor.snapshot()["steps"] == before
    monitor.close()


def worker(rank, port, answers):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.manual_seed(1)
    x = torch.randn(T, B, 5)
    want = alone(x)
    assert want.group is None
    for name, case in CASES.items():
        try:
            compared(case(x[:, 4 * rank : 4 * rank + 4]), want)
        except AssertionError as e:
            answers.put((rank, name, str(e)))
        else:
            answers.put((rank, name, "right"))
    try:
        lengths_apart(x, rank)
    except AssertionError as e:
        answers.put((rank, "lengths", str(e)))
    else:
        answers.put((rank, "lengths", "right"))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.cpu
def test_two_processes():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    answers = torch.multiprocessing.get_context("spawn").SimpleQueue()
    torch.multiprocessing.spawn(worker, (port, answers), nprocs=2)
    got = [answers.get() for _ in range(2 * (len(CASES) + 1))]
    assert {(rank, name) for rank, name, _ in got} == {(rank, name) for rank in (0, 1) for name in (*CASES, "lengths")}
    assert not [answer for answer in got if answer[2] != "right"]
