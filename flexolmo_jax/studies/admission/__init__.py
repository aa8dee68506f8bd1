"""Attackers and honest experts beside each other, examined by `flexolmo_jax.admission`."""
