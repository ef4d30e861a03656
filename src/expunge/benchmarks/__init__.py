"""Benchmarks: one file each, with its data, protocol, gold and table. `python -m expunge.benchmarks.<name>`."""
