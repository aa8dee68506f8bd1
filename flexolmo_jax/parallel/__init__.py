"""The mesh of devices, where arrays lie on it, and the collectives between its devices."""
