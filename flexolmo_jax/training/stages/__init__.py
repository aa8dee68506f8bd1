"""The stages of training: anchor, expert, router; and joint training as a baseline."""
