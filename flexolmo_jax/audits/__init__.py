"""Attacks on trained experts: extraction, membership inference, removal."""
