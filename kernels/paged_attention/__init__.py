"""Attention of single queries over pages of a cache."""
