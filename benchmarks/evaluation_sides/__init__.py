"""The parts of benchmarks/evaluation_throughput.py; each has `measure(given)`, which returns its figures."""
