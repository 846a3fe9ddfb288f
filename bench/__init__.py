"""Benchmarks: `pytest bench --benchmark-only`, or `python -m bench` for the tables and the plot."""
