"""Differential privacy: its mechanism, its accounts and its certificate; and audits of it."""
