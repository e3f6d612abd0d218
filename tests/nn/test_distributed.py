"""Two processes on one machine: DDP and FSDP2, wrapped before and after conversion, compiled or not, with and without a probe."""

import socket
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import gradkernels as gk


class Small(nn.Module):
    def __init__(self, layer):
        super().__init__()
        torch.manual_seed(0)
        self.rnn, self.out = layer(8, 16, num_layers=2), nn.Linear(16, 4)

    def forward(self, x):
        return self.out(self.rnn(x)[0][-1])


def loss(y):
    return y.square().mean()


def whole(p):
    return p.full_tensor() if hasattr(p, "full_tensor") else p


def probe(model):
    leaves = [torch.zeros(12, 3, dtype=torch.double, requires_grad=True) for _ in range(2)]
    model.rnn.probes = leaves
    return leaves


def ddp(x, **kwargs):
    model = DistributedDataParallel(Small(gk.nn.LSTM), **kwargs)
    leaves = probe(model.module)
    loss(model(x)).backward()
    return model, leaves


def ddp_accumulated(x):
    model = DistributedDataParallel(Small(gk.nn.LSTM))
    leaves = probe(model.module)
    with model.no_sync():
        (loss(model(x[:, :2])) / 2).backward()
    (loss(model(x[:, 2:])) / 2).backward()
    return model, leaves


def ddp_compiled(x):
    model = DistributedDataParallel(torch.compile(Small(gk.nn.LSTM), fullgraph=True, backend="aot_eager"))
    loss(model(x)).backward()
    return model, None


def ddp_converted(x):
    model = DistributedDataParallel(Small(nn.LSTM))
    assert type(gk.convert(model).module.rnn) is gk.nn.LSTM
    loss(model(x)).backward()
    return model, None


def fsdp(x, layer=gk.nn.LSTM, **kwargs):
    model = Small(layer)
    for part in (model.rnn, model):
        fully_shard(part, mesh=init_device_mesh("cpu", (2,)), **kwargs)
    if layer is nn.LSTM:
        gk.convert(model)
    assert isinstance(model.rnn, gk.nn.LSTM) and isinstance(model.rnn, FSDPModule)
    leaves = None if kwargs else probe(model)
    loss(model(x)).backward()
    if layer is nn.LSTM:
        gk.convert(model, to="torch")
        assert isinstance(model.rnn, nn.LSTM) and isinstance(model.rnn, FSDPModule)
    return model, leaves


def fsdp_converted(x):
    return fsdp(x, nn.LSTM)


def fsdp_bf16(x):
    return fsdp(x, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))


CASES = {f.__name__: f for f in (ddp, ddp_accumulated, ddp_compiled, ddp_converted, fsdp, fsdp_converted, fsdp_bf16)}
CASES["ddp_static_graph"] = lambda x: ddp(x, static_graph=True)


def worker(rank, port, answers):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.manual_seed(1)
    x = torch.randn(12, 8, 8)
    alone = Small(gk.nn.LSTM)
    norms = probe(alone)
    loss(alone(x)).backward()
    want = {n: p.grad for n, p in alone.named_parameters()}
    for name, case in CASES.items():
        model, leaves = case(x[:, 4 * rank : 4 * rank + 4])
        tolerance = {"rtol": 0.1, "atol": 5e-3} if "bf16" in name else {"rtol": 1e-4, "atol": 1e-6}
        try:
            for n, p in model.named_parameters():
                n = n.replace("module.", "").replace("_orig_mod.", "")
                torch.testing.assert_close(whole(p.grad), want[n], msg=f"{n}: {{}}".format, **tolerance)
            for got, whole_batch in zip(leaves or (), norms):
                total = got.grad.clone()
                dist.all_reduce(total)  # squares add up over ranks; each rank's mean is over half of the rows
                torch.testing.assert_close(total[:, :2] / 4, whole_batch.grad[:, :2], rtol=1e-4, atol=1e-12)
                torch.testing.assert_close(total[:, 2], whole_batch.grad[:, 2])
        except AssertionError as e:
            answers.put((rank, name, str(e)))
        else:
            answers.put((rank, name, "right"))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    answers = torch.multiprocessing.get_context("spawn").SimpleQueue()
    torch.multiprocessing.spawn(worker, (port, answers), nprocs=2)
    got = [answers.get() for _ in range(2 * len(CASES))]
    assert {(rank, name) for rank, name, _ in got} == {(rank, name) for rank in (0, 1) for name in CASES}
    assert not [answer for answer in got if answer[2] != "right"]
