"""The sides that benchmarks/world_size_drift.py compares, what they share, and how two runs are compared."""
