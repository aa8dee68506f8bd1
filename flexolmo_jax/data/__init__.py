"""From text to batches: documents, tokens, windows; and units of privacy."""
