"""Attention whose mask gives each query an interval of keys, with tiles that nobody sees left out."""
