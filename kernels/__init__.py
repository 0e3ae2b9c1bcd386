"""GPU kernels of jaxscale, imported as `jaxscale.kernels`.

They know jax and numpy, never the rest of jaxscale.
"""
