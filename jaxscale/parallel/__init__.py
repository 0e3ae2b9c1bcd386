"""The device mesh: axes, sharding rules and the operations a mesh injects into a single-device model."""
