"""Public corpora and tasks to download; training never imports them."""
