"""Whether the tests would see a missing synchronisation: every synchronising call is left out in turn.

A site is found by running, so that a new one is covered as soon as it is written. It has to make some case fault, hang or
change its values in some order, or else be seen by the race detector; one that nothing sees is not needed.
"""

import pytest
import torch

from tests.cuda_on_cpu.machine import SCHEDULES, Twin
from tests.cuda_on_cpu.replay import capture, findings, missed_without
from tests.cuda_on_cpu.test_twin import EXCHANGES, NAMES, Args, Small


def small_case(small, n, taken=None, out=None, which=0, blocks=8):
    taken, out = (torch.zeros(128, dtype=torch.int32) if t is None else t for t in (taken, out))
    counter = torch.zeros(1, dtype=torch.int32)
    arguments = Args(taken.data_ptr(), out.data_ptr(), counter.data_ptr(), n, which)
    return capture(Twin().kernel(small), blocks, arguments, small.struct)


@pytest.mark.parametrize("small", EXCHANGES, ids=NAMES)
def test_small_exchanges(small):
    case = small_case(small, 5)
    assert not findings(case, SCHEDULES[:2])
    found = missed_without([case], SCHEDULES)
    assert len(found) == 5 and all(found.values()), found
