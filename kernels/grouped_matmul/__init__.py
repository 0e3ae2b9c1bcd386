"""Consecutive groups of rows, each times a matrix of its own."""
