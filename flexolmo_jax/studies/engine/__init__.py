"""What all studies share: stages whose results are kept, commands, Markdown pages and figures."""
