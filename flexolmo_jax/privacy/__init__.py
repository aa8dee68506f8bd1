"""Differential privacy: mechanism, accounting, ledger and certificate."""
