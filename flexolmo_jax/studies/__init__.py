"""Experiments, and the pages of docs/ that they write."""
