"""The rows of attention, norms and convolution for a GPU, as far as they go without one: names, what is asked, floors, agreement of
everybody who computes on a CPU, pages and pictures of made-up samples, picks."""

import json
import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from bench import agreement, cases, providers, run, table
from bench import report as reports
from bench.cases import Case, Target
from bench.gpu import device, layer_peers, layer_picks, layer_rows, suite
from bench.layers import Layer
from bench.measure import HostWatch
from tests.bench.made_up import GPU, around

ALL = layer_rows.layers_gpu()
LIMITS = {
    "copy": {"gbs": 4000.0, "by": "copy_ of 128 MiB"},
    "bfloat16": {"gflops": 800e3, "by": "torch.mm"},
    "float16": {"gflops": 800e3, "by": "torch.mm"},
    "tf32": {"gflops": 400e3, "by": "torch.mm"},
    "float32": {"gflops": 50e3, "by": "torch.mm"},
    "bfloat16, heads of 64": {"gflops": 600e3, "by": "tile"},
    "bfloat16, heads of 128": {"gflops": 700e3, "by": "tile"},
    "missing": {"float16, heads of 64": "CompilationError: at 3:14"},
}  # of a GPU that nobody has
ids = lambda c: c.name


def row(cell, mode="inference", **more):
    return Layer("g", cell, mode, **{"T": 3, "B": 2, "H": 4, "device": "cuda", **more})


def test_names_are_unique_and_survive_json():
    assert len({c.name for c in ALL}) == len(ALL) and {c.device for c in ALL} == {"cuda"}
    for case in ALL:
        assert Case.from_dict(json.loads(json.dumps(case.as_dict()))) == case
    assert cases.SUITES["layers-gpu"]() == ALL


def test_every_length_width_and_head_is_there():
    timed = [c for c in ALL if c.cell == "attention" and c.kind == "time" and c.dtype == "bfloat16"]
    found = {(c.T, c.H // c.heads, c.causal, c.dropout > 0, c.mode) for c in timed}
    both = ("inference", "backward")
    for T in (512, 1024, 2048, 4096, 8192, 16384):
        for D in (64, 128):
            assert {(T, D, causal, False, mode) for causal in (True, False) for mode in both} <= found
            assert {(T, D, True, True, mode) for mode in both} <= found
    norms = {(c.H, c.mode, c.dropout > 0) for c in ALL if c.cell == "residual norm" and c.dtype == "bfloat16"}
    assert {(512 << k, mode, p) for k in range(7) for mode in both for p in (True, False)} <= norms
    assert all(c.T * c.B * c.H == 1 << 26 for c in ALL if c.group == "norms on a gpu")


@pytest.mark.parametrize(
    "name, against, at_least",
    [
        ("attention 512,32,2048 inference bf16 32 heads of 64", "best", 1.0),
        ("attention 2048,8,2048 backward bf16 32 heads of 64 full", "best", 1.0),
        ("attention 4096,4,2048 inference bf16 16 heads of 128", "rate", 450.0),
        ("attention 4096,4,2048 backward bf16 16 heads of 128", "rate", 320.0),
        ("attention 8192,2,2048 backward bf16 16 heads of 128 dropout 0.1", "best", 1.5),
        ("residual norm 2048,8,4096 inference bf16 dropout 0.1", "limit", 0.85),
        ("residual norm 256,8,32768 backward bf16 dropout 0.1", "limit", 0.65),
        ("residual norm 2048,8,4096 training bf16 dropout 0.1 peak memory", "torch", 1.0),
    ],
)
def test_what_is_asked(name, against, at_least):
    (case,) = [c for c in ALL if c.name == name]
    (target,) = [t for t in case.targets if t.against == against]
    assert target.at_least == at_least


def test_every_target_is_measured():
    for case in ALL:
        assert {t.against for t in case.targets} <= {*case.providers, "limit", "best", "rate"}, case.name
        assert case.providers[1] == "torch" and all(providers.label(key) for key in case.providers)


def test_backward_and_what_is_not_masked_as_counted_by_hand():
    pairs = 2 * 4 * 2 * 2  # 2 sequences, 4 channels, scores and sums, an addition and a product
    assert row("attention").flops() == 6 * pairs and row("attention", causal=False).flops() == 9 * pairs
    assert row("attention", "backward").flops() == 2.5 * 6 * pairs
    assert row("causal conv", "backward", taps=3).flops() == 2 * row("causal conv", taps=3).flops()
    plane = 3 * 2 * 4 * 4
    assert row("residual norm", "backward", dropout=0.1).bytes() == 4 * plane  # dy, the sum; dx, dresidual
    assert row("residual norm", "backward").bytes() == row("layer norm", "backward").bytes() == 3 * plane
    assert row("residual rms norm").bytes() == row("residual rms norm", "backward").bytes() == 4 * plane


def judged(case, ours=1.0, **others):
    made = reports.blank(case)
    timed = {key: around(others.get(key, 2 * ours)) for key in case.providers}
    reports.fill(made, {**timed, case.providers[0]: around(ours)})
    layer_rows.best(made, case)
    reports.judge(made, case, LIMITS, [])
    return made


def named(name):
    (case,) = [c for c in ALL if c.name == name]
    return case


def test_floors_by_hand():
    # 4 x 2048 channels x 4096 * 4097 / 2 pairs, two products of a multiplication and an addition
    case = named("attention 4096,4,2048 inference bf16 16 heads of 128")
    made = judged(case)
    flops = 4 * 2048 * (4096 * 4097 // 2) * 4
    assert made["gflop"] == pytest.approx(flops / 1e9) and made["limit_ms"] == pytest.approx(flops / 700e12 * 1e3)
    assert made["share"] == pytest.approx(made["limit_ms"])
    assert {r["against"]: r["value"] for r in made["ratios"]}["rate"] == pytest.approx(flops / 1e-3 / 1e12)
    norm = judged(named("residual norm 2048,8,4096 backward bf16 dropout 0.1"))
    assert norm["limit_ms"] == pytest.approx(4 * 2**27 / 4000e9 * 1e3) and norm["gbs"] == pytest.approx(4 * 2**27 / 1e6)
    conv = judged(named("causal conv 2048,8,512 inference tf32 3 taps, dilation 4"))
    assert conv["limit_ms"] == pytest.approx(2 * 2048 * 8 * 512 * 512 * 3 / 400e12 * 1e3)
    alone = judged(named("attention 2048,8,2048 inference fp16 32 heads of 64"))
    assert alone["limit_ms"] == pytest.approx(alone["gflop"] / 800e3 * 1e3), (
        "of large products, where those of heads are missing"
    )


def test_without_ceilings_there_is_no_share_and_no_verdict_on_it():
    case = named("residual norm 2048,8,4096 inference bf16 dropout 0.1")
    made = judged(case)
    reports.judge(made, case, {}, [])
    assert made["share"] is None and "limit" not in {r["against"] for r in made["ratios"]} and made["met"] is None


def test_the_best_backend_is_the_fastest_by_name():
    case = named("attention 2048,8,2048 inference bf16 32 heads of 64")
    made = judged(case, 1.0, torch=0.5, sdpa_cudnn=0.9, sdpa_flash=1.5)
    (best,) = [r for r in made["ratios"] if r["against"] == "best"]
    assert best["value"] == 0.9 and best["met"] is False and made["met"] is False
    assert made["results"]["best"]["label"] == "SDPA, the fastest backend: cudnn"
    assert reports.short(made) == ["0.90x SDPA, the fastest backend, 1.00x asked"]
    none = {**made, "results": {k: v for k, v in made["results"].items() if not k.startswith("sdpa") and k != "best"}}
    none["absent"] = dict.fromkeys(layer_peers.SDPA, "RuntimeError: no available kernel")
    layer_rows.best(none, case)
    reports.judge(none, case, LIMITS, [])
    assert "best" in none["absent"] and "best" not in {r["against"] for r in none["ratios"]}


# ---------------------------------------------------------------- who computes


def tiny(case, **more):
    T = 7 + 2 * case.dilation
    return replace(
        case.exact(), device="cpu", dtype="float32", tf32=False, T=T, B=3, H=16, heads=min(case.heads, 2), backend="reference", **more
    )  # fmt: skip


TINY = list(
    {replace(tiny(c), providers=("ours", "torch"), group="", targets=()): None for c in ALL if c.kind == "time"}
)


@pytest.fixture
def on_cpu(monkeypatch):
    """Rows are built as for a GPU, of tensors on the CPU."""
    monkeypatch.setattr(agreement, "build", layer_peers.build)
    monkeypatch.setattr(suite, "build", layer_peers.build)


@pytest.mark.parametrize("case", TINY, ids=ids)
def test_ours_and_torch_agree(on_cpu, case):
    worst = agreement.agree(case)
    assert worst["error"] <= worst["allowed"]


@pytest.mark.parametrize("mode", ["inference", "training", "backward"])
def test_what_is_timed_can_be_repeated(mode):
    case = tiny(row("residual norm", mode))
    made = layer_peers.build(case, "ours")
    for _ in range(3):
        made.run()
    assert (made.kept is not None) == (mode == "backward")
    assert all(t.requires_grad == (mode != "inference") and t.is_leaf for t in made.tensors.values())


def test_gradients_that_are_wrong_are_seen(on_cpu, monkeypatch):
    honest = layer_peers.ours
    monkeypatch.setitem(layer_peers.FUNCTIONS, "ours", lambda case: lambda x, *more: honest(case)(x * 1.001, *more))
    with pytest.raises(agreement.Disagreement, match="gradient of x"):
        agreement.agree(tiny(row("causal conv", "backward", taps=2)))


def test_sdpa_runs_by_the_backend_of_its_name_or_says_why_not():
    case = tiny(row("attention", heads=2))
    want = layer_peers.build(case, "torch").results()["output 0"]
    for key in ("sdpa_flash", "sdpa_math"):
        torch.testing.assert_close(layer_peers.build(case, key).results()["output 0"], want)
    with pytest.raises(RuntimeError, match="backend") as refused:
        layer_peers.build(case, "sdpa_efficient")
    assert "\n" not in str(refused.value)
    with pytest.raises(RuntimeError, match="kernel.*; .*dropout") as refused:
        layer_peers.build(replace(case, dropout=0.5), "sdpa_flash")
    assert "Triggered" not in str(refused.value) and "\n" not in str(refused.value)
    assert layer_peers.build(case, "torch").algorithm() == "FLASH_ATTENTION"
    assert layer_peers.build(replace(case, dropout=0.5), "torch").algorithm() == "MATH"


def test_what_is_not_installed_or_not_to_be_had_is_named():
    for key, error in (("flash_attn", ImportError), ("liger", ImportError)):
        with pytest.raises(error):
            layer_peers.build(tiny(row("layer norm")), key)
    with pytest.raises(NotImplementedError, match="dropout"):
        layer_peers.build(replace(tiny(row("attention")), dropout=0.1), "flex")


@pytest.fixture
def installed(monkeypatch):
    """What stands in for other packages computes as they document it."""

    def module(name, **values):
        made = ModuleType(name)
        made.__dict__.update(values)
        monkeypatch.setitem(sys.modules, name, made)

    def flash_attn_func(q, k, v, dropout_p, causal):  # [B, T, heads, D]
        heads = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(*heads, dropout_p=dropout_p, is_causal=causal).transpose(1, 2)

    def layer_norm_fn(x, weight, bias, residual=None, eps=1e-6, dropout_p=0.0, prenorm=False, is_rms_norm=False):
        s = F.dropout(x, dropout_p) + (0 if residual is None else residual)
        y = (
            F.rms_norm(s, s.shape[-1:], weight, eps)
            if is_rms_norm
            else F.layer_norm(s, s.shape[-1:], weight, bias, eps)
        )
        return (y, s) if prenorm else y

    class Norm:
        @staticmethod
        def apply(x, w, b, eps):
            return F.layer_norm(x, x.shape[-1:], w, b, eps)

    class Added:
        @staticmethod
        def apply(x, r, w, eps, offset, casting, in_place):
            assert offset == 0 and casting == "llama" and in_place is False, "a graph is kept: dy must stay what it is"
            return F.rms_norm(x + r, x.shape[-1:], w, eps), x + r

    module("flash_attn", flash_attn_func=flash_attn_func)
    for name in ("flash_attn.ops", "flash_attn.ops.triton", "liger_kernel", "liger_kernel.ops"):
        module(name)
    module("flash_attn.ops.triton.layer_norm", layer_norm_fn=layer_norm_fn)
    module("liger_kernel.ops.layer_norm", LigerLayerNormFunction=Norm)
    module("liger_kernel.ops.fused_add_rms_norm", LigerFusedAddRMSNormFunction=Added)


PEERS = list(
    {
        replace(tiny(c), providers=(key, "torch"), group="", targets=(), heads=1, causal=True): None
        for c in ALL
        for key in ("flash_attn", "liger")
        if key in c.providers and c.kind == "time"
    }
)


@pytest.mark.parametrize("case", PEERS, ids=lambda c: f"{c.providers[0]} {c.name}")
def test_other_packages_are_told_the_same(on_cpu, installed, case):
    worst = agreement.agree(case)
    assert worst["error"] <= worst["allowed"]


def test_rows_are_compared_over_fewer_tokens():
    case = agreement.shortened(named("attention 16384,1,2048 inference bf16 32 heads of 64"))
    assert (case.T, case.B, case.H, case.heads) == (333, 1, 2048, 32)
    assert agreement.shortened(tiny(row("attention"))) == tiny(row("attention"))


# ---------------------------------------------------------------- a run


def test_a_row_from_end_to_end(on_cpu, monkeypatch, tmp_path, capsys):
    one = replace(
        tiny(row("attention", heads=2)), targets=(Target("torch", 1e-9), Target("best", 1e-9), Target("limit"))
    )
    one = replace(one, device="cuda", backend=None, providers=("ours", "torch", "sdpa_flash", "sdpa_cudnn", "liger"))
    there = lambda case, *more: layer_peers.build(replace(case, device="cpu"), *more)
    for module in (agreement, suite):
        monkeypatch.setattr(module, "build", there)
    monkeypatch.setitem(cases.SUITES, "layers-gpu", lambda: [one])
    monkeypatch.setattr(suite, "why_not", lambda: None)
    monkeypatch.setattr(suite, "dead", lambda: None)
    monkeypatch.setattr(device, "Events", type("Watch", (HostWatch,), {}))
    monkeypatch.setattr(device, "describe", lambda: GPU)
    ceilings = pytest.importorskip("bench.gpu.ceilings", reason="needs Triton", exc_type=ImportError)
    monkeypatch.setattr(ceilings, "limits", lambda: LIMITS)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    path, threads = tmp_path / "layers-gpu.json", torch.get_num_threads()
    command = [
        "layers-gpu",
        "--budget",
        "0.01",
        "--repeat",
        "1",
        "--wait",
        "1e9",
        "--json",
        str(path),
        "--backend",
        "reference",
    ]
    command += ["--threads", str(threads), "--try", "BM=0,nothing=1"]
    assert run.main(command) == 0
    (made,) = json.loads(path.read_text())["rows"]
    assert made["error"] is None and made["algorithm"] == "FLASH_ATTENTION" and made["met"] is True
    assert set(made["results"]) == {"ours", "torch", "sdpa_flash", "best"}, (
        "a pick of what there is not is no pick of this row"
    )
    assert set(made["absent"]) == {"sdpa_cudnn", "liger"} and 0 < made["share"] < 1
    assert "1 of 1 rows meet everything" in capsys.readouterr().out
    assert run.main([*command, "--resume"]) == 0 and len(json.loads(path.read_text())["rows"]) == 1


def made_up():
    rows = []
    for case in ALL:
        rows.append(judged(case, 3.0))
        rows[-1].update(rounds=9, dropped=0, algorithm="CUDNN_ATTENTION", backend="triton")
        rows[-1]["absent"]["liger"] = "ModuleNotFoundError: No module named 'liger_kernel'"
    return {
        "schema": reports.SCHEMA, "suite": "layers-gpu", "options": {}, "machine": GPU, "limits": LIMITS, "rows": rows,
        "micro": {"machine": {}, "records": []}, "summary": [], "not_reached": [], "seconds": 1.0,
    }  # fmt: skip


def test_page_of_made_up_rows():
    text = table.markdown(made_up())
    assert text.startswith("# Attention, norms and convolution on Example(R) GPU 9000\n")
    assert "TFLOP/s or GB/s" in text and "us a step" not in text and "a graph that is kept" in text
    assert "bfloat16, heads of 64 600 TFLOP/s" in text and "float16, heads of 64 not measured: CompilationError" in text
    for case in ALL:
        assert f"| {case.name} |" in text
    assert "450 TFLOP/s" in text and text.count("No module named 'liger_kernel'") == len({c.group for c in ALL})


def test_pictures_of_made_up_rows(tmp_path):
    plot = pytest.importorskip("bench.plot", reason="needs matplotlib", exc_type=ImportError)
    from bench.gpu import panels

    with plot.plt.rc_context(plot.STYLE):
        figures = panels.figures(made_up())
    for figure in figures:
        for ax in figure.axes:
            names = [t.get_text() for t in ax.get_yticklabels()]
            assert len(names) == len(set(names)), names
        plot.plt.close(figure)
    timed = [c for c in ALL if c.kind == "time"]
    norms = [c for c in timed if c.group == "norms on a gpu"]
    assert sum(len(ax.patches) for ax in figures[0].axes) == len(timed) + len(norms)


# ---------------------------------------------------------------- picks


def test_picks_go_to_the_rows_that_have_such_a_thing():
    options = ["layers-gpu", "--variants", "--try", "queries.BM=64", "--try", "VALUES=2", "--try", "BM=64,warps=4"]
    for case in run.chosen(run.arguments(options)):
        more = {key.removeprefix("ours:") for key in case.providers if key.startswith("ours:")}
        own = {
            "attention": {"queries.BM=64", "BM=64,warps=4"}, "norm": {"VALUES=2"}, "causal conv": {"BM=64,warps=4"}, None: set(),
        }[layer_picks.kind(case)]  # fmt: skip
        variants = set(layer_picks.VARIANTS.get(layer_picks.kind(case), ()))
        assert more == (own | variants if case.kind == "time" else set()), case.name


def test_variants_name_what_there_is():
    triton = pytest.importorskip("gradkernels.backends.triton.residual_norm")
    assert all(hasattr(triton, name) for name in layer_picks.NAMES["norm"])
    for case in (row("attention"), row("residual norm"), row("causal conv", taps=2)):
        assert all(layer_picks.fits(case, pick) for pick in layer_picks.VARIANTS[layer_picks.kind(case)])
    assert not layer_picks.fits(row("attention block"), "BM=16")


def test_tiles_are_as_picked_and_then_as_before(monkeypatch):
    pytest.importorskip("triton")
    from gradkernels.backends.triton import attention_tiles, causal_conv1d, residual_norm
    from gradkernels.backends.triton.launch import Limits, Number

    monkeypatch.setattr(attention_tiles, "capability", lambda: 90)
    at = Limits(200 << 10, 132, True, True)
    number = Number.of(torch.bfloat16, at)
    before = attention_tiles.choose, residual_norm.VALUES, causal_conv1d._sizes, causal_conv1d._tile
    asked = lambda kernel: attention_tiles.choose(kernel, number, at, 64, 64, 512, False, True)
    shipped = asked("keys")
    with layer_picks.by(row("attention"), "forward.BM=32,warps=2,WS=0"):
        assert (asked("forward").BM, asked("forward").warps, asked("forward").WS) == (32, 2, False)
        assert asked("keys") == replace(shipped, warps=2)
    with layer_picks.by(row("layer norm"), "VALUES=2"):
        assert residual_norm.VALUES == 2
    with layer_picks.by(row("causal conv", taps=2), "BM=32,BN=64,warps=2,stages=5"):
        assert causal_conv1d._tile(4096, 512, number, at) == (32, 64)
        assert causal_conv1d._options(32, 64, 64, number, at)["num_warps"] == 2
    assert before == (attention_tiles.choose, residual_norm.VALUES, causal_conv1d._sizes, causal_conv1d._tile)
    with pytest.raises(ValueError, match="has nothing of 'C=4'"), layer_picks.by(row("attention"), "C=4"):
        pass


def test_the_kernel_of_products_compiles():
    """The kernel's source compiles for the GPU it is meant for: nothing runs it here."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from bench.gpu import ceilings

    if isinstance(ceilings.products_of_heads, triton.runtime.interpreter.InterpretedFunction):
        q, k = torch.randn(128, 64), torch.randn(ceilings.KEYS, 64)
        got = ceilings.of_heads(q, k, (64, 128, 4, 3))
        assert torch.allclose(got, q @ k.T @ k, rtol=1e-3, atol=1e-2)
        return
    constants = {"KEYS": ceilings.KEYS, "M": 128, "N": 64, "D": 64}
    signature = {"q": "*bf16", "k": "*bf16", "out": "*bf16"} | dict.fromkeys(constants, "constexpr")
    source = ASTSource(ceilings.products_of_heads, signature, constants)
    options = {"num_warps": 8, "num_stages": 3, "enable_fp_fusion": True}
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert "wgmma" in made.asm["ptx"]
