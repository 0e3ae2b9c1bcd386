"""Tensor operations, one function each with its backend choice; the only package that imports the kernels."""
