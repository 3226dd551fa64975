"""Kernels by processor family, each with its schedule space."""
