"""Whom to trust: keys, signatures of packages, the registry of keys. Nothing here runs a model."""
