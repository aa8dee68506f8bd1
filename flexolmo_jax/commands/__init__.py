"""The command `flexolmo`: one file per command."""
