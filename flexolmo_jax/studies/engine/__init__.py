"""What all studies share: stages whose results are stored, commands, Markdown pages and figures."""
