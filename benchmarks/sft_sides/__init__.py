"""The sides that benchmarks/sft_throughput.py compares; each runs in a process of its own."""
