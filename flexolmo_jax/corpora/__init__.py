"""Public corpora and tasks that are downloaded; training never imports them."""
