"""Benchmarks: cases.py says what, run.py measures, plot.py draws, results/ keeps the last committed run of each device."""
