"""The mesh of devices, the placement of arrays on it, and the collectives."""
