"""Tensor operations, each with its choice of a backend; the sole importer of the kernels."""
