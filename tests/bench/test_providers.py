"""Who is timed: gradients are really made, everybody computes the same, and who doesn't is not timed."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from bench import agreement, machine, providers
from bench.agreement import Disagreement, agree
from bench.cases import Case, recurrent


def tiny(case):
    """The same row, small; lengths and projection shrink along. The reference is there on every machine."""
    small = {"T": min(case.T, 4), "B": min(case.B, 3), "H": 6, "backend": "reference"}
    return replace(case, **small, tokens=case.tokens and 8, proj_size=case.proj_size and 4)


TINY = list({tiny(c): None for c in recurrent() if c.kind == "time"})


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("case", TINY, ids=lambda c: f"{c.providers[0]} {c.name}")
def test_everybody_agrees(case):
    worst = agree(case)
    assert set(worst) == {"what", "error", "torch_error", "allowed"}
    assert worst["error"] <= worst["allowed"]


@pytest.mark.parametrize("case", [c for c in TINY if c.mode == "training"], ids=lambda c: c.name)
@pytest.mark.parametrize("which", [0, 1])
def test_training_gives_every_gradient(case, which):
    provider = providers.build(case, case.providers[which])
    provider.run()
    assert provider.x.grad is not None and provider.x.grad.abs().sum() > 0
    for name, p in provider.parameters.items():
        assert p.grad is not None and p.grad.abs().sum() > 0, name


def test_inference_makes_no_graph():
    case = Case("g", "gru", "inference", 4, 3, 6, backend="reference")
    provider = providers.build(case, "ours")
    provider.run()
    assert provider.x.grad is None and all(p.grad is None for p in provider.parameters.values())


def test_weights_count_as_changed_between_training_calls_and_are_not():
    case = Case("g", "lstm", "training", 4, 3, 6, backend="reference")
    provider = providers.build(case, "ours")
    weight = provider.parameters["weight_hh_l0"]
    before, version = weight.detach().clone(), weight._version
    provider.run()
    assert weight._version > version and torch.equal(weight, before)


def test_the_probe_is_on_and_measures():
    (case,) = [c for c in TINY if c.name == "lstm 4,3,6 training probe"]
    watched, unwatched = (providers.build(case, key) for key in case.providers)
    watched.run()
    assert unwatched.module.probes is None
    assert (watched.module.probes[0].grad[:, 2] == 3).all() and (watched.module.probes[0].grad[:, 0] > 0).all()


@pytest.mark.parametrize("layout", ["packed", "ragged"])
@pytest.mark.parametrize("key", ["ours", "torch"])
def test_ragged_rows_do_less_work(layout, key):
    case = Case("g", "lstm", "inference", 4, 3, 6, layout=layout, tokens=8, backend="reference")
    results = providers.build(case, key).results()
    outputs = results["outputs"]
    if layout == "packed":
        assert outputs.shape == (8, 6)
    else:
        lengths = torch.tensor(case.lengths())
        absent = torch.arange(4)[:, None] >= lengths
        assert outputs.shape == (4, 3, 6) and (outputs[absent] == 0).all() and (outputs[~absent] != 0).all()


@pytest.mark.parametrize("wrong", ["outputs", "gradient of weight_hh_l0"])
def test_wrong_numbers_are_caught(monkeypatch, wrong):
    case = Case("g", "gru", "training", 4, 3, 6, backend="reference")
    honest = providers.Provider.results

    def off(self):
        found = honest(self)
        if self.key == "ours":
            found[wrong] = found[wrong] * 1.001
        return found

    monkeypatch.setattr(providers.Provider, "results", off)
    with pytest.raises(Disagreement, match=rf"^{wrong} is off by .*, torch by .*, allowed [^;]*$"):
        agree(case)


def test_nan_disagrees(monkeypatch):
    case = Case("g", "lstm", "inference", 4, 3, 6, backend="reference")
    ours = providers.ours

    def spoiled(case, weights):
        module = ours(case, weights)
        module.weight_hh_l0.data[0, 0] = torch.nan
        return module

    monkeypatch.setattr(providers, "ours", spoiled)
    with pytest.raises(Disagreement, match="outputs is off by inf"):
        agree(case)


def test_one_check_serves_rows_that_measure_the_same_thing(monkeypatch):
    case = Case("shapes", "lstm", "training", 4, 3, 6, backend="reference")
    seen = {}
    agree(case, seen)
    monkeypatch.setattr(agreement, "build", lambda *_: pytest.fail("checked again"))
    agree(replace(case, group="peak memory", kind="memory"), seen)


def test_the_loop_is_what_it_says():
    layer = nn.RNN(5, 4)
    loop = providers.Loop(layer, "rnn_sigmoid")
    x = torch.randn(3, 2, 5)
    y, h = loop(x)
    state = torch.zeros(2, 4)
    for step in range(3):
        w = layer.weight_ih_l0, layer.bias_ih_l0, layer.weight_hh_l0, layer.bias_hh_l0
        state = torch.sigmoid(x[step] @ w[0].T + w[1] + state @ w[2].T + w[3])
        torch.testing.assert_close(y[step], state)
    torch.testing.assert_close(h[0], state)


@pytest.mark.slow  # compiles C++
@pytest.mark.parametrize("cell", ["gru_reset_before", "rnn_sigmoid"])
def test_the_compiled_loop_is_the_loop(cell):
    case = Case("g", cell, "training", 3, 2, 8, providers=("ours", "loop", "compiled"))
    loop, compiled = (providers.build(case, key).results() for key in ("loop", "compiled"))
    for name, x in loop.items():
        torch.testing.assert_close(compiled[name], x, msg=lambda text, name=name: f"{name}: {text}")


def test_the_peers_algorithm_is_named():
    case = Case("g", "lstm", "inference", 4, 3, 6)
    if torch.backends.mkldnn.is_available():
        assert providers.build(case, "torch").algorithm() == "oneDNN's fused layer, 1 call"
    assert providers.build(replace(case, cell="gru"), "torch").algorithm().endswith(" torch operations a call")


def test_limits_name_the_way_that_was_fastest(monkeypatch):
    monkeypatch.setattr(machine, "PRODUCTS", [(64, 32, 96), (128, 64, 64)])
    monkeypatch.setattr(machine, "COPIED", 1)
    found = machine.limits(0.0)
    for dtype in ("float32", "bfloat16"):
        rates = found[dtype]["all"]
        assert found[dtype]["gflops"] == rates[found[dtype]["by"]] == max(rates.values()) > 0
    assert found["copy"]["gbs"] > 0
    assert found["waited"] >= 0
    twice = {"waited": 1e9}
    for k in ("float32", "bfloat16", "copy"):
        twice[k] = {**found[k], **{rate: found[k][rate] * 2 for rate in ("gflops", "gbs") if rate in found[k]}}
    assert machine.better(found, twice) == machine.better(twice, found) == twice


def test_ways_to_multiply_agree():
    a, w = torch.randn(16, 8), torch.randn(24, 8)
    for name, make in machine.products(torch.float32).items():
        torch.testing.assert_close(make(a, w)(), a @ w.T, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(
    "cpu, family, slug",
    [
        ("AMD EPYC", "family 26 model 2", "amd-epyc-family-26-model-2-avx512-2-cores"),
        ("Intel(R) Xeon(R) Platinum 8488C CPU @ 2.40GHz", None, "intel-xeon-platinum-8488c-avx512-2-cores"),
    ],
)
def test_folder_of_a_device(cpu, family, slug):
    assert machine.slug({"cpu": cpu, "cpu_family": family, "capability": "AVX512", "cores": 2}) == slug
