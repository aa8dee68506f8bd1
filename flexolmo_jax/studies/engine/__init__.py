"""What all studies share: cached stages, tables and figures."""
