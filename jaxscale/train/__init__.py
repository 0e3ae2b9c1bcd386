"""The train step, its state, losses, optimizers and loop."""
