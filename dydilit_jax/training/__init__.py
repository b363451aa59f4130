"""State, step, loop, optimizer, sharding, checkpoints, telemetry."""
