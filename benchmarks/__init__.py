"""Runnable comparisons; each writes its table into `benchmarks/results/`."""
