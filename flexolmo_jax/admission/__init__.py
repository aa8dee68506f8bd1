"""Admission: what an expert package from a stranger must pass before it is merged."""
