"""Memory and time of a training step, estimated from its program compiled for a TPU."""
