"""Modules that import what is not installed are not collected: Triton's backend, callbacks of other libraries."""

import importlib.util

NEEDS = {
    "triton": "gradkernels/backends/triton/*.py",
    "lightning": "gradkernels/flow/lightning.py",
    "transformers": "gradkernels/flow/huggingface.py",
}
collect_ignore_glob = [path for library, path in NEEDS.items() if importlib.util.find_spec(library) is None]
