"""What is done on a GPU in our own kernels. Without triton, the same in torch's operators."""
