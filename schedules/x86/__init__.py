"""Kernels for x86 CPUs: direct convolution, pooling and layout, on blocks of channels."""
