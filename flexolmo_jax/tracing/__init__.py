"""Tracing: where a text's words stand in owners' documents, and what the owners let be said."""
