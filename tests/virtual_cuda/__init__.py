"""Training on a virtual CUDA device: torch's own dispatch, autograd and autocast, with kernels that run on the CPU.

What a GPU would refuse is refused, and what would make the host wait for it is counted. What only a GPU can show, its
kernels' bits and times, is in tests/gpu.
"""
