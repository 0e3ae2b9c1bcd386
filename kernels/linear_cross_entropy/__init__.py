"""Logits of a vocabulary reduced to what cross-entropy needs of them."""
