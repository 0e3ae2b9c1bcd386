"""GPU kernels of jaxscale, imported as `jaxscale.kernels`; they know jax and numpy, never the rest of jaxscale."""
