"""One machine with a GPU, measured within minutes, beside transformers."""
