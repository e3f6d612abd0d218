"""Triton is either interpreted or compiled in a process, from its import on; so both folders here have processes of their own,
which test_processes.py starts. They are collected where they are named: `pytest tests/backends/triton/interpreted`."""

from pathlib import Path

HERE = Path(__file__).parent
APART = [HERE / "interpreted", HERE / "compiled"]


def pytest_ignore_collect(collection_path, config):
    for folder in APART:
        if folder in (collection_path, *collection_path.parents):
            named = [Path(config.invocation_params.dir, a.split("::")[0]).resolve() for a in config.args]
            return None if any(folder in (path, *path.parents) for path in named) else True
    return None
