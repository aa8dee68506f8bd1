"""An owner's side of tracing over a network, and the coordinator's, who asks all owners."""
