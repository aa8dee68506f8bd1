"""Fast paths of single operations, each beside its plain reference."""
