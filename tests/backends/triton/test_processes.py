"""The kernels of Triton in processes of their own: interpreted, and compiled for GPUs that are not there by two versions."""

import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests import place

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
OLDER = "3.6.0"  # what torch 2.11 comes with

missing = importlib.util.find_spec("triton") is None
if missing and place.REQUIRED:
    raise RuntimeError("GRADKERNELS_REQUIRE_COMPILED=1, but Triton is missing")
needs_triton = pytest.mark.skipif(missing, reason="nothing to test: Triton is not installed")


def older() -> Path:
    """A folder with the older version, made once."""
    folder = ROOT / "build" / f"triton-{OLDER}"
    if not folder.exists():
        folder.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True) as fresh:
            what = ["--quiet", "--no-deps", "--target", fresh, f"triton=={OLDER}"]
            subprocess.run([sys.executable, "-m", "pip", "install", *what], check=True)
            Path(fresh).rename(folder)
    return folder


class Run:
    """pytest on a folder, in this repository's package, or in a package that lies before it; started when it is made."""

    def __init__(self, folder, first=(), **environment):
        path = os.pathsep.join(map(str, (*first, ROOT)))
        self.out = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by the fixture
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", str(HERE / folder)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment},
            stdout=self.out,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def passed(self):
        """What it printed, once it has ended."""
        code = self.process.wait()
        self.out.seek(0)
        said = self.out.read()
        assert code == 0, said[-25000:]
        assert " passed" in said and " skipped" not in said, said
        return said


RUNS = {
    "test_interpreted": lambda: Run("interpreted", TRITON_INTERPRET="1"),
    "test_compiled": lambda: Run("compiled"),
    "test_compiled_by_an_older_version": lambda: Run("compiled", [older()]),
}


@pytest.fixture(scope="module")
def runs(request):
    """All that were asked for at once: each needs one core, and takes minutes."""
    wanted = [item.name for item in request.session.items if item.path == request.path and item.name in RUNS]
    started = {name: RUNS[name]() for name in wanted}
    yield started
    for run in started.values():
        run.process.kill()
        run.process.wait()
        run.out.close()


@needs_triton
@pytest.mark.slow
def test_interpreted(runs):
    runs["test_interpreted"].passed()


@needs_triton
@pytest.mark.slow
def test_compiled(runs):
    runs["test_compiled"].passed()


@needs_triton
@pytest.mark.slow
def test_compiled_by_an_older_version(runs):
    assert f"triton {OLDER}" in runs["test_compiled_by_an_older_version"].passed()


def python(code, **environment):
    given = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**given, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_without_triton():
    """All else works, and says what is missing."""
    code = "import sys; sys.modules['triton'] = None; import torch, gradkernels as gk; print(gk.backends()['triton']); "
    code += "gk.ops.recurrent(torch.zeros(2, 1, 4), torch.zeros(4, 1), [torch.zeros(1, 1)] * 2, cell='lstm')"
    assert python(code) == "Triton is not installed; `pip install triton` (Linux)"


@needs_triton
@pytest.mark.parametrize("before", [True, False], ids=["before-import", "after-import"])
def test_interpreter_is_asked_for_before_triton_is_imported(before):
    first = "os.environ['TRITON_INTERPRET'] = '1'; "
    second = "import triton.language; "
    code = "import os, torch; from gradkernels.backends import triton as ours; " + (
        first + second if before else second + first
    )
    code += "print(ours.why_not(device=torch.device('cpu')))"
    expected = (
        "None"
        if before
        else "it runs on GPUs, and on cpu only where TRITON_INTERPRET=1 was set before Triton was imported"
    )
    assert python(code) == expected


@needs_triton
def test_reasons():
    import torch

    from gradkernels.backends import triton
    from gradkernels.cells import CELLS, cell

    cpu = torch.device("cpu")
    assert "no kernels for torch.int64" in triton.why_not(dtype=torch.int64)
    assert "TRITON_INTERPRET=1" in triton.why_not(device=cpu)
    assert "on meta" in triton.why_not(device=torch.device("meta"))
    if not torch.cuda.is_available():
        assert triton.why_not(device=torch.device("cuda")) == "there is no GPU that torch can use"
    from gradkernels.backends.triton.cells import why_not

    def normed(x, r, s):
        v = tanh(x[1] + r[1](s[0] * x[0]))  # noqa: F821 - functions of the language
        return v - mean(v)  # noqa: F821

    assert why_not(cell(normed)) == "cell 'normed' has means, and no product or a second one beside them"
    assert all(why_not(c) is None for c in CELLS.values())
