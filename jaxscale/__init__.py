"""jaxscale: train, align, serve and check large transformers in JAX by editing a gin file."""

__version__ = "0.1.0"
