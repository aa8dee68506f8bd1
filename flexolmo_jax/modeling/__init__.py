"""The network as pure functions of its weights: attention, router, experts."""
