"""CUDA kernels and their tunable spaces (see README.md in this folder)."""
