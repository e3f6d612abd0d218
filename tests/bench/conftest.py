"""A report of made up measurements, shared by the tests of what is made of it."""

import copy

import pytest

from bench import cases
from bench import report as reports
from tests.bench.made_up import GPU, LIMITS, MACHINE, MICRO, invent, invent_gpu


@pytest.fixture
def report():
    rows = invent(cases.recurrent(), cell=0.5)
    return {
        "schema": reports.SCHEMA,
        "suite": "recurrent",
        "options": {},
        "machine": MACHINE,
        "limits": LIMITS,
        "rows": rows,
        "summary": reports.summarize(rows),
        "seconds": 1.0,
    }


@pytest.fixture(scope="session")
def recorded_gpu_report():
    """A report of made up measurements of a GPU that does not exist."""
    from bench.gpu import device

    limits = device.limits(MICRO)
    rows = invent_gpu(cases.recurrent_gpu(), limits)
    return {
        "schema": reports.SCHEMA,
        "suite": "recurrent-gpu",
        "options": {},
        "machine": GPU,
        "limits": limits,
        "micro": MICRO,
        "rows": rows,
        "summary": [],
        "not_reached": ["lstm 1,2,3 training"],
        "seconds": 1.0,
    }


@pytest.fixture
def gpu_report(recorded_gpu_report):
    return copy.deepcopy(recorded_gpu_report)
