"""The sides that benchmarks/classification_throughput.py compares; each runs in a process of its own."""
