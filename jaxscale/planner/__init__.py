"""A planner that finds the mesh: for the decoder of a run, and for any function of JAX."""
