"""What the services over HTTP share: keys, errors, limits on bodies, listening."""
