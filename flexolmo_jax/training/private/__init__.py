"""Expert training with differential privacy."""
