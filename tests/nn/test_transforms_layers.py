"""What torch does to the layers of attention: compile, export, vmap, forward mode, checkpoints, autocast, processes."""

import copy
import pickle
import socket
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.export import Dim, export
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import gradkernels as gk

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("one_thread")]
D = 8
MASK = torch.ones(6, 6, dtype=torch.bool).triu(1)


class Itself(nn.Module):
    """Attention of x to itself, causal, without weights."""

    def __init__(self, layer, **kwargs):
        super().__init__()
        self.attn = layer(D, 2, batch_first=True, **kwargs)

    def forward(self, x):
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        return self.attn(x, x, x, attn_mask=mask, need_weights=False)[0]


class Decoder(nn.Module):
    """A layer that attends to its input turned around."""

    def __init__(self, layer, **kwargs):
        super().__init__()
        self.layer = layer(D, 2, 12, batch_first=True, **kwargs)

    def forward(self, x):
        return self.layer(x, x.flip(1))


MAKERS = {
    "attention": lambda m=gk.nn, p=0.0: Itself(m.MultiheadAttention, dropout=p),
    "encoder": lambda m=gk.nn, p=0.0: m.TransformerEncoderLayer(D, 2, 12, p, batch_first=True, norm_first=True),
    "encoder-post": lambda m=gk.nn, p=0.0: m.TransformerEncoderLayer(D, 2, 12, p, "gelu", batch_first=True),
    "decoder": lambda m=gk.nn, p=0.0: Decoder(m.TransformerDecoderLayer, dropout=p),
    "block": lambda p=0.0: gk.nn.AttentionBlock(D, 2, p, causal=True),
    "again": lambda p=0.0: gk.nn.TransformerEncoderLayer(D, 2, 12, p, batch_first=True, recompute=True),
}


@pytest.fixture(params=MAKERS)
def make(request):
    return MAKERS[request.param]


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


def trained(run, module, x):
    x = x.detach().requires_grad_()
    out = run(x)
    slopes = torch.linspace(-1, 2, out.numel()).cos().view_as(out).to(out.dtype)
    return out, *torch.autograd.grad(out, [x, *module.parameters()], slopes)


def test_compiled_in_one_graph_with_every_gradient(make):
    module, x = make(), torch.randn(2, 6, D)
    run = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(trained(run, module, x), trained(module, module, x))
    with torch.no_grad():
        torch.testing.assert_close(run(x), module(x))
    module.eval()
    torch.testing.assert_close(run(x), module(x))


@pytest.mark.slow
def test_compiled_by_inductor_with_dropout():
    module, x = MAKERS["block"](p=0.3), torch.randn(2, 6, D)
    run = torch.compile(module, fullgraph=True)
    assert all(v.isfinite().all() for v in trained(run, module, x)) and not torch.equal(run(x), run(x))
    torch.testing.assert_close(torch.stack([run(x) for _ in range(500)]).mean(0), module.eval()(x), atol=0.1, rtol=0.1)


@pytest.mark.parametrize("name", ("attention", "decoder", "block"))
def test_one_graph_for_every_shape(name):
    module, count = MAKERS[name](), torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    run = torch.compile(module, fullgraph=True, backend=count, dynamic=True)
    for B, T in ((2, 6), (3, 9), (5, 4)):
        x = torch.randn(B, T, D, requires_grad=True)
        torch.testing.assert_close(run(x), module(x))
    assert count.frame_count <= 2


@pytest.mark.parametrize("name", ("attention", "decoder", "block"))
def test_exported_with_open_sizes(name):
    module = MAKERS[name]().eval()
    program = export(module, (torch.randn(2, 6, D),), dynamic_shapes=({0: Dim("B", min=2), 1: Dim("T", min=2)},))
    x = torch.randn(3, 11, D)
    torch.testing.assert_close(program.module()(x), module(x))


def test_gradients_of_each_sample(make):
    module, x = make(), torch.randn(3, 1, 6, D)
    parameters = {k: v.detach() for k, v in module.named_parameters()}

    def loss(parameters, x):
        return functional_call(module, parameters, (x,)).square().mean()

    got = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for n in range(3):
        want = torch.autograd.grad(module(x[n]).square().mean(), list(module.parameters()))
        torch.testing.assert_close([v[n] for v in got.values()], list(want))


def test_forward_mode_and_second_derivatives(make):
    module = make().double()
    x = torch.randn(1, 4, D, dtype=torch.double)
    assert torch.autograd.gradcheck(module, x.requires_grad_(), check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(module, x, fast_mode=True)
    direction = torch.randn_like(x)
    moved = jvp(module, (x.detach(),), (direction,))[1]
    eps = 1e-6
    with torch.no_grad():
        torch.testing.assert_close(moved, (module(x + eps * direction) - module(x - eps * direction)) / (2 * eps))


@pytest.mark.parametrize("reentrant", (False, True), ids=("", "reentrant"))
def test_checkpointed_with_dropout(make, reentrant):
    module, x, found = make(p=0.4), torch.randn(2, 6, D), []
    for run in (module, lambda v: checkpoint(module, v, use_reentrant=reentrant)):
        torch.manual_seed(5)
        found.append(trained_by_backward(run, module, x))
    assert all(map(torch.equal, *found))


def trained_by_backward(run, module, x):
    x = x.detach().requires_grad_()
    module.zero_grad()
    out = run(x)
    out.square().mean().backward()
    return out, x.grad, *(p.grad.clone() for p in module.parameters())


def test_autocast():
    """Outputs and gradients have torch's dtypes, and are as close as its own in that dtype."""
    for name in ("attention", "encoder", "encoder-post", "decoder"):
        theirs = MAKERS[name](nn)
        x, found = torch.randn(2, 6, D), []
        for module in (theirs, MAKERS[name](), copy.deepcopy(theirs)):
            module.load_state_dict(theirs.state_dict())
            with torch.autocast("cpu", torch.bfloat16, enabled=len(found) < 2):
                out = module(x.requires_grad_())
            slopes = torch.linspace(-1, 2, out.numel()).cos().view_as(out).to(out.dtype)
            found.append((out, *torch.autograd.grad(out, [x, *module.parameters()], slopes)))
        assert [v.dtype for v in found[0]] == [v.dtype for v in found[1]], name
        for n, (ours, torchs, full) in enumerate(zip(*found)):
            off, own = ((v.double() - full.double()).abs().max() for v in (ours, torchs))
            assert off <= 4 * own + 16 * 2**-8 * full.abs().max(), (name, n, off, own)


def test_pickled_and_copied_in_the_middle_of_training(make):
    module, x = make(), torch.randn(2, 6, D)
    module(x).sum().backward()
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x), module(x)) and type(other) is type(module)


def test_the_meta_device_and_loading_by_assignment(make):
    with torch.device("meta"):
        module = make()
    x = torch.empty(2, 6, D, device="meta", requires_grad=True)
    assert torch.autograd.grad(module(x).sum(), x)[0].shape == (2, 6, D)
    real = make()
    module.load_state_dict(real.state_dict(), assign=True)
    x = torch.randn(2, 6, D)
    assert torch.equal(module(x), real(x))


# ---------------------------------------------------------------- two processes


def stack(layer=gk.nn.TransformerEncoderLayer, **kwargs):
    torch.manual_seed(0)
    layers = (layer(D, 2, 12, 0.0, batch_first=True, norm_first=True, **kwargs) for _ in range(2))
    return nn.Sequential(*layers, gk.nn.AttentionBlock(D, 2, 0.0), gk.nn.WaveNet(D, D, 4, dilations=(1, 2)))


def ddp(again):
    return DistributedDataParallel(stack(recompute=again))


def ddp_converted(_):
    model = DistributedDataParallel(stack(nn.TransformerEncoderLayer))
    assert type(gk.convert(model).module[0]) is gk.nn.TransformerEncoderLayer
    return model


def ddp_compiled(_):
    return DistributedDataParallel(torch.compile(stack(), fullgraph=True, backend="aot_eager"))


def fsdp(again):
    model = stack(recompute=again)
    for part in (*model, model):
        fully_shard(part, mesh=init_device_mesh("cpu", (2,)))
    return model


CASES = [(f, again) for f in (ddp, fsdp) for again in (True, False)] + [(ddp_converted, False), (ddp_compiled, False)]


def worker(rank, port, answers):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.manual_seed(1)
    x = torch.randn(8, 6, D)
    alone = stack()
    alone(x).square().mean().backward()
    want = {n: p.grad for n, p in alone.named_parameters()}
    for case, again in CASES:
        name, wrong = f"{case.__name__} {again}", []
        model = case(again)
        model(x[4 * rank : 4 * rank + 4]).square().mean().backward()
        for n, p in model.named_parameters():
            g = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
            n = n.replace("module.", "").replace("_orig_mod.", "")
            if not torch.allclose(g, want[n], rtol=1e-4, atol=1e-6):
                wrong.append(n)
        answers.put((rank, name, wrong))
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
    assert len({(rank, name) for rank, name, _ in got}) == 2 * len(CASES)
    assert not [answer for answer in got if answer[2]]
