"""Training with less: memory, time, or error signals that travel far."""
