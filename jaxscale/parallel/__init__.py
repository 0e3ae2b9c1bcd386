"""The device mesh: sharding rules, the manual region and the collectives that it injects."""
