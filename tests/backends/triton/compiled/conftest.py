"""Here Triton compiles, for GPUs that are not there."""

import pytest
import triton


def pytest_report_header():
    return f"triton {triton.__version__} of {triton.__file__}"


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory):
    """Everything is compiled anew."""
    folder = str(tmp_path_factory.mktemp("triton"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.knobs.cache, "dir", folder)
        yield
