"""Products of a few tokens with weights in 4 or 8 bits: `api` has the interface."""
