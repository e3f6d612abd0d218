import pytest
import torch


@pytest.fixture
def one_thread():
    """For tests in which torch's layers run a great deal: their many small operations wait for other threads by spinning."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
