"""Where Triton is not installed there is nothing to collect in its backend: its kernels import it."""

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["gradkernels/backends/triton/*.py"]
