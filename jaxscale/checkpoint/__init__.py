"""Checkpoints whose tree never depends on the mesh."""
