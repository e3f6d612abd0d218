"""A report of made up measurements, shared by the tests of what is made of it."""

import pytest

from bench import cases
from bench import report as reports
from tests.bench.made_up import LIMITS, MACHINE, invent


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
