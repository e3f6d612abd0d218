"""Where nothing can be compiled, and where there is no GPU, there are no tests of that, rather than skipped ones."""

from gradkernels.backends.cuda import nvrtc
from tests import place

collect_ignore = [] if place.GPU else ["test_gpu.py"]
if nvrtc.why_not() is not None and not place.REQUIRED:
    collect_ignore += ["test_nvrtc.py", "test_driver.py", "test_host.py", "test_registers.py"]
