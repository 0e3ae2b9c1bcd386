"""Attention whose mask gives each query an interval of keys.

Tiles of keys that no query sees are skipped.
"""
