"""New keys and values put into the pages of a cache."""
