"""Experiments: what they run, and the reports they write."""
