"""The Triton kernels, for CUDA."""
