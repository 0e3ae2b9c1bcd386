"""Sequence parallelism: Ulysses, rings, and where the tokens of a sequence lie."""
