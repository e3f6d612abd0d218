"""Every cell, in both residencies, compiles for every architecture, in all dtypes in turn; registers and what spills.

All combinations would take half an hour. Here each cell meets each residency, and the other properties take turns, others by
each version of Triton.
"""

import pytest
import triton

from gradkernels.cells.codegen import COMPILED
from tests.backends.triton.compiled import offline
from tests.backends.triton.compiled.calls import Call

ARCHITECTURES = (80, 90, 100)
LAYOUTS = ("dense", "packed", "lengths")
NUMBERS = ("bf16", "fp16", "tf32", "fp32", "fp64")
SMALL = {"bf16": 64, "fp16": 63, "tf32": 32, "fp32": 16, "fp64": 16}  # units of which one program keeps the matrix
BATCHES = (64, 16, 1024)
# Bytes of a thread: a frame of one value; in the largest tiles some more, which is little beside the chunks; the sine of a large
# angle has a table there; norms inside the step have more planes than there are registers, and more warps would spill more.
SPILLED, SPILLED_LARGE = 8, 128
SPILLED_BY = {"vocabulary": 32, "lstm_layer_norm": 160}

shift = 1 if triton.__version__ < "3.7" else 0
KINDS = [
    (cell, projected, resident) for cell, projected in [*((c, 0) for c in COMPILED), ("lstm", 1)] for resident in (1, 0)
]
CASES = []
for n, (cell, projected, resident) in enumerate(KINDS):
    number, batch = NUMBERS[(n + shift) % 5], BATCHES[(n + n // 3) % 3]
    architecture = ARCHITECTURES[(n // 2 + shift) % 3]
    H = SMALL[number] if resident else 1000 if n % 4 == 3 else 1024
    layout, reverse, norms = LAYOUTS[(n // 3) % 3], n // 2 % 2 == 1, n // 4 % 2 == 1
    call = Call(cell, number, H, H // 2 * projected, batch, 2, layout, reverse, norms)
    CASES.append(pytest.param(call, architecture, bool(resident), id=f"{call}-sm_{architecture}"))
# the corners: the most that one program keeps, the largest tiles, and the dtype that is used most on the newest GPUs
CASES += [
    pytest.param(call, architecture, resident, id=f"{call}-sm_{architecture}")
    for call, architecture, resident in (
        (Call("lstm", "bf16", 128), 90, True),
        (Call("gru", "fp16", 128, norms=True), 90, True),
        (Call("lstm", "bf16", 1024, B=4096), 90, False),
        (Call("lstm", "bf16", 1024, layout="lengths"), 100, False),
    )
]


# what cells have beside products and states
EXTRA = [
    (Call("lstm_peephole", "bf16", 64), 90, True),
    (Call("lstm_peephole", "fp16", 1024), 80, False),
    (Call("lstm_layer_norm", "bf16", 64, norms=True), 100, True),
    (Call("lstm_layer_norm", "bf16", 512, B=256, norms=True), 90, False),
    (Call("gru_layer_norm", "fp32", 200, layout="lengths"), 80, False),
    (Call("slstm", "bf16", 64), 90, True),
    (Call("indrnn", "bf16", 1000, norms=True), 90, True),
    (Call("indrnn", "fp64", 30, layout="packed"), 80, True),
    (Call("vocabulary", "bf16", 32), 80, True),
    (Call("zoneout_lstm", "bf16", 64, layout="lengths"), 90, True),
    (Call("zoneout_lstm", "tf32", 512), 100, False),
    (Call("masked_gru", "fp16", 1000), 90, False),
    (Call("skip_gru", "bf16", 64, reverse=True), 80, True),
    (Call("skip_gru", "bf16", 512), 100, False),
]
CASES += [pytest.param(*case, id=f"{case[0]}-sm_{case[1]}") for case in EXTRA]


@pytest.mark.parametrize("call, architecture, resident", CASES)
def test_compiles(call, architecture, resident, monkeypatch):
    with offline.gpu(architecture) as driver:
        call.run(monkeypatch)
    names = {k.name for k in driver.kernels}
    assert ("forward_walk" in names and "backward_walk" in names) if resident else "backward_step" in names, names
    for kernel in driver.kernels:
        registers, spilled = kernel.resources
        print(
            f"{call} sm_{architecture} {kernel.name}: {registers} registers, {spilled} B spilled, {kernel.shared} B shared"
        )
        assert 16 <= registers <= 255 and kernel.shared <= offline.SHARED[architecture]
        most = SPILLED_LARGE if call.B > 512 else SPILLED_BY.get(call.cell, SPILLED)
        assert spilled <= most, kernel.name


@pytest.mark.parametrize("architecture", ["gfx942", "gfx1100"])
@pytest.mark.parametrize("H, kernels", [(32, 2), (1024, 2)], ids=["resident", "steps"])
def test_compiles_for_another_vendor(architecture, H, kernels, monkeypatch):
    """tf32 is asked for, which one of the two has."""
    with offline.gpu(architecture) as driver:
        Call("rnn_tanh", "tf32", H, layout="packed", norms=True).run(monkeypatch)
    assert len(driver.kernels) == kernels
    for kernel in driver.kernels:
        assert kernel.binary[:4] == b"\x7fELF" and kernel.shared <= offline.SHARED[architecture]
