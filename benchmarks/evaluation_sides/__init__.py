"""The parts of benchmarks/evaluation_throughput.py, each with a `measure` that returns its figures; and their flags."""
