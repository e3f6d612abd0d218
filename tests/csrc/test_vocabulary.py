"""The functions of cells over vectors against mpmath, in units of the last place, and at the edges of their range."""

import math
import subprocess

import mpmath
import numpy as np
import pytest

from gradkernels.backends.cpu import toolchain
from tests.csrc.test_sanitizers import BUILD, HERE, ISAS, missing_compiler

TYPES = {"float": np.float32, "double": np.float64}
INFINITE, NAN = math.inf, math.nan


@pytest.fixture(scope="module", params=[(isa, t) for isa in ISAS for t in TYPES], ids="-".join)
def run(request):
    """run(function, numbers, second) -> results, in one type and one instruction set."""
    if missing_compiler():
        pytest.skip(missing_compiler())
    isa, storage = request.param
    BUILD.mkdir(parents=True, exist_ok=True)
    program = BUILD / f"vocabulary-{isa}-{storage}"
    flags = f"{toolchain.FLAGS} {toolchain.INSTRUCTION_SETS[isa]} -DGK_STORAGE={storage}".split()
    subprocess.run([*toolchain.compiler(), *flags, HERE / "vocabulary.cpp", "-o", program], check=True)

    def run(function, numbers, second=0.0):
        given = np.asarray(numbers, TYPES[storage]).astype(np.float64)
        done = subprocess.run([program, function, repr(second)], input=given.tobytes(), capture_output=True, check=True)
        return given, np.frombuffer(done.stdout)

    run.type = TYPES[storage]
    return run


def truth(function, x, n):
    x = mpmath.mpf(float(x))
    exact = {
        "exp2": lambda v: mpmath.power(2, v),
        "sigmoid": lambda v: 1 / (1 + mpmath.exp(-v)),
        "softplus": lambda v: mpmath.log1p(mpmath.exp(v)),
        "pow": lambda v: mpmath.power(v, n),
    }
    return exact.get(function, getattr(mpmath, function, None))(x)


SPREAD = np.concatenate([s * 10.0 ** np.linspace(-12, 1.9, 400) for s in (-1, 1)])
POSITIVE = 10.0 ** np.linspace(-37, 37, 800)
FAR = [3e5, 7e6, 1e15, 1e30]
NUMBERS = {
    "spread": SPREAD,
    "above -1": np.concatenate([POSITIVE, SPREAD[SPREAD > -1]]),
    "positive": np.concatenate([POSITIVE, 1 + SPREAD[np.abs(SPREAD) < 0.9]]),
    "moderate": 10.0 ** np.linspace(-15, 15, 400),
    "angles": np.concatenate([SPREAD, np.linspace(-1e4, 1e4, 400), np.arange(1, 60) * math.pi / 2, FAR]),
}


@pytest.mark.parametrize(
    "function, numbers, n, ulps",
    [
        ("exp", "spread", 0, 2),
        ("exp2", "spread", 0, 2),
        ("expm1", "spread", 0, 3),
        ("log", "positive", 0, 2),
        ("log1p", "above -1", 0, 3),
        ("sigmoid", "spread", 0, 4),
        ("tanh", "spread", 0, 4),
        ("softplus", "spread", 0, 4),
        ("sqrt", "positive", 0, 0.5),
        ("sin", "angles", 0, 2),
        ("cos", "angles", 0, 2),
        ("erf", "spread", 0, 3),
        ("pow", "moderate", 1.5, 1),
        ("pow", "moderate", -2.0, 1),
    ],
)
def test_within_a_few_units_in_the_last_place(run, function, numbers, n, ulps):
    x, got = run(function, NUMBERS[numbers], n)
    worst, least = 0.0, float(np.finfo(run.type).tiny)  # what is smaller than that may vanish
    with mpmath.workdps(40):
        for v, y in zip(x, got, strict=True):
            want = truth(function, v, n)
            unit = max(float(np.spacing(run.type(abs(float(want))))), least * (abs(want) < least))
            worst = max(worst, float(abs(mpmath.mpf(float(y)) - want)) / unit)
    assert worst <= ulps, f"{function}: {worst:.2f} units"


EDGES = {
    "exp": {0: 1, 1000: INFINITE, INFINITE: INFINITE, -INFINITE: 0, NAN: NAN},
    "exp2": {0: 1, 3: 8, -2000: 0, -INFINITE: 0, NAN: NAN},
    "expm1": {0: 0, 1000: INFINITE, INFINITE: INFINITE, -INFINITE: -1, -1000: -1, NAN: NAN},
    "log": {0: -INFINITE, 1: 0, -1: NAN, INFINITE: INFINITE, -INFINITE: NAN, NAN: NAN},
    "log1p": {0: 0, -1: -INFINITE, -2: NAN, INFINITE: INFINITE, NAN: NAN},
    "softplus": {1000: 1000, -1000: 0, INFINITE: INFINITE, -INFINITE: 0, NAN: NAN},
    "sqrt": {0: 0, -1: NAN, INFINITE: INFINITE, NAN: NAN},
    "sin": {0: 0, INFINITE: NAN, NAN: NAN},
    "cos": {0: 1, -INFINITE: NAN, NAN: NAN},
    "erf": {0: 0, 30: 1, INFINITE: 1, -INFINITE: -1, NAN: NAN},
    "abs": {-3: 3, 3: 3, -INFINITE: INFINITE, NAN: NAN},
    "sign": {-3: -1, 3: 1, 0: 0, NAN: 0},
    "relu": {-3: 0, 3: 3, NAN: NAN},
    "sigmoid": {1000: 1, -1000: 0, NAN: NAN},
    "tanh": {1000: 1, -1000: -1, NAN: NAN},
    "min": {1: 1, 3: 2, NAN: NAN},
    "max": {1: 2, 3: 3, NAN: NAN},
    "pow": {0: 0, 3: 9, -3: 9, INFINITE: INFINITE, NAN: NAN},
}


@pytest.mark.parametrize("function", EDGES)
def test_at_the_edges(run, function):
    _, got = run(function, list(EDGES[function]), 2.0)
    np.testing.assert_array_equal(got, list(EDGES[function].values()))


@pytest.mark.parametrize("function", ["min", "max"])
def test_a_nan_on_either_side_comes_through(run, function):
    _, got = run(function, [1.0, 2.0], NAN)
    assert np.isnan(got).all()


def test_powers_of_what_is_negative(run):
    x, got = run("pow", [-2.0, -0.5, -2.0, 4.0], 3.0)
    np.testing.assert_array_equal(got, x**3)
    assert np.isnan(run("pow", [-2.0], 0.5)[1]).all()


@pytest.mark.parametrize("scale", [1e-42, 3e-45])
def test_log_of_what_is_smaller_than_normal_numbers(run, scale):
    x, got = run("log", [scale, 5 * scale])
    np.testing.assert_allclose(got, np.log(x), rtol=3e-7)
