"""Speed as a ratio against a reference in the same process, after warm-up, median of several: `python -m benchmarks
NAME`."""
