"""The sides that benchmarks/classification_accuracy.py compares."""
