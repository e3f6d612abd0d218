"""Measuring on a GPU: gpu.sh runs it all, micro.py the parts of a step, floor.py what a step costs at least, README.md what to try."""
