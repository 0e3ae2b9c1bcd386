"""Evaluators and the baselines they are read beside."""
