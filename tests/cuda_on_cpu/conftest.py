import pytest

from tests.csrc.test_sanitizers import need


@pytest.fixture(autouse=True, scope="session")
def compiler():
    """The twin is compiled when it is asked for."""
    need("thread")
    need("address")
