"""What all studies share: stages that are kept, tables and figures."""
